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

/// Both programs: what gets EAFNOSUPPORT, and what gets EPERM.
///
/// # Errors
///
/// The compiler's, about the table above.
pub(crate) fn programs() -> Result<[BpfProgram; 2], seccompiler::BackendError> {
    // A kernel without vsock would say the same, and programs that probe for it know this answer.
    let families = [libc::SYS_socket, libc::SYS_socketpair].map(|call| {
        let vsock = u64::from(libc::AF_VSOCK.unsigned_abs());
        let condition = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, vsock)?;
        Ok((call, vec![SeccompRule::new(vec![condition])?]))
    });
    let families = families.into_iter().collect::<Result<BTreeMap<_, _>, seccompiler::BackendError>>()?;
    let denied = DENIED.iter().map(|&(call, _reason)| (call, Vec::new())).collect();
    Ok([compile(families, libc::EAFNOSUPPORT)?, compile(denied, libc::EPERM)?])
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
