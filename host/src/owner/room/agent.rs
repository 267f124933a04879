//! What the agent says, and what follows from it. All of it is a claim.

use std::time::{Duration, Instant};

use carrel_protocol::agent::{
    self, Attach, Blob, EndingReason, Entropy, Exited, Failed, FromAgent, FromHost, Hello, Identity, Layer,
    Prepare, ProcessId, Refused, ReportUsage, Request, Signal, Stdio, UnpackLimits, Welcome, Zip,
};

use super::super::api::{self, StreamKind};
use super::super::streams::Purpose;
use super::{Process, Room, SAMPLE, SIGKILL, WORKLOAD};
use crate::home::{Task, random};
use crate::launch;
use crate::outcome::{Outcome, Step, clean};
use crate::record::Phase;
use crate::session::SessionError;
use crate::spec::{CONTAINER, MOST_ENTRIES, ProcessSpec};
use crate::timestamp::{mark, now_ms, now_ns};
use carrel_protocol::{Message, chain};

/// From the agent's silence to the VMM's end: a guest that restarts or panics takes a moment.
const AFTER_THE_AGENT: Duration = Duration::from_secs(5);
/// How a time is told to the agent, ms.
const REPORT_MS: u32 = 5000;

impl Room {
    pub(super) fn hear_agent(&mut self, message: FromAgent) {
        match (message, self.record.phase) {
            (FromAgent::Hello(hello), Phase::Handshaking) if self.pressure.is_none() => self.welcome(&hello),
            (FromAgent::Prepared(prepared), Phase::Preparing) => {
                tracing::debug!(?prepared, "the payload is in place");
                self.note(mark("payload unpacked"));
                match self.own.task {
                    Task::Template if !self.own.spec.initialised => self.freeze(),
                    Task::Run | Task::Clone | Task::Template => self.or_give_up(Self::start),
                }
            }
            (FromAgent::Frozen(_), Phase::Freezing) => self.frozen(),
            (FromAgent::Awake(awake), _) if self.own.task == Task::Clone => {
                tracing::debug!(?awake, "the clone is itself");
                self.note(mark("clone awake"));
            }
            (FromAgent::Started(started), _) => self.started(started.process),
            (FromAgent::Ready(ready), _) if ready.process == WORKLOAD && self.initialises() => self.ready(),
            (FromAgent::Attached(attached), Phase::Starting) if self.attaches() => {
                self.started(attached.process);
            }
            (FromAgent::Exited(exited), _) => self.exited(&exited),
            (FromAgent::Failed(failed), _) => self.failed(&failed),
            (FromAgent::Usage(mut usage), _) => {
                self.hear_spare(usage.spare_bytes);
                // A report that leaves the container out answers nobody.
                if let Some(usage) = usage.containers.remove(&CONTAINER.0) {
                    self.guest_usage = Some(usage);
                    self.answer_usage();
                }
            }
            (FromAgent::Invoked(invoked), _) => {
                // An event that was never fetched has a runtime that was gone before.
                self.event = None;
                self.record_working_set();
                if self.end_invocation() {
                    self.tell_client(self.creator, api::Invoked { invoked });
                }
            }
            (FromAgent::Ending(ending), _) => {
                if let EndingReason::Broken { message } = ending.reason {
                    self.agent_said = Some(clean(&message));
                }
            }
            (
                FromAgent::Hello(_)
                | FromAgent::Prepared(_)
                | FromAgent::Frozen(_)
                | FromAgent::Awake(_)
                | FromAgent::Ready(_)
                | FromAgent::Attached(_),
                phase,
            ) => {
                self.give_up(Outcome::AgentFailed { message: format!("it spoke out of turn ({phase:?})") });
            }
        }
    }

    fn welcome(&mut self, hello: &Hello) {
        if hello.version != agent::VERSION {
            let reason = format!(
                "the agent speaks version {} and this host version {}; build the initramfs anew (scripts/build)",
                hello.version,
                agent::VERSION
            );
            self.tell_agent(Refused { reason: reason.clone() });
            return self.give_up(Outcome::AgentFailed { message: reason });
        }
        if hello.clone != (self.own.task == Task::Clone) {
            let message = "it says that it is a clone, or that it is none, and the host knows better".into();
            return self.give_up(Outcome::AgentFailed { message });
        }
        tracing::debug!(booted_us = hello.booted_us, kernel = %clean(&hello.kernel), "the agent is there");
        let mut entropy = Entropy([0; 64]);
        if let Err(error) = random(&mut entropy.0) {
            return self.give_up(Outcome::OwnerFailed { message: chain(&error) });
        }
        let hostname = self.own.spec.surroundings.hostname.clone();
        let identity = Identity {
            id: self.own.id.to_string(),
            hostname: hostname.unwrap_or_else(|| self.own.id.to_string()),
            realtime_ns: now_ns(),
            entropy,
        };
        self.tell_agent(Welcome { version: agent::VERSION, identity });
        self.note(mark("welcomed"));
        if self.own.task == Task::Clone {
            // Its payload is in place. The agent carries this out once it is itself.
            return match self.attaches() {
                true => self.or_give_up(Self::attach),
                false => self.or_give_up(Self::start),
            };
        }
        match self.preparation() {
            Ok(prepare) => {
                let bytes = prepare
                    .layers
                    .iter()
                    .map(|l| l.blob.size)
                    .chain(prepare.zips.iter().map(|z| z.blob.size))
                    .sum();
                let time = self.own.patience.prepare(bytes);
                self.enter(Phase::Preparing, Some((Step::Prepare, time)));
                self.tell_agent(prepare);
            }
            Err(error) => self.give_up(Outcome::OwnerFailed { message: chain(&error) }),
        }
    }

