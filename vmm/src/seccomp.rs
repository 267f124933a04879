//! The system calls that are allowed, each with its reason: one table, three stages.
//!
//! - **set-up**: from the end of [`crate::jail`] until the guest's first instruction. Makes the VM and its threads.
//! - **events** and **vcpu**: the two kinds of threads while the guest runs.
//!
//! Filters stack, so what a later stage needs the first must allow too. Anything else kills the process with SIGSYS. There is no
//! `open`, `socket`, `connect`, `execve`, `ptrace` or `kill` in any stage.

use std::collections::BTreeMap;
use std::mem::size_of;

use kvm_bindings as kvm;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use thiserror::Error;

/// The filter can't be installed.
#[derive(Debug, Error)]
pub enum SeccompError {
    /// The table is wrong.
    #[error("the system-call filter can't be built")]
    Build(#[from] seccompiler::BackendError),
    /// The kernel refused.
    #[error("the host can't give this part of the confinement: seccomp filters")]
    Install(#[from] seccompiler::Error),
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    SetUp,
    Events,
    Vcpu,
    Both,
}

/// A condition on one argument.
#[derive(Clone, Copy)]
enum Arg {
    Any,
    /// The 32-bit argument is one of these.
    OneOf(u8, &'static [u64]),
    /// None of these bits is set in the 32-bit argument.
    Without(u8, u64),
}

struct Call {
    number: i64,
    who: Who,
    arg: Arg,
    why: &'static str,
}

const fn call(number: i64, who: Who, arg: Arg, why: &'static str) -> Call {
    Call { number, who, arg, why }
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
/// ioctl(2) requests of the set-up; KVM_RUN is there for the filters' stacking.
const KVM_REQUESTS: &[u64] = &[
    io(0x00),                                        // KVM_GET_API_VERSION
    io(0x01),                                        // KVM_CREATE_VM
    io(0x03),                                        // KVM_CHECK_EXTENSION
    io(0x04),                                        // KVM_GET_VCPU_MMAP_SIZE
    read_write::<kvm::kvm_cpuid2>(0x05),             // KVM_GET_SUPPORTED_CPUID
    io(0x41),                                        // KVM_CREATE_VCPU
    write::<kvm::kvm_userspace_memory_region>(0x46), // KVM_SET_USER_MEMORY_REGION
    io(0x47),                                        // KVM_SET_TSS_ADDR
    io(0x60),                                        // KVM_CREATE_IRQCHIP
    write::<kvm::kvm_irqfd>(0x76),                   // KVM_IRQFD
    write::<kvm::kvm_ioeventfd>(0x79),               // KVM_IOEVENTFD
    write::<kvm::kvm_regs>(0x82),                    // KVM_SET_REGS
    read::<kvm::kvm_sregs>(0x83),                    // KVM_GET_SREGS
    write::<kvm::kvm_sregs>(0x84),                   // KVM_SET_SREGS
    write::<kvm::kvm_msrs>(0x89),                    // KVM_SET_MSRS
    write::<kvm::kvm_fpu>(0x8d),                     // KVM_SET_FPU
    read::<kvm::kvm_lapic_state>(0x8e),              // KVM_GET_LAPIC
    write::<kvm::kvm_lapic_state>(0x8f),             // KVM_SET_LAPIC
    write::<kvm::kvm_cpuid2>(0x90),                  // KVM_SET_CPUID2
    write::<kvm::kvm_xcrs>(0xa7),                    // KVM_SET_XCRS
    KVM_RUN,
];

const EXECUTABLE: u64 = 4; // PROT_EXEC
const AF_UNIX: u64 = 1;
const ADVICE: &[u64] = &[4, 8, 14, 15, 16]; // DONTNEED, FREE, HUGEPAGE, NOHUGEPAGE, DONTDUMP
const PRCTLS: &[u64] = &[15, 38]; // PR_SET_NAME, PR_SET_NO_NEW_PRIVS
const FCNTLS: &[u64] = &[1, 3, 4, 1030]; // F_GETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
const FALLOCATE_MODES: &[u64] = &[3]; // PUNCH_HOLE | KEEP_SIZE

use Arg::{Any, OneOf, Without};
use Who::{Both, Events, SetUp, Vcpu};

/// The table.
const CALLS: &[Call] = &[
    // The guest.
    call(libc::SYS_ioctl, SetUp, OneOf(1, KVM_REQUESTS), "make the VM, its vCPUs and their state"),
    call(libc::SYS_ioctl, Vcpu, OneOf(1, &[KVM_RUN]), "run the guest"),
    // Threads and memory.
    call(libc::SYS_clone3, SetUp, Any, "start the vCPUs' threads"),
    call(libc::SYS_clone, SetUp, Any, "the same, with an older libc"),
    call(libc::SYS_set_robust_list, SetUp, Any, "a new thread's start in libc"),
    call(libc::SYS_rseq, SetUp, Any, "a new thread's start in libc"),
    call(libc::SYS_prctl, SetUp, OneOf(0, PRCTLS), "a thread's name; no_new_privs before a filter"),
    call(libc::SYS_seccomp, SetUp, Any, "install the run filters"),
    call(libc::SYS_sched_getaffinity, SetUp, Any, "a new thread's start in libc"),
    call(libc::SYS_gettid, Both, Any, "a thread's start and signals to it in libc"),
    call(libc::SYS_getpid, Both, Any, "signals to threads in libc"),
    call(
        libc::SYS_mmap,
        Both,
        Without(2, EXECUTABLE),
        "guest memory, kvm_run, stacks, the allocator; never executable",
    ),
    call(
        libc::SYS_mprotect,
        Both,
        Without(2, EXECUTABLE),
        "stack guards and the allocator's arenas; never executable",
    ),
    call(libc::SYS_munmap, Both, Any, "the allocator, a thread's end"),
    call(libc::SYS_mremap, Both, Any, "the allocator"),
    call(libc::SYS_brk, Both, Any, "the allocator"),
    call(libc::SYS_madvise, Both, OneOf(2, ADVICE), "huge pages for guest memory; balloon; a thread's end"),
    call(libc::SYS_futex, Both, Any, "locks between threads"),
    call(libc::SYS_sigaltstack, Both, Any, "a thread's start and end in the standard library"),
    call(libc::SYS_rt_sigaction, SetUp, Any, "the kick's handler"),
    call(libc::SYS_rt_sigprocmask, Both, Any, "threads' start and end; signals to threads"),
    call(libc::SYS_rt_sigreturn, Both, Any, "return from the kick's handler"),
    call(libc::SYS_tgkill, Events, Any, "kick a vCPU; the empty PID namespace has nobody else"),
    call(libc::SYS_restart_syscall, Both, Any, "the kernel's own, after a stop"),
    call(libc::SYS_sched_yield, Both, Any, "a contended lock"),
    call(libc::SYS_clock_gettime, Both, Any, "time, where the vDSO can't tell it"),
    call(libc::SYS_exit, Both, Any, "a thread's end"),
    call(libc::SYS_exit_group, Both, Any, "the end"),
    // Descriptors that are there already.
    call(libc::SYS_eventfd2, SetUp, Any, "notifications and interrupts of devices"),
    call(libc::SYS_epoll_create1, SetUp, Any, "the event loop"),
    call(libc::SYS_signalfd4, SetUp, Any, "SIGTERM and SIGINT in the event loop"),
    call(libc::SYS_fstat, SetUp, Any, "sizes of the files handed over"),
    call(libc::SYS_newfstatat, SetUp, Any, "fstat, as libc spells it"),
    call(libc::SYS_statx, SetUp, Any, "fstat, as the standard library spells it"),
    call(libc::SYS_lseek, SetUp, Any, "read the kernel and the initramfs"),
    call(libc::SYS_epoll_wait, Events, Any, "the event loop"),
    call(libc::SYS_epoll_pwait, Events, Any, "the event loop, as some libcs spell it"),
    call(libc::SYS_epoll_ctl, Events, Any, "connections come and go"),
    call(libc::SYS_read, Both, Any, "eventfds, signals, connections"),
    call(libc::SYS_write, Both, Any, "eventfds, connections, serial output"),
    call(libc::SYS_readv, Events, Any, "vsock: from a connection straight into guest memory"),
    call(libc::SYS_recvmsg, Events, Any, "the owner's requests"),
    call(
        libc::SYS_sendmsg,
        Events,
        Any,
        "the owner's answers; a dialled connection's other end; vsock: straight from guest memory into a connection",
    ),
    call(libc::SYS_accept4, Events, Any, "who connects to the vsock and control sockets"),
    call(libc::SYS_socketpair, Events, OneOf(0, &[AF_UNIX]), "vsock: what the guest dials"),
    call(libc::SYS_shutdown, Events, Any, "vsock: half-close"),
    call(libc::SYS_fcntl, Events, OneOf(1, FCNTLS), "non-blocking connections"),
    call(libc::SYS_close, Both, Any, "connections' and vCPUs' end"),
    call(libc::SYS_poll, Both, Any, "whether serial output would block"),
    // Disks and entropy.
    call(libc::SYS_pread64, Events, Any, "read and write disks"),
    call(libc::SYS_pwrite64, Events, Any, "read and write disks"),
    call(libc::SYS_preadv, Events, Any, "disks: straight into guest memory"),
    call(libc::SYS_pwritev, Events, Any, "disks: straight from guest memory"),
    call(libc::SYS_fallocate, Events, OneOf(1, FALLOCATE_MODES), "disks: discard"),
    call(libc::SYS_fdatasync, Events, Any, "disks: flush"),
    call(libc::SYS_getrandom, Events, Any, "the entropy device; hash seeds"),
];

impl Stage {
    fn has(self, who: Who) -> bool {
        match self {
            Self::SetUp => true,
            Self::RunEvents => matches!(who, Events | Both),
            Self::RunVcpu => matches!(who, Vcpu | Both),
        }
    }
}

/// Calls of a stage with their reasons, for people.
pub fn allowed(stage: Stage) -> impl Iterator<Item = (i64, &'static str)> {
    CALLS.iter().filter(move |call| stage.has(call.who)).map(|call| (call.number, call.why))
}

/// Puts the calling thread under the stage's filter, for good.
pub fn install(stage: Stage) -> Result<(), SeccompError> {
    Ok(seccompiler::apply_filter(&program(stage)?)?)
}

/// The filter as a program for the kernel.
fn program(stage: Stage) -> Result<BpfProgram, SeccompError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in CALLS.iter().filter(|call| stage.has(call.who)) {
        let conditions = match call.arg {
            Any => Vec::new(),
            OneOf(index, values) => values
                .iter()
                .map(|&value| SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value))
                .collect::<Result<_, _>>()?,
            Without(index, bits) => {
                vec![SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(bits), 0)?]
            }
        };
        // Rules of one call are alternatives; a call without rules is allowed whatever its arguments.
        let chain = rules.entry(call.number).or_default();
        for condition in conditions {
            chain.push(SeccompRule::new(vec![condition])?);
        }
    }
    let filter =
        SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_numbers_are_the_kernels() {
        // From strace of any KVM user.
        assert_eq!(write::<kvm::kvm_userspace_memory_region>(0x46), 0x4020_ae46);
        assert_eq!(read_write::<kvm::kvm_cpuid2>(0x05), 0xc008_ae05);
        assert_eq!(write::<kvm::kvm_irqfd>(0x76), 0x4020_ae76);
        assert_eq!(write::<kvm::kvm_ioeventfd>(0x79), 0x4040_ae79);
        assert_eq!(write::<kvm::kvm_msrs>(0x89), 0x4008_ae89);
    }

    #[test]
    fn a_later_stage_allows_nothing_that_the_set_up_forbids() {
        let of = |stage| allowed(stage).map(|(n, _)| n).collect::<std::collections::BTreeSet<_>>();
        assert!(of(Stage::RunEvents).is_subset(&of(Stage::SetUp)));
        assert!(of(Stage::RunVcpu).is_subset(&of(Stage::SetUp)));
    }

    #[test]
    fn every_call_says_why_and_every_filter_compiles() {
        assert!(CALLS.iter().all(|call| call.why.len() > 6));
        for stage in [Stage::SetUp, Stage::RunEvents, Stage::RunVcpu] {
            assert!(program(stage).unwrap().len() > 50);
        }
    }

    #[test]
    fn nothing_opens_connects_or_executes() {
        for number in [
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_ptrace,
            libc::SYS_kill,
            libc::SYS_process_vm_writev,
            libc::SYS_io_uring_setup,
            libc::SYS_bpf,
        ] {
            assert!(CALLS.iter().all(|call| call.number != number), "{number}");
        }
    }
}
