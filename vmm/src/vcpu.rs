//! A vCPU: the loop around KVM_RUN, on a thread of its own.
//!
//! ```text
//!  gate.pass() ──▶ KVM_RUN ──▶ MMIO ──▶ device registers ──┐
//!      ▲                 ├───▶ port I/O ──▶ Ports ──▶ End? │
//!      │                 ├───▶ EINTR (kicked)              │
//!      │                 └───▶ shutdown, errors ──▶ End    │
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
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use carrel_protocol::vmm::End;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::current::ioapic::{self, IoApic};
use crate::arch::current::{ShutdownCause, shutdown_cause};
use crate::devices::Bus;
use crate::gate::Gate;
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

/// Runs a vCPU until the gate closes for good.
pub fn run(mut vcpu: VcpuFd, shared: &Arc<Shared>) {
    IMMEDIATE_EXIT.with(|exit| exit.set(&raw mut vcpu.get_kvm_run().immediate_exit));
    while let Some(permit) = shared.gate.pass() {
        let end = step(&mut vcpu, shared);
        drop(permit);
        if let Some((end, detail)) = end {
            shared.verdict.reach(end, detail);
            break;
        }
    }
    IMMEDIATE_EXIT.with(|exit| exit.set(ptr::null_mut()));
}

/// One entry into the guest and what it came back for.
fn step(vcpu: &mut VcpuFd, shared: &Shared) -> Option<(End, Option<String>)> {
    let kvm = |detail: String| Some((End::Kvm, Some(detail)));
    let exit = vcpu.run();
    shared.exits.all.fetch_add(1, Ordering::Relaxed);
    match exit {
        Ok(VcpuExit::MmioRead(address, data)) => {
            shared.exits.mmio.fetch_add(1, Ordering::Relaxed);
            match ioapic::register(address) {
                Some(register) => shared.io_apic.read(register, data),
                None => shared.bus.read(address, data),
            }
            None
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            shared.exits.mmio.fetch_add(1, Ordering::Relaxed);
            match ioapic::register(address) {
                Some(register) => match shared.io_apic.write(register, data) {
                    Ok(()) => None,
                    Err(e) => kvm(format!("KVM did not take the routes of the guest's interrupts: {e}")),
                },
                None => {
                    shared.bus.write(address, data);
                    None
                }
            }
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            shared.exits.ports.fetch_add(1, Ordering::Relaxed);
            shared.ports.read(port, data);
            None
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            shared.exits.ports.fetch_add(1, Ordering::Relaxed);
            shared.ports.write(port, data).map(|end| (end, None))
        }
        Ok(VcpuExit::Shutdown) => Some(match shutdown_cause(&shared.memory) {
            ShutdownCause::Restart => (End::Reset, None),
            ShutdownCause::Panic => (End::Panic, None),
            ShutdownCause::Accident => (End::TripleFault, None),
        }),
        Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => None,
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            kvm(format!("the processor refused to enter the guest on CPU {cpu}, reason {reason:#x}"))
        }
        Ok(VcpuExit::InternalError) => kvm("KVM could not emulate an instruction of the guest".into()),
        Ok(other) => kvm(format!("KVM came back for a reason that is not handled: {other:?}")),
        Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {
            vcpu.set_kvm_immediate_exit(0);
            None
        }
        Err(e) => kvm(format!("KVM_RUN failed: {e}")),
    }
}
