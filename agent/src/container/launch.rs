//! The agent's side of a process: its streams dialled, its supervisor forked, its start and its end awaited.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use carrel_protocol::agent::{ExitStatus, Failure, Process, TerminalSize};
use carrel_protocol::chain;
use tokio::time::timeout;

use super::cgroup::Cgroup;
use super::report::{self, Along, Order, Report, Reporter, Reports};
use super::supervise::{self, Job};
use super::{StartError, seccomp};
use crate::fork::{self, Child, Separate};
use crate::refusal::Refusal;
use crate::socket::Dialler;
use crate::streams::{Connections, Pipes, Pumps};

const SIGKILL: u8 = 9;
/// How long a supervisor may take to end its process.
const LAST_WORDS: Duration = Duration::from_secs(2);

impl From<StartError> for Refusal {
    fn from(error: StartError) -> Self {
        Self::new(error.failure(), chain(&error))
    }
}

/// A container's init that has its namespaces and its root, and waits to be told what to run (OCI runtime-spec, runtime.md, *created*). It ends when
/// this is dropped.
#[derive(Debug)]
pub(crate) struct Created {
    init: Child,
    reports: Reports,
}

/// One more process in a container.
#[derive(Debug)]
pub(crate) struct Further<'a> {
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) process: &'a Process,
    pub(crate) hostname: &'a str,
    /// A pidfd of the container's init.
    pub(crate) init: BorrowedFd<'a>,
}

/// A process that runs.
#[derive(Debug)]
pub(crate) struct Live {
    reports: Reports,
    pumps: Option<Pumps>,
}

impl Created {
    /// Forks a container's init, and waits until what every container has around it is there.
    ///
    /// # Errors
    ///
    /// Why it isn't.
    pub(crate) async fn new(cgroup: &Cgroup, rootfs: &Path) -> Result<Self, Refusal> {
        let namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        let forked = fork(cgroup, namespaces, |reporter| supervise::init(reporter, rootfs));
        let (init, reports) = forked.map_err(StartError::step("forking the container's init"))?;
        match reports.next().await {
            Some((Report::Created, _)) => Ok(Self { init, reports }),
            other => Err(refused(init, other.map(|(report, _)| report)).await),
        }
    }

    /// Has it run a process.
    ///
    /// # Errors
    ///
    /// Why that doesn't run; the container is gone then.
    pub(crate) async fn start(
        self,
        dialler: &Dialler,
        order: &Order,
        clone_socket: Option<OwnedFd>,
    ) -> Result<(Child, Live), Refusal> {
        let Self { init, reports } = self;
        let ordered = || {
            let (ours, pipes) = Pipes::new(&order.process.stdio).map_err(StartError::step("making pipes"))?;
            let along = Along { pipes, clone_socket };
            reports
                .order(order, &along)
                .map_err(StartError::step("telling the container's init what to run"))?;
            Ok::<_, StartError>(ours)
        };
        match ordered() {
            Ok(pipes) => connect(dialler, &order.process, pipes, init, reports).await,
            Err(error) => {
                discard(init).await;
                Err(error.into())
            }
        }
    }

    /// Ends it, with all that it made.
    pub(crate) async fn discard(self) {
        discard(self.init).await;
    }
}

impl Further<'_> {
    /// Starts it.
    ///
    /// # Errors
    ///
    /// Why it doesn't run.
    pub(crate) async fn start(&self, dialler: &Dialler) -> Result<(Child, Live), Refusal> {
        let Self { cgroup, process, hostname, init } = *self;
        let filters = seccomp::programs().map_err(io::Error::other);
        let filters = filters.map_err(StartError::step("compiling filters"))?;
        let (ours, pipes) = Pipes::new(&process.stdio).map_err(StartError::step("making pipes"))?;
        let mut pipes = Some(pipes);
        let forked = fork(cgroup, 0, |reporter| {
            let pipes = pipes.take().unwrap_or_default();
            let job = Job { process, hostname, extra: &[], filters: &filters, reporter, pipes };
            supervise::keeper(job, init)
        });
        // The process's ends are its own alone.
        drop(pipes);
        let (keeper, reports) = forked.map_err(StartError::step("forking the process's keeper"))?;
        connect(dialler, process, ours, keeper, reports).await
    }
}

/// Forks a supervisor.
fn fork(
    cgroup: &Cgroup,
    namespaces: i32,
    body: impl FnOnce(&Reporter) -> u8,
) -> io::Result<(Child, Reports)> {
    let (reports, reporter) = report::pair()?;
    let cgroup = cgroup.open()?;
    let child = fork::fork(Separate { namespaces, cgroup: Some(cgroup.as_fd()) }, || body(&reporter))?;
    Ok((child, reports))
}

