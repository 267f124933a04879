//! A room under a VMM and an agent that are played by the test. The VMM's process is a shell that waits for a socket to close.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::thread::JoinHandle;

use carrel_protocol::agent::{
    self, Compression, Exited, Failed, Failure, FromAgent, FromHost, Hello, Prepared, Request, Started, Usage,
};
use carrel_protocol::vmm::{DeviceStopped, Dialled, End, FromOwner};

mod execs;
mod hostile;
mod initialised;
mod invocations;
mod recording;
mod resting;
mod returning;

use super::*;
use crate::launch::testing;
use crate::session::{Session, Streams as Files};
use crate::spec::{self, LayerSpec, Payload, ProcessSpec};

const TIME: Duration = Duration::from_secs(20);

fn spec(detached: bool) -> RoomSpec {
    RoomSpec {
        id: Some("0123456789ab".parse().unwrap()),
        name: Some("desk".parse().unwrap()),
        payload: Payload {
            layers: vec![LayerSpec {
                digest: "sha256:00".into(),
                size: 5,
                compression: Compression::None,
                diff_id: "sha256:00".into(),
            }],
            ..Payload::default()
        },
        process: ProcessSpec {
            arguments: vec!["cat".into()],
            working_directory: "/".into(),
            interactive: true,
            ..ProcessSpec::default()
        },
        stop_timeout_ms: 300,
        detached,
        ..spec::testing::room()
    }
}

/// The guest's side: what the VMM's socket and the agent's connections are to a real one.
struct Guest {
    vmm: Connection,
    control: UnixStream,
    /// The VMM's process lives as long as this.
    _life: UnixStream,
}

/// The files of a room whose owner runs on a thread.
struct Place {
    directory: tempfile::TempDir,
    owner: JoinHandle<()>,
    session: Session,
}

impl Place {
    fn path(&self) -> std::path::PathBuf {
        self.directory.path().join("room")
    }

    fn record(&self) -> Option<Record> {
        Record::read(&self.path().join("state.json"))
    }
}

/// Begins a room; the guest has dialled its control port.
fn begin(spec: RoomSpec) -> (Place, Guest) {
    begin_with(spec, Patience::default())
}

fn begin_with(spec: RoomSpec, patience: Patience) -> (Place, Guest) {
    begin_task(spec, patience, Task::Run, None)
}

fn begin_task(
    spec: RoomSpec,
    patience: Patience,
    task: Task,
    saved: Option<launch::Saved>,
) -> (Place, Guest) {
    begin_recording(spec, patience, task, saved, None)
}

fn begin_recording(
    spec: RoomSpec,
    patience: Patience,
    task: Task,
    saved: Option<launch::Saved>,
    record: Option<OwnedFd>,
) -> (Place, Guest) {
    let directory = tempfile::tempdir().unwrap();
    let room = directory.path().join("room");
    std::fs::create_dir(&room).unwrap();
    let mut blob = tempfile::tempfile().unwrap();
    blob.write_all(b"layer").unwrap();
    let lock = File::create(room.join("lock")).unwrap();
    let (creator, command) = Connection::pair().unwrap();
    let (vmm, owners) = Connection::pair().unwrap();
    let ownership = Ownership {
        id: spec.id.clone().unwrap(),
        spec,
        task,
        timeline: Vec::new(),
        directory: room,
        blobs: vec![blob],
        lock: lock.into(),
        patience,
        held: Held::default(),
    };
    let (life, held) = UnixStream::pair().unwrap();
    let child = testing::stand_in(held.as_fd());
    let launched = Launched { connection: owners, child, cgroup: None, saved, record };
    let owner = std::thread::spawn(move || Room::begin(ownership, launched, creator).unwrap().serve());
    let (control, theirs) = UnixStream::pair().unwrap();
    control.set_read_timeout(Some(TIME)).unwrap();
    dialled(&vmm, CONTROL_PORT, &theirs);
    let session = Session::new(command, patience);
    (Place { directory, owner, session }, Guest { vmm, control, _life: life })
}

fn dialled(vmm: &Connection, port: u32, socket: &UnixStream) {
    vmm.send_blocking(&FromVmm::from(Dialled { port }), &[socket.as_fd()]).unwrap();
}

impl Guest {
    fn say(&mut self, message: impl Into<FromAgent>) {
        message.into().write_to(&mut self.control).unwrap();
    }

    fn hear(&mut self) -> FromHost {
        FromHost::read_from(&mut self.control).unwrap()
    }

