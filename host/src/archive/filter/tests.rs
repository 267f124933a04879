//! The filter, tested by attempting what it forbids: each attempt in a forked child that first puts itself under it.

use super::*;

/// The status of a process whose attempt came back; its error's number is in the lowest bits.
const CAME_BACK: i32 = 0x80;

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// The call returned: 0, or an error's number.
    Returned(i32),
    Killed(i32),
}

const FILTERED: Fate = Fate::Killed(libc::SIGSYS);

fn attempt(attempt: impl Fn() -> i64) -> Fate {
    // SAFETY: the child has one thread, does nothing but system calls and allocations, which glibc's fork allows, and never returns.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the limit is valid for the read; prctl takes no pointers.
        unsafe {
            libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core);
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        }
        let status = match install() {
            Ok(()) if attempt() >= 0 => CAME_BACK,
            // SAFETY: errno is this thread's own.
            Ok(()) => CAME_BACK | unsafe { *libc::__errno_location() } & 0x7f,
            Err(_) => 1,
        };
        loop {
            // SAFETY: ends this process.
            unsafe { libc::syscall(libc::SYS_exit_group, status) };
        }
    }
    let mut status = 0;
    // SAFETY: the child is ours and `status` is valid for the write.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    if libc::WIFSIGNALED(status) {
        return Fate::Killed(libc::WTERMSIG(status));
    }
    let status = libc::WEXITSTATUS(status);
    assert!(status & CAME_BACK != 0, "the filter could not be installed");
    Fate::Returned(status & !CAME_BACK)
}

fn fate(number: i64, given: &[u64]) -> Fate {
    let mut all = [0; 6];
    all[..given.len()].copy_from_slice(given);
    let [a, b, c, d, e, f] = all;
    // SAFETY: pointers among the arguments are C strings with static lifetime, or none; no call writes to memory of ours.
    attempt(|| unsafe { libc::syscall(number, a, b, c, d, e, f) })
}

fn text(string: &'static std::ffi::CStr) -> u64 {
    string.as_ptr() as u64
}

const HERE: u64 = (-100i64).cast_unsigned(); // AT_FDCWD
const READ: u64 = 1;
const WRITE: u64 = 2;
const EXECUTE: u64 = 4;
const PRIVATE: u64 = 2;
const ANONYMOUS: u64 = 0x20;
const NONE: u64 = u64::MAX;
const SIGCHLD: u64 = 17;
const NEW_USER: u64 = 0x1000_0000;

