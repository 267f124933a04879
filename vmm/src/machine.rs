//! A machine: made by [`boot`], which reads top to bottom, and served by [`Machine::serve`] until it ends.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use carrel_protocol::FrameError;
use carrel_protocol::vmm::{
    Booted, Descriptor, Done, End, Ended, FromOwner, FromVmm, Metrics, Refused, VmConfig,
};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::current as arch;
use crate::crew::Crew;
use crate::devices::serial::{SERIAL_GSI, SerialPort};
use crate::devices::{Devices, DevicesError, Notice};
use crate::event::{Epoll, Event, Interest, borrow};
use crate::gate::Gate;
use crate::memory::{self, MemoryError};
use crate::owner::{Connection, OwnerError, Packet};
use crate::ports::Ports;
use crate::resources::ResourceError;
use crate::seccomp::{self, SeccompError, Stage};
use crate::signal;
use crate::timeline::Timeline;
use crate::vcpu::{self, ExitCounters, Shared, Verdict};

/// A machine can't be made.
#[derive(Debug, Error)]
pub enum BootError {
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
}

impl BootError {
    /// Under which end of the process this falls.
    pub fn end(&self) -> End {
        match self {
            Self::Resources(e) => e.end(),
            Self::Parameters(_) | Self::Load(_) | Self::Tables(_) => End::BadConfiguration,
            Self::Devices(e) => e.end(),
            Self::Kvm { .. } | Self::Cpuid(_) | Self::Registers(_) => End::Kvm,
            Self::Memory(_) | Self::Host { .. } | Self::Seccomp(_) => End::Host,
        }
    }
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> BootError {
    move |source| BootError::Kvm { what, source }
}

fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> BootError {
    move |source| BootError::Host { what, source }
}

/// A machine whose vCPUs run.
#[derive(Debug)]
pub struct Machine {
    shared: Arc<Shared>,
    devices: Devices,
    vcpus: Vec<JoinHandle<()>>,
    epoll: Epoll,
    control: Option<OwnedFd>,
    signals: OwnedFd,
}

/// Makes a machine and lets it run. With `filters`, each thread is under its run filter when the first guest instruction
/// executes.
pub fn boot(
    vm: VmConfig<Descriptor>,
    descriptors: Vec<OwnedFd>,
    filters: bool,
    timeline: &mut Timeline,
) -> Result<Machine, BootError> {
    let config = crate::resources::from_owner(vm, descriptors)?;
    timeline.mark("configuration");

    // Before any thread: all of them are to leave these signals to the event loop.
    let signals = signal::watch().map_err(host("watch for signals"))?;
    vcpu::install_kick().map_err(host("install a signal handler"))?;
    let crew = Crew::start(config.vcpus.get(), filters).map_err(host("start a thread"))?;
    timeline.mark("threads");

    let memory = memory::allocate(config.memory_mib, config.huge_pages)?;
    let loaded = start_loading(&memory, config.kernel.image, config.initramfs)?;
    timeline.mark("memory");

    // SAFETY: the descriptor is owned and was opened as /dev/kvm; its owner is given up here.
    let kvm_device = unsafe { Kvm::from_raw_fd(config.kvm.into_raw_fd()) };
    if kvm_device.get_api_version() != 12 {
        return Err(BootError::Kvm {
            what: "speak version 12",
            source: kvm_ioctls::Error::new(libc::ENOTTY),
        });
    }
    let vm = create_vm(&kvm_device)?;
    register_memory(&vm, &memory)?;
    arch::create_interrupt_chips(&vm).map_err(kvm("create interrupt chips"))?;
    let vcpus = create_vcpus(&kvm_device, &vm, config.vcpus.get())?;
    timeline.mark("vm");

    let epoll = Epoll::new().map_err(host("create an epoll"))?;
    let devices = Devices::new(config.vsock, config.blocks, config.entropy, config.balloon, &memory, &epoll)?;
    let bus = devices.bus();
    connect_devices(&vm, &devices)?;
    let serial = match config.serial {
        Some(serial) => {
            let interrupt = EventFd::new(libc::EFD_NONBLOCK).map_err(host("create an eventfd"))?;
            vm.register_irqfd(&interrupt, SERIAL_GSI).map_err(kvm("register the serial interrupt"))?;
            Some(SerialPort::new(interrupt, serial.output, serial.limit_bytes))
        }
        None => None,
    };
    timeline.mark("devices");

    let (kernel, initramfs) = loaded()?;
    timeline.mark("kernel");

    let command_line = devices.command_line(&config.kernel.command_line);
    arch::boot::write(&memory, &kernel, &command_line, initramfs)?;
    arch::mptable::write(&memory, config.vcpus, devices.interrupt_count())?;
    arch::registers::write_tables(&memory, !kernel.pvh)?;
    arch::arm_restart_flag(&memory)?;
    for (index, vcpu) in (0u8..).zip(&vcpus) {
        arch::registers::set_up(vcpu, index, &kernel)?;
    }
    timeline.mark("registers");

    let shared = Arc::new(Shared {
        gate: Gate::default(),
        bus,
        io_apic: arch::ioapic::IoApic::new(vm, devices.interrupt_count()),
        ports: Ports::new(serial),
        memory,
        verdict: Verdict::new().map_err(host("create an eventfd"))?,
        exits: ExitCounters::default(),
    });
    // No vCPU enters the guest before every thread is under its filter.
    crew.filtered()?;
    if filters {
        seccomp::install(Stage::RunEvents)?;
    }
    timeline.mark("filters");
    // What only the set-up needs is closed before the guest's first instruction.
    drop(kvm_device);
    let vcpus = crew.run(vcpus, &shared);
    Ok(Machine { shared, devices, vcpus, epoll, control: config.control, signals })
}

fn create_vm(device: &Kvm) -> Result<VmFd, BootError> {
    // KVM_CREATE_VM gives up when a signal is pending (it allocates under a killable lock).
    loop {
        match device.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            other => return other.map_err(kvm("create a VM")),
        }
    }
}

