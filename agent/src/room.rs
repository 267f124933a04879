//! The room: what the host asks for, carried out, each request a task of its own, until it says Shutdown or goes away.
//!
//! ```text
//!  container:  (nothing) ─Prepare─▶ Preparing ─▶ Prepared ─Start─▶ Running ─▶ Ended
//!                                      │ fails                       ▲ Exec, Signal, Resize, Invoke
//!                                      ▼
//!                                  (nothing)
//! ```

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use carrel_protocol::agent::{
    Collect, ContainerId, Ending, EndingReason, Exec, ExitStatus, Exited, Failed, Failure, FromAgent,
    FromHost, Invoke, Prepare, ProcessId, Request, Start, Started, Usage,
};
use tokio::sync::mpsc;
use tokio::task::spawn_local;
use tokio::time::MissedTickBehavior;

use crate::collect;
use crate::container::StartError;
use crate::container::cgroup::{self, Cgroup};
use crate::container::launch::{Launch, Live};
use crate::container::root::SetIds;
use crate::control::{Control, ControlError};
use crate::disk::Disk;
use crate::fork::Child;
use crate::function::Function;
use crate::refusal::Refusal;
use crate::socket::Dialler;
use crate::unpack;
use crate::usage::{Meter, SAMPLE};

/// How long killed containers may take to be gone before the room ends without them.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What the room has from its guest.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) dialler: Dialler,
    /// Below it, one directory a container.
    pub(crate) containers: PathBuf,
    pub(crate) cgroups: cgroup::Tree,
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
    /// Those that run.
    processes: RefCell<BTreeMap<ProcessId, Rc<Live>>>,
    /// All that ever were asked for.
    known: RefCell<BTreeSet<ProcessId>>,
    outbox: mpsc::UnboundedSender<FromAgent>,
}

#[derive(Clone, Debug)]
enum State {
    Preparing,
    Prepared,
    Starting,
    Running(Rc<Container>),
    Ended(Rc<Container>),
}

/// A container that was started.
#[derive(Debug)]
pub(crate) struct Container {
    /// A pidfd of its init.
    init: Option<OwnedFd>,
    hostname: String,
    pub(crate) cgroup: Cgroup,
    pub(crate) meter: RefCell<Meter>,
    function: Option<Rc<Function>>,
}

impl Room {
    /// Serves the host until it asks for the end, or is gone. Returns when nothing runs any more.
    pub(crate) async fn live(mut host: Host, mut control: Control) {
        let (outbox, mut outgoing) = mpsc::unbounded_channel();
        let room = Rc::new(Self {
            disk: host.disk.take().into(),
            host,
            containers: RefCell::default(),
            processes: RefCell::default(),
            known: RefCell::default(),
            outbox,
        });
        let ended = room.serve(&mut control, &mut outgoing).await;
        room.kill_all().await;
        if ended.is_ok() {
            // Dirty pages become I/O that is counted.
            if let Ok(files) =
                rustix::fs::open(&room.host.containers, rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty())
            {
                let _ = rustix::fs::syncfs(files);
            }
            while let Ok(message) = outgoing.try_recv() {
                let _ = control.send(&message).await;
            }
            let _ = control.send(&room.usage(true).into()).await;
            let _ = control.send(&Ending { reason: EndingReason::Asked }.into()).await;
        } else if let Err(error) = ended {
            control.broken(&carrel_protocol::chain(&error)).await;
        }
        let _ = control.close().await;
    }

    async fn serve(
        self: &Rc<Self>,
        control: &mut Control,
        outgoing: &mut mpsc::UnboundedReceiver<FromAgent>,
    ) -> Result<(), ControlError> {
        let mut sample = tokio::time::interval(SAMPLE);
        sample.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut report: Option<tokio::time::Interval> = None;
        loop {
            tokio::select! {
                message = control.receive() => match message? {
                    FromHost::Shutdown(_) => return Ok(()),
                    FromHost::ReportUsage(request) => {
                        control.send(&self.usage(false).into()).await?;
                        report = request.every_ms.map(|every| {
                            let every = Duration::from_millis(u64::from(every.max(100)));
                            let mut report = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
                            report.set_missed_tick_behavior(MissedTickBehavior::Delay);
                            report
                        });
                    }
                    other @ (FromHost::Welcome(_)
                    | FromHost::Refused(_)
                    | FromHost::Prepare(_)
                    | FromHost::Start(_)
                    | FromHost::Exec(_)
                    | FromHost::Signal(_)
                    | FromHost::Resize(_)
                    | FromHost::Invoke(_)
                    | FromHost::Collect(_)) => self.carry_out(other),
                },
                Some(message) = outgoing.recv() => control.send(&message).await?,
                _ = sample.tick() => self.sample(),
                () = tick(report.as_mut()) => control.send(&self.usage(false).into()).await?,
            }
        }
    }

