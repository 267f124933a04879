//! Containers: a cgroup, namespaces, a root, an init that supervises, and the workload.
//!
//! ```text
//!  agent ── fork (clone3 into the cgroup, new mount, pid, ipc, uts namespaces) ──▶ init, PID 1 of the container
//!    │ ◀══ seqpacket: Created ═════════════════════════════════╡ root: pivot_root, mounts
//!    ╎                                                         ╎ (a template may be made here)
//!    │ ═══ order, pipes ══════════════════════════════════════▶│ names, settings, volumes
//!    │ ◀══ Terminal, Started | Failed, Ended ══════════════════╡ fork ──▶ workload: user, capabilities, seccomp, exec
//!    │ ═══ signals ═══════════════════════════════════════════▶│ reaps; ends when the workload does, and with it all others
//!    │
//!    └─── fork (clone3 into the cgroup, setns into the init's) ─▶ keeper: as the init, for one exec
//! ```

pub(crate) mod capabilities;
pub(crate) mod cgroup;
pub(crate) mod devices;
pub(crate) mod launch;
pub(crate) mod program;
pub(crate) mod report;
pub(crate) mod root;
pub(crate) mod seccomp;
pub(crate) mod supervise;
pub(crate) mod tmpfs;
pub(crate) mod user;

use std::io;
use std::path::Path;

use carrel_protocol::agent::Failure;
use thiserror::Error;

/// Why a process can't be started. Told to the host as its failure and one sentence.
#[derive(Debug, Error)]
pub(crate) enum StartError {
    /// See there.
    #[error(transparent)]
    User(#[from] user::UserError),
    /// See there.
    #[error(transparent)]
    Tmpfs(#[from] tmpfs::TmpfsError),
    /// The program's name leads nowhere.
    #[error(
        "the command '{0}' is not found in the container; look at its PATH, or at the interpreter that a script names"
    )]
    NotFound(String),
    /// execve(2) refuses it.
    #[error("the command '{program}' can't be executed; it must be an executable file for this machine")]
    NotExecutable {
        /// What was asked for.
        program: String,
        /// EACCES, ENOEXEC, ….
        #[source]
        source: io::Error,
    },
    /// execve(2) says E2BIG.
    #[error(
        "the command '{0}' can't be executed with arguments and environment as long as these; 128 KiB each and 2 MiB together are the most that the kernel takes"
    )]
    TooLong(String),
    /// The image has something else where a container needs a file or directory of its own.
    #[error("the image is in the way at {path}: there must be {expected} or nothing")]
    InTheWay {
        /// In the container.
        path: String,
        /// "a directory", "a file".
        expected: &'static str,
        /// EEXIST, ENOTDIR, ….
        #[source]
        source: io::Error,
    },
    /// The request names something impossible.
    #[error("{0}")]
    Request(String),
    /// The kernel refused a step.
    #[error("{step} failed")]
    Step {
        /// What was being done.
        step: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl StartError {
    /// For `map_err`: the step that failed.
    pub(crate) fn step<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |error| Self::Step { step: step.into(), source: error.into() }
    }

    /// For `map_err`, where the image decides what is found at a path: whatever is no shortage is its fault.
    pub(crate) fn at(path: &Path, expected: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.display().to_string();
        move |source| match source.raw_os_error() {
            Some(libc::ENOSPC | libc::ENOMEM | libc::EIO | libc::EMFILE | libc::ENFILE) => {
                Self::Step { step: format!("making {expected} at {path}"), source }
            }
            _ => Self::InTheWay { path, expected, source },
        }
    }

    /// The class that decides the host's exit status.
    pub(crate) fn failure(&self) -> Failure {
        match self {
            Self::User(_) => Failure::UnknownUser,
            Self::NotFound(_) => Failure::CommandNotFound,
            Self::NotExecutable { .. } | Self::TooLong(_) => Failure::CommandNotExecutable,
            Self::InTheWay { .. } => Failure::BadPayload,
            Self::Tmpfs(_) | Self::Request(_) => Failure::BadRequest,
            Self::Step { source, .. } if source.raw_os_error() == Some(libc::ENOSPC) => Failure::DiskFull,
            Self::Step { .. } => Failure::System,
        }
    }
}