    fn dial(&self, stream: &agent::Stream) -> UnixStream {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(TIME)).unwrap();
        dialled(&self.vmm, stream.port, &theirs);
        ours.write_all(&stream.token.0).unwrap();
        ours
    }

    fn hello(&mut self) {
        self.say(Hello {
            version: agent::VERSION,
            agent: "0".into(),
            kernel: "6".into(),
            booted_us: 1,
            clone: false,
        });
    }

    /// What the VMM is told next. Its counters it is asked for at any time.
    fn order(&self) -> Result<Packet<FromOwner>, crate::packet::PacketError> {
        loop {
            match self.vmm.receive::<FromOwner>()? {
                Packet { message: FromOwner::ReadMetrics(_), .. } => {}
                packet => return Ok(packet),
            }
        }
    }

    /// Everything up to the workload's start; returns its streams.
    fn boot(&mut self) -> [UnixStream; 3] {
        let start = self.boot_to_start();
        let stdio = start.process.stdio;
        let streams = [stdio.stdin, stdio.stdout, stdio.stderr].map(|stream| self.dial(&stream.unwrap()));
        self.say(Started { process: start.process.id });
        assert!(matches!(self.hear(), FromHost::ReportUsage(_)));
        streams
    }

    fn boot_to_start(&mut self) -> agent::Start {
        self.hello();
        let FromHost::Welcome(welcome) = self.hear() else { panic!("no welcome") };
        assert_eq!(welcome.identity.id, "0123456789ab");
        let FromHost::Prepare(prepare) = self.hear() else { panic!("nothing to prepare") };
        let mut layer = String::new();
        self.dial(&prepare.layers[0].blob.stream).read_to_string(&mut layer).unwrap();
        assert_eq!(layer, "layer");
        self.say(Prepared { container: prepare.container, bytes: 5, entries: 1, took_us: 1 });
        let FromHost::Start(start) = self.hear() else { panic!("nothing to start") };
        start
    }

    fn exit(&mut self, status: ExitStatus) {
        self.say(Exited { process: WORKLOAD, status, out_of_memory: false });
    }

    /// Answers the shutdown with a last report, and ends as a guest that restarted.
    fn shut_down(mut self) {
        loop {
            match self.hear() {
                FromHost::Shutdown(_) => break,
                FromHost::ReportUsage(_) | FromHost::Signal(_) => {}
                other @ (FromHost::Welcome(_)
                | FromHost::Refused(_)
                | FromHost::Prepare(_)
                | FromHost::Start(_)
                | FromHost::Exec(_)
                | FromHost::Resize(_)
                | FromHost::Invoke(_)
                | FromHost::Freeze(_)
                | FromHost::Attach(_)
                | FromHost::Collect(_)) => panic!("{other:?}"),
            }
        }
        let usage = GuestUsage { wall_us: 77, ..GuestUsage::default() };
        self.say(Usage { containers: BTreeMap::from([(0, usage)]), spare_bytes: 0, last: true });
        self.end(End::Reset);
    }

    fn end(self, end: End) {
        self.vmm.send_blocking(&FromVmm::from(Ended { end, detail: None }), &[]).unwrap();
        self.vmm.shut_down();
    }
}

/// Files that a session writes into, and what they hold in the end.
fn files(input: &[u8]) -> (Files, File, File) {
    let file = || tempfile::tempfile().unwrap();
    let (mut stdin, stdout, stderr) = (file(), file(), file());
    stdin.write_all(input).unwrap();
    std::io::Seek::rewind(&mut stdin).unwrap();
    let (out, err) = (stdout.try_clone().unwrap(), stderr.try_clone().unwrap());
    (Files { stdin: Some(stdin), stdout, stderr }, out, err)
}

