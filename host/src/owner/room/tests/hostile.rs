//! Guests whose agent is the attacker's: every message out of order, too often, about what there is not, or never read.

use carrel_protocol::agent::{Ending, EndingReason, Invoked, Outcome as Answer};
use carrel_protocol::vmm::{Booted, DeviceStopped};

use super::*;
use crate::session::SessionError;

/// Deadlines of a tenth.
fn hurried() -> Patience {
    "0.1".parse().unwrap()
}

/// What the creator was told, up to a message that is the last.
fn told(session: &Session, last: impl Fn(&api::ToClient) -> bool) -> Vec<api::ToClient> {
    let mut all = Vec::new();
    session.limit(Some(TIME)).unwrap();
    while !all.last().is_some_and(&last) {
        all.push(session.receive().unwrap().message);
    }
    all
}

/// Asks the room something, and the guest answers: it is well.
fn must_be_well(place: &Place, guest: &mut Guest) {
    let session = Session::connect(&place.path(), Patience::default()).unwrap();
    let command = std::thread::spawn(move || session.usage());
    while !matches!(guest.hear(), FromHost::ReportUsage(_)) {}
    let usage = GuestUsage { wall_us: 4321, ..GuestUsage::default() };
    guest.say(Usage { containers: BTreeMap::from([(0, usage)]), spare_bytes: 0, last: false });
    assert_eq!(command.join().unwrap().unwrap().guest.unwrap().wall_us, 4321);
}

#[test]
fn a_process_starts_and_ends_once_however_often_that_is_said() {
    let (place, mut guest) = begin(spec(false));
    let _streams = guest.boot();
    for code in [3, 4, 5] {
        guest.say(Started { process: WORKLOAD });
        guest.exit(ExitStatus::Code(code));
    }
    let all = told(&place.session, |message| matches!(message, api::ToClient::Exited(_)));
    assert_eq!(all.iter().filter(|message| matches!(message, api::ToClient::Started(_))).count(), 1);
    place.session.remote().send(api::Drained {}).unwrap();
    guest.shut_down();
    let all = told(&place.session, |message| matches!(message, api::ToClient::Ended(_)));
    assert!(!all.iter().any(|message| matches!(message, api::ToClient::Exited(_))), "{all:?}");
    let Some(api::ToClient::Ended(ended)) = all.last() else { panic!("no end") };
    assert_eq!(ended.outcome, exited(3));
}

#[test]
fn an_end_without_a_beginning_ends_the_room() {
    let (place, mut guest) = begin(spec(false));
    guest.boot_to_start();
    guest.exit(ExitStatus::Code(0));
    assert!(matches!(guest.order().unwrap().message, FromOwner::Stop(_)));
    guest.end(End::Stopped);
    assert!(matches!(place.session.wait().unwrap().outcome, Outcome::AgentFailed { .. }));
}

#[test]
fn a_command_that_asks_after_the_end_hears_how_it_was() {
    let ask: [fn(Session) -> Result<Outcome, SessionError>; 4] = [
        |session| Ok(session.wait()?.outcome),
        |session| Ok(session.wait_stopped(Instant::now(), Duration::ZERO)?.outcome),
        |session| Ok(session.exec(&ProcessSpec::default(), files(b"").0, &mut |_| ())?.outcome),
        |session| session.usage().map(|_| Outcome::Stopped { signal: SIGTERM }),
    ];
    for ask in ask {
        let (place, guest) = begin(spec(false));
        place.session.remote().stop(Some(0)).unwrap();
        let FromOwner::Stop(_) = guest.order().unwrap().message else { panic!("no stop") };
        guest.end(End::Stopped);
        place.owner.join().unwrap();
        assert!(matches!(ask(place.session).unwrap(), Outcome::Stopped { .. }));
    }
}

