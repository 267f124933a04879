//! Files that come back when the workload has ended.

use carrel_protocol::returned::{Done, Entry, FromRoom, Kind};

use super::*;
use crate::program::returned::{self, Destination, Limits, Received, ReturnError};
use crate::session::{Ended as Over, SessionError, Taking};

const LIMITS: Limits = Limits { bytes: 1000, entries: 10 };

/// What came of a room and of its file.
type Came = (Result<Over, SessionError>, Option<Result<Received, ReturnError>>);

/// Runs a room and takes this file.
fn run(session: Session, to: std::path::PathBuf) -> JoinHandle<Came> {
    std::thread::spawn(move || {
        let to = [Destination { in_room: "/out/report".into(), on_host: to }];
        let mut taken = None;
        let take = |stream: Result<UnixStream, String>| {
            let stream = stream.map_err(ReturnError::Refused);
            taken = Some(stream.and_then(|stream| returned::receive(stream, &to, LIMITS, TIME)));
        };
        let (streams, ..) = files(b"");
        let paths = [to[0].in_room.clone()];
        let taking = Taking { paths: &paths, take: Box::new(take) };
        let ended = session.run_and_take(streams, taking, &mut |_| ());
        (ended, taken)
    })
}

/// The order to send files.
fn collect(guest: &mut Guest) -> agent::Collect {
    loop {
        let heard = guest.hear();
        if let FromHost::Collect(collect) = heard {
            return collect;
        }
        assert!(matches!(heard, FromHost::ReportUsage(_)), "{heard:?}");
    }
}

#[test]
fn a_file_comes_back_before_the_room_ends_whatever_its_status() {
    let folder = tempfile::tempdir().unwrap();
    let (place, mut guest) = begin(spec(false));
    let command = run(place.session, folder.path().join("report"));
    drop(guest.boot());
    guest.exit(ExitStatus::Signal(6));
    let collect = collect(&mut guest);
    assert_eq!(collect.paths, ["/out/report"]);
    let mut stream = guest.dial(&collect.stream);
    let kind = Kind::File { bytes: 4 };
    FromRoom::from(Entry { root: 0, path: String::new(), kind, mode: 0o644, mtime: 0 })
        .write_to(&mut stream)
        .unwrap();
    stream.write_all(b"text").unwrap();
    FromRoom::from(Done { left_out: 0 }).write_to(&mut stream).unwrap();
    guest.shut_down();
    let (ended, taken) = command.join().unwrap();
    assert_eq!(taken.unwrap().unwrap().bytes, 4);
    let aborted = Outcome::Exited { status: ExitStatus::Signal(6), out_of_memory: false };
    assert_eq!(ended.unwrap().outcome, aborted);
    assert_eq!(std::fs::read(folder.path().join("report")).unwrap(), b"text");
}

#[test]
fn an_agent_that_can_not_send_them_says_why_and_the_status_stays() {
    let folder = tempfile::tempdir().unwrap();
    let (place, mut guest) = begin(spec(false));
    let command = run(place.session, folder.path().join("report"));
    drop(guest.boot());
    guest.exit(ExitStatus::Code(3));
    let collect = collect(&mut guest);
    let request = Request::Collect(collect.container);
    guest.say(Failed { request, failure: Failure::System, message: "the disk is gone".into() });
    guest.shut_down();
    let (ended, taken) = command.join().unwrap();
    assert!(matches!(taken, Some(Err(ReturnError::Refused(why))) if why == "the disk is gone"));
    assert_eq!(ended.unwrap().outcome, exited(3));
}

#[test]
fn an_agent_that_sends_nothing_is_not_waited_for_without_end() {
    let folder = tempfile::tempdir().unwrap();
    let (place, mut guest) = begin_with(spec(false), "0.1".parse().unwrap());
    let command = run(place.session, folder.path().join("report"));
    drop(guest.boot());
    guest.exit(ExitStatus::Code(0));
    let begun = Instant::now();
    collect(&mut guest);
    guest.shut_down();
    let (ended, taken) = command.join().unwrap();
    assert!(taken.is_none() && begun.elapsed() < TIME);
    assert_eq!(ended.unwrap().outcome, exited(0));
}

#[test]
fn nobody_takes_files_of_a_workload_that_runs_nor_of_another_commands_room() {
    let (place, mut guest) = begin(spec(false));
    let streams = guest.boot();
    let beside = Session::connect(&place.path(), Patience::default()).unwrap();
    for session in [&place.session, &beside] {
        session.remote().send(api::Return { paths: vec!["/etc".into()] }).unwrap();
        // Its streams and its start were told before.
        while !matches!(session.receive().unwrap().message, api::ToClient::Refused(_)) {}
    }
    drop(streams);
}
