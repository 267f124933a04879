//! What commands ask of the room, and what they are told.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use carrel_protocol::agent::{Collect, Failure, Invoke, ProcessId, Resize, Signal};

use super::super::api::{self, FromClient, StreamKind, ToClient};
use super::super::events::ClientId;
use super::super::streams::Purpose;
use super::{Client, Room, SIGKILL, WORKLOAD};
use crate::outcome::{Outcome, Step};
use crate::packet::{Connection, Packet};
use crate::record::Phase;
use crate::spec::CONTAINER;
use carrel_protocol::chain;

/// Commands at once.
const MOST_CLIENTS: usize = 128;
/// What a guest can have its owner tell the user.
const MOST_NOTICES: u32 = 20;
/// Signals that end a room whose workload does not run yet: HUP, INT, QUIT, KILL, TERM.
const ENDING_SIGNALS: [u8; 5] = [1, 2, 3, 9, 15];

impl Room {
    pub(super) fn add_client(&mut self, connection: Connection) -> std::io::Result<ClientId> {
        if self.clients.len() >= MOST_CLIENTS {
            return Err(std::io::Error::other("there are too many commands at once"));
        }
        let id = ClientId(self.next_client);
        self.next_client += 1;
        let connection = Arc::new(connection);
        self.events.watch_client(id, &connection);
        self.clients.insert(id, Client::new(connection, None));
        Ok(id)
    }

    pub(super) fn hear_client(&mut self, id: ClientId, packet: Packet<FromClient>) {
        match packet.message {
            FromClient::Supply(_) => {}
            FromClient::Exec(exec) => self.start_exec(id, &exec.process),
            FromClient::Signal(api::Signal { signal }) => self.signal(id, signal),
            FromClient::Resize(api::Resize { size }) => {
                if let Some(client) = self.clients.get_mut(&id) {
                    client.size = Some(size);
                    if let Some(process) = client.process {
                        self.resize(process);
                    }
                }
            }
            FromClient::Stop(api::Stop { timeout_ms }) => {
                self.stop_workload(timeout_ms);
                self.tell_client(id, api::Done {});
            }
            FromClient::ReadUsage(_) => {
                self.usage_waiters.push(id);
                // One that rests is left alone: nothing has happened in it since its last report.
                if self.record.phase == Phase::Running && !self.is_paused() {
                    let time = self.own.patience.usage();
                    self.deadlines.usage.get_or_insert(Instant::now() + time);
                    // The VMM first: it answers before the guest does.
                    self.ask_vmm();
                    self.ask_usage();
                } else {
                    self.answer_usage();
                }
            }
            // Everybody is told of the end.
            FromClient::Wait(_) => {}
            FromClient::Drained(_) => {
                if id == self.creator && self.record.phase == Phase::Draining {
                    self.shut_down();
                }
            }
            FromClient::Return(api::Return { paths }) => {
                if id == self.creator && self.record.phase == Phase::Draining {
                    self.collect(id, paths);
                } else {
                    self.refuse(id, "files come back once the workload has ended, to its creator alone");
                }
            }
            FromClient::Rest(_) => {
                if id == self.creator {
                    self.keep();
                }
            }
            FromClient::Invoke(invoke) => {
                let event = packet.descriptors.into_iter().next().map(File::from);
                match event {
                    Some(event) if id == self.creator && !self.invoking => self.invoke(id, invoke, event),
                    Some(_) | None => self.refuse(id, "the room takes one event at a time, from its creator"),
                }
            }
        }
    }