#[test]
fn what_is_said_of_things_that_there_are_not_is_nothing() {
    let (place, mut guest) = begin(spec(false));
    let _streams = guest.boot();
    for process in [1, 7, u32::MAX].map(ProcessId) {
        guest.say(Started { process });
        guest.say(Exited { process, status: ExitStatus::Code(0), out_of_memory: true });
        let request = Request::Process(process);
        guest.say(Failed { request, failure: Failure::System, message: "x".into() });
    }
    guest.say(Failed { request: Request::Invoke("x".into()), failure: Failure::System, message: "x".into() });
    guest.say(Invoked {
        id: "x".into(),
        outcome: Answer::TimedOut,
        init_us: Some(u64::MAX),
        duration_us: u64::MAX,
        memory_peak_bytes: u64::MAX,
        response_bytes: u64::MAX,
    });
    let usage = GuestUsage { wall_us: 1, ..GuestUsage::default() };
    guest.say(Usage { containers: BTreeMap::from([(9, usage)]), spare_bytes: 0, last: true });
    must_be_well(&place, &mut guest);
    assert_eq!(place.record().unwrap().phase, Phase::Running);
    let session = place.session;
    guest.end(End::Panic);
    let all = told(&session, |message| matches!(message, api::ToClient::Ended(_)));
    let unasked = |message: &&api::ToClient| {
        matches!(message, api::ToClient::Refused(_) | api::ToClient::Invoked(_) | api::ToClient::Exited(_))
    };
    assert_eq!(all.iter().find(unasked), None);
}

#[test]
fn a_flood_of_reports_is_heard_at_a_pace_and_the_room_heeds_its_commands() {
    let (place, mut guest) = begin(spec(false));
    let _streams = guest.boot();
    let mut flooding = guest.control.try_clone().unwrap();
    let flood = std::thread::spawn(move || {
        let begun = Instant::now();
        let usage =
            Usage { containers: BTreeMap::from([(0, GuestUsage::default())]), spare_bytes: 0, last: false };
        let message = FromAgent::from(usage);
        let sent = (0..2500).take_while(|_| message.write_to(&mut flooding).is_ok()).count();
        (sent, begun.elapsed())
    });
    let session = Session::connect(&place.path(), Patience::default()).unwrap();
    assert!(session.usage().unwrap().guest.is_some());
    let (sent, took) = flood.join().unwrap();
    // Some hundreds wait in the socket; the others are 500 a second.
    assert!(sent == 2500 && took > Duration::from_secs(1), "{sent} in {took:?}");
    guest.end(End::Reset);
}

#[test]
fn five_hundred_dials_at_once_leave_no_descriptor_and_the_room_well() {
    let (place, mut guest) = begin_with(spec(false), hurried());
    let start = guest.boot_to_start();
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let agreed = start.process.stdio.stdout.unwrap();
    let (mut silent, mut most) = (Vec::new(), 0);
    // As many as are heard in a second: each goes the way of the first, so more would take longer and show no more here. A guest that
    // dials a hundred thousand times is among the whole-system tests.
    for n in 0..500 {
        let (ours, theirs) = UnixStream::pair().unwrap();
        // Some to a port that is waited for, silent or with a wrong token; the others to any.
        dialled(&guest.vmm, if n % 2 == 0 { agreed.port } else { 100_000 + n }, &theirs);
        if n % 4 == 0 {
            let _ = (&ours).write_all(&[0; 16]);
        }
        silent.push(ours);
        most = most.max(descriptors());
    }
    // Our own ends, what waits in the channel and the socket, and those that may be silent for a while.
    assert!(most < 500 + 500, "{most}");
    let mut stdout = guest.dial(&agreed);
    stdout.write_all(b"x").unwrap();
    guest.say(Started { process: WORKLOAD });
    must_be_well(&place, &mut guest);
    drop(silent);
    guest.end(End::Panic);
    assert_eq!(place.session.wait().unwrap().outcome, Outcome::GuestPanicked { last_words: None });
}

#[test]
fn an_agent_that_never_reads_loses_its_room() {
    let (place, mut guest) = begin_with(spec(false), hurried());
    let _streams = guest.boot();
    let remote = place.session.remote();
    // More than its socket holds. USR1 is no end by itself.
    let asking = std::thread::spawn(move || (0..20_000).take_while(|_| remote.signal(10).is_ok()).count());
    assert!(matches!(guest.order().unwrap().message, FromOwner::Stop(_)));
    guest.end(End::Stopped);
    assert!(matches!(place.session.wait().unwrap().outcome, Outcome::AgentFailed { .. }));
    asking.join().unwrap();
}

