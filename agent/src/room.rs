//! The room: what the host asks for, carried out, each request a task of its own, until it says Shutdown or goes away.
//!
//! ```text
//!  container:  (nothing) ─Prepare─▶ Preparing ─▶ Prepared ─Start─▶ Running ─▶ Ended
//!                                      │ fails                       ▲ Exec, Signal, Resize, Invoke, Attach
//!                                      ▼
//!                                  (nothing)
//! ```
//!
//! Between requests the room can be frozen and cloned: see [`sleep`].

mod requests;
mod sleep;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use carrel_protocol::agent::{
    ContainerId, Ending, EndingReason, Failed, FromAgent, FromHost, Frozen, ProcessId, ReportUsage, Request,
    Usage,
};
use tokio::sync::mpsc;
use tokio::task::spawn_local;
use tokio::time::MissedTickBehavior;

use crate::container::cgroup::{self, Cgroup};
use crate::container::launch::{self, Live};
use crate::control::Control;
use crate::disk::Disk;
use crate::function::Function;
use crate::hook::Hook;
use crate::identity::Guest;
use crate::refusal::Refusal;
use crate::socket::Dialler;
use crate::spare;
use crate::unpack;
use crate::usage::{Meter, Pace};
use sleep::{RoomError, Woken};

/// How long killed containers may take to be gone before the room ends without them.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What the room has from its guest.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) dialler: Dialler,
    /// CLOCK_MONOTONIC when the agent began, µs.
    pub(crate) booted_us: u64,
    /// Below it, one directory a container.
    pub(crate) containers: PathBuf,
    /// Below it, one directory with a clone socket for each container that has one.
    pub(crate) hooks: PathBuf,
    pub(crate) cgroups: cgroup::Tree,
    pub(crate) guest: Rc<dyn Guest>,
    /// The room's id.
    pub(crate) id: String,
    /// Of containers that name none.
    pub(crate) hostname: String,
    pub(crate) disk: Option<Disk>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Room {
    host: Host,
    disk: tokio::sync::Mutex<Option<Disk>>,
    containers: RefCell<BTreeMap<ContainerId, State>>,
    /// Of those that wait for their start: what is there of them already.
    created: RefCell<BTreeMap<ContainerId, Created>>,
    /// Those that run.
    processes: RefCell<BTreeMap<ProcessId, Rc<Live>>>,
    /// All that ever were asked for.
    known: RefCell<BTreeSet<ProcessId>>,
    /// What can't be frozen.
    at_work: RefCell<Vec<Work>>,
    /// Who this room is, in a clone another than at boot.
    named: RefCell<Named>,
    outbox: mpsc::UnboundedSender<FromAgent>,
}

/// A room's names.
#[derive(Clone, Debug)]
struct Named {
    id: String,
    hostname: String,
}

/// What is at work for a request, and must be over before the room can be frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Preparing,
    Starting,
    Executing,
    Invoking,
    Attaching,
    Collecting,
}

/// Work, until this is dropped. It is there before the request's task first runs.
#[derive(Debug)]
struct AtWork(Rc<Room>, Work);

/// What follows a time awake.
enum Turn {
    Sleep,
    End,
}

#[derive(Clone, Debug)]
enum State {
    Preparing,
    Prepared,
    Starting,
    Running(Rc<Container>),
    Ended(Rc<Container>),
}

/// A container whose init waits to be told what to run: made when it is started, or for a template's clones before that.
#[derive(Debug)]
struct Created {
    init: launch::Created,
    cgroup: Cgroup,
    meter: Meter,
}

/// A container that was started.
#[derive(Debug)]
pub(crate) struct Container {
    /// A pidfd of its init.
    init: Option<OwnedFd>,
    hostname: RefCell<String>,
    /// The hostname is the room's.
    takes_rooms_name: bool,
    pub(crate) cgroup: Cgroup,
    pub(crate) meter: RefCell<Meter>,
    function: Option<Rc<Function>>,
    hook: Option<Rc<Hook>>,
}

impl Room {
    /// A room with nothing in it, and what it has to say.
    fn new(mut host: Host) -> (Rc<Self>, mpsc::UnboundedReceiver<FromAgent>) {
        let (outbox, outgoing) = mpsc::unbounded_channel();
        let named = Named { id: host.id.clone(), hostname: host.hostname.clone() };
        let room = Self {
            disk: host.disk.take().into(),
            host,
            containers: RefCell::default(),
            created: RefCell::default(),
            processes: RefCell::default(),
            known: RefCell::default(),
            at_work: RefCell::default(),
            named: named.into(),
            outbox,
        };
        (Rc::new(room), outgoing)
    }

