//! A room's sleep: frozen for a snapshot, and awake again as somebody else.
//!
//! ```text
//!  awake ─Freeze─▶ inits created ─▶ cgroups frozen ─▶ output sent ─▶ streams parted ─▶ written back ─▶ Frozen ─▶ asleep
//!    ▲                │ an exec, an event, … at work; a process that can't be stopped; output that nobody takes
//!    ├──── Failed ◀───┘                                                                           │
//!    │                                     the connection is lost: a clone. Dials, Hello, Welcome ┤
//!    │                                     Welcome on the same connection: the room goes on       │
//!    │                                                                                            ▼
//!    └─── Awake ◀─ thawed ◀─ programs told (hook) ◀─ containers' names ◀─ clock, hostname ◀─ entropy, reseeded
//! ```
//!
//! From Frozen on nothing is done by itself: no timer runs, and the agent waits for the control connection alone. Nothing of the workloads runs before the
//! last step; if a step fails, the room ends with them frozen.

use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use carrel_protocol::agent::{Awake, Failure, FromHost, Frozen, Identity, Request};
use thiserror::Error;
use tokio::time::timeout;

use super::{Container, Named, Room, State, Work};
use crate::boot::monotonic_us;
use crate::container::StartError;
use crate::container::launch::Live;
use crate::control::{self, Control, ControlError};
use crate::identity::{self, IdentityError, Renaming};
use crate::refusal::Refusal;
use carrel_protocol::agent::ContainerId;

/// How long a container's processes may take to stop.
const STOP: Duration = Duration::from_secs(5);
/// How long the host may take to read what they had said.
const SAY: Duration = Duration::from_secs(5);
/// Handshakes that may be lost in a row: a snapshot may be made at any moment of the sleep, of a handshake too.
const HANDSHAKES: u32 = 8;