fn text(mut file: File) -> String {
    let mut text = String::new();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

fn exited(code: u8) -> Outcome {
    Outcome::Exited { status: ExitStatus::Code(code), out_of_memory: false }
}

#[test]
fn a_workload_runs_with_its_streams_apart_and_its_status_comes_back() {
    let (place, mut guest) = begin(spec(false));
    let path = place.path();
    let (streams, out, err) = files(b"input");
    let command = std::thread::spawn(move || place.session.run(streams, &mut |_| ()));
    let [mut stdin, mut stdout, mut stderr] = guest.boot();
    let mut read = String::new();
    stdin.read_to_string(&mut read).unwrap();
    assert_eq!(read, "input", "and its end");
    stdout.write_all(b"out").unwrap();
    stderr.write_all(b"err").unwrap();
    drop((stdout, stderr));
    guest.exit(ExitStatus::Code(7));
    guest.shut_down();
    let ended = command.join().unwrap().unwrap();
    assert_eq!(ended.outcome, exited(7));
    let usage = ended.usage.unwrap();
    assert_eq!(usage.guest.unwrap().wall_us, 77);
    assert!(usage.host.pss_peak_bytes.is_some(), "however short it was");
    assert_eq!((text(out).as_str(), text(err).as_str()), ("out", "err"));
    assert!(!path.exists(), "nothing stays of an attached room");
}

#[test]
fn an_end_that_overtakes_the_streams_loses_no_output() {
    let (place, mut guest) = begin(spec(false));
    let (streams, out, _err) = files(b"");
    let command = std::thread::spawn(move || place.session.run(streams, &mut |_| ()));
    let start = guest.boot_to_start();
    guest.say(Started { process: WORKLOAD });
    guest.exit(ExitStatus::Code(0));
    let stdio = start.process.stdio;
    for stream in [stdio.stdin, stdio.stderr, stdio.stdout].into_iter().flatten() {
        std::thread::sleep(Duration::from_millis(20));
        guest.dial(&stream).write_all(b"late").unwrap();
    }
    guest.shut_down();
    assert_eq!(command.join().unwrap().unwrap().outcome, exited(0));
    assert_eq!(text(out), "late");
}

#[test]
fn what_the_agent_refuses_has_its_status() {
    for (failure, status) in [(Failure::CommandNotFound, 127), (Failure::UnknownUser, 125)] {
        let (place, mut guest) = begin(spec(false));
        guest.boot_to_start();
        let message = "no \x1b[1msuch\nthing".to_owned();
        guest.say(Failed { request: Request::Process(WORKLOAD), failure, message });
        let FromOwner::Stop(_) = guest.order().unwrap().message else { panic!("no stop") };
        guest.end(End::Stopped);
        let ended = place.session.wait().unwrap();
        assert_eq!(ended.outcome.exit_status(), status);
        assert_eq!(ended.outcome, Outcome::Refused { failure, message: "no [1msuch thing".into() });
    }
}

#[test]
fn a_killed_vmm_is_noticed_within_a_second() {
    let (place, mut guest) = begin(spec(false));
    let _streams = guest.boot();
    let vmm = place.record().unwrap().remains.vmm.unwrap();
    let begun = Instant::now();
    let pid = rustix::process::Pid::from_raw(vmm.pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    guest.vmm.shut_down();
    let ended = place.session.wait().unwrap();
    assert_eq!(ended.outcome, Outcome::VmmKilled { signal: 9, out_of_memory: false });
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    place.owner.join().unwrap();
}

#[test]
fn an_attached_room_ends_with_the_command_that_made_it() {
    let (place, mut guest) = begin(spec(false));
    let _streams = guest.boot();
    let path = place.path();
    drop(place.session);
    guest.shut_down();
    place.owner.join().unwrap();
    assert!(!path.exists());
}

#[test]
fn a_detached_room_outlives_its_command_and_leaves_record_and_log() {
    let (place, mut guest) = begin(spec(true));
    let path = place.path();
    let [_stdin, mut stdout, stderr] = guest.boot();
    let Place { session, owner, directory: _directory } = place;
    assert!(matches!(session.wait_started().unwrap(), crate::session::Beginning::Started));
    drop(session);
    stdout.write_all(b"logged\n").unwrap();
    drop((stdout, stderr));
    guest.exit(ExitStatus::Signal(9));
    guest.shut_down();
    owner.join().unwrap();
    let record = Record::read(&path.join("state.json")).unwrap();
    assert_eq!((record.phase, record.remains), (Phase::Ended, Remains::default()));
    assert_eq!(record.outcome.unwrap().exit_status(), 137);
    let log = std::fs::read(path.join("log")).unwrap();
    assert!(log.ends_with(b"logged\n"));
    assert!(!path.join("owner.sock").exists());
}

#[test]
fn a_timeout_asks_then_kills_and_is_the_outcome() {
    let (place, mut guest) = begin(RoomSpec { timeout_ms: Some(100), ..spec(true) });
    let streams = guest.boot();
    for expected in [15, SIGKILL] {
        let FromHost::Signal(signal) = guest.hear() else { panic!("no signal") };
        assert_eq!((signal.process, signal.signal), (WORKLOAD, expected));
    }
    drop(streams);
    guest.exit(ExitStatus::Signal(9));
    guest.shut_down();
    assert_eq!(place.session.wait().unwrap().outcome, Outcome::TimedOut { after_ms: 100 });
}

#[test]
fn a_signal_before_the_workload_ends_the_room() {
    let (place, mut guest) = begin(spec(false));
    guest.boot_to_start();
    place.session.remote().signal(2).unwrap();
    let FromOwner::Stop(_) = guest.order().unwrap().message else { panic!("no stop") };
    guest.end(End::Stopped);
    assert_eq!(place.session.wait().unwrap().outcome, Outcome::Stopped { signal: 2 });
}

#[test]
fn an_agent_of_another_version_is_refused() {
    let (place, mut guest) = begin(spec(false));
    guest.say(Hello { version: 999, agent: "0".into(), kernel: "6".into(), booted_us: 1, clone: false });
    let FromHost::Refused(refused) = guest.hear() else { panic!("not refused") };
    assert!(refused.reason.contains("999"), "{refused:?}");
    guest.end(End::Stopped);
    assert!(matches!(place.session.wait().unwrap().outcome, Outcome::AgentFailed { .. }));
}

#[test]
fn an_agent_that_speaks_out_of_turn_ends_its_room() {
    let (place, mut guest) = begin(spec(false));
    guest.hello();
    guest.hello();
    // The guest's end must not come before its second word.
    assert!(matches!(guest.order().unwrap().message, FromOwner::Stop(_)));
    guest.end(End::Stopped);
    assert!(matches!(place.session.wait().unwrap().outcome, Outcome::AgentFailed { .. }));
}

#[test]
fn a_second_dial_to_the_control_port_is_dropped() {
    let (place, mut guest) = begin(spec(false));
    let _streams = guest.boot();
    let (mut forger, theirs) = UnixStream::pair().unwrap();
    forger.set_read_timeout(Some(TIME)).unwrap();
    dialled(&guest.vmm, CONTROL_PORT, &theirs);
    drop(theirs);
    let _ = FromAgent::from(Exited { process: WORKLOAD, status: ExitStatus::Code(0), out_of_memory: false })
        .write_to(&mut forger);
    assert_eq!(forger.read(&mut [0]).unwrap_or(0), 0);
    assert_eq!(place.record().unwrap().phase, Phase::Running);
    guest.end(End::Panic);
    assert_eq!(place.session.wait().unwrap().outcome, Outcome::GuestPanicked { last_words: None });
}

#[test]
fn usage_is_asked_of_the_guest_and_merged_with_the_hosts() {
    let (place, mut guest) = begin(spec(false));
    let _workload = guest.boot();
    let session = Session::connect(&place.path(), Patience::default()).unwrap();
    let command = std::thread::spawn(move || session.usage());
    let FromHost::ReportUsage(_) = guest.hear() else { panic!("not asked") };
    let usage = GuestUsage { wall_us: 5, ..GuestUsage::default() };
    guest.say(Usage { containers: BTreeMap::from([(0, usage.clone())]), spare_bytes: 0, last: false });
    let report = command.join().unwrap().unwrap();
    assert_eq!((report.room.as_str(), report.name.as_deref()), ("0123456789ab", Some("desk")));
    assert_eq!(report.guest, Some(usage));
    assert!(report.host.pss_peak_bytes.is_some(), "{report:?}");
}

#[test]
fn a_guest_that_lost_what_it_wrote_is_no_template() {
    let stopped = DeviceStopped { device: "block room".into(), reason: DeviceStopReason::HostDiskFull };
    let (place, mut guest) = begin_task(spec(false), Patience::default(), Task::Template, None);
    guest.hello();
    assert!(matches!(guest.hear(), FromHost::Welcome(_)));
    let FromHost::Prepare(prepare) = guest.hear() else { panic!("nothing to prepare") };
    guest.vmm.send_blocking(&FromVmm::from(stopped), &[]).unwrap();
    // Its agent saw nothing of it: what it wrote is in the guest's memory still.
    guest.say(Prepared { container: prepare.container, bytes: 5, entries: 1, took_us: 1 });
    assert!(matches!(guest.order().unwrap().message, FromOwner::Stop(_)), "it was to be paused");
    guest.end(End::Stopped);
    let Outcome::OwnerFailed { message } = place.session.wait().unwrap().outcome else { panic!("saved") };
    assert!(message.contains("no space"), "{message}");
}

#[test]
fn a_full_host_disk_is_said() {
    let (place, mut guest) = begin(spec(false));
    let (streams, ..) = files(b"");
    let session = place.session;
    let command = std::thread::spawn(move || {
        let mut said = Vec::new();
        let ended = session.run(streams, &mut |notice| said.push(notice.to_owned()));
        (said, ended)
    });
    let streams = guest.boot();
    let stopped = DeviceStopped { device: "block room".into(), reason: DeviceStopReason::HostDiskFull };
    guest.vmm.send_blocking(&FromVmm::from(stopped), &[]).unwrap();
    drop(streams);
    guest.exit(ExitStatus::Code(1));
    guest.shut_down();
    let (said, ended) = command.join().unwrap();
    assert!(said.len() == 1 && said[0].contains("no space left"), "{said:?}");
    assert_eq!(ended.unwrap().outcome, exited(1));
}