    /// Serves the host until it asks for the end, or is gone. Returns when nothing runs any more.
    pub(crate) async fn live(host: Host, control: Control) {
        let (room, outgoing) = Self::new(host);
        room.live_on(control, outgoing).await;
    }

    async fn live_on(
        self: &Rc<Self>,
        mut control: Control,
        mut outgoing: mpsc::UnboundedReceiver<FromAgent>,
    ) {
        let ended = self.serve(&mut control, &mut outgoing).await;
        self.kill_all().await;
        if ended.is_ok() {
            self.write_back();
            while let Ok(message) = outgoing.try_recv() {
                let _ = control.send(&message).await;
            }
            let _ = control.send(&self.usage(true).into()).await;
            let _ = control.send(&Ending { reason: EndingReason::Asked }.into()).await;
        } else if let Err(error) = ended {
            control.broken(&carrel_protocol::chain(&error)).await;
        }
        let _ = control.close().await;
    }

    /// Dirty pages become I/O: at the end so that it is counted, in a template so that its clones needn't do it.
    fn write_back(&self) {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
        if let Ok(files) = rustix::fs::open(&self.host.containers, flags, rustix::fs::Mode::empty()) {
            let _ = rustix::fs::syncfs(files);
        }
    }

    async fn serve(
        self: &Rc<Self>,
        control: &mut Control,
        outgoing: &mut mpsc::UnboundedReceiver<FromAgent>,
    ) -> Result<(), RoomError> {
        loop {
            match self.serve_awake(control, outgoing).await? {
                Turn::Sleep => {}
                Turn::End => return Ok(()),
            }
            match self.sleep(control).await? {
                Woken::Awake => {}
                Woken::ShutDown => return Ok(()),
            }
        }
    }

    /// Until the host asks for the end, or the room is frozen. Whatever runs by itself, samples and reports, is over then.
    async fn serve_awake(
        self: &Rc<Self>,
        control: &mut Control,
        outgoing: &mut mpsc::UnboundedReceiver<FromAgent>,
    ) -> Result<Turn, RoomError> {
        let mut pace = Pace::often();
        let sample = tokio::time::sleep(Duration::ZERO);
        tokio::pin!(sample);
        let mut report: Option<tokio::time::Interval> = None;
        loop {
            tokio::select! {
                message = control.receive() => match message? {
                    FromHost::Shutdown(_) => return Ok(Turn::End),
                    FromHost::ReportUsage(request) => {
                        control.send(&self.usage(false).into()).await?;
                        report = period(&request);
                    }
                    FromHost::Freeze(_) => match self.freeze().await {
                        Ok(()) => {
                            while let Ok(message) = outgoing.try_recv() {
                                control.send(&message).await?;
                            }
                            control.send(&Frozen {}.into()).await?;
                            return Ok(Turn::Sleep);
                        }
                        Err(refusal) => self.fail(Request::Freeze, refusal),
                    },
                    other @ (FromHost::Welcome(_)
                    | FromHost::Refused(_)
                    | FromHost::Prepare(_)
                    | FromHost::Start(_)
                    | FromHost::Exec(_)
                    | FromHost::Signal(_)
                    | FromHost::Resize(_)
                    | FromHost::Attach(_)
                    | FromHost::Invoke(_)
                    | FromHost::Collect(_)) => {
                        self.carry_out(other);
                        pace = Pace::often();
                        let soon = tokio::time::Instant::now() + pace.after(true);
                        // Never put off: requests may come without end.
                        if soon < sample.deadline() {
                            sample.as_mut().reset(soon);
                        }
                    }
                },
                Some(message) = outgoing.recv() => control.send(&message).await?,
                () = &mut sample => {
                    let gap = pace.after(self.sample());
                    sample.as_mut().reset(tokio::time::Instant::now() + gap);
                }
                () = tick(report.as_mut()) => control.send(&self.usage(false).into()).await?,
            }
        }
    }