#[test]
fn whatever_is_forbidden_kills() {
    let this = u64::from(std::process::id());
    let null = text(c"/dev/null");
    let forbidden: &[(&str, i64, &[u64])] = &[
        // Programs and processes.
        ("execve", libc::SYS_execve, &[text(c"/bin/true")]),
        ("execveat", libc::SYS_execveat, &[HERE, text(c"/bin/true")]),
        ("fork", libc::SYS_fork, &[]),
        ("vfork", libc::SYS_vfork, &[]),
        ("clone", libc::SYS_clone, &[SIGCHLD]),
        ("clone into a user namespace", libc::SYS_clone, &[SIGCHLD | NEW_USER]),
        ("clone a thread", libc::SYS_clone, &[0x003d_0f00]),
        ("clone3", libc::SYS_clone3, &[]),
        ("ptrace", libc::SYS_ptrace, &[0]),
        ("process_vm_readv", libc::SYS_process_vm_readv, &[this]),
        ("process_vm_writev", libc::SYS_process_vm_writev, &[this]),
        ("kill", libc::SYS_kill, &[this]),
        ("tgkill", libc::SYS_tgkill, &[this, this]),
        ("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, &[this]),
        ("rt_sigaction", libc::SYS_rt_sigaction, &[10]),
        ("pidfd_open", libc::SYS_pidfd_open, &[this]),
        ("prlimit64", libc::SYS_prlimit64, &[0, 7]),
        ("setrlimit", libc::SYS_setrlimit, &[7]),
        // Files.
        ("open", libc::SYS_open, &[null]),
        ("openat", libc::SYS_openat, &[HERE, null]),
        ("openat2", libc::SYS_openat2, &[HERE, null]),
        ("creat", libc::SYS_creat, &[null]),
        ("open_by_handle_at", libc::SYS_open_by_handle_at, &[HERE]),
        ("memfd_create", libc::SYS_memfd_create, &[text(c"x")]),
        ("stat", libc::SYS_stat, &[null]),
        ("newfstatat", libc::SYS_newfstatat, &[HERE, null]),
        ("statx", libc::SYS_statx, &[HERE, null]),
        ("readlink", libc::SYS_readlink, &[null]),
        ("unlink", libc::SYS_unlink, &[text(c"/nonexistent")]),
        ("mkdir", libc::SYS_mkdir, &[text(c"/nonexistent/x")]),
        ("fchmod", libc::SYS_fchmod, &[0, 0o777]),
        ("ftruncate", libc::SYS_ftruncate, &[0]),
        ("getdents64", libc::SYS_getdents64, &[0]),
        ("read", libc::SYS_read, &[NONE]),
        ("write", libc::SYS_write, &[NONE]),
        ("pwrite64", libc::SYS_pwrite64, &[NONE]),
        ("lseek", libc::SYS_lseek, &[NONE]),
        ("dup", libc::SYS_dup, &[0]),
        ("dup3", libc::SYS_dup3, &[0, 9]),
        ("F_DUPFD", libc::SYS_fcntl, &[0, 0]),
        ("F_SETFD", libc::SYS_fcntl, &[0, 2]),
        ("F_SETFL", libc::SYS_fcntl, &[0, 4]),
        ("splice", libc::SYS_splice, &[0]),
        ("sendfile", libc::SYS_sendfile, &[0]),
        ("ioctl", libc::SYS_ioctl, &[0, 0x5412]),
        ("chroot", libc::SYS_chroot, &[text(c"/")]),
        ("chdir", libc::SYS_chdir, &[text(c"/")]),
        ("flock", libc::SYS_flock, &[0, 2]),
        // Mounts and namespaces.
        ("mount", libc::SYS_mount, &[0, text(c"/")]),
        ("umount2", libc::SYS_umount2, &[text(c"/")]),
        ("pivot_root", libc::SYS_pivot_root, &[text(c"/"), text(c"/")]),
        ("unshare", libc::SYS_unshare, &[NEW_USER]),
        ("setns", libc::SYS_setns, &[0]),
        // Sockets: the one at its place, for messages.
        ("socket", libc::SYS_socket, &[1, 1]),
        ("socketpair", libc::SYS_socketpair, &[1, 1]),
        ("connect", libc::SYS_connect, &[3]),
        ("accept4", libc::SYS_accept4, &[3]),
        ("sendto", libc::SYS_sendto, &[3]),
        ("sendmsg elsewhere", libc::SYS_sendmsg, &[4]),
        ("recvmsg elsewhere", libc::SYS_recvmsg, &[4]),
        ("sendmmsg", libc::SYS_sendmmsg, &[3]),
        // Who one is.
        ("setuid", libc::SYS_setuid, &[0]),
        ("setresuid", libc::SYS_setresuid, &[0]),
        ("setgroups", libc::SYS_setgroups, &[0]),
        ("capset", libc::SYS_capset, &[0]),
        ("prctl", libc::SYS_prctl, &[4, 1]),
        ("arch_prctl", libc::SYS_arch_prctl, &[0x1002]),
        ("personality", libc::SYS_personality, &[0x40_0000]),
        ("seccomp", libc::SYS_seccomp, &[1]),
        // Memory that executes, or is a file's.
        ("mmap to execute", libc::SYS_mmap, &[0, 4096, READ | EXECUTE, PRIVATE | ANONYMOUS, NONE]),
        ("mmap, high bits", libc::SYS_mmap, &[0, 4096, 1 << 32 | EXECUTE, PRIVATE | ANONYMOUS, NONE]),
        ("mmap of a file", libc::SYS_mmap, &[0, 4096, READ, PRIVATE, 0]),
        ("mprotect", libc::SYS_mprotect, &[0, 4096, READ]),
        ("pkey_mprotect", libc::SYS_pkey_mprotect, &[0, 4096, READ | EXECUTE]),
        ("shmget", libc::SYS_shmget, &[0, 4096, 0o1600]),
        ("madvise", libc::SYS_madvise, &[0, 0, 4]),
        ("userfaultfd", libc::SYS_userfaultfd, &[1]),
        // The kernel.
        ("bpf", libc::SYS_bpf, &[0]),
        ("perf_event_open", libc::SYS_perf_event_open, &[0]),
        ("keyctl", libc::SYS_keyctl, &[0]),
        ("io_uring_setup", libc::SYS_io_uring_setup, &[1]),
        ("io_setup", libc::SYS_io_setup, &[1]),
        ("futex", libc::SYS_futex, &[0]),
        ("getpid", libc::SYS_getpid, &[]),
        ("x32 close", libc::SYS_close | 0x4000_0000, &[NONE]),
        ("a call of the future", 4095, &[]),
    ];
    for (name, number, given) in forbidden {
        assert_eq!(fate(*number, given), FILTERED, "{name}");
    }
}

#[test]
fn calls_in_32_bit_form_kill() {
    let fate = attempt(|| {
        let result: i64;
        // SAFETY: close(-1) by its number in the 32-bit table; registers are named, no memory is touched.
        unsafe {
            std::arch::asm!("push rbx", "mov ebx, -1", "int 0x80", "pop rbx", inlateout("rax") 6i64 => result)
        };
        result
    });
    // SIGSEGV where the kernel has no such table.
    assert!(matches!(fate, FILTERED | Fate::Killed(libc::SIGSEGV)), "{fate:?}");
}

/// The other half of the proof: an attempt comes back where it is allowed, so the kills above are the filter's.
#[test]
fn what_is_allowed_comes_back() {
    let allowed: &[(&str, i64, &[u64], i32)] = &[
        ("mmap", libc::SYS_mmap, &[0, 4096, READ | WRITE, PRIVATE | ANONYMOUS, NONE], 0),
        ("pread64", libc::SYS_pread64, &[NONE], libc::EBADF),
        ("F_GETFD", libc::SYS_fcntl, &[NONE, 1], libc::EBADF),
        ("close", libc::SYS_close, &[NONE], libc::EBADF),
        ("munmap", libc::SYS_munmap, &[1, 4096], libc::EINVAL),
    ];
    for (name, number, given, error) in allowed {
        assert_eq!(fate(*number, given), Fate::Returned(*error), "{name}");
    }
}

#[test]
fn every_call_is_there_once() {
    let mut numbers: Vec<i64> = CALLS.iter().map(|call| call.number).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), CALLS.len());
}
