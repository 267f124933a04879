//! How a machine comes to be: [`boot`] makes one that begins with its kernel, [`restore`] one that goes on from a snapshot. Both read top to
//! bottom and share their steps.
//!
//! ```text
//!  boot     threads ─▶ memory ─▶ VM ─▶ vCPUs ─▶ devices ─▶ kernel, boot tables, registers ─────────────▶ filters ─▶ run
//!  restore  state ─▶ threads ─▶ memory file ─▶ VM ─▶ vCPUs' state ─▶ devices ─▶ devices' state, clock ─▶ filters ─▶ run
//! ```

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use carrel_protocol::vmm::{
    BalloonConfig, BlockConfig, Descriptor, End, EntropyConfig, RestoreConfig, RestoredBlock, SerialConfig,
    VmConfig, VsockConfig,
};
use kvm_bindings::{CpuId, KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::current as arch;
use crate::arch::current::ioapic::IoApic;
use crate::arch::current::state::StateError;
use crate::crew::Crew;
use crate::devices::serial::{SERIAL_GSI, SerialPort, SerialState};
use crate::devices::{self, Devices, DevicesError};
use crate::event::Epoll;
use crate::gate::Gate;
use crate::machine::Machine;
use crate::memory::{self, MemoryError, Written};
use crate::ports::Ports;
use crate::resources::{self, ResourceError};
use crate::seccomp::{self, SeccompError, Stage};
use crate::signal;
use crate::snapshot::{BlockShape, Layout, MachineState, Shape, SnapshotError};
use crate::timeline::Timeline;
use crate::vcpu::{self, ExitCounters, Saves, Shared, Verdict};

/// A machine can't be made.
#[derive(Debug, Error)]
pub enum StartError {
    /// The configuration's resources don't fit.
    #[error(transparent)]
    Resources(#[from] ResourceError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel or initramfs.
    #[error(transparent)]
    Load(#[from] arch::load::LoadError),
    /// The boot information.
    #[error(transparent)]
    Parameters(#[from] arch::boot::BootError),
    /// vCPU registers.
    #[error(transparent)]
    Registers(#[from] arch::registers::RegisterError),
    /// CPUID.
    #[error(transparent)]
    Cpuid(#[from] arch::cpuid::CpuidError),
    /// Devices.
    #[error(transparent)]
    Devices(#[from] DevicesError),
    /// Filters.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// KVM.
    #[error("KVM refused to {what}")]
    Kvm {
        /// What was asked.
        what: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The host has no such thing to give.
    #[error("the host refused to {what}")]
    Host {
        /// What was asked.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Boot tables.
    #[error("the boot tables do not fit into the guest's memory")]
    Tables(#[from] vm_memory::GuestMemoryError),
    /// The state file.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A vCPU's or the clock's state.
    #[error(transparent)]
    State(#[from] StateError),
    /// The snapshot's guest knows other addresses.
    #[error(
        "the snapshot was made by a carrel-vmm that lays machines out differently; make the snapshot anew"
    )]
    Layout,
    /// The snapshot was made under another kernel.
    #[error("the snapshot was made under Linux {saved} and this host runs {here}; make the snapshot anew")]
    HostKernel {
        /// The snapshot's.
        saved: String,
        /// This one.
        here: String,
    },
    /// What was handed over is not what the snapshot's machine needs.
    #[error("the snapshot's machine has {has}, for which the configuration has {given}")]
    Misfit {
        /// What it has.
        has: String,
        /// What was given.
        given: String,
    },
    /// Device state that no driver could have made.
    #[error("the snapshot holds a state that no device of this carrel-vmm can be in; make the snapshot anew")]
    DeviceState,
}

impl StartError {
    /// Under which end of the process this falls.
    pub fn end(&self) -> End {
        match self {
            Self::Resources(e) => e.end(),
            Self::Parameters(_) | Self::Load(_) | Self::Tables(_) | Self::Misfit { .. } => {
                End::BadConfiguration
            }
            Self::Devices(e) => e.end(),
            Self::Memory(e) => e.end(),
            Self::State(e) if !e.is_misfit() => End::Kvm,
            Self::Snapshot(_)
            | Self::State(_)
            | Self::Layout
            | Self::HostKernel { .. }
            | Self::DeviceState => End::BadSnapshot,
            Self::Kvm { .. } | Self::Cpuid(_) | Self::Registers(_) => End::Kvm,
            Self::Host { .. } | Self::Seccomp(_) => End::Host,
        }
    }
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StartError {
    move |source| StartError::Kvm { what, source }
}

fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> StartError {
    move |source| StartError::Host { what, source }
}

/// How to start, beside the machine itself.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// Each thread is under its run filter when the first guest instruction executes.
    pub filters: bool,
    /// `uname -r`.
    pub host_kernel: String,
}

/// Makes a machine and lets it run.
///
/// # Errors
///
/// Whatever of it can't be had.
pub fn boot(
    vm: VmConfig<Descriptor>,
    descriptors: Vec<OwnedFd>,
    surroundings: Surroundings,
    timeline: &mut Timeline,
) -> Result<Machine, StartError> {
    let config = resources::from_owner(vm, descriptors)?;
    let shape = shape_of(&config);
    timeline.mark("configuration");

    let (crew, signals) = start_threads(&shape, &surroundings)?;
    timeline.mark("threads");

    let memory = memory::allocate(config.memory_mib, config.huge_pages)?;
    let loaded = start_loading(&memory, config.kernel.image, config.initramfs)?;
    timeline.mark("memory");

    let (kvm_device, vm, written) = create_vm(config.kvm, &memory, config.track_dirty)?;
    let vcpus = create_vcpus(&kvm_device, &vm, shape.vcpus.get())?;
    for (vcpu, cpuid) in &vcpus {
        vcpu.set_cpuid2(cpuid).map_err(kvm("set a vCPU's CPUID"))?;
        if let Some(components) = arch::cpuid::extended_state(cpuid) {
            arch::registers::enable_extended_state(vcpu, components)?;
        }
    }
    timeline.mark("vm");

    let epoll = Epoll::new().map_err(host("create an epoll"))?;
    let devices =
        Devices::new(config.vsock, config.blocks, config.entropy, config.balloon, &memory, &written, &epoll)?;
    connect_devices(&vm, &devices)?;
    let serial = match config.serial {
        Some(serial) => Some(SerialPort::new(serial_interrupt(&vm)?, serial.output, serial.limit_bytes)),
        None => None,
    };
    timeline.mark("devices");

    let (kernel, initramfs) = loaded()?;
    timeline.mark("kernel");

    let command_line = devices.command_line(&config.kernel.command_line);
    arch::boot::write(&memory, &kernel, &command_line, initramfs)?;
    arch::mptable::write(&memory, shape.vcpus, devices.interrupt_count())?;
    arch::registers::write_tables(&memory, !kernel.pvh)?;
    arch::arm_restart_flag(&memory)?;
    for (index, (vcpu, _)) in (0u8..).zip(&vcpus) {
        arch::registers::set_up(vcpu, index, &kernel)?;
    }
    timeline.mark("registers");

    // What only the set-up needs is closed before the guest's first instruction.
    drop(kvm_device);
    let io_apic = IoApic::new(vm, devices.interrupt_count());
    let vcpus = vcpus.into_iter().map(|(vcpu, _)| vcpu).collect();
    let parts = Parts { memory, written, io_apic, devices, serial, epoll, control: config.control, signals };
    run(parts, shape, vcpus, crew, surroundings, timeline)
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
    let config = resources::restored_from_owner(vm, descriptors)?;
    let saved = MachineState::read(&mut File::from(config.state))?;
    check_origin(&saved, &surroundings)?;
    let shape = saved.shape;
    let blocks = fit_blocks(&shape, config.blocks)?;
    timeline.mark("state");

    let (crew, signals) = start_threads(&shape, &surroundings)?;
    timeline.mark("threads");

    let memory = memory::map(shape.memory_mib, config.memory)?;
    timeline.mark("memory");

    let (kvm_device, vm, written) = create_vm(config.kvm, &memory, config.track_dirty)?;
    let vcpus = create_vcpus(&kvm_device, &vm, shape.vcpus.get())?;
    if vcpus.len() != saved.vcpus.len() {
        return Err(StartError::DeviceState);
    }
    timeline.mark("vm");
    for ((vcpu, offered), saved) in vcpus.iter().zip(&saved.vcpus) {
        saved.check_cpu(offered.as_slice())?;
        saved.restore(vcpu)?;
    }
    timeline.mark("vcpus");

    let epoll = Epoll::new().map_err(host("create an epoll"))?;
    let vsock = fit_vsock(&shape, config.vsock)?;
    let entropy = shape.entropy.then_some(EntropyConfig {});
    let balloon = shape.balloon.map(|free_page_reporting| BalloonConfig { size_mib: 0, free_page_reporting });
    let mut devices = Devices::new(vsock, blocks, entropy, balloon, &memory, &written, &epoll)?;
    let pins = devices.interrupt_count();
    connect_devices(&vm, &devices)?;
    let serial = match &saved.serial {
        Some(saved) => Some(restore_serial(&vm, saved, config.serial)?),
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
    let parts = Parts { memory, written, io_apic, devices, serial, epoll, control: config.control, signals };
    run(parts, shape, vcpus, crew, surroundings, timeline)
}

/// What a machine has when its vCPUs may run.
struct Parts {
    memory: GuestMemoryMmap,
    written: Written,
    io_apic: IoApic,
    devices: Devices,
    serial: Option<SerialPort>,
    epoll: Epoll,
    control: Option<OwnedFd>,
    signals: OwnedFd,
}

/// The last step of both: filters, then the guest.
fn run(
    parts: Parts,
    shape: Shape,
    vcpus: Vec<VcpuFd>,
    crew: Crew,
    surroundings: Surroundings,
    timeline: &mut Timeline,
) -> Result<Machine, StartError> {
    let Parts { memory, written, io_apic, devices, serial, epoll, control, signals } = parts;
    let shared = Arc::new(Shared {
        gate: Gate::default(),
        bus: devices.bus(),
        io_apic,
        ports: Ports::new(serial),
        memory,
        verdict: Verdict::new().map_err(host("create an eventfd"))?,
        exits: ExitCounters::default(),
        saves: Saves::default(),
    });
    // No vCPU enters the guest before every thread is under its filter.
    crew.filtered()?;
    if surroundings.filters {
        seccomp::install(Stage::RunEvents)?;
    }
    timeline.mark("filters");
    let vcpus = crew.run(vcpus, &shared);
    let host_kernel = surroundings.host_kernel;
    Ok(Machine { shared, devices, vcpus, epoll, control, signals, shape, written, host_kernel })
}

/// Threads for the vCPUs, and the signals that the event loop watches: blocked before any thread starts, so that all of them leave these to it.
fn start_threads(shape: &Shape, surroundings: &Surroundings) -> Result<(Crew, OwnedFd), StartError> {
    let signals = signal::watch().map_err(host("watch for signals"))?;
    vcpu::install_kick().map_err(host("install a signal handler"))?;
    let crew = Crew::start(shape.vcpus.get(), surroundings.filters).map_err(host("start a thread"))?;
    Ok((crew, signals))
}

fn create_vm(
    device: OwnedFd,
    memory: &GuestMemoryMmap,
    track_dirty: bool,
) -> Result<(Kvm, VmFd, Written), StartError> {
    // SAFETY: the descriptor is owned and was opened as /dev/kvm; its owner is given up here.
    let device = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
    if device.get_api_version() != 12 {
        return Err(StartError::Kvm {
            what: "speak version 12",
            source: kvm_ioctls::Error::new(libc::ENOTTY),
        });
    }
    let vm = loop {
        // KVM_CREATE_VM gives up when a signal is pending (it allocates under a killable lock).
        match device.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            other => break other.map_err(kvm("create a VM"))?,
        }
    };
    register_memory(&vm, memory, track_dirty)?;
    arch::create_interrupt_chips(&vm).map_err(kvm("create interrupt chips"))?;
    let written = if track_dirty { Written::tracked(memory) } else { Written::default() };
    Ok((device, vm, written))
}

fn register_memory(vm: &VmFd, memory: &GuestMemoryMmap, track_dirty: bool) -> Result<(), StartError> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: if track_dirty { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
        };
        // SAFETY: the range is this region's mapping, which lives as long as `memory`, kept by the machine.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm("take the guest's memory"))?;
    }
    Ok(())
}

/// vCPUs as KVM makes them, each with the CPUID that a booting one is to have here.
fn create_vcpus(device: &Kvm, vm: &VmFd, count: u8) -> Result<Vec<(VcpuFd, CpuId)>, StartError> {
    let supported = arch::cpuid::supported(device)?;
    let mut vcpus = Vec::with_capacity(usize::from(count));
    for index in 0..count {
        let vcpu = vm.create_vcpu(index.into()).map_err(kvm("create a vCPU"))?;
        let cpuid = arch::cpuid::for_vcpu(&supported, device, index, count)?;
        vcpus.push((vcpu, cpuid));
    }
    Ok(vcpus)
}

fn connect_devices(vm: &VmFd, devices: &Devices) -> Result<(), StartError> {
    for (address, queue, event) in devices.notifications() {
        vm.register_ioevent(event, &IoEventAddress::Mmio(address), queue)
            .map_err(kvm("register a device's notification"))?;
    }
    for (gsi, event) in devices.interrupts() {
        vm.register_irqfd(event, gsi).map_err(kvm("register a device's interrupt"))?;
    }
    Ok(())
}

fn serial_interrupt(vm: &VmFd) -> Result<EventFd, StartError> {
    let interrupt = EventFd::new(libc::EFD_NONBLOCK).map_err(host("create an eventfd"))?;
    vm.register_irqfd(&interrupt, SERIAL_GSI).map_err(kvm("register the serial interrupt"))?;
    Ok(interrupt)
}

fn restore_serial(
    vm: &VmFd,
    saved: &SerialState,
    output: Option<SerialConfig<OwnedFd>>,
) -> Result<SerialPort, StartError> {
    let (output, limit) = output.map_or((None, 0), |serial| (Some(serial.output), serial.limit_bytes));
    SerialPort::restored(saved, serial_interrupt(vm)?, output, limit).ok_or(StartError::DeviceState)
}

/// A kernel and, if there is one, the address and size of the initramfs.
type Loaded = Result<(arch::load::LoadedKernel, Option<(GuestAddress, u64)>), StartError>;

/// A kernel below this size, bytes, is copied sooner than a thread is made.
const WORTH_A_THREAD: u64 = 1 << 20;

/// Begins to copy the kernel, while KVM makes the rest: neither needs the other. What is returned waits for it.
fn start_loading(
    memory: &GuestMemoryMmap,
    kernel: OwnedFd,
    initramfs: Option<OwnedFd>,
) -> Result<Box<dyn FnOnce() -> Loaded>, StartError> {
    let mut image = File::from(kernel);
    // By lseek, which the set-up's filter allows. A device has no size that it would tell here, and is loaded at once.
    let size = image.seek(SeekFrom::End(0)).map_err(host("measure the kernel's image"))?;
    image.rewind().map_err(host("measure the kernel's image"))?;
    let memory = memory.clone();
    let load = move || {
        let kernel = arch::load::kernel(&memory, &mut image)?;
        let initramfs = match initramfs {
            Some(image) => Some(arch::load::initramfs(&memory, kernel.end, &mut File::from(image))?),
            None => None,
        };
        Ok((kernel, initramfs))
    };
    if size < WORTH_A_THREAD {
        return Ok(Box::new(load));
    }
    let thread = std::thread::Builder::new().name("loader".into()).stack_size(128 << 10);
    let thread = thread.spawn(load).map_err(host("start a thread"))?;
    Ok(Box::new(move || thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))))
}

fn shape_of(config: &VmConfig<OwnedFd>) -> Shape {
    let block = |block: &BlockConfig<OwnedFd>| BlockShape {
        id: block.id.clone(),
        size_bytes: block.size_bytes,
        read_only: block.overlay.is_none(),
    };
    Shape {
        vcpus: config.vcpus,
        memory_mib: config.memory_mib,
        vsock: config.vsock.as_ref().map(|vsock| (vsock.guest_cid, vsock.connections)),
        blocks: config.blocks.iter().map(block).collect(),
        entropy: config.entropy.is_some(),
        balloon: config.balloon.map(|balloon| balloon.free_page_reporting),
        serial: config.serial.is_some(),
    }
}

/// Where everything lies in machines of this size, by this build.
pub(crate) fn layout(shape: &Shape) -> Layout {
    let bytes = |size: usize| u64::try_from(size).unwrap_or(u64::MAX);
    Layout {
        memory: memory::ranges(shape.memory_mib)
            .into_iter()
            .map(|(start, size)| (start.0, bytes(size)))
            .collect(),
        devices: devices::BASE,
        window: devices::WINDOW,
        first_interrupt: devices::FIRST_GSI,
    }
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
        Ok(BlockConfig { id, base, overlay, size_bytes: saved.size_bytes, limit })
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
