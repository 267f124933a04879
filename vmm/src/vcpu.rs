//! A vCPU: the loop around KVM_RUN, on a thread of its own.
//!
//! ```text
//!  gate.pass() ──▶ KVM_RUN ──▶ MMIO ──▶ device registers ──┐
//!      ▲    │            ├───▶ port I/O ──▶ Ports ──▶ End? │
//!      │    │            ├───▶ EINTR (kicked)              │
//!      │    │            └───▶ shutdown, errors ──▶ End    │
//!      │    └─▶ (paused) complete the last exit ──▶ save   │
//!      └───────────────────────────────────────────────────┘
//! ```
//!
//! A kick is a signal whose handler sets `kvm_run.immediate_exit`: a signal that comes just before KVM_RUN makes it
//! return at once (KVM API, *5. The kvm_run structure*).

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use carrel_protocol::vmm::End;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::current::ioapic::{self, IoApic};
use crate::arch::current::state::{self, StateError, VcpuState, Wanted};
use crate::arch::current::{ShutdownCause, shutdown_cause};
use crate::devices::Bus;
use crate::gate::{Gate, Pass};
use crate::last_words::last_words;
use crate::ports::Ports;

/// Counters of all vCPUs together.
#[derive(Debug, Default)]
pub struct ExitCounters {
    /// Returns from KVM_RUN.
    pub all: AtomicU64,
    /// For MMIO.
    pub mmio: AtomicU64,
    /// For port I/O.
    pub ports: AtomicU64,
}

/// How the machine ended: told once, by whoever comes first.
#[derive(Debug)]
pub struct Verdict {
    end: Mutex<Option<(End, Option<String>)>>,
    /// Becomes readable when there is a verdict.
    pub reached: EventFd,
}

impl Verdict {
    /// None yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self { end: Mutex::new(None), reached: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)? })
    }

    /// Says how the machine ended. Only the first word counts.
    pub fn reach(&self, end: End, detail: Option<String>) {
        if let Ok(mut verdict) = self.end.lock() {
            verdict.get_or_insert((end, detail));
        }
        // Full means that it is readable already.
        let _ = self.reached.write(1);
    }

    /// The verdict, if there is one.
    pub fn get(&self) -> Option<(End, Option<String>)> {
        self.end.lock().ok()?.clone()
    }
}

/// What every vCPU shares.
#[derive(Debug)]
pub struct Shared {
    /// Leave to run.
    pub gate: Gate,
    /// virtio-mmio devices.
    pub bus: Bus,
    /// Interrupts' ways.
    pub io_apic: IoApic,
    /// Port I/O.
    pub ports: Ports,
    /// Guest memory, for the restart flag.
    pub memory: GuestMemoryMmap,
    /// How it ended.
    pub verdict: Verdict,
    /// Counters.
    pub exits: ExitCounters,
    /// What paused vCPUs have saved.
    pub saves: Saves,
}

/// Where vCPUs leave their state when they are sent to save it.
#[derive(Debug, Default)]
pub struct Saves(Mutex<SavesInner>);

#[derive(Debug, Default)]
struct SavesInner {
    wanted: Arc<Wanted>,
    saved: Vec<(usize, Result<VcpuState, StateError>)>,
}

impl Saves {
    /// Every paused vCPU saves itself; returned in the vCPUs' order. `None` unless the gate is closed.
    ///
    /// # Errors
    ///
    /// The first vCPU's that could not be saved.
    pub fn collect(
        &self,
        gate: &Gate,
        vcpus: usize,
        wanted: Wanted,
    ) -> Option<Result<Vec<VcpuState>, StateError>> {
        *self.lock() = SavesInner { wanted: wanted.into(), saved: Vec::with_capacity(vcpus) };
        if !gate.send(vcpus) {
            return None;
        }
        let mut saved = std::mem::take(&mut self.lock().saved);
        saved.sort_by_key(|(index, _)| *index);
        Some(saved.into_iter().map(|(_, state)| state).collect())
    }

    fn save(&self, index: usize, vcpu: &mut VcpuFd, shared: &Shared) {
        let wanted = self.lock().wanted.clone();
        let state = settle(vcpu, shared).and_then(|()| VcpuState::save(vcpu, index, &wanted));
        self.lock().saved.push((index, state));
    }

    fn lock(&self) -> MutexGuard<'_, SavesInner> {
        // No code panics while it holds this; a poisoned lock's content is still right.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that kicks.
pub fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: i32) {
    IMMEDIATE_EXIT.with(|exit| {
        let exit = exit.get();
        if !exit.is_null() {
            // SAFETY: the pointer is into this thread's own kvm_run mapping, set while its vCPU lives and cleared before.
            unsafe { ptr::write_volatile(exit, 1) };
        }
    });
}

