//! The room's state, and what each event does to it. The states and their transitions are drawn in [`crate::owner`].

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use carrel_protocol::Message;
use carrel_protocol::agent::{CONTROL_PORT, ExitStatus, FromHost, ProcessId, Signal, TerminalSize};
use carrel_protocol::usage::GuestUsage;
use carrel_protocol::vmm::{DeviceStopReason, Ended, FromOwner, FromVmm, Mark, ReadMetrics};

use self::deadlines::{Deadlines, stood_still};
use self::rest::Rest;
use super::Held;
use super::api::{self, StreamKind};
use super::blobs;
use super::events::{ClientId, Event, Events, Teller};
use super::pace::InTime;
use super::streams::{Purpose, Streams};
use crate::home::Task;
use crate::launch::{self, ChildEnd, Launched, Saved};
use crate::log::LogWriter;
use crate::meter::Meter;
use crate::outcome::{Outcome, Step, clean};
use crate::packet::{Connection, Packet};
use crate::patience::Patience;
use crate::record::{Phase, ProcessMark, Record, Remains};
use crate::spec::{RoomId, RoomSpec, WORKLOAD};
use crate::threads;
use crate::timestamp::{mark, now_ms};
use crate::usage::UsageReport;
use carrel_protocol::{chain, one_line};

mod agent;
mod clients;
mod deadlines;
mod ending;
mod recording;
mod rest;
mod template;

pub(crate) use ending::end_without_vmm;

/// Marks of a start, and characters in one of the VMM's.
const MOST_MARKS: usize = 64;
const MARK_CHARACTERS: usize = 40;
/// Commands that may wait to be accepted.
const BACKLOG: i32 = 16;
const SIGKILL: u8 = 9;
const SIGTERM: u8 = 15;
/// How often the host's meter is read, and how often the guest reports.
const SAMPLE: Duration = Duration::from_secs(5);
/// How long a message to the agent may take.
const AGENT_WRITE: Duration = Duration::from_secs(10);

/// All that makes an owner a room's owner.
#[derive(Debug)]
pub(crate) struct Ownership {
    pub(crate) id: RoomId,
    pub(crate) spec: RoomSpec,
    pub(crate) task: Task,
    pub(crate) directory: PathBuf,
    /// The payload's, layers then zips.
    pub(crate) blobs: Vec<File>,
    /// Locked while the room lives.
    pub(crate) lock: OwnedFd,
    pub(crate) patience: Patience,
    /// What happened when in its start.
    pub(crate) timeline: Vec<Mark>,
    pub(crate) held: Held,
}

/// A process in the guest: the workload, or an exec.
#[derive(Debug, Default)]
struct Process {
    /// Who is told, and gets its streams. Nobody for a detached workload: its log does.
    client: Option<ClientId>,
    /// Streams that were agreed on and not dialled yet.
    awaited: HashSet<StreamKind>,
    /// Streams that the log still reads.
    logged: HashSet<StreamKind>,
    /// The agent said that it runs.
    started: bool,
    /// The size of its terminal, as the agent was told last.
    size: Option<TerminalSize>,
    /// How it ended; told when all its streams are connected.
    exited: Option<(ExitStatus, bool)>,
    /// Once it ended: when its streams are waited for no longer, dialled or not, logged to their end or not.
    flush: Option<Instant>,
}

/// A command's connection.
#[derive(Debug)]
struct Client {
    connection: Arc<Connection>,
    process: Option<ProcessId>,
    /// The size of its terminal, as it said last; perhaps before its process was there.
    size: Option<TerminalSize>,
}

impl Client {
    fn new(connection: Arc<Connection>, process: Option<ProcessId>) -> Self {
        Self { connection, process, size: None }
    }
}

/// Steps of a VMM's end, each harder than the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pressure {
    /// The agent was asked to shut down.
    Asked,
    /// The VMM was told to stop.
    Stopped,
    /// It was killed.
    Killed,
}