    fn preparation(&mut self) -> std::io::Result<Prepare> {
        let payload = self.own.spec.payload.clone();
        let (mut layers, mut zips) = (Vec::new(), Vec::new());
        for (n, layer) in payload.layers.iter().enumerate() {
            let stream = self.streams.agree(Purpose::Blob(n))?;
            let blob = Blob { digest: layer.digest.clone(), size: layer.size, stream };
            layers.push(Layer { compression: layer.compression, blob, diff_id: layer.diff_id.clone() });
        }
        for (n, zip) in payload.zips.iter().enumerate() {
            let stream = self.streams.agree(Purpose::Blob(layers.len() + n))?;
            zips.push(Zip {
                blob: Blob { digest: zip.digest.clone(), size: zip.size, stream },
                at: zip.at.clone(),
            });
        }
        let bytes = payload.unpacked_bytes.unwrap_or(self.own.spec.machine.disk_bytes);
        Ok(Prepare {
            container: CONTAINER,
            layers,
            zips,
            limits: UnpackLimits { bytes, entries: MOST_ENTRIES },
        })
    }

    fn or_give_up(&mut self, step: fn(&mut Self) -> std::io::Result<()>) {
        if let Err(error) = step(self) {
            self.give_up(Outcome::OwnerFailed { message: chain(&error) });
        }
    }

    fn start(&mut self) -> std::io::Result<()> {
        let process = self.add_workload()?;
        let start = self.own.spec.start(process, self.initialises());
        self.tell_agent(start);
        Ok(())
    }

    /// The workload runs already, as its template's did, and waits for streams.
    fn attach(&mut self) -> std::io::Result<()> {
        let agent::Process { id, stdio, .. } = self.add_workload()?;
        self.tell_agent(Attach { process: id, stdio });
        Ok(())
    }

    fn add_workload(&mut self) -> std::io::Result<agent::Process> {
        let spec = self.own.spec.process.clone();
        let client = (!self.own.spec.detached).then_some(self.creator);
        let process = self.add_process(WORKLOAD, &spec, client)?;
        let time = self.own.patience.start();
        self.enter(Phase::Starting, Some((Step::Start, time)));
        Ok(process)
    }

    /// A process as the agent is told of it, with its streams agreed on.
    pub(super) fn add_process(
        &mut self,
        id: ProcessId,
        spec: &ProcessSpec,
        client: Option<super::ClientId>,
    ) -> std::io::Result<agent::Process> {
        // The command may have said another size since it asked for the process.
        let said = client.and_then(|client| self.clients.get(&client)?.size);
        let terminal = spec.terminal.map(|size| said.unwrap_or(size));
        let mut process = Process { client, size: terminal, ..Process::default() };
        let mut agree = |stream: StreamKind, wanted: bool| {
            if !wanted {
                return Ok(None);
            }
            process.awaited.insert(stream);
            self.streams.agree(Purpose::Process(id, stream)).map(Some)
        };
        let stdio = Stdio {
            stdin: agree(StreamKind::Stdin, spec.interactive)?,
            stdout: agree(StreamKind::Stdout, true)?,
            stderr: agree(StreamKind::Stderr, terminal.is_none())?,
            terminal,
        };
        self.processes.insert(id, process);
        Ok(spec.told(id, stdio))
    }

    /// Tells the agent of one more process in the container. One that can't be said is refused: the room must not suffer for it.
    pub(super) fn exec(&mut self, id: super::ClientId, process: agent::Process) {
        let process_id = process.id;
        let exec = FromHost::from(agent::Exec { container: CONTAINER, process });
        match exec.encode() {
            Ok(_) => self.tell_agent(exec),
            Err(error) => {
                self.streams.forget(process_id);
                self.processes.remove(&process_id);
                self.refuse(id, &chain(&SessionError::unsent(error.into())));
            }
        }
    }

