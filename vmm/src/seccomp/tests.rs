//! The filters, tested by attempting what they forbid: each attempt in a process of its own that first puts itself under the filters that the
//! real threads have, in their order.

use std::collections::BTreeSet;

use super::*;

const STAGES: [Stage; 3] = [Stage::SetUp, Stage::RunEvents, Stage::RunVcpu];
/// The status of a process whose attempt came back; its result is in the lowest bits.
const CAME_BACK: i32 = 0x40;

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// The call returned: 0, or an error's number.
    Returned(i32),
    Killed(i32),
}

const FILTERED: Fate = Fate::Killed(libc::SIGSYS);

/// A system call with its arguments.
type Attempt = (i64, [u64; 6]);

fn attempt(stage: Stage, attempt: impl Fn() -> i64) -> Fate {
    // SAFETY: the child has one thread, does nothing but system calls and allocations, which glibc's fork allows, and never returns.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the limit is valid for the read.
        unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core) };
        let filtered = install(Stage::SetUp).and_then(|()| match stage {
            Stage::SetUp => Ok(()),
            Stage::RunEvents | Stage::RunVcpu => install(stage),
        });
        let status = match filtered {
            Ok(()) if attempt() >= 0 => CAME_BACK,
            // SAFETY: errno is this thread's own.
            Ok(()) => CAME_BACK | unsafe { *libc::__errno_location() } & 0x3f,
            Err(_) => 1,
        };
        let exit = if stage == Stage::RunVcpu { libc::SYS_exit } else { libc::SYS_exit_group };
        loop {
            // SAFETY: ends this process.
            unsafe { libc::syscall(exit, status) };
        }
    }
    let mut status = 0;
    // SAFETY: the child is ours and `status` is valid for the write.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    if libc::WIFSIGNALED(status) {
        return Fate::Killed(libc::WTERMSIG(status));
    }
    let status = libc::WEXITSTATUS(status);
    assert!(status & CAME_BACK != 0, "{stage:?}: the filter could not be installed");
    Fate::Returned(status & !CAME_BACK)
}

fn call_fate(stage: Stage, (number, args): Attempt) -> Fate {
    attempt(stage, || {
        let [a, b, c, d, e, f] = args;
        // SAFETY: the pointers among the arguments are to C strings or structures that live, or null, which the kernel checks.
        unsafe { libc::syscall(number, a, b, c, d, e, f) }
    })
}

fn args(given: &[u64]) -> [u64; 6] {
    let mut all = [0; 6];
    all[..given.len()].copy_from_slice(given);
    all
}

fn text(string: &'static std::ffi::CStr) -> u64 {
    string.as_ptr() as u64
}

const READ: u64 = 1;
const WRITE: u64 = 2;
const EXECUTE: u64 = 4;
const PRIVATE_ANONYMOUS: u64 = 0x22;
const HERE: u64 = (-100i64).cast_unsigned(); // AT_FDCWD
const SIGCHLD: u64 = 17;
const NEW_USER: u64 = 0x1000_0000;
const NEW_NET: u64 = 0x4000_0000;