/// A room in its owner's hands.
pub(crate) struct Room {
    own: Ownership,
    record: Record,
    events: Events,
    teller: Teller,
    vmm: Arc<Connection>,
    child: launch::Child,
    cgroup: Option<crate::cgroup::Cgroup>,
    meter: Meter,
    begun: Instant,
    /// The control connection's writing end.
    control: Option<UnixStream>,
    control_taken: bool,
    streams: Streams,
    processes: BTreeMap<ProcessId, Process>,
    next_process: u32,
    clients: BTreeMap<ClientId, Client>,
    next_client: u64,
    creator: ClientId,
    /// Clients that wait for a usage report.
    usage_waiters: Vec<ClientId>,
    guest_usage: Option<GuestUsage>,
    /// A function's event, between its arrival and the guest's dial.
    event: Option<(File, u64)>,
    /// The files that a template is saved into.
    saved: Option<Saved>,
    /// The workload of a template said that it is ready.
    said_ready: bool,
    /// The file that the working set is written into, until it is asked for.
    working_set: Option<OwnedFd>,
    /// It was asked for, and the VMM has not answered.
    recording: bool,
    /// The agent was given an event and has not answered for it.
    invoking: bool,
    /// Its creator has no event for it, and waits until it has.
    kept: bool,
    rest: Rest,
    /// What it took and its guest could spare when that had been given back last, bytes.
    left: Option<u64>,
    /// Notices that were given.
    noticed: u32,
    log: Option<LogWriter>,
    idle_stdin: Option<UnixStream>,
    deadlines: Deadlines,
    pressure: Option<Pressure>,
    /// What the agent said before it gave up.
    agent_said: Option<String>,
    /// What the VMM said of its end.
    vmm_said: Option<Ended>,
    vmm_closed: bool,
    vmm_end: Option<ChildEnd>,
}

impl Room {
    /// Takes over a launched VMM and the connection of whoever made the room. If the host has no thread, descriptor or space for that,
    /// the room is ended and its creator told why: there is no room then.
    pub(crate) fn begin(own: Ownership, launched: Launched, creator: Connection) -> Option<Self> {
        let Launched { connection, child, cgroup, saved, record: working_set } = launched;
        let (vmm, creator) = (Arc::new(connection), Arc::new(creator));
        let watched = || -> io::Result<_> {
            let log = own.spec.detached.then(|| LogWriter::open(&own.directory)).transpose()?;
            let (teller, mut events) = Events::new()?;
            events.accept_clients(super::listen(&own.directory, "owner.sock", BACKLOG)?)?;
            events.watch_vmm(&vmm, &child)?;
            events.watch_client(ClientId(0), &creator);
            Ok((log, teller, events))
        };
        let (log, teller, events) = match watched() {
            Ok(watched) => watched,
            Err(error) => {
                tracing::error!(%error, "the room can't be owned");
                drop(child);
                if let Some(cgroup) = cgroup {
                    cgroup.remove();
                }
                end_without_vmm(own, &creator, Outcome::OwnerFailed { message: chain(&error) });
                return None;
            }
        };
        let now = Instant::now();
        let mut record =
            Record::read(&own.directory.join("state.json")).unwrap_or_else(|| Record::new(now_ms()));
        record.remains = Remains {
            cgroup: cgroup.as_ref().map(|cgroup| cgroup.path().to_owned()),
            vmm: ProcessMark::of(child.pid()).ok(),
        };
        let mut room = Self {
            meter: Meter::new(child.pid(), cgroup.clone()),
            streams: Streams::new(own.patience),
            record,
            events,
            teller,
            vmm,
            child,
            cgroup,
            begun: now,
            control: None,
            control_taken: false,
            processes: BTreeMap::new(),
            next_process: WORKLOAD.0 + 1,
            clients: BTreeMap::from([(ClientId(0), Client::new(creator, Some(WORKLOAD)))]),
            next_client: 1,
            creator: ClientId(0),
            usage_waiters: Vec::new(),
            guest_usage: None,
            event: None,
            saved,
            said_ready: false,
            working_set,
            recording: false,
            invoking: false,
            kept: false,
            rest: Rest::Awake,
            left: None,
            noticed: 0,
            log,
            idle_stdin: None,
            deadlines: Deadlines { sample: Some(now + SAMPLE), ..Deadlines::default() },
            pressure: None,
            agent_said: None,
            vmm_said: None,
            vmm_closed: false,
            vmm_end: None,
            own,
        };
        let boot = room.own.patience.boot();
        room.enter(Phase::Handshaking, Some((Step::Boot, boot)));
        Some(room)
    }