/// Installs the kick's handler; once, before any vCPU runs.
pub fn install_kick() -> io::Result<()> {
    // SAFETY: a sigaction is plain data; zeros mean no flags and an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_kick as *const () as usize;
    // SAFETY: the handler does nothing but a store through a thread-local.
    crate::event::check(unsafe { libc::sigaction(kick_signal(), &raw const action, ptr::null_mut()) })
        .map(drop)
}

/// Brings a vCPU out of the guest.
pub fn kick(thread: &JoinHandle<()>) {
    // SAFETY: the handle is not joined, so the thread id is valid.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
}

/// Runs vCPU `index` until the gate closes for good.
pub fn run(index: usize, mut vcpu: VcpuFd, shared: &Arc<Shared>) {
    IMMEDIATE_EXIT.with(|exit| exit.set(&raw mut vcpu.get_kvm_run().immediate_exit));
    let mut errands = 0;
    let mut saved = false;
    while let Some(pass) = shared.gate.pass(&mut errands) {
        match pass {
            Pass::Enter(permit) => {
                // Not at a pause so short that it was over before this thread came here: nothing stood still.
                if std::mem::take(&mut saved) || permit.waited() {
                    state::announce_pause(&vcpu);
                }
                if let Step::Over(end, detail) = step(&mut vcpu, shared) {
                    // Before the permit is given back: whoever pauses the machine then knows that this vCPU is over.
                    shared.verdict.reach(end, detail);
                    drop(permit);
                    break;
                }
            }
            Pass::Run(errand) => {
                shared.saves.save(index, &mut vcpu, shared);
                saved = true;
                drop(errand);
            }
        }
    }
    IMMEDIATE_EXIT.with(|exit| exit.set(ptr::null_mut()));
}

/// Exits that one instruction can take to be completed: an access that crosses pages comes in parts.
const MOST_PARTS: usize = 16;

/// Completes the exit that the vCPU came out with last, without another instruction of the guest: until then KVM's registers are not those of
/// any moment (KVM API, *5. The kvm_run structure*).
fn settle(vcpu: &mut VcpuFd, shared: &Shared) -> Result<(), StateError> {
    for _ in 0..MOST_PARTS {
        vcpu.set_kvm_immediate_exit(1);
        match step(vcpu, shared) {
            Step::Kicked => return Ok(()),
            Step::Again => {}
            Step::Over(end, detail) => {
                shared.verdict.reach(end, detail);
                break;
            }
        }
    }
    Err(StateError::Unsettled)
}

/// What an entry into the guest came to.
enum Step {
    /// Enter it again.
    Again,
    /// It was called out, and no exit is under way.
    Kicked,
    /// This was the last.
    Over(End, Option<String>),
}

/// One entry into the guest and what it came back for.
fn step(vcpu: &mut VcpuFd, shared: &Shared) -> Step {
    let kvm = |detail: String| Step::Over(End::Kvm, Some(detail));
    let exit = vcpu.run();
    shared.exits.all.fetch_add(1, Ordering::Relaxed);
    match exit {
        Ok(VcpuExit::MmioRead(address, data)) => {
            shared.exits.mmio.fetch_add(1, Ordering::Relaxed);
            match ioapic::register(address) {
                Some(register) => shared.io_apic.read(register, data),
                None => shared.bus.read(address, data),
            }
            Step::Again
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            shared.exits.mmio.fetch_add(1, Ordering::Relaxed);
            match ioapic::register(address) {
                Some(register) => match shared.io_apic.write(register, data) {
                    Ok(()) => Step::Again,
                    Err(e) => kvm(format!("KVM did not take the routes of the guest's interrupts: {e}")),
                },
                None => {
                    shared.bus.write(address, data);
                    Step::Again
                }
            }
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            shared.exits.ports.fetch_add(1, Ordering::Relaxed);
            shared.ports.read(port, data);
            Step::Again
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            shared.exits.ports.fetch_add(1, Ordering::Relaxed);
            shared.ports.write(port, data).map_or(Step::Again, |end| Step::Over(end, None))
        }
        Ok(VcpuExit::Shutdown) => match shutdown_cause(&shared.memory) {
            ShutdownCause::Restart => Step::Over(End::Reset, None),
            ShutdownCause::Panic => Step::Over(End::Panic, last_words(&shared.memory)),
            ShutdownCause::Accident => Step::Over(End::TripleFault, None),
        },
        Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => Step::Again,
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            kvm(format!("the processor refused to enter the guest on CPU {cpu}, reason {reason:#x}"))
        }
        Ok(VcpuExit::InternalError) => kvm("KVM could not emulate an instruction of the guest".into()),
        Ok(other) => kvm(format!("KVM came back for a reason that is not handled: {other:?}")),
        Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {
            vcpu.set_kvm_immediate_exit(0);
            Step::Kicked
        }
        Err(e) => kvm(format!("KVM_RUN failed: {e}")),
    }
}
