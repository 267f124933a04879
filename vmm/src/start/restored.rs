//! Machines that go on from a snapshot: [`prepare`] and [`Prepared::restore`], which [`restore`] does in one go.

use std::fs::File;
use std::os::fd::OwnedFd;

use carrel_protocol::chain;
use carrel_protocol::units::{MemoryMib, VcpuCount};
use carrel_protocol::vmm::{
    BalloonConfig, BlockConfig, Descriptor, EntropyConfig, RestoreConfig, RestoredBlock, SerialConfig,
    VsockConfig,
};
use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::{
    Parts, StartError, Surroundings, connect_devices, create_vcpus, create_vm, host, kvm, layout,
    register_memory, run, serial_interrupt, start_threads,
};
use crate::arch::current as arch;
use crate::arch::current::ioapic::IoApic;
use crate::crew::Crew;
use crate::devices::serial::{SerialPort, SerialState};
use crate::devices::{self, Devices};
use crate::event::Epoll;
use crate::machine::Machine;
use crate::memory::{self, PAGE, Written};
use crate::resources;
use crate::snapshot::{BlockShape, MachineState, Shape};
use crate::timeline::Timeline;
use crate::working_set::{WorkingSet, ahead};

/// All of a machine that needs no snapshot.
#[derive(Debug)]
pub struct Prepared {
    announced: Announced,
    surroundings: Surroundings,
    crew: Crew,
    signals: OwnedFd,
    /// Reserved; the memory file comes in its place.
    memory: GuestMemoryMmap,
    kvm: Kvm,
    vm: VmFd,
    /// With the CPUID that they have.
    vcpus: Vec<(VcpuFd, CpuId)>,
    epoll: Epoll,
}

/// What KVM has to know before there is a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Announced {
    vcpus: VcpuCount,
    memory_mib: MemoryMib,
}

impl std::fmt::Display for Announced {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let plural = if self.vcpus.get() == 1 { "" } else { "s" };
        write!(to, "{} vCPU{plural} and {} MiB of memory", self.vcpus.get(), self.memory_mib.get())
    }
}

/// A snapshot that was read and can be gone on from here, with what its machine gets.
struct Snapshot {
    saved: MachineState,
    kvm: Option<OwnedFd>,
    memory: OwnedFd,
    vsock: Option<OwnedFd>,
    working_set: Option<OwnedFd>,
    blocks: Vec<RestoredBlock<OwnedFd>>,
    serial: Option<SerialConfig<OwnedFd>>,
    control: Option<OwnedFd>,
    track_dirty: bool,
}

/// Makes a machine that goes on from a snapshot, and lets it run. Its guest finds time stopped where it stood and its vsock connections gone.
///
/// # Errors
///
/// The snapshot is damaged, or not one that this host and this VMM can go on with, or what was handed over does not fit it; or whatever can't be had.
pub fn restore(
    vm: RestoreConfig<Descriptor>,
    descriptors: Vec<OwnedFd>,
    surroundings: Surroundings,
    timeline: &mut Timeline,
) -> Result<Machine, StartError> {
    let mut snapshot = read(vm, descriptors, &surroundings)?;
    let device = snapshot.kvm.take().ok_or(StartError::Device)?;
    let Shape { vcpus, memory_mib, .. } = snapshot.saved.shape;
    timeline.mark("state");
    prepare(device, vcpus, memory_mib, surroundings, timeline)?.go_on(snapshot, timeline)
}

/// Makes what a machine of so many vCPUs and so much memory needs before it goes on from a snapshot.
///
/// # Errors
///
/// Whatever can't be had.
pub fn prepare(
    device: OwnedFd,
    vcpus: VcpuCount,
    memory_mib: MemoryMib,
    surroundings: Surroundings,
    timeline: &mut Timeline,
) -> Result<Prepared, StartError> {
    let announced = Announced { vcpus, memory_mib };
    let (crew, signals) = start_threads(vcpus, &surroundings)?;
    timeline.mark("threads");

    // Only the addresses: KVM is told of them before it has interrupt chips, when that costs least.
    let memory = memory::reserve(memory_mib)?;
    let (kvm_device, vm, _) = create_vm(device, &memory, false)?;
    timeline.mark("vm");

    let vcpus = create_vcpus(&kvm_device, &vm, vcpus.get())?;
    for (vcpu, offered) in &vcpus {
        // It is the snapshot's too, or the snapshot is refused.
        vcpu.set_cpuid2(offered).map_err(kvm("set a vCPU's CPUID"))?;
    }
    let epoll = Epoll::new().map_err(host("create an epoll"))?;
    timeline.mark("vcpus");
    Ok(Prepared { announced, surroundings, crew, signals, memory, kvm: kvm_device, vm, vcpus, epoll })
}