/// Why a room can't go on.
#[derive(Debug, Error)]
pub(crate) enum RoomError {
    /// See there.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// See there.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A clone's host isn't there.
    #[error("the host that made this clone doesn't answer")]
    Unanswered(#[source] io::Error),
    /// cgroup.freeze.
    #[error("container {id} can't be thawed")]
    Thaw {
        /// Which.
        id: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// How a sleep ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Woken {
    Awake,
    ShutDown,
}

impl Room {
    /// Stops everything that isn't the agent. Whatever hinders that is a refusal, and all runs on.
    pub(super) async fn freeze(&self) -> Result<(), Refusal> {
        if let Some(work) = self.at_work.borrow().first() {
            let message = format!("the room can't be frozen while {}", in_words(*work));
            return Err(Refusal::new(Failure::BadRequest, message));
        }
        if let Some(disk) = self.disk.lock().await.as_mut() {
            let settled = disk.settled().await;
            settled.map_err(|error| Refusal::new(Failure::System, carrel_protocol::chain(&error)))?;
        }
        self.create_prepared().await;
        let running = self.running();
        let hooks = || running.iter().filter_map(|(_, container)| container.hook.as_ref());
        // Before the first process is stopped: an answer that it doesn't read any more, each clone would.
        hooks().for_each(|hook| hook.sleep());
        let lives: Vec<Rc<Live>> = self.processes.borrow().values().cloned().collect();
        let stopped = stop(&running, &lives).await;
        for pumps in lives.iter().filter_map(|live| live.pumps()) {
            match stopped {
                Ok(()) => pumps.part().await,
                Err(_) => pumps.go_on(),
            }
        }
        if stopped.is_err() {
            for (_, container) in &running {
                // What was not frozen need not be thawed; that the kernel doesn't thaw what it froze is unheard of.
                let _ = container.cgroup.thaw();
            }
            hooks().for_each(|hook| hook.stay());
            return stopped;
        }
        self.sample();
        self.write_back();
        Ok(())
    }

    /// Has the inits of containers that are not started yet wait for what they will run: each clone finds them there. One that can't be made is
    /// made again by who starts it, and said then.
    async fn create_prepared(&self) {
        let prepared = |(id, state): (&ContainerId, &State)| matches!(state, State::Prepared).then_some(*id);
        let prepared: Vec<ContainerId> = self.containers.borrow().iter().filter_map(prepared).collect();
        for id in prepared {
            let _ = self.create(id).await;
        }
    }

    /// From Frozen to Awake, or to the end.
    pub(super) async fn sleep(&self, control: &mut Control) -> Result<Woken, RoomError> {
        loop {
            match control.receive().await {
                Ok(FromHost::Welcome(welcome)) => {
                    let since = monotonic_us();
                    let identity = control::identity(welcome)?;
                    self.wake(control, &identity, Birth::None, since).await?;
                    return Ok(Woken::Awake);
                }
                Ok(FromHost::Shutdown(_)) => return Ok(Woken::ShutDown),
                Ok(FromHost::Freeze(_)) => control.send(&Frozen {}.into()).await?,
                Ok(FromHost::ReportUsage(_)) => control.send(&self.usage(false).into()).await?,
                Ok(other) => self.refuse_asleep(control, &other).await?,
                Err(lost) if lost.is_loss() => {
                    let since = monotonic_us();
                    let identity = self.greet(control).await?;
                    self.wake(control, &identity, Birth::Clone, since).await?;
                    return Ok(Woken::Awake);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn refuse_asleep(&self, control: &Control, message: &FromHost) -> Result<(), RoomError> {
        let request = match message {
            FromHost::Prepare(request) => Request::Prepare(request.container),
            FromHost::Start(request) => Request::Process(request.process.id),
            FromHost::Exec(request) => Request::Process(request.process.id),
            FromHost::Invoke(request) => Request::Invoke(request.id.clone()),
            FromHost::Attach(request) => Request::Attach(request.process),
            FromHost::Collect(request) => Request::Collect(request.container),
            // None of them is answered ever, or they were served before.
            FromHost::Signal(_)
            | FromHost::Resize(_)
            | FromHost::Refused(_)
            | FromHost::Welcome(_)
            | FromHost::Freeze(_)
            | FromHost::ReportUsage(_)
            | FromHost::Shutdown(_) => return Ok(()),
        };
        let message = "the room is frozen; welcome it first".to_owned();
        let failed = carrel_protocol::agent::Failed { request, failure: Failure::BadRequest, message };
        Ok(control.send(&failed.into()).await?)
    }

    /// A clone's first words, and who it is told to be. `control` is the new connection then.
    async fn greet(&self, control: &mut Control) -> Result<Identity, RoomError> {
        let mut handshakes = 0;
        loop {
            *control = Control::dial(&self.host.dialler).await.map_err(RoomError::Unanswered)?;
            let greeted = async {
                control.hello(self.host.booted_us, true).await?;
                control.welcome().await
            };
            match greeted.await {
                Err(lost) if lost.is_loss() && handshakes < HANDSHAKES => handshakes += 1,
                greeted => return Ok(greeted?),
            }
        }
    }

    /// Becomes who it is told to be, and lets everything run on. The order is the module's.
    async fn wake(
        &self,
        control: &Control,
        who: &Identity,
        birth: Birth,
        since_us: u64,
    ) -> Result<(), RoomError> {
        let behind_ns = identity::adopt(&*self.host.guest, who)?;
        let running = self.running();
        for (id, container) in &running {
            self.rename(*id, container, &who.hostname).await?;
        }
        self.named.replace(Named { id: who.id.clone(), hostname: who.hostname.clone() });
        if birth == Birth::Clone {
            let now = Instant::now();
            for (_, container) in self.started() {
                container.meter.borrow_mut().inherit(now);
                if let Some(function) = &container.function {
                    function.cloned();
                }
            }
        }
        for hook in running.iter().filter_map(|(_, container)| container.hook.as_ref()) {
            hook.cloned(&who.id);
        }
        for (id, container) in &running {
            container.cgroup.thaw().map_err(|source| RoomError::Thaw { id: id.0, source })?;
        }
        let took_us = monotonic_us().saturating_sub(since_us);
        Ok(control.send(&Awake { behind_ns, took_us }.into()).await?)
    }

    /// A container that took the room's name takes the new one.
    async fn rename(&self, id: ContainerId, container: &Container, to: &str) -> Result<(), IdentityError> {
        let from = container.hostname.borrow().clone();
        if !container.takes_rooms_name || from == to {
            return Ok(());
        }
        let failed = |source| IdentityError::Container { id: id.0, source };
        let gone = || failed(io::Error::other("its init is gone"));
        let init = container.init.as_ref().ok_or_else(gone)?.try_clone().map_err(failed)?;
        let renaming = Renaming { init, rootfs: self.rootfs(id), from, to: to.to_owned() };
        self.host.guest.rename(renaming).await.map_err(failed)?;
        container.hostname.replace(to.to_owned());
        Ok(())
    }

    fn running(&self) -> Vec<(ContainerId, Rc<Container>)> {
        let running = |(id, state): (&ContainerId, &State)| match state {
            State::Running(container) => Some((*id, Rc::clone(container))),
            State::Preparing | State::Prepared | State::Starting | State::Ended(_) => None,
        };
        self.containers.borrow().iter().filter_map(running).collect()
    }
}

/// Whether the room that wakes is the one that slept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Birth {
    None,
    Clone,
}

/// Freezes the containers and has all that their processes said sent.
async fn stop(running: &[(ContainerId, Rc<Container>)], lives: &[Rc<Live>]) -> Result<(), Refusal> {
    for (id, container) in running {
        let step = format!("freezing container {}", id.0);
        container.cgroup.freeze(STOP).await.map_err(StartError::step(step))?;
    }
    let said = async {
        for pumps in lives.iter().filter_map(|live| live.pumps()) {
            pumps.still().await;
        }
    };
    timeout(SAY, said).await.map_err(|_| {
        let message = "the room can't be frozen while its output is not read";
        Refusal::new(Failure::BadRequest, message)
    })
}

fn in_words(work: Work) -> &'static str {
    match work {
        Work::Preparing => "a container is being prepared",
        Work::Starting => "a container is being started",
        Work::Executing => "an exec runs",
        Work::Invoking => "the function handles an event",
        Work::Attaching => "a process is being connected with its streams",
        Work::Collecting => "files of it are being sent",
    }
}