/// What no stage may do. Each would succeed, or fail for another reason, without a filter.
fn forbidden() -> Vec<(&'static str, Attempt)> {
    let this = u64::from(std::process::id());
    let call = |name, number: i64, given: &[u64]| (name, (number, args(given)));
    let path = text(c"/dev/null");
    vec![
        // Programs and processes.
        call("execve", libc::SYS_execve, &[text(c"/bin/true")]),
        call("execveat", libc::SYS_execveat, &[HERE, text(c"/bin/true")]),
        call("fork", libc::SYS_fork, &[]),
        call("vfork", libc::SYS_vfork, &[]),
        call("clone a process", libc::SYS_clone, &[SIGCHLD]),
        call("clone into a user namespace", libc::SYS_clone, &[SIGCHLD | NEW_USER]),
        call("clone a thread into a namespace", libc::SYS_clone, &[0x003d_0f00 | NEW_NET]),
        call("ptrace", libc::SYS_ptrace, &[0]),
        call("process_vm_readv", libc::SYS_process_vm_readv, &[this]),
        call("process_vm_writev", libc::SYS_process_vm_writev, &[this]),
        call("kcmp", libc::SYS_kcmp, &[this, this]),
        call("kill", libc::SYS_kill, &[this]),
        call("tkill", libc::SYS_tkill, &[this]),
        call("tgkill somebody else", libc::SYS_tgkill, &[1, 1, SIGRTMIN]),
        call("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, &[this]),
        call("pidfd_open", libc::SYS_pidfd_open, &[this]),
        call("pidfd_getfd", libc::SYS_pidfd_getfd, &[0]),
        call("pidfd_send_signal", libc::SYS_pidfd_send_signal, &[0]),
        call("prlimit64", libc::SYS_prlimit64, &[0, 7]),
        call("setrlimit", libc::SYS_setrlimit, &[7, 0]),
        call("sched_setaffinity", libc::SYS_sched_setaffinity, &[0]),
        call("sched_setscheduler", libc::SYS_sched_setscheduler, &[0]),
        call("setpriority", libc::SYS_setpriority, &[0, 0, 1]),
        // Files.
        call("open", libc::SYS_open, &[path]),
        call("openat", libc::SYS_openat, &[HERE, path]),
        call("openat2", libc::SYS_openat2, &[HERE, path]),
        call("creat", libc::SYS_creat, &[path]),
        call("open_by_handle_at", libc::SYS_open_by_handle_at, &[HERE]),
        call("name_to_handle_at", libc::SYS_name_to_handle_at, &[HERE, path]),
        call("memfd_create", libc::SYS_memfd_create, &[text(c"x")]),
        call("stat", libc::SYS_stat, &[path]),
        call("newfstatat", libc::SYS_newfstatat, &[HERE, path]),
        call("statx", libc::SYS_statx, &[HERE, path]),
        call("readlink", libc::SYS_readlink, &[path]),
        call("unlink", libc::SYS_unlink, &[text(c"/nonexistent")]),
        call("rename", libc::SYS_rename, &[text(c"/nonexistent"), text(c"/nonexistent")]),
        call("link", libc::SYS_link, &[text(c"/nonexistent"), text(c"/nonexistent")]),
        call("mkdir", libc::SYS_mkdir, &[text(c"/nonexistent/x")]),
        call("mknod", libc::SYS_mknod, &[text(c"/nonexistent/x")]),
        call("chmod", libc::SYS_chmod, &[text(c"/nonexistent")]),
        call("fchmod", libc::SYS_fchmod, &[0, 0o777]),
        call("chown", libc::SYS_chown, &[text(c"/nonexistent")]),
        call("ftruncate", libc::SYS_ftruncate, &[0, 0]),
        call("fallocate without a hole", libc::SYS_fallocate, &[0, 0, 0, 1]),
        call("getdents64", libc::SYS_getdents64, &[0]),
        call("dup", libc::SYS_dup, &[0]),
        call("dup2", libc::SYS_dup2, &[0, 9]),
        call("F_DUPFD", libc::SYS_fcntl, &[0, 0]),
        call("F_SETFL", libc::SYS_fcntl, &[0, 4]),
        call("splice", libc::SYS_splice, &[0]),
        call("sendfile", libc::SYS_sendfile, &[0]),
        call("copy_file_range", libc::SYS_copy_file_range, &[0]),
        call("chroot", libc::SYS_chroot, &[text(c"/")]),
        call("chdir", libc::SYS_chdir, &[text(c"/")]),
        call("fchdir", libc::SYS_fchdir, &[0]),
        call("inotify_init1", libc::SYS_inotify_init1, &[]),
        call("fanotify_init", libc::SYS_fanotify_init, &[]),
        // Mounts and namespaces.
        call("mount", libc::SYS_mount, &[0, text(c"/")]),
        call("umount2", libc::SYS_umount2, &[text(c"/")]),
        call("pivot_root", libc::SYS_pivot_root, &[text(c"/"), text(c"/")]),
        call("fsopen", libc::SYS_fsopen, &[text(c"tmpfs")]),
        call("move_mount", libc::SYS_move_mount, &[HERE]),
        call("open_tree", libc::SYS_open_tree, &[HERE, text(c"/")]),
        call("unshare", libc::SYS_unshare, &[NEW_USER]),
        call("setns", libc::SYS_setns, &[0]),
        // Sockets.
        call("socket", libc::SYS_socket, &[AF_UNIX, 1]),
        call("socketpair that is not a Unix one", libc::SYS_socketpair, &[2, 1]),
        call("connect", libc::SYS_connect, &[0]),
        call("bind", libc::SYS_bind, &[0]),
        call("listen", libc::SYS_listen, &[0]),
        call("accept", libc::SYS_accept, &[0]),
        call("sendto", libc::SYS_sendto, &[0]),
        call("setsockopt", libc::SYS_setsockopt, &[0]),
        // Who one is.
        call("setuid", libc::SYS_setuid, &[0]),
        call("setresuid", libc::SYS_setresuid, &[0]),
        call("setresgid", libc::SYS_setresgid, &[0]),
        call("setgroups", libc::SYS_setgroups, &[0]),
        call("capset", libc::SYS_capset, &[0]),
        call("PR_SET_SECCOMP", libc::SYS_prctl, &[22, 2]),
        call("PR_SET_DUMPABLE", libc::SYS_prctl, &[4, 1]),
        call("PR_SET_PDEATHSIG", libc::SYS_prctl, &[1, 0]),
        call("PR_SET_MM", libc::SYS_prctl, &[35]),
        call("PR_SET_PTRACER", libc::SYS_prctl, &[0x5961_6d61]),
        call("arch_prctl", libc::SYS_arch_prctl, &[0x1002]),
        call("personality", libc::SYS_personality, &[0x40_0000]),
        call("seccomp: no filter", libc::SYS_seccomp, &[0]),
        // Memory that executes.
        call("mmap", libc::SYS_mmap, &[0, 4096, READ | EXECUTE, PRIVATE_ANONYMOUS, u64::MAX]),
        call("mmap, high bits", libc::SYS_mmap, &[0, 4096, 1 << 32 | EXECUTE, PRIVATE_ANONYMOUS, u64::MAX]),
        call("mprotect", libc::SYS_mprotect, &[0, 4096, READ | EXECUTE]),
        call("pkey_mprotect", libc::SYS_pkey_mprotect, &[0, 4096, READ | EXECUTE]),
        call("remap_file_pages", libc::SYS_remap_file_pages, &[0]),
        call("shmget", libc::SYS_shmget, &[0, 4096, 0o1600]),
        call("shmat", libc::SYS_shmat, &[0]),
        call("MADV_FREE", libc::SYS_madvise, &[0, 0, 8]),
        call("mlock", libc::SYS_mlock, &[0]),
        call("modify_ldt", libc::SYS_modify_ldt, &[0]),
        call("userfaultfd", libc::SYS_userfaultfd, &[1]),
        // Devices and the kernel.
        call("TIOCSTI", libc::SYS_ioctl, &[0, 0x5412]),
        call("FIONREAD", libc::SYS_ioctl, &[0, 0x541b]),
        call("KVM_CREATE_DEVICE", libc::SYS_ioctl, &[0, 0xc00c_aee0]),
        call("KVM_CREATE_IRQCHIP", libc::SYS_ioctl, &[0, 0xae60]),
        call("KVM_SIGNAL_MSI", libc::SYS_ioctl, &[0, 0x4020_aea5]),
        call("KVM_RUN of another size", libc::SYS_ioctl, &[0, 0x4000_ae80]),
        call("bpf", libc::SYS_bpf, &[0]),
        call("perf_event_open", libc::SYS_perf_event_open, &[0]),
        call("keyctl", libc::SYS_keyctl, &[0]),
        call("add_key", libc::SYS_add_key, &[0]),
        call("request_key", libc::SYS_request_key, &[0]),
        call("io_uring_setup", libc::SYS_io_uring_setup, &[1]),
        call("io_uring_enter", libc::SYS_io_uring_enter, &[0]),
        call("io_setup", libc::SYS_io_setup, &[1]),
        call("kexec_load", libc::SYS_kexec_load, &[0]),
        call("kexec_file_load", libc::SYS_kexec_file_load, &[0]),
        call("init_module", libc::SYS_init_module, &[0]),
        call("finit_module", libc::SYS_finit_module, &[0]),
        call("delete_module", libc::SYS_delete_module, &[text(c"x")]),
        call("reboot", libc::SYS_reboot, &[0]),
        call("swapon", libc::SYS_swapon, &[path]),
        call("iopl", libc::SYS_iopl, &[3]),
        call("ioperm", libc::SYS_ioperm, &[0, 1, 1]),
        call("clock_settime", libc::SYS_clock_settime, &[0]),
        call("sethostname", libc::SYS_sethostname, &[0]),
        call("syslog", libc::SYS_syslog, &[0]),
        // Other ways to name calls: x32's, and numbers that are nobody's.
        call("x32 getpid", libc::SYS_getpid | 0x4000_0000, &[]),
        call("a call of the future", 4095, &[]),
    ]
}

#[test]
fn whatever_is_forbidden_kills_in_every_stage() {
    for (name, call) in forbidden() {
        for stage in STAGES {
            assert_eq!(call_fate(stage, call), FILTERED, "{name} in {stage:?}");
        }
    }
}

/// What the set-up is done with is over when the guest runs.
#[test]
fn what_made_the_machine_is_forbidden_once_it_runs() {
    let set_up: &[(&str, i64, &[u64])] = &[
        ("KVM_CREATE_VM", libc::SYS_ioctl, &[0, 0xae01]),
        ("KVM_SET_USER_MEMORY_REGION", libc::SYS_ioctl, &[0, 0x4020_ae46]),
        ("KVM_CREATE_VCPU", libc::SYS_ioctl, &[0, 0xae41]),
        ("KVM_SET_SREGS", libc::SYS_ioctl, &[0, 0x4138_ae84]),
        ("KVM_SET_MSRS", libc::SYS_ioctl, &[0, 0x4008_ae89]),
        ("KVM_ENABLE_CAP", libc::SYS_ioctl, &[0, 0x4068_aea3]),
        ("KVM_SET_LAPIC", libc::SYS_ioctl, &[0, 0x4400_ae8f]),
        ("KVM_SET_CLOCK", libc::SYS_ioctl, &[0, 0x4030_ae7b]),
        ("KVM_SET_VCPU_EVENTS", libc::SYS_ioctl, &[0, 0x4040_aea0]),
        ("a thread", libc::SYS_clone, &[0x003d_0f00]),
        ("clone3", libc::SYS_clone3, &[]),
        ("a further filter", libc::SYS_seccomp, &[1]),
        ("a name", libc::SYS_prctl, &[15]),
        ("a handler", libc::SYS_rt_sigaction, &[10, 0, 0, 8]),
        ("eventfd2", libc::SYS_eventfd2, &[]),
        ("epoll_create1", libc::SYS_epoll_create1, &[]),
        ("mprotect", libc::SYS_mprotect, &[0, 4096, READ]),
        ("lseek", libc::SYS_lseek, &[0]),
        ("MADV_HUGEPAGE", libc::SYS_madvise, &[0, 0, 14]),
    ];
    for (name, number, given) in set_up {
        for stage in [Stage::RunEvents, Stage::RunVcpu] {
            assert_eq!(call_fate(stage, (*number, args(given))), FILTERED, "{name} in {stage:?}");
        }
    }
}

#[test]
fn each_kind_of_thread_may_do_its_own_part_alone() {
    let parts: &[(&str, Stage, i64, &[u64])] = &[
        ("KVM_RUN", Stage::RunEvents, libc::SYS_ioctl, &[0, 0xae80]),
        ("KVM_SET_GSI_ROUTING", Stage::RunEvents, libc::SYS_ioctl, &[0, 0x4008_ae6a]),
        ("KVM_GET_REGS", Stage::RunEvents, libc::SYS_ioctl, &[0, 0x8090_ae81]),
        ("KVM_GET_CLOCK", Stage::RunVcpu, libc::SYS_ioctl, &[0, 0x8030_ae7c]),
        ("KVM_GET_DIRTY_LOG", Stage::RunVcpu, libc::SYS_ioctl, &[0, 0x4010_ae42]),
        ("poll", Stage::RunEvents, libc::SYS_poll, &[]),
        ("rt_sigreturn", Stage::RunEvents, libc::SYS_rt_sigreturn, &[]),
        ("read", Stage::RunVcpu, libc::SYS_read, &[9]),
        ("recvmsg", Stage::RunVcpu, libc::SYS_recvmsg, &[9]),
        ("sendmsg", Stage::RunVcpu, libc::SYS_sendmsg, &[9]),
        ("accept4", Stage::RunVcpu, libc::SYS_accept4, &[9]),
        ("socketpair", Stage::RunVcpu, libc::SYS_socketpair, &[AF_UNIX, 1]),
        ("pwritev", Stage::RunVcpu, libc::SYS_pwritev, &[9]),
        ("pread64", Stage::RunVcpu, libc::SYS_pread64, &[9]),
        ("epoll_ctl", Stage::RunVcpu, libc::SYS_epoll_ctl, &[9]),
        ("exit_group", Stage::RunVcpu, libc::SYS_exit_group, &[]),
    ];
    for (name, stage, number, given) in parts {
        assert_eq!(call_fate(*stage, (*number, args(given))), FILTERED, "{name} in {stage:?}");
    }
    let kick = |stage| attempt(stage, || tgkill(u64::from(std::process::id()), 0, SIGRTMIN));
    assert_eq!(kick(Stage::RunVcpu), FILTERED, "a vCPU kicks nobody");
    // Thread 0 is nobody: the kernel says so, and not the filter.
    assert_eq!(kick(Stage::RunEvents), Fate::Returned(libc::EINVAL));
    let end = |stage| attempt(stage, || tgkill(u64::from(std::process::id()), 0, 9));
    assert_eq!((end(Stage::RunEvents), end(Stage::RunVcpu)), (FILTERED, FILTERED));
}

fn tgkill(process: u64, thread: u64, signal: u64) -> i64 {
    // SAFETY: no pointers are passed.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) }
}

#[test]
fn calls_in_32_bit_form_kill() {
    for stage in STAGES {
        let fate = attempt(stage, || {
            let result: i64;
            // SAFETY: getpid by its number in the 32-bit table; registers are named, no memory is touched.
            unsafe { std::arch::asm!("int 0x80", inlateout("rax") 20i64 => result) };
            result
        });
        // SIGSEGV where the kernel has no such table.
        assert!(matches!(fate, FILTERED | Fate::Killed(libc::SIGSEGV)), "{fate:?} in {stage:?}");
    }
}

/// The other half of the proof: an attempt comes back where it is allowed, so the kills above are the filters'.
#[test]
fn what_is_allowed_comes_back() {
    for stage in STAGES {
        for (name, number, given) in [
            ("getpid", libc::SYS_getpid, &[][..]),
            ("mmap", libc::SYS_mmap, &[0, 4096, READ | WRITE, PRIVATE_ANONYMOUS, u64::MAX]),
            ("F_GETFD", libc::SYS_fcntl, &[0, 1]),
        ] {
            assert_eq!(call_fate(stage, (number, args(given))), Fate::Returned(0), "{name} in {stage:?}");
        }
    }
    assert_eq!(
        call_fate(Stage::SetUp, (libc::SYS_clone3, args(&[]))),
        Fate::Returned(libc::ENOSYS),
        "libc falls back to clone"
    );
    let spawned = attempt(Stage::SetUp, || -i64::from(std::thread::spawn(|| ()).join().is_err()));
    assert_eq!(spawned, Fate::Returned(0), "a thread, as libc makes one");
    let no_such = u64::MAX;
    assert_eq!(call_fate(Stage::RunVcpu, (libc::SYS_write, args(&[no_such]))), Fate::Returned(libc::EBADF));
}

#[test]
fn the_request_numbers_are_the_kernels() {
    // From strace of any KVM user.
    assert_eq!(write::<kvm::kvm_userspace_memory_region>(0x46), 0x4020_ae46);
    assert_eq!(read_write::<kvm::kvm_cpuid2>(0x05), 0xc008_ae05);
    assert_eq!(write::<kvm::kvm_irqfd>(0x76), 0x4020_ae76);
    assert_eq!(write::<kvm::kvm_ioeventfd>(0x79), 0x4040_ae79);
    assert_eq!(write::<kvm::kvm_msrs>(0x89), 0x4008_ae89);
    assert_eq!(libc::SIGRTMIN().unsigned_abs(), u32::try_from(SIGRTMIN).unwrap());
    assert_eq!(crate::vcpu::kick_signal(), libc::SIGRTMIN());
}

#[test]
fn a_later_stage_allows_nothing_that_the_set_up_forbids() {
    let of = |stage: Stage| -> BTreeSet<i64> { allowed(stage).map(|(number, _)| number).collect() };
    assert!(of(Stage::RunEvents).is_subset(&of(Stage::SetUp)));
    assert!(of(Stage::RunVcpu).is_subset(&of(Stage::SetUp)));
}

#[test]
fn every_call_says_why_and_no_line_undoes_the_conditions_of_another() {
    assert!(CALLS.iter().all(|call| !call.why.is_empty()));
    for stage in STAGES {
        let lines = CALLS.iter().filter(|call| stage.has(call.who));
        let free: BTreeSet<i64> =
            lines.clone().filter(|call| call.args.is_empty()).map(|call| call.number).collect();
        assert!(lines.filter(|call| !call.args.is_empty()).all(|call| !free.contains(&call.number)));
    }
}