fn register_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), BootError> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the range is this region's mapping, which lives as long as `memory`, kept by the machine.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm("take the guest's memory"))?;
    }
    Ok(())
}

fn connect_devices(vm: &VmFd, devices: &Devices) -> Result<(), BootError> {
    for (address, queue, event) in devices.notifications() {
        vm.register_ioevent(event, &IoEventAddress::Mmio(address), queue)
            .map_err(kvm("register a device's notification"))?;
    }
    for (gsi, event) in devices.interrupts() {
        vm.register_irqfd(event, gsi).map_err(kvm("register a device's interrupt"))?;
    }
    Ok(())
}

/// A kernel and, if there is one, the address and size of the initramfs.
type Loaded = Result<(arch::load::LoadedKernel, Option<(GuestAddress, u64)>), BootError>;

/// A kernel below this size, bytes, is copied sooner than a thread is made.
const WORTH_A_THREAD: u64 = 1 << 20;

/// Begins to copy the kernel, while KVM makes the rest: neither needs the other. What is returned waits for it.
fn start_loading(
    memory: &GuestMemoryMmap,
    kernel: OwnedFd,
    initramfs: Option<OwnedFd>,
) -> Result<Box<dyn FnOnce() -> Loaded>, BootError> {
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

fn create_vcpus(device: &Kvm, vm: &VmFd, count: u8) -> Result<Vec<VcpuFd>, BootError> {
    let supported = arch::cpuid::supported(device)?;
    let mut vcpus = Vec::with_capacity(usize::from(count));
    for index in 0..count {
        let vcpu = vm.create_vcpu(index.into()).map_err(kvm("create a vCPU"))?;
        let cpuid = arch::cpuid::for_vcpu(&supported, device, index, count)?;
        vcpu.set_cpuid2(&cpuid).map_err(kvm("set a vCPU's CPUID"))?;
        if let Some(components) = arch::cpuid::extended_state(&cpuid) {
            arch::registers::enable_extended_state(&vcpu, components)?;
        }
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

/// Tokens of what is not a device; devices' are below.
const OWNER: u64 = u64::MAX;
const CONTROL: u64 = u64::MAX - 1;
const VERDICT: u64 = u64::MAX - 2;
const SIGNALS: u64 = u64::MAX - 3;

impl Machine {
    /// Serves devices and owner until the machine ends. `owner` is told that it booted, and at the end how it ended.
    pub fn serve(mut self, owner: Connection, timeline: Timeline) -> (End, Option<String>) {
        let mut owner = Some(owner);
        if let Err(e) = self.watch(owner.as_ref()) {
            return (End::Host, Some(format!("the event loop can't be set up: {e}")));
        }
        tell(&mut owner, &Booted { timeline: timeline.into_marks() }.into());
        let mut events: Vec<Event> = Vec::new();
        let (end, detail) = loop {
            if let Some(verdict) = self.shared.verdict.get() {
                break verdict;
            }
            if let Err(e) = self.epoll.wait(self.devices.timeout_ms(), &mut events) {
                break (End::Internal, Some(format!("epoll_wait failed: {e}")));
            }
            if let Some(end) = self.handle(&events, &mut owner) {
                break end;
            }
        };
        tell(&mut owner, &Ended { end, detail: detail.clone() }.into());
        (end, detail)
    }

    fn watch(&self, owner: Option<&Connection>) -> std::io::Result<()> {
        if let Some(owner) = owner {
            self.epoll.add(owner, OWNER, Interest::READ)?;
        }
        if let Some(control) = &self.control {
            self.epoll.add(control, CONTROL, Interest::READ)?;
        }
        self.epoll.add(&self.signals, SIGNALS, Interest::READ)?;
        self.epoll.add(borrow(&self.shared.verdict.reached), VERDICT, Interest::READ)
    }

    fn handle(&mut self, events: &[Event], owner: &mut Option<Connection>) -> Option<(End, Option<String>)> {
        for event in events {
            match event.token {
                VERDICT => return self.shared.verdict.get(),
                SIGNALS => return Some((End::Stopped, Some("a signal asked".into()))),
                OWNER => {
                    if let Some(end) = self.hear(owner) {
                        return Some(end);
                    }
                }
                CONTROL => self.accept_owner(owner),
                _ => self.devices.handle(event, &self.epoll),
            }
        }
        self.devices.tick(&self.epoll);
        for notice in self.devices.take_notices() {
            match notice {
                // Without an owner the descriptor is dropped here: the guest is refused.
                Notice::Dialled(dialled, end) => tell_with(owner, &dialled.into(), &end),
                Notice::Stopped(stopped) => tell(owner, &stopped.into()),
            }
        }
        None
    }

    /// Carries out what the owner asks, until it has no more to say.
    fn hear(&mut self, owner: &mut Option<Connection>) -> Option<(End, Option<String>)> {
        loop {
            let received = owner.as_ref()?.receive::<FromOwner>();
            let answer: FromVmm = match received {
                Ok(None) => return None,
                Ok(Some(Packet { message, .. })) => match message {
                    FromOwner::Stop(_) => return Some((End::Stopped, Some("the owner asked".into()))),
                    FromOwner::Configure(_) => {
                        Refused { reason: "the machine is configured already".into() }.into()
                    }
                    FromOwner::Pause(_) => {
                        self.shared.gate.pause(|| self.vcpus.iter().for_each(vcpu::kick));
                        // Devices carry out requests where they take them from their queues, on this thread: none is under way.
                        Done {}.into()
                    }
                    FromOwner::Resume(_) => {
                        self.devices.kick();
                        self.shared.gate.resume();
                        Done {}.into()
                    }
                    FromOwner::SetBalloon(set) => match self.devices.set_balloon(set.size_mib) {
                        Ok(()) => Done {}.into(),
                        Err(reason) => Refused { reason }.into(),
                    },
                    FromOwner::ReadMetrics(_) => self.metrics().into(),
                },
                Err(OwnerError::Frame(FrameError::Body { name, source })) => {
                    Refused { reason: format!("the {name} message is malformed: {source}") }.into()
                }
                Err(e) => return self.lose_owner(owner, &e),
            };
            tell(owner, &answer);
        }
    }

    /// With a control socket the machine goes on and waits for the next owner; without one nobody could ever reach it.
    fn lose_owner(&self, owner: &mut Option<Connection>, why: &OwnerError) -> Option<(End, Option<String>)> {
        if let Some(owner) = owner.take() {
            let _ = self.epoll.remove(&owner);
        }
        match self.control {
            Some(_) => None,
            None => Some((End::Stopped, Some(why.to_string()))),
        }
    }

    fn accept_owner(&self, owner: &mut Option<Connection>) {
        let Some(control) = &self.control else { return };
        if let Ok(socket) = crate::devices::accept(control.as_fd()) {
            if let Some(old) = owner.take() {
                let _ = self.epoll.remove(&old);
            }
            let new = Connection::new(socket);
            if self.epoll.add(&new, OWNER, Interest::READ).is_ok() {
                *owner = Some(new);
            }
        }
    }

    fn metrics(&self) -> Metrics {
        let exits = &self.shared.exits;
        Metrics {
            exits: exits.all.load(Ordering::Relaxed),
            mmio_exits: exits.mmio.load(Ordering::Relaxed),
            port_exits: exits.ports.load(Ordering::Relaxed),
            ..self.devices.metrics()
        }
    }
}

/// Tells the owner, if there is one. An owner that doesn't read misses it: the guest's room must not depend on it.
fn tell(owner: &mut Option<Connection>, message: &FromVmm) {
    if let Some(owner) = owner {
        let _ = owner.send(message, &[]);
    }
}

fn tell_with(owner: &mut Option<Connection>, message: &FromVmm, descriptor: &OwnedFd) {
    if let Some(owner) = owner {
        let _ = owner.send(message, &[descriptor.as_fd()]);
    }
}