/// Ends a process that nobody is connected with, through its supervisor: an exec's outlives a keeper that is killed.
async fn abandon(supervisor: Child, reports: &Reports) {
    reports.signal(SIGKILL);
    let gone = async { while reports.next().await.is_some() {} };
    let _ = timeout(LAST_WORDS, gone).await;
    discard(supervisor).await;
}

async fn discard(supervisor: Child) {
    supervisor.kill();
    let _ = supervisor.wait().await;
}

/// A supervisor whose process doesn't begin: what it said last, and its end.
async fn refused(supervisor: Child, last: Option<Report>) -> Refusal {
    if let Some(Report::Failed { failure, message }) = last {
        let _ = supervisor.wait().await;
        return Refusal { failure, message };
    }
    supervisor.kill();
    let status = supervisor.wait().await;
    let message = format!("the container's init ended before the process began ({status:?})");
    Refusal::new(Failure::System, message)
}

/// Connects a process's streams with the host while its supervisor makes it, until it runs, or doesn't.
async fn connect(
    dialler: &Dialler,
    process: &Process,
    pipes: Pipes,
    supervisor: Child,
    reports: Reports,
) -> Result<(Child, Live), Refusal> {
    let dialled = Connections::dial(dialler, &process.stdio).await;
    let dialled = dialled.map_err(StartError::step("dialling the host for the standard streams"));
    let streams = dialled.and_then(|connections| match process.stdio.terminal {
        Some(_) => Ok((Some(connections), None)),
        None => {
            let pumps = connections.through_pipes(pipes).map_err(StartError::step("joining the pipes"))?;
            Ok((None, Some(pumps)))
        }
    });
    let (mut connections, mut pumps) = match streams {
        Ok(streams) => streams,
        Err(error) => {
            abandon(supervisor, &reports).await;
            return Err(error.into());
        }
    };
    loop {
        match reports.next().await {
            Some((Report::Started, _)) => return Ok((supervisor, Live { reports, pumps })),
            Some((Report::Terminal, Some(master))) => {
                match connections.take().map(|all| all.through_terminal(master)) {
                    Some(Ok(made)) => pumps = Some(made),
                    Some(Err(error)) => {
                        abandon(supervisor, &reports).await;
                        return Err(StartError::step("joining the terminal")(error).into());
                    }
                    None => {}
                }
            }
            other => return Err(refused(supervisor, other.map(|(report, _)| report)).await),
        }
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
                Some((Report::Created | Report::Terminal | Report::Started | Report::Failed { .. }, _)) => {}
                None => break None,
            }
        };
        // An init's own end comes after that of everything in its container.
        let own = supervisor.wait().await;
        if let Some(pumps) = &self.pumps {
            pumps.finish().await;
        }
        told.or(own.ok()).unwrap_or(ExitStatus::Signal(SIGKILL))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use carrel_protocol::agent::{ProcessId, Stdio, Stream, Token};

    use super::*;

    #[tokio::test]
    async fn a_process_that_nobody_can_be_connected_with_is_ended_by_its_supervisor() {
        let (reports, reporter) = report::pair().unwrap();
        let (told, tell) = io::pipe().unwrap();
        let supervisor = fork::fork(Separate::default(), || {
            fork::close_all_but(&[reporter.as_fd(), tell.as_fd()]);
            let mut waits = [rustix::event::PollFd::new(&reporter, rustix::event::PollFlags::IN)];
            let _ = rustix::event::poll(&mut waits, None);
            let _ = rustix::io::write(&tell, &[reporter.signal().unwrap_or(0)]);
            0
        });
        drop((reporter, tell));
        let stream = Stream { port: 7, token: Token([0; 16]) };
        let process = Process {
            id: ProcessId(1),
            arguments: vec!["true".into()],
            environment: Vec::new(),
            working_directory: "/".into(),
            user: String::new(),
            stdio: Stdio { stdout: Some(stream), ..Stdio::default() },
        };
        let nowhere = Dialler::Unix("/nonexistent".into());
        let refusal = connect(&nowhere, &process, Pipes::default(), supervisor.unwrap(), reports).await;
        assert!(refusal.unwrap_err().message.contains("standard streams"));
        let mut signals = Vec::new();
        { told }.read_to_end(&mut signals).unwrap();
        assert_eq!(signals, [SIGKILL]);
    }
}
