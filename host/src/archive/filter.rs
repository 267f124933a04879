//! The system calls of an archive's reader, each with its reason. Anything else kills it with SIGSYS: there is no `open`, no `write`, no
//! `socket`, no process and no thread, and no memory but anonymous memory that can't be executed.

use std::collections::BTreeMap;
use std::io;

use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::confinement::Missing;
use crate::launch::OWNER_FD;

/// A condition on an argument, of which the kernel uses 32 bits: its index, how it is compared, with what.
type Condition = (u8, SeccompCmpOp, u64);

struct Call {
    number: i64,
    /// All must hold.
    conditions: &'static [Condition],
}

const fn call(number: i64, conditions: &'static [Condition]) -> Call {
    Call { number, conditions }
}

const SOCKET: Condition = (0, Eq, OWNER_FD.unsigned_abs() as u64);
const NOT_EXECUTABLE: Condition = (2, MaskedEq(4), 0); // PROT_EXEC
const ANONYMOUS: Condition = (3, MaskedEq(0x20), 0x20); // MAP_ANONYMOUS
const F_GETFD: u64 = 1;

const CALLS: &[Call] = &[
    // Be handed the archive.
    call(libc::SYS_recvmsg, &[SOCKET]),
    // Read it: of all descriptors only the archive and /dev/null can be read so.
    call(libc::SYS_pread64, &[]),
    // Answer.
    call(libc::SYS_sendmsg, &[SOCKET]),
    // The allocator; mremap leaves protection as it is.
    call(libc::SYS_brk, &[]),
    call(libc::SYS_mmap, &[NOT_EXECUTABLE, ANONYMOUS]),
    call(libc::SYS_mremap, &[]),
    call(libc::SYS_munmap, &[]),
    // Let go of the archive and the socket; debug builds of the standard library look at a descriptor first.
    call(libc::SYS_close, &[]),
    call(libc::SYS_fcntl, &[(1, Eq, F_GETFD)]),
    // The end of the main thread in the standard library, and of the process.
    call(libc::SYS_sigaltstack, &[]),
    call(libc::SYS_exit_group, &[]),
];

/// Puts this process, which has one thread, under the filter for good.
pub(super) fn install() -> Result<(), Missing> {
    let installed = || -> io::Result<()> {
        let program = program().map_err(io::Error::other)?;
        seccompiler::apply_filter(&program).map_err(io::Error::other)
    };
    installed().map_err(Missing::new("seccomp filters"))
}

fn program() -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for Call { number, conditions } in CALLS {
        // A call without rules is allowed whatever its arguments.
        let chain = rules.entry(*number).or_default();
        if !conditions.is_empty() {
            let conditions = conditions.iter().map(|(index, operator, value)| {
                SeccompCondition::new(*index, SeccompCmpArgLen::Dword, operator.clone(), *value)
            });
            chain.push(SeccompRule::new(conditions.collect::<Result<_, _>>()?)?);
        }
    }
    let (other, these) = (SeccompAction::KillProcess, SeccompAction::Allow);
    SeccompFilter::new(rules, other, these, TargetArch::x86_64)?.try_into()
}

#[cfg(test)]
#[expect(unsafe_code, reason = "attempts of forbidden system calls, each in a forked child")]
mod tests;
