//! How a machine comes to be: [`boot`] makes one that begins with its kernel, [`restore`] one that goes on from a snapshot, in two parts: [`prepare`] is what
//! needs no snapshot and may be done long before there is one. All read top to bottom and share their steps.
//!
//! ```text
//!  boot     threads ─▶ memory ─▶ VM ─▶ vCPUs ─▶ devices ─▶ kernel, boot tables, registers ──────────▶ filters ─▶ run
//!  prepare  threads ─▶ addresses ─▶ VM ─▶ vCPUs, their CPUID ──┐
//!  restore  state ─────────────────────────────────────────────┴▶ memory file ─▶ vCPUs' state ─▶ devices, their state, clock ─▶ filters ─▶ run
//! ```

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use carrel_protocol::units::VcpuCount;
use carrel_protocol::vmm::{BlockConfig, Descriptor, VmConfig};
use kvm_bindings::{CpuId, KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::current as arch;
use crate::arch::current::ioapic::IoApic;
use crate::crew::Crew;
use crate::devices::serial::{SERIAL_GSI, SerialPort};
use crate::devices::{self, Devices};
use crate::event::Epoll;
use crate::gate::Gate;
use crate::machine::Machine;
use crate::memory::{self, Written};
use crate::ports::Ports;
use crate::resources;
use crate::seccomp::{self, Stage};
use crate::signal;
use crate::snapshot::{BlockShape, Layout, Shape};
use crate::timeline::Timeline;
use crate::vcpu::{self, ExitCounters, Saves, Shared, Verdict};
use crate::working_set::touched::Pagemap;

mod failure;
mod restored;

pub use failure::StartError;
pub use restored::{Prepared, prepare, restore};

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StartError {
    move |source| StartError::Kvm { what, source }
}

fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> StartError {
    move |source| StartError::Host { what, source }
}

/// How to start, beside the machine itself.
#[derive(Debug)]
pub struct Surroundings {
    /// Each thread is under its run filter when the first guest instruction executes.
    pub filters: bool,
    /// `uname -r`.
    pub host_kernel: String,
    /// This process's own, where the host has such.
    pub pagemap: Option<Pagemap>,
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

    let (crew, signals) = start_threads(shape.vcpus, &surroundings)?;
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
    let parts = Parts {
        memory,
        written,
        io_apic,
        devices,
        serial,
        epoll,
        control: config.control,
        signals,
        is_clone: false,
        notice: None,
    };
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
    is_clone: bool,
    /// What could not be used.
    notice: Option<String>,
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
    let Parts { memory, written, io_apic, devices, serial, epoll, control, signals, is_clone, notice } =
        parts;
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
    let Surroundings { host_kernel, pagemap, .. } = surroundings;
    // What a booted machine touches is no clone's working set.
    let pagemap = pagemap.filter(|_| is_clone);
    Ok(Machine {
        shared,
        devices,
        vcpus,
        epoll,
        control,
        signals,
        shape,
        written,
        forgotten: false,
        host_kernel,
        pagemap,
        notice,
    })
}

/// Threads for the vCPUs, and the signals that the event loop watches: blocked before any thread starts, so that all of them leave these to it.
fn start_threads(vcpus: VcpuCount, surroundings: &Surroundings) -> Result<(Crew, OwnedFd), StartError> {
    let signals = signal::watch().map_err(host("watch for signals"))?;
    vcpu::install_kick().map_err(host("install a signal handler"))?;
    let crew = Crew::start(vcpus.get(), surroundings.filters).map_err(host("start a thread"))?;
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
        cache: block.cache,
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