impl Prepared {
    /// Waits until what was begun here is done: threads put themselves under their filters meanwhile. What is to come is code that has not run yet: it
    /// is mapped now, so that no page of it is a fault then.
    ///
    /// # Errors
    ///
    /// A filter could not be installed.
    pub fn settle(&self) -> Result<(), StartError> {
        // What can't be mapped ahead is mapped when it is run.
        ahead::map_program();
        Ok(self.crew.filtered()?)
    }

    /// Readable when SIGTERM or SIGINT came.
    pub fn signals(&self) -> &OwnedFd {
        &self.signals
    }

    /// Goes on from a snapshot.
    ///
    /// # Errors
    ///
    /// As [`restore`]; and if this was prepared for a machine of another shape.
    pub fn restore(
        self,
        vm: RestoreConfig<Descriptor>,
        descriptors: Vec<OwnedFd>,
        timeline: &mut Timeline,
    ) -> Result<Machine, StartError> {
        let snapshot = read(vm, descriptors, &self.surroundings)?;
        if snapshot.kvm.is_some() {
            return Err(StartError::Device);
        }
        timeline.mark("state");
        self.go_on(snapshot, timeline)
    }

    fn go_on(self, snapshot: Snapshot, timeline: &mut Timeline) -> Result<Machine, StartError> {
        let Self { announced, surroundings, crew, signals, memory, kvm: kvm_device, vm, vcpus, epoll } = self;
        let saved = snapshot.saved;
        let shape = saved.shape;
        let has = Announced { vcpus: shape.vcpus, memory_mib: shape.memory_mib };
        if has != announced {
            return Err(StartError::PreparedForAnother {
                has: has.to_string(),
                prepared: announced.to_string(),
            });
        }
        if vcpus.len() != saved.vcpus.len() {
            return Err(StartError::DeviceState);
        }
        memory::fill(&memory, snapshot.memory)?;
        let written = match snapshot.track_dirty {
            true => {
                register_memory(&vm, &memory, true)?;
                Written::tracked(&memory)
            }
            false => Written::default(),
        };
        timeline.mark("memory");

        for ((vcpu, offered), saved) in vcpus.iter().zip(&saved.vcpus) {
            saved.check_cpu(offered.as_slice())?;
            saved.restore(vcpu)?;
        }
        timeline.mark("vcpus' state");

        let notice = match (snapshot.working_set, vcpus.first()) {
            (Some(file), Some((vcpu, _))) => have_ahead(file, &memory, &kvm_device, vcpu, timeline),
            (None, _) | (_, None) => None,
        };

        let blocks = fit_blocks(&shape, snapshot.blocks)?;
        let vsock = fit_vsock(&shape, snapshot.vsock)?;
        let entropy = shape.entropy.then_some(EntropyConfig {});
        let balloon =
            shape.balloon.map(|free_page_reporting| BalloonConfig { size_mib: 0, free_page_reporting });
        let mut devices = Devices::new(vsock, blocks, entropy, balloon, &memory, &written, &epoll)?;
        let pins = devices.interrupt_count();
        connect_devices(&vm, &devices)?;
        let serial = match &saved.serial {
            Some(saved) => Some(restore_serial(&vm, saved, snapshot.serial)?),
            None => None,
        };
        timeline.mark("devices");

        // Routes before devices: a device whose interrupt was pending raises it again.
        arch::state::restore_clock(&vm, &saved.clock)?;
        let io_apic = IoApic::restored(vm, &saved.io_apic, pins).ok_or(StartError::DeviceState)?;
        io_apic.route().map_err(kvm("route the devices' interrupts"))?;
        devices.restore(&saved.devices).map_err(|devices::mmio::Misfit| StartError::DeviceState)?;
        // Whatever drivers notified and nobody served.
        devices.kick();
        let vcpus: Vec<VcpuFd> = vcpus.into_iter().map(|(vcpu, _)| vcpu).collect();
        vcpus.iter().for_each(arch::state::announce_pause);
        timeline.mark("device state");

        drop(kvm_device);
        let parts = Parts {
            memory,
            written,
            io_apic,
            devices,
            serial,
            epoll,
            control: snapshot.control,
            signals,
            is_clone: true,
            notice,
        };
        run(parts, shape, vcpus, crew, surroundings, timeline)
    }
}