#[test]
fn an_agent_that_hangs_up_loses_its_room_and_its_last_word_is_clean() {
    let (place, mut guest) = begin(spec(false));
    let _streams = guest.boot();
    let message = "\x1b]0;title\x07\u{9b}2J over".to_owned();
    guest.say(Ending { reason: EndingReason::Broken { message } });
    guest.control.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(matches!(guest.order().unwrap().message, FromOwner::Stop(_)));
    guest.end(End::Stopped);
    let outcome = place.session.wait().unwrap().outcome;
    assert_eq!(outcome, Outcome::AgentFailed { message: "]0;title2J over".into() });
}

#[test]
fn a_broken_vmms_words_are_clean_and_not_many() {
    let (place, guest) = begin(spec(false));
    let (streams, ..) = files(b"");
    let session = place.session;
    let command = std::thread::spawn(move || {
        let mut said = Vec::new();
        let ended = session.run(streams, &mut |notice| said.push(notice.to_owned()));
        (said, ended.unwrap().outcome)
    });
    for _ in 0..100 {
        let stopped = DeviceStopped { device: "\x1b[2Jdisk".into(), reason: DeviceStopReason::HostIo };
        guest.vmm.send_blocking(&FromVmm::from(stopped), &[]).unwrap();
    }
    let detail = Some("\x1b[31mred\x07".to_owned());
    guest.vmm.send_blocking(&FromVmm::from(Ended { end: End::Kvm, detail }), &[]).unwrap();
    guest.vmm.shut_down();
    drop(guest);
    let (said, outcome) = command.join().unwrap();
    assert!((1..=20).contains(&said.len()), "{}", said.len());
    assert!(said.iter().all(|text| !text.chars().any(char::is_control) && text.contains("disk")), "{said:?}");
    assert_eq!(outcome, Outcome::VmmFailed { end: End::Kvm, message: "[31mred".into() });
}

#[test]
fn a_stop_ends_a_room_whose_ended_workload_holds_its_streams_open() {
    let (place, mut guest) = begin(spec(false));
    let streams = guest.boot();
    guest.exit(ExitStatus::Code(2));
    told(&place.session, |message| matches!(message, api::ToClient::Exited(_)));
    Session::connect(&place.path(), Patience::default()).unwrap().remote().stop(Some(0)).unwrap();
    guest.shut_down();
    drop(streams);
    assert_eq!(place.session.wait().unwrap().outcome, exited(2));
}

#[test]
fn a_timeout_ends_such_a_room_too_and_is_its_outcome() {
    let (place, mut guest) = begin(RoomSpec { timeout_ms: Some(300), ..spec(false) });
    let _streams = guest.boot();
    guest.exit(ExitStatus::Code(0));
    guest.shut_down();
    assert_eq!(place.session.wait().unwrap().outcome, Outcome::TimedOut { after_ms: 300 });
}

#[test]
fn a_killed_workload_whose_agent_does_not_bury_it_is_ended_with_its_room() {
    let (place, mut guest) = begin_with(spec(false), hurried());
    let _streams = guest.boot();
    place.session.remote().signal(SIGKILL).unwrap();
    let FromHost::Signal(signal) = guest.hear() else { panic!("no signal") };
    assert_eq!(signal.signal, SIGKILL);
    // It says nothing; it is not asked for anything more, but the VMM to stop.
    assert!(matches!(guest.order().unwrap().message, FromOwner::Stop(_)));
    guest.control.set_nonblocking(true).unwrap();
    assert!(FromHost::read_from(&mut guest.control).is_err());
    guest.end(End::Stopped);
    let outcome = place.session.wait().unwrap().outcome;
    assert!(matches!(outcome, Outcome::Overdue { step: Step::Kill, .. }), "{outcome:?}");
}

/// A room's directory whose owner has been stopped: it listens, and does nothing more.
fn stopped_owner() -> (tempfile::TempDir, OwnedFd) {
    let directory = tempfile::tempdir().unwrap();
    let listener = crate::owner::listen(directory.path(), "owner.sock", 4).unwrap();
    (directory, listener)
}

