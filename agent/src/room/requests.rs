//! The requests themselves. Each is a task: what it returns is its refusal.

use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Instant;

use carrel_protocol::agent::{
    Attach, Attached, Collect, ContainerId, Exec, ExitStatus, Exited, Failure, Invoke, Prepare, ProcessId,
    Start, Started,
};
use tokio::task::spawn_local;

use super::{AtWork, Container, Created, Room, State};
use crate::collect;
use crate::container::StartError;
use crate::container::cgroup::Cgroup;
use crate::container::launch::{self, Further, Live};
use crate::container::report::Order;
use crate::container::root::{self, SetIds};
use crate::fork::Child;
use crate::function::Function;
use crate::hook::Hook;
use crate::refusal::Refusal;
use crate::streams::Connections;
use crate::unpack;
use crate::usage::Meter;

impl Room {
    pub(super) async fn prepare(self: Rc<Self>, request: Prepare, _work: AtWork) -> Result<(), Refusal> {
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

    pub(super) async fn start(self: Rc<Self>, request: Start, work: AtWork) -> Result<(), Refusal> {
        let id = request.container;
        let state = self.containers.borrow().get(&id).cloned();
        if !matches!(state, Some(State::Prepared)) {
            let message = format!("container {} can't be started: it is {}", id.0, in_words(state.as_ref()));
            return Err(Refusal::new(Failure::BadRequest, message));
        }
        self.claim(request.process.id)?;
        self.containers.borrow_mut().insert(id, State::Starting);
        let started = self.start_prepared(&request, work).await;
        if started.is_err() {
            // What it is made of is still there, but its cgroup has been used.
            self.containers.borrow_mut().remove(&id);
            let created = self.created.borrow_mut().remove(&id);
            if let Some(created) = created {
                created.init.discard().await;
            }
        }
        started
    }

    /// Makes what a prepared container needs before it is known what will run there, unless that is there.
    pub(super) async fn create(&self, id: ContainerId) -> Result<Cgroup, Refusal> {
        if let Some(created) = self.created.borrow().get(&id) {
            return Ok(created.cgroup.clone());
        }
        let cgroup = self.host.cgroups.make(id);
        let cgroup = cgroup.map_err(StartError::step("making the container's cgroup"))?;
        let init = launch::Created::new(&cgroup, &self.rootfs(id)).await.inspect_err(|_| cgroup.remove())?;
        let mut meter = Meter::new(cgroup.clone());
        // What its init used until now is nobody's.
        meter.inherit(Instant::now());
        self.created.borrow_mut().insert(id, Created { init, cgroup: cgroup.clone(), meter });
        Ok(cgroup)
    }

    async fn start_prepared(self: &Rc<Self>, request: &Start, work: AtWork) -> Result<(), Refusal> {
        let id = request.container;
        let surroundings = &request.surroundings;
        let cgroup = self.create(id).await?;
        cgroup.limit(surroundings).map_err(StartError::step("limiting the container's cgroup"))?;
        let named = self.named.borrow().clone();
        let hostname = surroundings.hostname.clone().unwrap_or(named.hostname);
        let function = match &request.function {
            Some(spec) => {
                let function = Function::serve(spec.clone(), cgroup.clone()).await;
                Some(function.map_err(StartError::step("listening for the Runtime API"))?)
            }
            None => None,
        };
        let hook = match request.cloning {
            true => Some(self.hook(id, request.process.id, named.id)?),
            false => None,
        };
        let taken = hook.as_ref().map(|hook| root::take_along(hook.folder())).transpose();
        let clone_socket = taken.map_err(StartError::step("taking the clone socket along"))?;
        let order = Order {
            process: request.process.clone(),
            surroundings: surroundings.clone(),
            // On Lambda nobody is root, whatever the image brings.
            set_ids: if function.is_some() { SetIds::Ignored } else { SetIds::Honoured },
            hostname: hostname.clone(),
            extra: function.as_ref().map(|function| function.environment()).unwrap_or_default(),
        };
        let created = self.created.borrow_mut().remove(&id);
        let gone = || Refusal::new(Failure::System, "the container's init is gone");
        let Created { init, cgroup, mut meter } = created.ok_or_else(gone)?;
        meter.begin(Instant::now());
        if let Some(function) = &function {
            function.begin();
        }
        if let (Some(function), Some(hook)) = (&function, &hook) {
            let (function, hook) = (Rc::clone(function), Rc::clone(hook));
            spawn_local(async move {
                if function.ready().await {
                    hook.announce();
                }
            });
        }
        let (init, live) = init.start(&self.host.dialler, &order, clone_socket).await?;
        let container = Rc::new(Container {
            init: init.pidfd().try_clone_to_owned().ok(),
            hostname: hostname.into(),
            takes_rooms_name: surroundings.hostname.is_none(),
            cgroup,
            meter: meter.into(),
            function,
            hook,
        });
        self.containers.borrow_mut().insert(id, State::Running(Rc::clone(&container)));
        drop(work);
        let (status, out_of_memory) = self.accompany(request.process.id, &container, init, live).await;
        container.meter.borrow_mut().end(Instant::now());
        self.containers.borrow_mut().insert(id, State::Ended(Rc::clone(&container)));
        if let Some(function) = &container.function {
            function.exited(status, out_of_memory).await;
        }
        self.tell(Exited { process: request.process.id, status, out_of_memory });
        Ok(())
    }

    /// What lets a container be cloned while it runs.
    fn hook(&self, id: ContainerId, process: ProcessId, room: String) -> Result<Rc<Hook>, StartError> {
        let folder = self.host.hooks.join(id.0.to_string());
        let hook = Hook::serve(&folder, process, room, Rc::clone(&self.host.guest), self.outbox.clone());
        hook.map(Rc::new).map_err(StartError::step("making the clone socket"))
    }

    pub(super) async fn exec(self: Rc<Self>, request: Exec, _work: AtWork) -> Result<(), Refusal> {
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
        let hostname = container.hostname.borrow().clone();
        let further = Further {
            cgroup: &container.cgroup,
            process: &request.process,
            hostname: &hostname,
            init: init.as_fd(),
        };
        let (keeper, live) = further.start(&self.host.dialler).await?;
        let (status, out_of_memory) = self.accompany(request.process.id, &container, keeper, live).await;
        self.tell(Exited { process: request.process.id, status, out_of_memory });
        Ok(())
    }

    /// From Started to the end.
    pub(super) async fn accompany(
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

    /// Connects a process that was frozen with new streams.
    pub(super) async fn attach(self: Rc<Self>, request: Attach, _work: AtWork) -> Result<(), Refusal> {
        let id = request.process;
        let wrong = |what: &str| Refusal::new(Failure::BadRequest, format!("process {} {what}", id.0));
        let live = self.processes.borrow().get(&id).cloned().ok_or_else(|| wrong("doesn't run"))?;
        let pumps = live.pumps().ok_or_else(|| wrong("has no streams"))?;
        if request.stdio.terminal.is_some() && !pumps.has_terminal() {
            return Err(wrong("has no terminal"));
        }
        let connected = || wrong("is connected with its streams already");
        if !pumps.is_parted() {
            return Err(connected());
        }
        let connections = Connections::dial(&self.host.dialler, &request.stdio).await;
        let connections =
            connections.map_err(StartError::step("dialling the host for the standard streams"))?;
        // Somebody else's request may have been quicker.
        if !pumps.is_parted() {
            return Err(connected());
        }
        if let Some(size) = request.stdio.terminal {
            pumps.resize(size);
        }
        pumps.join(connections);
        self.tell(Attached { process: id });
        Ok(())
    }

    /// Of a container whose processes are gone, so that nothing changes under whoever reads.
    pub(super) async fn collect(self: Rc<Self>, request: Collect, _work: AtWork) -> Result<(), Refusal> {
        let state = self.containers.borrow().get(&request.container).cloned();
        if !matches!(state, Some(State::Ended(_))) {
            let message = format!(
                "no files can be sent of container {}: it is {}",
                request.container.0,
                in_words(state.as_ref())
            );
            return Err(Refusal::new(Failure::BadRequest, message));
        }
        let rootfs = self.rootfs(request.container);
        collect::in_a_child(&self.host.dialler, &rootfs, &request).await
    }

    pub(super) async fn invoke(self: Rc<Self>, request: Invoke, _work: AtWork) -> Result<(), Refusal> {
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