    /// Tells the agent the size of a process's terminal, if it runs and the agent doesn't know: one that doesn't run yet has no terminal.
    pub(super) fn resize(&mut self, id: ProcessId) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        let size = process.client.and_then(|client| self.clients.get(&client)?.size);
        let Some(size) = size.filter(|_| process.started && process.exited.is_none()) else { return };
        if process.size.is_some_and(|told| told != size) {
            process.size = Some(size);
            self.tell_agent(Resize { process: id, size });
        }
    }

    fn process_of(&self, id: ClientId) -> ProcessId {
        self.clients.get(&id).and_then(|client| client.process).unwrap_or(WORKLOAD)
    }

    pub(super) fn refuse(&mut self, id: ClientId, message: &str) {
        self.tell_client(id, api::Refused { failure: Failure::BadRequest, message: message.to_owned() });
    }

    fn start_exec(&mut self, id: ClientId, spec: &crate::spec::ProcessSpec) {
        if self.record.phase != Phase::Running {
            return self.refuse(id, "the room's workload does not run");
        }
        if self.clients.get(&id).is_none_or(|client| client.process.is_some()) {
            return self.refuse(id, "a connection has one process");
        }
        let process = ProcessId(self.next_process);
        self.next_process = self.next_process.saturating_add(1);
        let spec = spec.beside(&self.own.spec.process);
        match self.add_process(process, &spec, Some(id)) {
            Ok(told) => {
                if let Some(client) = self.clients.get_mut(&id) {
                    client.process = Some(process);
                }
                self.exec(id, told);
            }
            Err(error) => self.refuse(id, &chain(&error)),
        }
    }

    fn signal(&mut self, id: ClientId, signal: u8) {
        let process = self.process_of(id);
        let begins = matches!(
            self.record.phase,
            Phase::Launching
                | Phase::Handshaking
                | Phase::Preparing
                | Phase::Freezing
                | Phase::Saving
                | Phase::Starting
                | Phase::Initialising
        );
        if process == WORKLOAD && begins {
            if ENDING_SIGNALS.contains(&signal) {
                self.give_up(Outcome::Stopped { signal });
            }
        } else if process == WORKLOAD && self.record.phase == Phase::Draining {
            // All that is left is output that nobody may be reading.
            if ENDING_SIGNALS.contains(&signal) {
                self.shut_down();
            }
        } else if self.processes.get(&process).is_some_and(|process| process.exited.is_none()) {
            match (process, signal) {
                (WORKLOAD, SIGKILL) => self.kill_workload(),
                _ => self.tell_agent(Signal { process, signal }),
            }
        }
    }

    /// The stop signal now, SIGKILL after a time.
    pub(super) fn stop_workload(&mut self, timeout_ms: Option<u64>) {
        match self.record.phase {
            Phase::Launching
            | Phase::Handshaking
            | Phase::Preparing
            | Phase::Freezing
            | Phase::Saving
            | Phase::Starting
            | Phase::Initialising => {
                self.give_up(Outcome::Stopped { signal: self.own.spec.stop_signal });
            }
            Phase::Running => {
                let time = Duration::from_millis(timeout_ms.unwrap_or(self.own.spec.stop_timeout_ms));
                let at = Instant::now() + time;
                self.deadlines.kill = Some(self.deadlines.kill.map_or(at, |other| other.min(at)));
                self.signal_workload(self.own.spec.stop_signal);
            }
            Phase::Draining => self.shut_down(),
            Phase::Ending | Phase::Ended => {}
        }
    }

    fn invoke(&mut self, id: ClientId, invoke: api::Invoke, event: File) {
        let api::Invoke { id: request, event_bytes, timeout_ms, headers } = invoke;
        let streams = self
            .streams
            .agree(Purpose::Event)
            .and_then(|event| Ok((event, self.streams.agree(Purpose::Response(id))?)));
        match streams {
            Ok((stream, response)) => {
                self.event = Some((event, event_bytes));
                self.invoking = true;
                self.stop_keeping();
                // The agent times out the runtime; this times out the agent.
                let init_ms = self.own.spec.function.as_ref().map_or(0, |function| function.init_timeout_ms);
                let limits = Duration::from_millis(u64::from(init_ms) + u64::from(timeout_ms));
                let time = limits + self.own.patience.invoke();
                self.deadlines.step = Some((Instant::now() + time, Step::Invoke, time));
                self.tell_agent(Invoke {
                    id: request,
                    event: stream,
                    event_bytes,
                    response,
                    timeout_ms,
                    headers,
                });
            }
            Err(error) => self.refuse(id, &chain(&error)),
        }
    }

    fn collect(&mut self, id: ClientId, paths: Vec<String>) {
        match self.streams.agree(Purpose::Returned(id)) {
            Ok(stream) => {
                let time = self.own.patience.returned();
                self.deadlines.step = Some((Instant::now() + time, Step::Return, time));
                self.tell_agent(Collect { container: CONTAINER, paths, stream });
            }
            Err(error) => self.refuse(id, &chain(&error)),
        }
    }

    /// Answers all that wait for a report, with the guest's last one.
    pub(super) fn answer_usage(&mut self) {
        self.deadlines.usage = None;
        let waiters = std::mem::take(&mut self.usage_waiters);
        if waiters.is_empty() {
            return;
        }
        self.meter.sample();
        self.meter.sample_living();
        let report = self.report();
        for id in waiters {
            self.tell_client(id, api::Used { report: report.clone() });
        }
    }

    /// A command is gone. An attached room ends with the one that made it; an exec's process ends with its own.
    pub(super) fn lose_client(&mut self, id: ClientId) {
        let Some(client) = self.clients.remove(&id) else { return };
        if id == self.creator {
            if self.own.spec.detached || self.record.phase == Phase::Ending {
                return;
            }
            tracing::debug!("the command that made the room is gone");
            if let Some(workload) = self.processes.get_mut(&WORKLOAD) {
                workload.client = None;
            }
            return self.give_up(Outcome::Stopped { signal: SIGKILL });
        }
        if let Some(id) = client.process
            && let Some(process) = self.processes.get_mut(&id)
        {
            process.client = None;
            if process.exited.is_none() {
                self.tell_agent(Signal { process: id, signal: SIGKILL });
            }
        }
    }

    /// Says something that the user should know to every command that listens, and to the log; so often and no more.
    pub(super) fn notice(&mut self, message: &str) {
        self.noticed = self.noticed.saturating_add(1);
        if self.noticed > MOST_NOTICES {
            return;
        }
        tracing::warn!(message, "notice");
        if let Some(log) = &self.log {
            log.write(StreamKind::Stderr, format!("carrel: {message}\n").as_bytes());
        }
        let clients: Vec<ClientId> = self.clients.keys().copied().collect();
        for client in clients {
            self.tell_client(client, api::Noticed { message: message.to_owned() });
        }
    }

    pub(super) fn tell_client(&mut self, id: ClientId, message: impl Into<ToClient>) {
        self.tell(id, &message.into(), None);
    }

    pub(super) fn tell_client_with(
        &mut self,
        id: ClientId,
        message: impl Into<ToClient>,
        descriptor: BorrowedFd<'_>,
    ) {
        self.tell(id, &message.into(), Some(descriptor));
    }

    /// A command that doesn't read its messages is as good as gone.
    fn tell(&mut self, id: ClientId, message: &ToClient, descriptor: Option<BorrowedFd<'_>>) {
        let Some(client) = self.clients.get(&id) else { return };
        if let Err(error) = client.connection.send(message, descriptor.as_slice()) {
            tracing::debug!(?id, error = %chain(&error), "a command doesn't listen");
            client.connection.shut_down();
        }
    }
}