#[test]
fn an_owner_that_does_not_answer_is_named_and_not_waited_for() {
    let (directory, _listener) = stopped_owner();
    let session = Session::connect(directory.path(), hurried()).unwrap();
    let begun = Instant::now();
    session.remote().stop(None).unwrap();
    let stopped = session.wait_stopped(begun, Duration::from_secs(600)).unwrap_err();
    let usage = session.usage().unwrap_err();
    assert!(begun.elapsed() < TIME, "{:?}", begun.elapsed());
    for error in [stopped, usage] {
        assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    }
}

#[test]
fn an_owner_whose_queue_is_full_is_not_waited_for_either() {
    let (directory, _listener) = stopped_owner();
    let mut waiting = Vec::new();
    let error = loop {
        match Session::connect(directory.path(), hurried()) {
            Ok(session) => waiting.push(session),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, SessionError::Silent), "{error}");
}

#[test]
fn a_stop_of_a_room_that_goes_on_is_not_waited_for_without_end() {
    let (place, mut guest) = begin(RoomSpec { stop_timeout_ms: 600_000, ..spec(true) });
    let _streams = guest.boot();
    // The owner answers; the command's patience is shorter than the room's time.
    let session = Session::connect(&place.path(), Patience::try_from(0.1).unwrap()).unwrap();
    session.remote().stop(None).unwrap();
    let error = session.wait_stopped(Instant::now(), Duration::ZERO).unwrap_err();
    assert!(matches!(error, SessionError::NotEnded { .. }), "{error}");
    guest.exit(ExitStatus::Code(0));
    guest.shut_down();
    place.owner.join().unwrap();
}

#[test]
fn a_command_is_told_why_its_room_could_not_begin() {
    let directory = tempfile::tempdir().unwrap();
    let room = directory.path().join("room");
    std::fs::create_dir(&room).unwrap();
    // The place of the owner's socket is taken.
    std::fs::create_dir(room.join("owner.sock")).unwrap();
    let (creator, command) = Connection::pair().unwrap();
    let (_vmm, owners) = Connection::pair().unwrap();
    let (_life, held) = UnixStream::pair().unwrap();
    let launched = Launched {
        connection: owners,
        child: testing::stand_in(held.as_fd()),
        cgroup: None,
        saved: None,
        record: None,
    };
    let ownership = Ownership {
        held: Held::default(),
        id: "0123456789ab".parse().unwrap(),
        spec: spec(false),
        task: Task::Run,
        directory: room.clone(),
        timeline: Vec::new(),
        blobs: Vec::new(),
        lock: File::create(room.join("lock")).unwrap().into(),
        patience: Patience::default(),
    };
    assert!(Room::begin(ownership, launched, creator).is_none());
    let session = Session::new(command, Patience::default());
    let Ok(packet) = session.receive() else { panic!("nothing was told") };
    let api::ToClient::Ended(ended) = packet.message else { panic!("no end") };
    assert!(matches!(ended.outcome, Outcome::OwnerFailed { .. }), "{ended:?}");
    assert!(!room.exists());
    assert!(matches!(session.receive(), Err(SessionError::OwnerGone(_))));
}

#[test]
fn a_start_is_noted_once_however_often_its_steps_are_said() {
    let (place, mut guest) = begin(spec(false));
    let _streams = guest.boot();
    let marks = |round: usize| {
        let long = "x".repeat(200);
        (0..20).map(|n| Mark { done: format!("{round}.{n} {long}"), at_us: 1 }).collect()
    };
    for round in 0..8 {
        guest
            .vmm
            .send_blocking(&FromVmm::from(Booted { timeline: marks(round), notice: None }), &[])
            .unwrap();
        guest.say(Started { process: WORKLOAD });
    }
    must_be_well(&place, &mut guest);
    let session = place.session;
    guest.end(End::Panic);
    let all = told(&session, |message| matches!(message, api::ToClient::Ended(_)));
    let Some(api::ToClient::Ended(ended)) = all.last() else { panic!("no end") };
    assert_eq!(ended.timeline.len(), MOST_MARKS);
    assert!(ended.timeline.iter().all(|mark| mark.done.chars().count() <= 60));
    assert_eq!(ended.timeline.iter().filter(|mark| mark.done == "workload started").count(), 1);
}