/// Reads a snapshot's state, and refuses one that nobody can go on from here.
fn read(
    vm: RestoreConfig<Descriptor>,
    descriptors: Vec<OwnedFd>,
    surroundings: &Surroundings,
) -> Result<Snapshot, StartError> {
    let RestoreConfig { kvm, state, memory, vsock, working_set, blocks, serial, control, track_dirty } =
        resources::restored_from_owner(vm, descriptors)?;
    let saved = MachineState::read(&File::from(state))?;
    check_origin(&saved, surroundings)?;
    Ok(Snapshot { saved, kvm, memory, vsock, working_set, blocks, serial, control, track_dirty })
}

/// Has a working set's pages before the guest asks for them. What can't be used is said.
fn have_ahead(
    file: OwnedFd,
    memory: &GuestMemoryMmap,
    device: &Kvm,
    vcpu: &VcpuFd,
    timeline: &mut Timeline,
) -> Option<String> {
    let pages = memory.iter().map(|region| region.len() / PAGE as u64).sum();
    match WorkingSet::read(&File::from(file), pages) {
        Ok(set) => {
            ahead::populate(&set, memory, device, vcpu, timeline);
            None
        }
        Err(error) => Some(chain(&error)),
    }
}

fn restore_serial(
    vm: &VmFd,
    saved: &SerialState,
    output: Option<SerialConfig<OwnedFd>>,
) -> Result<SerialPort, StartError> {
    let (output, limit) = output.map_or((None, 0), |serial| (Some(serial.output), serial.limit_bytes));
    SerialPort::restored(saved, serial_interrupt(vm)?, output, limit).ok_or(StartError::DeviceState)
}

fn check_origin(saved: &MachineState, surroundings: &Surroundings) -> Result<(), StartError> {
    if saved.layout != layout(&saved.shape) {
        return Err(StartError::Layout);
    }
    let here = &surroundings.host_kernel;
    if saved.host_kernel != *here {
        return Err(StartError::HostKernel { saved: saved.host_kernel.clone(), here: here.clone() });
    }
    Ok(())
}

/// The snapshot's disks with the files that were handed over for them.
fn fit_blocks(
    shape: &Shape,
    given: Vec<RestoredBlock<OwnedFd>>,
) -> Result<Vec<BlockConfig<OwnedFd>>, StartError> {
    if given.len() != shape.blocks.len() {
        let has = format!("{} disks", shape.blocks.len());
        return Err(StartError::Misfit { has, given: format!("{} disks", given.len()) });
    }
    let fit = |(given, saved): (RestoredBlock<OwnedFd>, &BlockShape)| {
        let RestoredBlock { id, base, overlay, limit } = given;
        if id != saved.id || overlay.is_none() != saved.read_only {
            let kind = |read_only| if read_only { "a read-only disk" } else { "a disk" };
            return Err(StartError::Misfit {
                has: format!("{} {:?}", kind(saved.read_only), saved.id),
                given: format!("{} {id:?}", kind(overlay.is_none())),
            });
        }
        Ok(BlockConfig { id, base, overlay, size_bytes: saved.size_bytes, cache: saved.cache, limit })
    };
    given.into_iter().zip(&shape.blocks).map(fit).collect()
}

fn fit_vsock(shape: &Shape, socket: Option<OwnedFd>) -> Result<Option<VsockConfig<OwnedFd>>, StartError> {
    match (shape.vsock, socket) {
        (Some((guest_cid, connections)), socket) => Ok(Some(VsockConfig { guest_cid, socket, connections })),
        (None, None) => Ok(None),
        (None, Some(_)) => {
            Err(StartError::Misfit { has: "no vsock device".into(), given: "a socket for one".into() })
        }
    }
}