    /// Owns the room to its end.
    pub(crate) fn serve(mut self) {
        while !(self.vmm_closed && self.vmm_end.is_some()) {
            let (due, began) = (self.next_deadline(), Instant::now());
            let event = self.events.next(due);
            if let Some(by) = stood_still(due, began, Instant::now()) {
                self.put_off(by);
            }
            if let Some(event) = event {
                self.handle(event);
            }
            self.meet_deadlines(Instant::now());
        }
        self.hear_last_words();
        self.finish();
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Vmm(packet) => self.hear_vmm(packet),
            Event::VmmClosed => self.vmm_closed = true,
            Event::VmmEnded(end) => self.vmm_end = Some(end),
            Event::Agent(message) => self.hear_agent(message),
            Event::AgentClosed(why) => self.lose_agent(&why),
            Event::Identified { port, socket } => self.connect_stream(port, socket),
            Event::NewClient(connection) => {
                if let Err(error) = self.add_client(connection) {
                    tracing::warn!(%error, "a command can't be served");
                }
            }
            Event::Client(id, packet) => self.hear_client(id, packet),
            Event::ClientClosed(id) => self.lose_client(id),
            Event::Logged(stream) => {
                if let Some(workload) = self.processes.get_mut(&WORKLOAD) {
                    workload.logged.remove(&stream);
                }
                self.end_if_drained();
            }
        }
    }

    /// Enters a phase; whoever looks at the record sees it.
    fn enter(&mut self, phase: Phase, step: Option<(Step, Duration)>) {
        tracing::debug!(?phase, "the room enters a phase");
        self.record.phase = phase;
        if matches!(phase, Phase::Running | Phase::Ending) {
            self.own.held.starting = None;
        }
        self.deadlines.step = step.map(|(step, time)| (Instant::now() + time, step, time));
        self.write_record();
    }

    fn write_record(&self) {
        // A full disk must not end a room: the record is then of the phase before.
        if let Err(error) = self.record.write(&self.own.directory.join("state.json")) {
            tracing::warn!(%error, "the room's record can't be written");
        }
    }

    /// Notes a step of the start, each once and so many at most: guests and broken VMMs repeat themselves, and all of it goes into one message.
    fn note(&mut self, mark: Mark) {
        let timeline = &mut self.own.timeline;
        if timeline.len() < MOST_MARKS && timeline.iter().all(|noted| noted.done != mark.done) {
            timeline.push(mark);
        }
    }

    fn hear_vmm(&mut self, packet: Packet<FromVmm>) {
        match packet.message {
            // Of a VMM that was prepared while nobody looked: none of this room's time.
            FromVmm::Prepared(_) => {}
            FromVmm::Booted(booted) => {
                if let Some(why) = booted.notice {
                    self.notice(&format!("The room begins slower than it could: {}.", clean(&why)));
                }
                for Mark { done, at_us } in booted.timeline {
                    self.note(Mark { done: format!("VMM: {}", one_line(&done, MARK_CHARACTERS)), at_us });
                }
            }
            FromVmm::Dialled(dialled) => {
                for socket in packet.descriptors {
                    self.hear_dial(dialled.port, socket);
                }
            }
            FromVmm::Broken(broken) => {
                self.vmm_said = Some(Ended { end: broken.end, detail: Some(broken.message) });
            }
            FromVmm::Ended(ended) => self.vmm_said = Some(ended),
            FromVmm::DeviceStopped(stopped) => {
                self.spoil(&stopped);
                let message = match stopped.reason {
                    DeviceStopReason::HostDiskFull => format!(
                        "The host has no space left on the disk that holds {}, so the room's own disk can't grow: its writes fail.",
                        self.own.directory.display()
                    ),
                    DeviceStopReason::HostIo => {
                        format!("The host failed to read or write for the room's {}.", clean(&stopped.device))
                    }
                    DeviceStopReason::DriverFault => format!(
                        "The guest's driver broke the rules of its {}, which serves it no more.",
                        clean(&stopped.device)
                    ),
                };
                self.notice(&message);
            }
            FromVmm::Done(_) => match std::mem::take(&mut self.recording) {
                true => self.note(mark("working set recorded")),
                false => self.paused(),
            },
            FromVmm::Snapshotted(snapshotted) => self.saved(&snapshotted),
            FromVmm::Refused(refused) => {
                tracing::debug!(reason = %clean(&refused.reason), "the VMM refuses something");
                if !std::mem::take(&mut self.recording) {
                    self.not_saved(&refused.reason);
                }
            }
            FromVmm::Metrics(metrics) => {
                self.meter.given_back(metrics.reclaimed_bytes);
                self.hear_balloon(metrics.balloon_bytes);
            }
        }
    }

    /// The first dial to the control port is the agent's, for no workload exists yet; there is no second one.
    fn hear_dial(&mut self, port: u32, socket: OwnedFd) {
        if port != CONTROL_PORT {
            return self.streams.dialled(port, socket, &self.teller);
        }
        if std::mem::replace(&mut self.control_taken, true) {
            return tracing::debug!("the guest dialled the control port again");
        }
        self.note(mark("agent dialled"));
        let control = UnixStream::from(socket);
        match control.set_nonblocking(false).and_then(|()| control.try_clone()) {
            Ok(heard) => {
                self.events.watch_agent(heard);
                self.control = Some(control);
            }
            Err(error) => self.give_up(Outcome::OwnerFailed { message: chain(&error) }),
        }
    }

    /// Tells the agent something, which wakes a room that rests.
    fn tell_agent(&mut self, message: impl Into<FromHost>) {
        self.wake();
        self.say_to_agent(message);
    }

    /// An agent that doesn't listen ends the room.
    fn say_to_agent(&mut self, message: impl Into<FromHost>) {
        let Some(control) = &self.control else { return };
        if let Err(error) = message.into().write_to(&mut InTime::new(control, AGENT_WRITE)) {
            let why = chain(&error);
            self.lose_agent(&why);
        }
    }

    /// A stream that the guest dialled and proved to be the agent's goes where it belongs.
    fn connect_stream(&mut self, port: u32, socket: UnixStream) {
        let Some(purpose) = self.streams.take(port) else { return };
        match purpose {
            Purpose::Blob(n) => self.send_blob(n, socket),
            Purpose::Event => {
                if let Some((file, size)) = self.event.take() {
                    self.check_thread(blobs::send(&self.teller, file, size, socket));
                }
            }
            Purpose::Response(client) => {
                let message = api::Connected { stream: StreamKind::Response };
                self.tell_client_with(client, message, socket.as_fd());
            }
            Purpose::Returned(client) => {
                self.deadlines.step.take_if(|(_, step, _)| *step == Step::Return);
                let message = api::Connected { stream: StreamKind::Returned };
                self.tell_client_with(client, message, socket.as_fd());
            }
            Purpose::Process(id, stream) => self.connect_process(id, stream, socket),
        }
    }

    fn send_blob(&mut self, n: usize, socket: UnixStream) {
        let payload = &self.own.spec.payload;
        let sizes =
            payload.layers.iter().map(|layer| layer.size).chain(payload.zips.iter().map(|zip| zip.size));
        let (Some(file), Some(size)) = (self.own.blobs.get(n), sizes.clone().nth(n)) else { return };
        let sent = file.try_clone().and_then(|file| blobs::send(&self.teller, file, size, socket));
        self.check_thread(sent);
    }

    /// A room whose owner has no thread or descriptor left can't go on.
    fn check_thread(&mut self, spawned: io::Result<()>) {
        if let Err(error) = spawned {
            self.give_up(Outcome::OwnerFailed { message: chain(&error) });
        }
    }

    fn connect_process(&mut self, id: ProcessId, stream: StreamKind, socket: UnixStream) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        process.awaited.remove(&stream);
        match (process.client, &self.log) {
            (Some(client), _) => {
                self.tell_client_with(client, api::Connected { stream }, socket.as_fd());
            }
            // As Docker's `-d -i`: open, and nobody writes.
            (None, Some(_)) if stream == StreamKind::Stdin => self.idle_stdin = Some(socket),
            (None, Some(log)) if id == WORKLOAD => {
                process.logged.insert(stream);
                let log = log.clone();
                let spawned = self.teller.spawn("log", move |teller| {
                    log.copy(stream, socket);
                    teller.tell(Event::Logged(stream));
                });
                self.check_thread(spawned);
            }
            // Its command is gone: the guest's writer gets EPIPE.
            (None, _) => {}
        }
        self.tell_exit(id);
    }

    /// Tells of a process's end, once all its streams are connected: the guest says the end over another connection than it dials them.
    fn tell_exit(&mut self, id: ProcessId) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        let Some((status, out_of_memory)) = process.exited else { return };
        let late = process.flush.is_none_or(|at| Instant::now() >= at);
        if !process.awaited.is_empty() && !late {
            return;
        }
        process.awaited.clear();
        if let Some(client) = process.client {
            self.tell_client(client, api::Exited { status, out_of_memory });
        }
        self.streams.forget(id);
        if id != WORKLOAD {
            self.processes.remove(&id);
            return;
        }
        let outcome = Outcome::Exited { status, out_of_memory };
        match self.record.phase {
            // It was to be saved alive.
            Phase::Freezing | Phase::Saving => return self.give_up(outcome),
            Phase::Running | Phase::Initialising => {
                self.deadlines.kill = None;
                self.enter(Phase::Draining, None);
            }
            Phase::Launching
            | Phase::Handshaking
            | Phase::Preparing
            | Phase::Starting
            | Phase::Draining
            | Phase::Ending
            | Phase::Ended => {}
        }
        self.record.outcome.get_or_insert(outcome);
        self.end_if_drained();
    }

    fn next_deadline(&self) -> Option<Instant> {
        let flush = self.processes.values().filter_map(|process| process.flush);
        self.deadlines.next().into_iter().chain(flush).min()
    }

    fn put_off(&mut self, by: Duration) {
        tracing::warn!(
            seconds = by.as_secs(),
            "the owner was not let run: what was due meanwhile is put off"
        );
        self.deadlines.put_off(by);
        self.processes.values_mut().filter_map(|process| process.flush.as_mut()).for_each(|at| *at += by);
    }

    fn meet_deadlines(&mut self, now: Instant) {
        let due = |at: &mut Option<Instant>| at.take_if(|at| *at <= now).is_some();
        if let Some((_, step, time)) = self.deadlines.step.take_if(|(at, ..)| *at <= now) {
            self.meter.sample();
            let used = self.meter.usage();
            let cpu_ms = (used.cpu_user_us + used.cpu_system_us) / 1000;
            let threads = threads::of(self.child.pid());
            self.give_up(Outcome::Overdue { step, seconds: time.as_secs(), cpu_ms, threads });
        }
        if due(&mut self.deadlines.timeout)
            && let Some(after_ms) = self.own.spec.timeout_ms
        {
            if self.record.phase == Phase::Draining {
                // What nobody read yet is lost, so the workload's own status would not be true.
                self.record.outcome = None;
            }
            self.record.outcome.get_or_insert(Outcome::TimedOut { after_ms });
            self.stop_workload(None);
        }
        if due(&mut self.deadlines.kill) {
            self.kill_workload();
        }
        self.flush(now);
        if due(&mut self.deadlines.pressure) {
            self.press();
        }
        if due(&mut self.deadlines.record) {
            self.record_working_set();
        }
        if due(&mut self.deadlines.usage) {
            self.answer_usage();
        }
        if due(&mut self.deadlines.rest) {
            self.rest(now);
        }
        if due(&mut self.deadlines.sample) {
            self.meter.sample();
            self.meter.sample_living();
            self.ask_vmm();
            self.deadlines.sample = Some(now + SAMPLE);
        }
    }

    /// The VMM's own counters; they come when they come.
    fn ask_vmm(&mut self) {
        if let Err(error) = self.vmm.send(&FromOwner::from(ReadMetrics {}), &[]) {
            tracing::debug!(error = %chain(&error), "the VMM is not asked for its counters");
        }
    }

    fn signal_workload(&mut self, signal: u8) {
        self.tell_agent(Signal { process: WORKLOAD, signal });
    }

    /// SIGKILL. An agent that doesn't say in time that the workload is dead loses its room.
    fn kill_workload(&mut self) {
        self.signal_workload(SIGKILL);
        let (now, time) = (Instant::now(), self.own.patience.kill());
        if self.deadlines.step.is_none_or(|(_, step, _)| step != Step::Kill) {
            self.deadlines.step = Some((now + time, Step::Kill, time));
        }
    }

    /// What the room has used so far.
    fn report(&self) -> UsageReport {
        UsageReport {
            room: self.own.id.to_string(),
            name: self.own.spec.name.as_ref().map(ToString::to_string),
            wall_us: u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX),
            guest: self.guest_usage.clone(),
            host: self.meter.usage().clone(),
        }
    }
}

#[cfg(test)]
mod tests;