    fn carry_out(self: &Rc<Self>, message: FromHost) {
        match message {
            FromHost::Prepare(request) => {
                let about = Request::Prepare(request.container);
                self.answer(about, Rc::clone(self).prepare(request));
            }
            FromHost::Start(request) => {
                self.answer(Request::Process(request.process.id), Rc::clone(self).start(request));
            }
            FromHost::Exec(request) => {
                self.answer(Request::Process(request.process.id), Rc::clone(self).exec(request));
            }
            FromHost::Invoke(request) => {
                self.answer(Request::Invoke(request.id.clone()), Rc::clone(self).invoke(request));
            }
            FromHost::Collect(request) => {
                self.answer(Request::Collect(request.container), Rc::clone(self).collect(request));
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
            // Served by the loop itself; a second welcome has no meaning yet.
            FromHost::ReportUsage(_)
            | FromHost::Shutdown(_)
            | FromHost::Welcome(_)
            | FromHost::Refused(_) => {}
        }
    }

    /// Runs a request as a task; its refusal is the answer.
    fn answer(self: &Rc<Self>, request: Request, work: impl Future<Output = Result<(), Refusal>> + 'static) {
        let room = Rc::clone(self);
        spawn_local(async move {
            if let Err(Refusal { failure, message }) = work.await {
                // The message's own cap is 8 KiB, in JSON.
                let message = message.chars().take(1000).collect();
                room.tell(Failed { request, failure, message });
            }
        });
    }

    fn tell(&self, message: impl Into<FromAgent>) {
        // The receiver is gone only when the room is.
        let _ = self.outbox.send(message.into());
    }

    fn folder(&self, id: ContainerId) -> PathBuf {
        self.host.containers.join(id.0.to_string())
    }

    async fn prepare(self: Rc<Self>, request: Prepare) -> Result<(), Refusal> {
        let id = request.container;
        if self.containers.borrow().contains_key(&id) {
            return Err(Refusal::new(Failure::BadRequest, format!("container {} is prepared already", id.0)));
        }
        self.containers.borrow_mut().insert(id, State::Preparing);
        let began = Instant::now();
        let prepared = async {
            if let Some(disk) = self.disk.lock().await.as_mut() {
                let grown = disk.grown().await;
                grown.map_err(|error| Refusal::new(Failure::System, carrel_protocol::chain(&error)))?;
            }
            unpack::in_a_child(&self.host.dialler, &self.folder(id), &request, began).await
        };
        match prepared.await {
            Ok(prepared) => {
                self.containers.borrow_mut().insert(id, State::Prepared);
                self.tell(prepared);
                Ok(())
            }
            Err(refusal) => {
                self.containers.borrow_mut().remove(&id);
                Err(refusal)
            }
        }
    }

    async fn start(self: Rc<Self>, request: Start) -> Result<(), Refusal> {
        let id = request.container;
        let state = self.containers.borrow().get(&id).cloned();
        if !matches!(state, Some(State::Prepared)) {
            let message = format!("container {} can't be started: it is {}", id.0, in_words(state.as_ref()));
            return Err(Refusal::new(Failure::BadRequest, message));
        }
        self.claim(request.process.id)?;
        self.containers.borrow_mut().insert(id, State::Starting);
        let started = self.start_prepared(&request).await;
        if started.is_err() {
            // What it is made of is still there, but its cgroup has been used.
            self.containers.borrow_mut().remove(&id);
        }
        started
    }

    async fn start_prepared(self: &Rc<Self>, request: &Start) -> Result<(), Refusal> {
        let id = request.container;
        let surroundings = &request.surroundings;
        let cgroup = self.host.cgroups.make(id, surroundings);
        let cgroup = cgroup.map_err(StartError::step("making the container's cgroup"))?;
        let hostname = surroundings.hostname.clone().unwrap_or_else(|| self.host.hostname.clone());
        let function = match &request.function {
            Some(spec) => {
                let function = Function::serve(spec.clone(), cgroup.clone()).await;
                Some(function.map_err(StartError::step("listening for the Runtime API"))?)
            }
            None => None,
        };
        let extra = function.as_ref().map(|function| function.environment()).unwrap_or_default();
        let launch = Launch {
            dialler: &self.host.dialler,
            cgroup: &cgroup,
            process: &request.process,
            hostname: &hostname,
            extra: &extra,
        };
        let mut meter = Meter::new(cgroup.clone());
        meter.begin(Instant::now());
        if let Some(function) = &function {
            function.begin();
        }
        // On Lambda nobody is root, whatever the image brings.
        let set_ids = if function.is_some() { SetIds::Ignored } else { SetIds::Honoured };
        let rootfs = self.folder(id).join(unpack::ROOTFS);
        let (init, live) = launch.first(&rootfs, surroundings, set_ids).await?;
        let container = Rc::new(Container {
            init: init.pidfd().try_clone_to_owned().ok(),
            hostname,
            cgroup,
            meter: meter.into(),
            function,
        });
        self.containers.borrow_mut().insert(id, State::Running(Rc::clone(&container)));
        let (status, out_of_memory) = self.accompany(request.process.id, &container, init, live).await;
        container.meter.borrow_mut().end(Instant::now());
        self.containers.borrow_mut().insert(id, State::Ended(Rc::clone(&container)));
        if let Some(function) = &container.function {
            function.exited(status, out_of_memory).await;
        }
        self.tell(Exited { process: request.process.id, status, out_of_memory });
        Ok(())
    }

    async fn exec(self: Rc<Self>, request: Exec) -> Result<(), Refusal> {
        let state = self.containers.borrow().get(&request.container).cloned();
        let Some(State::Running(container)) = state else {
            let message = format!(
                "nothing can be executed in container {}: it is {}",
                request.container.0,
                in_words(state.as_ref())
            );
            return Err(Refusal::new(Failure::BadRequest, message));
        };
        self.claim(request.process.id)?;
        let gone = || Refusal::new(Failure::System, "the container's init is gone");
        let init = container.init.as_ref().ok_or_else(gone)?;
        let launch = Launch {
            dialler: &self.host.dialler,
            cgroup: &container.cgroup,
            process: &request.process,
            hostname: &container.hostname,
            extra: &[],
        };
        let (keeper, live) = launch.further(init.as_fd()).await?;
        let (status, out_of_memory) = self.accompany(request.process.id, &container, keeper, live).await;
        self.tell(Exited { process: request.process.id, status, out_of_memory });
        Ok(())
    }

    /// From Started to the end.
    async fn accompany(
        &self,
        id: ProcessId,
        container: &Container,
        supervisor: Child,
        live: Live,
    ) -> (ExitStatus, bool) {
        let before = container.meter.borrow().out_of_memory_kills();
        let live = Rc::new(live);
        self.processes.borrow_mut().insert(id, Rc::clone(&live));
        self.tell(Started { process: id });
        let status = live.end(supervisor).await;
        self.processes.borrow_mut().remove(&id);
        (status, container.meter.borrow().out_of_memory_kills() > before)
    }

    /// A process's number is used once.
    fn claim(&self, id: ProcessId) -> Result<(), Refusal> {
        if self.known.borrow_mut().insert(id) {
            Ok(())
        } else {
            Err(Refusal::new(Failure::BadRequest, format!("process {} exists already", id.0)))
        }
    }

    async fn invoke(self: Rc<Self>, request: Invoke) -> Result<(), Refusal> {
        let container = self.containers.borrow().values().find_map(|state| match state {
            State::Running(container) | State::Ended(container) => {
                container.function.is_some().then(|| Rc::clone(container))
            }
            State::Preparing | State::Prepared | State::Starting => None,
        });
        let function = container.as_ref().and_then(|container| container.function.as_ref());
        let function = function.ok_or_else(|| {
            Refusal::new(Failure::BadRequest, "this room runs no function, so nothing can be invoked")
        })?;
        let invoked = function.invoke(&self.host.dialler, request).await?;
        self.tell(invoked);
        Ok(())
    }

    /// Of a container whose processes are gone, so that nothing changes under whoever reads.
    async fn collect(self: Rc<Self>, request: Collect) -> Result<(), Refusal> {
        let state = self.containers.borrow().get(&request.container).cloned();
        if !matches!(state, Some(State::Ended(_))) {
            let message = format!(
                "no files can be sent of container {}: it is {}",
                request.container.0,
                in_words(state.as_ref())
            );
            return Err(Refusal::new(Failure::BadRequest, message));
        }
        let rootfs = self.folder(request.container).join(unpack::ROOTFS);
        collect::in_a_child(&self.host.dialler, &rootfs, &request).await
    }

    /// Containers that have been started.
    fn started(&self) -> Vec<(ContainerId, Rc<Container>)> {
        let started = |(id, state): (&ContainerId, &State)| match state {
            State::Running(container) | State::Ended(container) => Some((*id, Rc::clone(container))),
            State::Preparing | State::Prepared | State::Starting => None,
        };
        self.containers.borrow().iter().filter_map(started).collect()
    }

    fn sample(&self) {
        let now = Instant::now();
        for (_, container) in self.started() {
            container.meter.borrow_mut().sample(now);
        }
    }

    fn usage(&self, last: bool) -> Usage {
        let now = Instant::now();
        let containers = self.started();
        let read =
            |(id, container): &(ContainerId, Rc<Container>)| (id.0, container.meter.borrow_mut().read(now));
        Usage { containers: containers.iter().map(read).collect(), last }
    }

    async fn kill_all(&self) {
        for (_, container) in self.started() {
            container.cgroup.kill();
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

async fn tick(interval: Option<&mut tokio::time::Interval>) {
    match interval {
        Some(interval) => {
            interval.tick().await;
        }
        None => std::future::pending().await,
    }
}

fn in_words(state: Option<&State>) -> &'static str {
    match state {
        None => "not prepared",
        Some(State::Preparing) => "being prepared",
        Some(State::Prepared) => "not started",
        Some(State::Starting) => "being started",
        Some(State::Running(_)) => "running already",
        Some(State::Ended(_)) => "over",
    }
}
