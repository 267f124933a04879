//! The system calls that are allowed, each with its reason: one table, three stages.
//!
//! - **set-up**: from the end of [`crate::jail`] until the guest's first instruction. Makes the VM and its threads.
//! - **events** and **vcpu**: the two kinds of threads while the guest runs.
//!
//! Filters stack, so what a later stage needs the first must allow too. Anything else kills the process with SIGSYS. There is no
//! `open`, `socket`, `connect`, `execve`, `ptrace` or `kill` in any stage.
//!
//! The programs are assembled when this crate is compiled (`program`); a thread that puts itself under one copies it, writes the process's id
//! into it and gives it to the kernel, without an allocation.

mod program;

use std::io;
use std::mem::size_of;

use kvm_bindings as kvm;
use thiserror::Error;

use self::program::{Program, assemble};
use crate::working_set::ahead::PreFault;

/// The filter can't be installed.
#[derive(Debug, Error)]
pub enum SeccompError {
    /// The first filter comes with no_new_privs.
    #[error("the host can't give this part of the confinement: no_new_privs")]
    NoNewPrivileges(#[source] io::Error),
    /// The kernel refused.
    #[error("the host can't give this part of the confinement: seccomp filters")]
    Install(#[source] io::Error),
}

/// Which threads, when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// One thread, before the guest.
    SetUp,
    /// The event thread.
    RunEvents,
    /// A vCPU thread.
    RunVcpu,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    SetUp,
    Events,
    Vcpu,
    Both,
}

/// A condition on the lower half of one argument. The kernel looks at no more: these arguments are `int`, `unsigned` or `pid_t` to it, but for
/// clone's flags and the protection of mmap and mprotect. Those are longs; legacy clone drops the upper half of its flags (kernel/fork.c,
/// `lower_32_bits`), and PROT_EXEC is in the lower half. A condition on an argument that is wider needs both halves compared.
#[derive(Clone, Copy, Debug)]
enum Arg {
    /// It is one of these.
    OneOf(u8, &'static [u64]),
    /// None of these bits is set.
    Without(u8, u64),
    /// It is this process's id, as its own PID namespace has it.
    OwnProcess(u8),
}

#[derive(Debug)]
struct Call {
    number: i64,
    who: Who,
    /// All must hold.
    args: &'static [Arg],
    why: &'static str,
}

const fn call(number: i64, who: Who, args: &'static [Arg], why: &'static str) -> Call {
    Call { number, who, args, why }
}

const fn io(number: u64) -> u64 {
    0xae00 | number
}
const fn write<T>(number: u64) -> u64 {
    1 << 30 | (size_of::<T>() as u64) << 16 | io(number)
}
const fn read<T>(number: u64) -> u64 {
    2 << 30 | (size_of::<T>() as u64) << 16 | io(number)
}
const fn read_write<T>(number: u64) -> u64 {
    3 << 30 | (size_of::<T>() as u64) << 16 | io(number)
}

const KVM_RUN: u64 = io(0x80);
const SET_GSI_ROUTING: u64 = write::<kvm::kvm_irq_routing>(0x6a);
const CHECK_EXTENSION: u64 = io(0x03);
/// KVM_KVMCLOCK_CTRL
const ANNOUNCE_PAUSE: u64 = io(0xad);
/// What a vCPU reads of itself for a snapshot. It writes nothing: what would set a register is in no run filter.
const SAVE_VCPU: [u64; 12] = [
    read::<kvm::kvm_regs>(0x81),        // KVM_GET_REGS
    read::<kvm::kvm_sregs>(0x83),       // KVM_GET_SREGS
    read_write::<kvm::kvm_msrs>(0x88),  // KVM_GET_MSRS
    read::<kvm::kvm_lapic_state>(0x8e), // KVM_GET_LAPIC
    read::<kvm::kvm_mp_state>(0x98),    // KVM_GET_MP_STATE
    read::<kvm::kvm_vcpu_events>(0x9f), // KVM_GET_VCPU_EVENTS
    read::<kvm::kvm_debugregs>(0xa1),   // KVM_GET_DEBUGREGS
    io(0xa3),                           // KVM_GET_TSC_KHZ
    read::<kvm::kvm_xsave>(0xa4),       // KVM_GET_XSAVE
    read::<kvm::kvm_xcrs>(0xa6),        // KVM_GET_XCRS
    SET_GSI_ROUTING,
    ANNOUNCE_PAUSE,
];
/// What the event thread asks for a snapshot.
const SAVE_MACHINE: &[u64] = &[
    CHECK_EXTENSION,
    read_write::<kvm::kvm_msr_list>(0x02), // KVM_GET_MSR_INDEX_LIST
    read_write::<kvm::kvm_cpuid2>(0x05),   // KVM_GET_SUPPORTED_CPUID
    write::<kvm::kvm_dirty_log>(0x42),     // KVM_GET_DIRTY_LOG
    read::<kvm::kvm_clock_data>(0x7c),     // KVM_GET_CLOCK
];
/// ioctl(2) requests of the set-up. KVM_RUN and the routes are there for the filters' stacking, KVM_RUN first since each entry into the guest
/// passes here too.
const KVM_REQUESTS: &[u64] = &[
    KVM_RUN,
    io(0x00),                                        // KVM_GET_API_VERSION
    io(0x01),                                        // KVM_CREATE_VM
    io(0x03),                                        // KVM_CHECK_EXTENSION
    io(0x04),                                        // KVM_GET_VCPU_MMAP_SIZE
    read_write::<kvm::kvm_cpuid2>(0x05),             // KVM_GET_SUPPORTED_CPUID
    io(0x41),                                        // KVM_CREATE_VCPU
    write::<kvm::kvm_userspace_memory_region>(0x46), // KVM_SET_USER_MEMORY_REGION
    io(0x47),                                        // KVM_SET_TSS_ADDR
    SET_GSI_ROUTING,
    write::<kvm::kvm_irqfd>(0x76),      // KVM_IRQFD
    write::<kvm::kvm_ioeventfd>(0x79),  // KVM_IOEVENTFD
    write::<kvm::kvm_regs>(0x82),       // KVM_SET_REGS
    read::<kvm::kvm_sregs>(0x83),       // KVM_GET_SREGS
    write::<kvm::kvm_sregs>(0x84),      // KVM_SET_SREGS
    write::<kvm::kvm_msrs>(0x89),       // KVM_SET_MSRS
    write::<kvm::kvm_fpu>(0x8d),        // KVM_SET_FPU
    write::<kvm::kvm_cpuid2>(0x90),     // KVM_SET_CPUID2
    write::<kvm::kvm_enable_cap>(0xa3), // KVM_ENABLE_CAP
    write::<kvm::kvm_xcrs>(0xa7),       // KVM_SET_XCRS
    // What a machine that goes on from a snapshot is given beside.
    write::<kvm::kvm_clock_data>(0x7b),  // KVM_SET_CLOCK
    write::<kvm::kvm_lapic_state>(0x8f), // KVM_SET_LAPIC
    write::<kvm::kvm_mp_state>(0x99),    // KVM_SET_MP_STATE
    write::<kvm::kvm_vcpu_events>(0xa0), // KVM_SET_VCPU_EVENTS
    write::<kvm::kvm_debugregs>(0xa2),   // KVM_SET_DEBUGREGS
    io(0xa2),                            // KVM_SET_TSC_KHZ
    write::<kvm::kvm_xsave>(0xa5),       // KVM_SET_XSAVE
    read_write::<PreFault>(0xd5),        // KVM_PRE_FAULT_MEMORY
];

const EXECUTABLE: u64 = 4; // PROT_EXEC
const AF_UNIX: u64 = 1;
const SET_FILTER: u64 = 1; // SECCOMP_SET_MODE_FILTER
const PRCTLS: &[u64] = &[15]; // PR_SET_NAME
const SET_UP_ADVICE: &[u64] = &[14, 15, 16, 22, 23]; // HUGEPAGE, NOHUGEPAGE, DONTDUMP, POPULATE_READ, POPULATE_WRITE
const DONTNEED: &[u64] = &[4];
const F_GETFD: &[u64] = &[1];
const FALLOCATE_MODES: &[u64] = &[3]; // PUNCH_HOLE | KEEP_SIZE
const SIGABRT: u64 = 6;
const SIGRTMIN: u64 = 34; // glibc keeps 32 and 33
/// CLONE_VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS, PARENT_SETTID, CHILD_CLEARTID: glibc's threads, and no other.
const THREAD: &[u64] = &[0x003d_0f00];

use Arg::{OneOf, OwnProcess, Without};
use Who::{Both, Events, SetUp, Vcpu};

/// The table. What has been seen in use and what is kept without: docs/vmm.md.
const CALLS: &[Call] = &[
    // The guest.
    call(libc::SYS_ioctl, SetUp, &[OneOf(1, KVM_REQUESTS)], "make the VM, its vCPUs and their state"),
    call(libc::SYS_ioctl, Vcpu, &[OneOf(1, &[KVM_RUN])], "run the guest"),
    call(
        libc::SYS_ioctl,
        Vcpu,
        &[OneOf(1, &SAVE_VCPU)],
        "route an interrupt where the guest wants it; read the vCPU's state for a snapshot; tell its clock of a pause",
    ),
    call(libc::SYS_ioctl, Events, &[OneOf(1, SAVE_MACHINE)], "read the machine's state for a snapshot"),
    // Threads.
    call(libc::SYS_clone, SetUp, &[OneOf(0, THREAD)], "start the vCPUs' threads"),
    call(libc::SYS_set_robust_list, SetUp, &[], "a new thread's start in libc"),
    call(libc::SYS_rseq, SetUp, &[], "a new thread's start in libc"),
    call(libc::SYS_sched_getaffinity, SetUp, &[], "a new thread's start: libc says where its stack is"),
    call(libc::SYS_prctl, SetUp, &[OneOf(0, PRCTLS)], "a thread's name"),
    call(libc::SYS_seccomp, SetUp, &[OneOf(0, &[SET_FILTER])], "install the run filters"),
    call(libc::SYS_rt_sigaction, SetUp, &[], "the kick's handler"),
    call(libc::SYS_gettid, Both, &[], "signals to threads, abort in libc"),
    call(libc::SYS_getpid, Both, &[], "signals to threads, abort in libc"),
    call(libc::SYS_rt_sigprocmask, Both, &[], "threads' start and end; signals to threads"),
    call(libc::SYS_tgkill, Events, &[OwnProcess(0), OneOf(2, &[SIGRTMIN, SIGABRT])], "kick a vCPU; abort"),
    call(libc::SYS_tgkill, Vcpu, &[OwnProcess(0), OneOf(2, &[SIGABRT])], "abort"),
    call(libc::SYS_rt_sigreturn, Vcpu, &[], "return from the kick's handler"),
    call(libc::SYS_futex, Both, &[], "locks between threads"),
    call(libc::SYS_sigaltstack, Both, &[], "a thread's start and end in the standard library"),
    call(libc::SYS_exit, Vcpu, &[], "a thread's end"),
    call(libc::SYS_exit_group, Events, &[], "the end"),
    // Memory.
    call(
        libc::SYS_mmap,
        Both,
        &[Without(2, EXECUTABLE)],
        "guest memory, kvm_run, stacks, the allocator; never executable",
    ),
    call(libc::SYS_mprotect, SetUp, &[Without(2, EXECUTABLE)], "stacks and their guards; never executable"),
    call(libc::SYS_munmap, Both, &[], "the allocator, a thread's end"),
    call(libc::SYS_mremap, Both, &[], "the allocator"),
    call(libc::SYS_brk, Both, &[], "the allocator"),
    call(
        libc::SYS_madvise,
        SetUp,
        &[OneOf(2, SET_UP_ADVICE)],
        "huge pages for guest memory; none of it in a dump; a working set ahead",
    ),
    call(libc::SYS_madvise, Both, &[OneOf(2, DONTNEED)], "balloon; the allocator; a thread's end"),
    // Descriptors that are there already.
    call(libc::SYS_eventfd2, SetUp, &[], "notifications and interrupts of devices"),
    call(libc::SYS_epoll_create1, SetUp, &[], "the event loop"),
    call(libc::SYS_signalfd4, SetUp, &[], "SIGTERM and SIGINT in the event loop"),
    call(libc::SYS_lseek, SetUp, &[], "read the kernel and the initramfs; a disk's size"),
    call(libc::SYS_epoll_wait, Events, &[], "the event loop"),
    call(libc::SYS_epoll_ctl, Events, &[], "connections come and go"),
    call(libc::SYS_clock_gettime, Events, &[], "time, where the vDSO can't tell it"),
    call(libc::SYS_read, Events, &[], "eventfds, a greeting; the kernel and the initramfs"),
    call(libc::SYS_write, Both, &[], "eventfds, serial output"),
    call(libc::SYS_readv, Events, &[], "vsock: from a connection straight into guest memory"),
    call(libc::SYS_recvmsg, Events, &[], "the owner's requests"),
    call(
        libc::SYS_sendmsg,
        Events,
        &[],
        "the owner's answers; a dialled connection's other end; vsock: straight from guest memory into a connection",
    ),
    call(libc::SYS_accept4, Events, &[], "who connects to the vsock and control sockets"),
    call(libc::SYS_socketpair, Events, &[OneOf(0, &[AF_UNIX])], "vsock: what the guest dials"),
    call(libc::SYS_shutdown, Events, &[], "vsock: half-close"),
    call(libc::SYS_close, Both, &[], "connections' end, also by a vCPU that resets the device; a vCPU's end"),
    call(
        libc::SYS_fcntl,
        Both,
        &[OneOf(1, F_GETFD)],
        "before each close, in debug builds of the standard library",
    ),
    call(libc::SYS_poll, Vcpu, &[], "whether serial output would block"),
    // Disks and entropy.
    call(libc::SYS_pread64, Events, &[], "a disk: copy a block up from the base"),
    call(libc::SYS_pwrite64, Events, &[], "a disk: copy a block up, write zeros"),
    call(libc::SYS_preadv, Events, &[], "disks: straight into guest memory"),
    call(libc::SYS_pwritev, Events, &[], "disks: straight from guest memory"),
    call(libc::SYS_fallocate, Events, &[OneOf(1, FALLOCATE_MODES)], "disks: discard"),
    call(libc::SYS_fdatasync, Events, &[], "disks: flush"),
    call(libc::SYS_getrandom, Events, &[], "the entropy device; hash seeds"),
];

/// A call of the set-up that says that it does not exist, and libc uses clone: what clone3 is asked for lies in memory, where no filter can look,
/// clone's flags are an argument.
const NOT_THERE: i64 = libc::SYS_clone3;

impl Stage {
    const fn has(self, who: Who) -> bool {
        match self {
            Self::SetUp => true,
            Self::RunEvents => matches!(who, Events | Both),
            Self::RunVcpu => matches!(who, Vcpu | Both),
        }
    }
}

static SET_UP: Program<{ assemble(CALLS, Stage::SetUp).len() }> = assemble(CALLS, Stage::SetUp).finish();
static RUN_EVENTS: Program<{ assemble(CALLS, Stage::RunEvents).len() }> =
    assemble(CALLS, Stage::RunEvents).finish();
static RUN_VCPU: Program<{ assemble(CALLS, Stage::RunVcpu).len() }> =
    assemble(CALLS, Stage::RunVcpu).finish();

/// Calls of a stage with their reasons, for people.
pub fn allowed(stage: Stage) -> impl Iterator<Item = (i64, &'static str)> {
    CALLS.iter().filter(move |call| stage.has(call.who)).map(|call| (call.number, call.why))
}

/// Puts the calling thread under the stage's filter, for good. The set-up's comes first, and threads are started under it.
pub fn install(stage: Stage) -> Result<(), SeccompError> {
    let process = std::process::id();
    match stage {
        Stage::SetUp => {
            // Threads inherit it, so the later stages have it. The jail sets it too, but may be left out.
            // SAFETY: no pointers are passed.
            crate::event::check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
                .map_err(SeccompError::NoNewPrivileges)?;
            SET_UP.install(process)
        }
        Stage::RunEvents => RUN_EVENTS.install(process),
        Stage::RunVcpu => RUN_VCPU.install(process),
    }
    .map_err(SeccompError::Install)
}

#[cfg(test)]
mod tests;