    fn started(&mut self, id: ProcessId) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        if std::mem::replace(&mut process.started, true) {
            return tracing::debug!(?id, "the agent said twice that a process runs");
        }
        if let Some(client) = process.client.or((id == WORKLOAD).then_some(self.creator)) {
            self.tell_client(client, api::Started {});
        }
        if id != WORKLOAD && self.processes.get(&id).is_some_and(|process| process.client.is_none()) {
            // Its command went away before the agent knew the process, which heard no signal then.
            self.tell_agent(Signal { process: id, signal: SIGKILL });
        }
        self.resize(id);
        if id != WORKLOAD || self.record.phase != Phase::Starting {
            return;
        }
        self.note(mark(if self.attaches() { "workload attached" } else { "workload started" }));
        if self.initialises() {
            return self.initialise();
        }
        self.record.started_ms = Some(now_ms());
        self.enter(Phase::Running, None);
        self.deadlines.timeout =
            self.own.spec.timeout_ms.map(|ms| Instant::now() + Duration::from_millis(ms));
        self.await_working_set();
        if let Some(cgroup) = &self.cgroup
            && let Err(error) = cgroup.limit_cpu(launch::running_cpu_millis(&self.own.spec.machine))
        {
            tracing::warn!(error = %chain(&error), "the room keeps its boot's share of the CPUs");
        }
        // A room may be over before the first period is.
        self.meter.sample_living();
        debug_assert_eq!(u128::from(REPORT_MS), SAMPLE.as_millis());
        self.ask_usage();
    }

    /// A report now, and from then on by itself.
    pub(super) fn ask_usage(&mut self) {
        self.wake();
        self.ask_spare();
    }

    /// The same of a room on its way to rest, which goes on.
    pub(super) fn ask_spare(&mut self) {
        self.say_to_agent(ReportUsage { every_ms: Some(REPORT_MS) });
    }

    /// A process ends once, after it began.
    fn exited(&mut self, exited: &Exited) {
        let Some(process) = self.processes.get_mut(&exited.process) else {
            return tracing::debug!(?exited, "the agent spoke of a process that there is not");
        };
        if !process.started {
            let message = "it said that a process ended that had not begun".into();
            return self.give_up(Outcome::AgentFailed { message });
        }
        if process.exited.is_none() {
            process.exited = Some((exited.status, exited.out_of_memory));
            process.flush = Some(Instant::now() + self.own.patience.identify());
            if exited.process == WORKLOAD {
                self.note(mark("workload ended"));
                // Before anybody is told: the VMM has still all that the workload made it take.
                self.meter.sample_living();
                self.record_working_set();
            }
            self.tell_exit(exited.process);
        }
    }

    /// The agent has answered for the function, if it had been asked.
    fn end_invocation(&mut self) -> bool {
        self.deadlines.step.take_if(|(_, step, _)| *step == Step::Invoke);
        std::mem::replace(&mut self.invoking, false)
    }

    fn failed(&mut self, failed: &Failed) {
        let message = clean(&failed.message);
        match &failed.request {
            Request::Prepare(_) | &Request::Process(WORKLOAD)
                if matches!(self.record.phase, Phase::Preparing | Phase::Starting) =>
            {
                self.streams.forget(WORKLOAD);
                self.give_up(Outcome::Refused { failure: failed.failure, message });
            }
            &Request::Process(id) if id != WORKLOAD => {
                self.streams.forget(id);
                if let Some(client) = self.processes.remove(&id).and_then(|process| process.client) {
                    self.tell_client(client, api::Refused { failure: failed.failure, message });
                }
            }
            Request::Invoke(_) => {
                self.event = None;
                if self.end_invocation() {
                    self.tell_client(self.creator, api::Refused { failure: failed.failure, message });
                }
            }
            Request::Freeze | &Request::Attach(WORKLOAD) => {
                self.give_up(Outcome::Refused { failure: failed.failure, message });
            }
            Request::Collect(_) => {
                self.deadlines.step.take_if(|(_, step, _)| *step == Step::Return);
                self.tell_client(self.creator, api::Refused { failure: failed.failure, message });
            }
            // A signal or a size for a process that is gone already; others than the workload are never attached.
            Request::Process(_) | Request::Prepare(_) | Request::Attach(_) => {
                tracing::debug!(message, "the agent refused a request")
            }
        }
    }

    /// The control connection is over. Before the room's own end that means the guest's: the VMM says which in a moment.
    pub(super) fn lose_agent(&mut self, why: &str) {
        self.control = None;
        if self.pressure.is_none() {
            tracing::debug!(why, "the agent is gone");
            self.agent_said.get_or_insert_with(|| clean(why));
            self.pressure = Some(super::Pressure::Asked);
            self.deadlines.pressure = Some(Instant::now() + AFTER_THE_AGENT);
        }
    }
}
