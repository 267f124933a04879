//! The agent's side of a process: its streams dialled, its supervisor forked, its start and its end awaited.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use carrel_protocol::agent::{ExitStatus, Failure, Process, TerminalSize};

use super::cgroup::Cgroup;
use super::report::{self, Report, Reports};
use super::root::Root;
use super::supervise::{self, Job};
use super::{StartError, seccomp};
use crate::fork::{self, Child, Separate};
use crate::refusal::Refusal;
use crate::socket::Dialler;
use crate::streams::{Connections, Pumps};
use carrel_protocol::chain;

impl From<StartError> for Refusal {
    fn from(error: StartError) -> Self {
        Self::new(error.failure(), chain(&error))
    }
}

/// A process to launch.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    pub(crate) dialler: &'a Dialler,
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) process: &'a Process,
    pub(crate) hostname: &'a str,
    /// Added to its environment.
    pub(crate) extra: &'a [(String, String)],
}

/// A process that runs.
#[derive(Debug)]
pub(crate) struct Live {
    reports: Reports,
    pumps: Option<Pumps>,
}

impl Launch<'_> {
    /// Starts a container's first process, below an init of the container's own.
    ///
    /// # Errors
    ///
    /// Why it doesn't run.
    pub(crate) async fn first(&self, root: &Root<'_>) -> Result<(Child, Live), Refusal> {
        let namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        self.run(namespaces, |job| supervise::init(job, root)).await
    }

    /// Starts one more process in the container of `init` (a pidfd).
    ///
    /// # Errors
    ///
    /// Why it doesn't run.
    pub(crate) async fn further(&self, init: BorrowedFd<'_>) -> Result<(Child, Live), Refusal> {
        self.run(0, |job| supervise::keeper(job, init)).await
    }

    async fn run(&self, namespaces: i32, body: impl FnOnce(Job<'_>) -> u8) -> Result<(Child, Live), Refusal> {
        let connections = Connections::dial(self.dialler, &self.process.stdio)
            .await
            .map_err(StartError::step("dialling the host for the standard streams"))?;
        let (mut connections, mut pumps, pipes) = match self.process.stdio.terminal {
            Some(_) => (Some(connections), None, [None, None, None]),
            None => {
                let (pumps, pipes) = connections.through_pipes().map_err(StartError::step("making pipes"))?;
                (None, Some(pumps), pipes)
            }
        };
        let (child, reports) =
            self.fork(namespaces, pipes, body).map_err(StartError::step("forking the container's init"))?;
        loop {
            match reports.next().await {
                Some((Report::Started, _)) => {
                    return Ok((child, Live { reports, pumps }));
                }
                Some((Report::Terminal, Some(master))) => {
                    pumps = match connections.take().map(|all| all.through_terminal(master)) {
                        Some(made) => Some(made.map_err(StartError::step("joining the terminal"))?),
                        None => pumps,
                    };
                }
                Some((Report::Failed { failure, message }, _)) => {
                    let _ = child.wait().await;
                    return Err(Refusal { failure, message });
                }
                Some((Report::Terminal | Report::Ended(_), _)) | None => {
                    child.kill();
                    let status = child.wait().await;
                    let message = format!("the container's init ended before the process began ({status:?})");
                    return Err(Refusal::new(Failure::System, message));
                }
            }
        }
    }

    /// Forks the supervisor. The pipes' ends, and its own, are closed here when this returns.
    fn fork(
        &self,
        namespaces: i32,
        pipes: [Option<OwnedFd>; 3],
        body: impl FnOnce(Job<'_>) -> u8,
    ) -> io::Result<(Child, Reports)> {
        let filters = seccomp::programs().map_err(io::Error::other)?;
        let (reports, reporter) = report::pair()?;
        let cgroup = self.cgroup.open()?;
        let separate = Separate { namespaces, cgroup: Some(cgroup.as_fd()) };
        let mut pipes = Some(pipes);
        let child = fork::fork(separate, || {
            let pipes = pipes.take().unwrap_or_default();
            body(Job {
                process: self.process,
                hostname: self.hostname,
                extra: self.extra,
                filters: &filters,
                reporter: &reporter,
                pipes,
            })
        })?;
        Ok((child, reports))
    }
}

impl Live {
    /// A process that a test is the supervisor of.
    #[cfg(test)]
    pub(crate) fn of(reports: Reports, pumps: Pumps) -> Self {
        Self { reports, pumps: Some(pumps) }
    }

    /// Sends a signal; a process that has ended doesn't mind.
    pub(crate) fn signal(&self, signal: u8) {
        self.reports.signal(signal);
    }

    /// Sets the terminal's size.
    pub(crate) fn resize(&self, size: TerminalSize) {
        if let Some(pumps) = &self.pumps {
            pumps.resize(size);
        }
    }

    /// Nobody will ask for its streams any more: what it says is for nobody.
    pub(crate) fn forsake(&self) {
        if let Some(pumps) = self.pumps.as_ref().filter(|pumps| pumps.is_parted()) {
            pumps.join(Connections::default());
        }
    }

    /// Its streams, if it got as far as having some.
    pub(crate) fn pumps(&self) -> Option<&Pumps> {
        self.pumps.as_ref()
    }

    /// Waits for the end of the process, of its supervisor, and of its output.
    pub(crate) async fn end(&self, supervisor: Child) -> ExitStatus {
        let told = loop {
            match self.reports.next().await {
                Some((Report::Ended(status), _)) => break Some(status),
                Some((Report::Terminal | Report::Started | Report::Failed { .. }, _)) => {}
                None => break None,
            }
        };
        // An init's own end comes after that of everything in its container.
        let own = supervisor.wait().await;
        if let Some(pumps) = &self.pumps {
            pumps.finish().await;
        }
        told.or(own.ok()).unwrap_or(ExitStatus::Signal(9))
    }
}
