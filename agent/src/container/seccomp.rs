//! System calls that workloads don't get. A list of what is denied, not of what is allowed: the wall is the VM, and ordinary
//! programs should find an ordinary kernel. What is denied would reach the agent's connection to the host, or the room's kernel
//! as a whole; most of it asks for capabilities that workloads lack anyway.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// Denied with EPERM, each with its reason.
const DENIED: [(libc::c_long, &str); 16] = [
    (libc::SYS_reboot, "ends the room behind the agent's back"),
    (libc::SYS_kexec_load, "replaces the room's kernel"),
    (libc::SYS_kexec_file_load, "replaces the room's kernel"),
    (libc::SYS_init_module, "adds to the room's kernel"),
    (libc::SYS_finit_module, "adds to the room's kernel"),
    (libc::SYS_delete_module, "takes from the room's kernel"),
    (libc::SYS_bpf, "programs of the room's kernel, and the filter on devices"),
    (libc::SYS_perf_event_open, "looks into other processes"),
    (libc::SYS_open_by_handle_at, "opens files outside of the root"),
    (libc::SYS_swapon, "the room's memory is the host's account"),
    (libc::SYS_swapoff, "the room's memory is the host's account"),
    (libc::SYS_settimeofday, "the clock is the host's"),
    (libc::SYS_clock_settime, "the clock is the host's"),
    (libc::SYS_acct, "writes files for the whole room"),
    (libc::SYS_iopl, "the machine's ports"),
    (libc::SYS_ioperm, "the machine's ports"),
];

/// Denied with ENOSYS, as by a kernel built without: libraries then do the same by ordinary system calls. io_uring makes and connects
/// sockets by operations that no filter sees, of `AF_VSOCK` too; and it was behind most of the ways into Linux that were found
/// in its years, so Docker's profile lacks it as well.
const ABSENT: [libc::c_long; 3] =
    [libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];

/// All programs: what gets EAFNOSUPPORT, what gets EPERM, and what gets ENOSYS.
///
/// # Errors
///
/// The compiler's, about the table above.
pub(crate) fn programs() -> Result<[BpfProgram; 3], seccompiler::BackendError> {
    // A kernel without vsock would say the same, and programs that probe for it know this answer.
    let families = [libc::SYS_socket, libc::SYS_socketpair].map(|call| {
        let vsock = u64::from(libc::AF_VSOCK.unsigned_abs());
        let condition = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, vsock)?;
        Ok((call, vec![SeccompRule::new(vec![condition])?]))
    });
    let families = families.into_iter().collect::<Result<BTreeMap<_, _>, seccompiler::BackendError>>()?;
    let denied = DENIED.iter().map(|&(call, _reason)| (call, Vec::new())).collect();
    let absent = ABSENT.iter().map(|&call| (call, Vec::new())).collect();
    Ok([
        compile(families, libc::EAFNOSUPPORT)?,
        compile(denied, libc::EPERM)?,
        compile(absent, libc::ENOSYS)?,
    ])
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    errno: i32,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let deny = SeccompAction::Errno(errno.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, deny, TargetArch::x86_64)?.try_into()
}

/// Puts the calling process, and what it executes, under the programs. Needs CAP_SYS_ADMIN, because `no_new_privs` stays off:
/// setuid programs work.
///
/// # Errors
///
/// seccomp(2)'s.
pub(crate) fn apply(programs: &[BpfProgram]) -> io::Result<()> {
    for program in programs {
        let filter = libc::sock_fprog {
            len: u16::try_from(program.len()).map_err(io::Error::other)?,
            filter: program.as_ptr().cast_mut().cast(),
        };
        // SAFETY: the kernel copies `len` instructions, laid out as its sock_filter, and writes nothing.
        let done =
            unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const filter) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a thread under the filters: they are a thread's, and no test after this one should live with them.
    fn filtered(attempt: impl FnOnce() + Send + 'static) {
        std::thread::spawn(|| {
            // So that CAP_SYS_ADMIN isn't needed.
            rustix::thread::set_no_new_privs(true).unwrap();
            apply(&programs().unwrap()).unwrap();
            attempt();
        })
        .join()
        .unwrap();
    }

    /// A system call with nothing but wrong arguments: whatever isn't denied fails, and otherwise.
    fn errno(call: libc::c_long, first: i64) -> i32 {
        // SAFETY: no call takes these numbers for addresses that it could write to.
        let done = unsafe { libc::syscall(call, first, -1_i64, -1_i64, -1_i64, -1_i64, -1_i64) };
        if done == 0 { 0 } else { io::Error::last_os_error().raw_os_error().unwrap() }
    }

    #[test]
    fn what_is_denied_is_denied() {
        filtered(|| {
            for (call, reason) in DENIED {
                assert_eq!(errno(call, -1), libc::EPERM, "{call} {reason}");
            }
        });
    }

    #[test]
    fn io_uring_is_nothing_that_this_kernel_has() {
        filtered(|| {
            for call in ABSENT {
                assert_eq!(errno(call, 1), libc::ENOSYS, "{call}");
            }
        });
    }

    #[test]
    fn vsock_is_a_family_that_this_kernel_doesnt_have() {
        filtered(|| {
            for call in [libc::SYS_socket, libc::SYS_socketpair] {
                let family = i64::from(libc::AF_VSOCK);
                // The kernel looks at the low half of the register, and so must the filter.
                for first in [family, family | 1 << 32, family | -1 << 32] {
                    assert_eq!(errno(call, first), libc::EAFNOSUPPORT, "{call} {first:#x}");
                }
            }
        });
    }

    #[test]
    fn ordinary_programs_find_an_ordinary_kernel() {
        filtered(|| {
            for call in [libc::SYS_mount, libc::SYS_ptrace, libc::SYS_clone3, libc::SYS_io_setup] {
                assert_ne!(errno(call, -1), 0, "{call}");
            }
            let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
            io::Write::write_all(&mut &one, b"x").unwrap();
            io::Read::read_exact(&mut &other, &mut [0]).unwrap();
            std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            std::thread::spawn(|| std::fs::read("/proc/self/status").unwrap()).join().unwrap();
        });
    }

    #[test]
    fn threads_inherit_the_filters() {
        filtered(|| {
            let denied = std::thread::spawn(|| errno(libc::SYS_bpf, -1)).join().unwrap();
            assert_eq!(denied, libc::EPERM);
        });
    }
}
