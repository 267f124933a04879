//! Processes beside the workload, and the windows that processes are looked at through.

use super::*;

#[test]
fn a_terminal_begins_with_the_size_that_its_window_has_by_then() {
    let sized = |rows| agent::TerminalSize { rows, columns: 80 };
    let mut of = spec(false);
    of.process.terminal = Some(sized(24));
    let (place, mut guest) = begin(of.clone());
    let remote = place.session.remote();
    remote.resize(sized(30)).unwrap();
    let start = guest.boot_to_start();
    assert_eq!(start.process.stdio.terminal, Some(sized(30)), "said before the start");
    remote.resize(sized(31)).unwrap();
    remote.resize(sized(32)).unwrap();
    // One behind the other: the owner has heard both when it answers.
    remote.send(api::ReadUsage {}).unwrap();
    while !matches!(place.session.receive().unwrap().message, api::ToClient::Used(_)) {}
    guest.say(Started { process: WORKLOAD });
    let FromHost::Resize(resize) = guest.hear() else { panic!("no size") };
    assert_eq!((resize.process, resize.size), (WORKLOAD, sized(32)), "said before it ran");
    assert!(matches!(guest.hear(), FromHost::ReportUsage(_)));
    remote.resize(sized(32)).unwrap();
    remote.resize(sized(33)).unwrap();
    let FromHost::Resize(resize) = guest.hear() else { panic!("no size") };
    assert_eq!(resize.size, sized(33), "what it knows is not said again");
    // Another command's window is another terminal's, before its process is there too.
    let beside = Session::connect(&place.path(), Patience::default()).unwrap();
    beside.remote().resize(sized(50)).unwrap();
    beside.remote().send(api::Exec { process: of.process }).unwrap();
    let FromHost::Exec(exec) = guest.hear() else { panic!("no exec") };
    assert_eq!(exec.process.stdio.terminal, Some(sized(50)));
}

#[test]
fn an_execs_end_does_not_end_the_reading_of_the_log() {
    let patience: Patience = "0.2".parse().unwrap();
    let (place, mut guest) = begin_with(spec(true), patience);
    let path = place.path();
    let [_stdin, mut stdout, stderr] = guest.boot();
    drop(stderr);
    let beside = Session::connect(&path, Patience::default()).unwrap();
    let process = ProcessSpec { arguments: vec!["true".into()], ..Default::default() };
    beside.remote().send(api::Exec { process }).unwrap();
    let FromHost::Exec(exec) = guest.hear() else { panic!("no exec") };
    guest.say(Started { process: exec.process.id });
    guest.say(Exited { process: exec.process.id, status: ExitStatus::Code(0), out_of_memory: false });
    // Its streams were never dialled, so its end is told when they are waited for no longer.
    while !matches!(beside.receive().unwrap().message, api::ToClient::Exited(_)) {}
    std::thread::sleep(patience.identify() / 10);
    guest.exit(ExitStatus::Code(0));
    // The backlog comes behind the end.
    std::thread::sleep(patience.identify() / 5);
    assert_eq!(place.record().unwrap().phase, Phase::Draining);
    stdout.write_all(b"the tail\n").unwrap();
    drop(stdout);
    guest.shut_down();
    place.owner.join().unwrap();
    assert!(std::fs::read(path.join("log")).unwrap().ends_with(b"the tail\n"));
}

#[test]
fn exec_has_streams_and_a_status_of_its_own() {
    let (place, mut guest) = begin(spec(false));
    let _workload = guest.boot();
    let session = Session::connect(&place.path(), Patience::default()).unwrap();
    let (streams, out, _err) = files(b"");
    let process =
        ProcessSpec { arguments: vec!["id".into()], environment: vec!["A=1".into()], ..Default::default() };
    let command = std::thread::spawn(move || session.exec(&process, streams, &mut |_| ()));
    let FromHost::Exec(exec) = guest.hear() else { panic!("no exec") };
    assert_eq!(
        (exec.process.arguments, exec.process.working_directory),
        (vec!["id".to_owned()], "/".to_owned())
    );
    assert!(exec.process.stdio.stdin.is_none() && exec.process.id != WORKLOAD);
    for stream in [exec.process.stdio.stdout, exec.process.stdio.stderr].into_iter().flatten() {
        guest.dial(&stream).write_all(b"beside").unwrap();
    }
    guest.say(Started { process: exec.process.id });
    guest.say(Exited { process: exec.process.id, status: ExitStatus::Code(6), out_of_memory: false });
    assert_eq!(command.join().unwrap().unwrap().outcome, exited(6));
    assert_eq!(text(out), "beside");
    assert_eq!(place.record().unwrap().phase, Phase::Running);
}

#[test]
fn an_exec_whose_command_is_killed_is_killed_too() {
    let (place, mut guest) = begin(spec(false));
    let _workload = guest.boot();
    let session = Session::connect(&place.path(), Patience::default()).unwrap();
    let process = ProcessSpec { arguments: vec!["sleep".into()], ..Default::default() };
    session.remote().send(api::Exec { process }).unwrap();
    let FromHost::Exec(exec) = guest.hear() else { panic!("no exec") };
    drop(session);
    let FromHost::Signal(signal) = guest.hear() else { panic!("no signal") };
    assert_eq!((signal.process, signal.signal), (exec.process.id, SIGKILL));
}

#[test]
fn an_exec_that_is_too_long_is_refused_and_the_room_goes_on() {
    let mut large = spec(false);
    // As large as a workload's may be, so that the exec's own makes it too much.
    large.process.environment = vec![format!("A={}", "x".repeat((1 << 20) - 8000))];
    large.check_start().unwrap();
    let (place, mut guest) = begin(large);
    let _workload = guest.boot();
    let exec = |bytes: usize| {
        let session = Session::connect(&place.path(), Patience::default()).unwrap();
        let arguments = vec!["id".into(), "x".repeat(bytes)];
        session.exec(&ProcessSpec { arguments, ..Default::default() }, files(b"").0, &mut |_| ())
    };
    assert!(matches!(exec(100 << 10), Err(crate::session::SessionError::TooLong { .. })), "never sent");
    let Outcome::Refused { failure, message } = exec(16 << 10).unwrap().outcome else {
        panic!("not refused")
    };
    assert_eq!(failure, Failure::BadRequest);
    assert!(message.contains("1048576 is the most"), "{message}");
    let session = Session::connect(&place.path(), Patience::default()).unwrap();
    session.remote().send(api::Exec { process: ProcessSpec::default() }).unwrap();
    assert!(matches!(guest.hear(), FromHost::Exec(_)), "a short one is still heard");
}