    fn carry_out(self: &Rc<Self>, message: FromHost) {
        match message {
            FromHost::Prepare(request) => {
                let work = self.begin(Work::Preparing);
                self.answer(Request::Prepare(request.container), Rc::clone(self).prepare(request, work));
            }
            FromHost::Start(request) => {
                let work = self.begin(Work::Starting);
                self.answer(Request::Process(request.process.id), Rc::clone(self).start(request, work));
            }
            FromHost::Exec(request) => {
                let work = self.begin(Work::Executing);
                self.answer(Request::Process(request.process.id), Rc::clone(self).exec(request, work));
            }
            FromHost::Invoke(request) => {
                let work = self.begin(Work::Invoking);
                self.answer(Request::Invoke(request.id.clone()), Rc::clone(self).invoke(request, work));
            }
            FromHost::Attach(request) => {
                let work = self.begin(Work::Attaching);
                self.answer(Request::Attach(request.process), Rc::clone(self).attach(request, work));
            }
            FromHost::Collect(request) => {
                let work = self.begin(Work::Collecting);
                self.answer(Request::Collect(request.container), Rc::clone(self).collect(request, work));
            }
            FromHost::Signal(request) => {
                if let Some(live) = self.processes.borrow().get(&request.process) {
                    live.signal(request.signal);
                }
            }
            FromHost::Resize(request) => {
                if let Some(live) = self.processes.borrow().get(&request.process) {
                    live.resize(request.size);
                }
            }
            // Served by the loop itself; a welcome has no meaning for who isn't frozen.
            FromHost::ReportUsage(_)
            | FromHost::Shutdown(_)
            | FromHost::Freeze(_)
            | FromHost::Welcome(_)
            | FromHost::Refused(_) => {}
        }
    }

    fn begin(self: &Rc<Self>, work: Work) -> AtWork {
        self.at_work.borrow_mut().push(work);
        AtWork(Rc::clone(self), work)
    }

    /// Runs a request as a task; its refusal is the answer.
    fn answer(self: &Rc<Self>, request: Request, work: impl Future<Output = Result<(), Refusal>> + 'static) {
        let room = Rc::clone(self);
        spawn_local(async move {
            if let Err(refusal) = work.await {
                room.fail(request, refusal);
            }
        });
    }

    fn fail(&self, request: Request, Refusal { failure, message }: Refusal) {
        // The message's own cap is 8 KiB, in JSON.
        let message = message.chars().take(1000).collect();
        self.tell(Failed { request, failure, message });
    }

    fn tell(&self, message: impl Into<FromAgent>) {
        // The receiver is gone only when the room is.
        let _ = self.outbox.send(message.into());
    }

    fn folder(&self, id: ContainerId) -> PathBuf {
        self.host.containers.join(id.0.to_string())
    }

    fn rootfs(&self, id: ContainerId) -> PathBuf {
        self.folder(id).join(unpack::ROOTFS)
    }

    /// Containers that have been started.
    fn started(&self) -> Vec<(ContainerId, Rc<Container>)> {
        let started = |(id, state): (&ContainerId, &State)| match state {
            State::Running(container) | State::Ended(container) => Some((*id, Rc::clone(container))),
            State::Preparing | State::Prepared | State::Starting => None,
        };
        self.containers.borrow().iter().filter_map(started).collect()
    }

    /// Says whether there was a change worth looking for more, in any of the containers.
    fn sample(&self) -> bool {
        let now = Instant::now();
        // Each of them is sampled, whatever those before it say.
        self.started()
            .iter()
            .fold(false, |changed, (_, container)| container.meter.borrow_mut().sample(now) | changed)
    }

    fn usage(&self, last: bool) -> Usage {
        let now = Instant::now();
        let containers = self.started();
        let read =
            |(id, container): &(ContainerId, Rc<Container>)| (id.0, container.meter.borrow_mut().read(now));
        let containers = containers.iter().map(read).collect();
        Usage { containers, spare_bytes: spare::spare_bytes(), last }
    }

    async fn kill_all(&self) {
        for (id, state) in &*self.containers.borrow() {
            match state {
                State::Running(container) | State::Ended(container) => container.cgroup.kill(),
                // Its process may run before its streams are there.
                State::Starting => self.host.cgroups.of(*id).kill(),
                State::Preparing | State::Prepared => {}
            }
        }
        // What nobody asked for any more after a freezing isn't waited for.
        for live in self.processes.borrow().values() {
            live.forsake();
        }
        let gone = async {
            while !self.processes.borrow().is_empty() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            // Their last messages are put into the outbox by tasks that are ready now.
            tokio::task::yield_now().await;
        };
        let _ = tokio::time::timeout(LAST_WORDS, gone).await;
    }
}

/// As asked for, beginning with the period's end.
fn period(request: &ReportUsage) -> Option<tokio::time::Interval> {
    let every = Duration::from_millis(u64::from(request.every_ms?.max(100)));
    let mut report = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
    report.set_missed_tick_behavior(MissedTickBehavior::Delay);
    Some(report)
}

async fn tick(interval: Option<&mut tokio::time::Interval>) {
    match interval {
        Some(interval) => {
            interval.tick().await;
        }
        None => std::future::pending().await,
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        let mut at_work = self.0.at_work.borrow_mut();
        if let Some(at) = at_work.iter().position(|work| *work == self.1) {
            at_work.swap_remove(at);
        }
    }
}

#[cfg(test)]
mod tests;
