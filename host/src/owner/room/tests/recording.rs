//! A clone's working set is asked for once, when its workload has come to a result.

use super::*;

fn clone_with(record: bool) -> (Place, Guest) {
    let record = record.then(|| OwnedFd::from(tempfile::tempfile().unwrap()));
    let payload = Payload::default();
    begin_recording(RoomSpec { payload, ..spec(false) }, Patience::default(), Task::Clone, None, record)
}

/// A clone's way to its workload's start.
fn start(guest: &mut Guest) {
    guest.say(Hello {
        version: agent::VERSION,
        agent: "0".into(),
        kernel: "6".into(),
        booted_us: 1,
        clone: true,
    });
    assert!(matches!(guest.hear(), FromHost::Welcome(_)));
    let FromHost::Start(start) = guest.hear() else { panic!("nothing to start") };
    let stdio = start.process.stdio;
    for stream in [stdio.stdin, stdio.stdout, stdio.stderr].into_iter().flatten() {
        drop(guest.dial(&stream));
    }
    guest.say(Started { process: start.process.id });
}

/// The command that made the room, until that has ended.
fn run(place: Place) -> JoinHandle<crate::session::Ended> {
    // All of the place goes along: its directory is the room's until the end.
    let Place { directory, owner, session } = place;
    std::thread::spawn(move || {
        let (streams, _out, _err) = files(b"");
        let ended = session.run(streams, &mut |_| ()).unwrap();
        owner.join().unwrap();
        drop(directory);
        ended
    })
}

/// What the VMM is asked, if it is within this time.
fn asked(guest: &Guest, within: Duration) -> Option<Packet<FromOwner>> {
    let timeout = rustix::net::sockopt::Timeout::Recv;
    rustix::net::sockopt::set_socket_timeout(&guest.vmm, timeout, Some(within)).unwrap();
    guest.order().ok()
}

fn assert_asked(guest: &Guest) {
    let packet = asked(guest, TIME).unwrap();
    assert!(matches!(packet.message, FromOwner::RecordWorkingSet(_)), "{:?}", packet.message);
    assert_eq!(packet.descriptors.len(), 1, "with the file that is written");
}

#[test]
fn it_is_asked_for_when_the_workload_exits_and_an_answer_ends_nothing() {
    let (place, mut guest) = clone_with(true);
    let command = run(place);
    start(&mut guest);
    guest.exit(ExitStatus::Code(3));
    assert_asked(&guest);
    guest.vmm.send_blocking(&FromVmm::from(carrel_protocol::vmm::Done {}), &[]).unwrap();
    assert!(asked(&guest, Duration::from_millis(50)).is_none(), "once");
    guest.shut_down();
    let ended = command.join().unwrap();
    assert_eq!(ended.outcome, exited(3));
    assert!(ended.timeline.iter().any(|mark| mark.done == "working set recorded"), "{:?}", ended.timeline);
}

#[test]
fn one_that_runs_on_is_asked_for_after_a_second_and_not_again_at_its_end() {
    let (place, mut guest) = clone_with(true);
    let command = run(place);
    start(&mut guest);
    let begun = Instant::now();
    assert_asked(&guest);
    assert!(begun.elapsed() >= Duration::from_millis(900), "{:?}", begun.elapsed());
    // A VMM that can't is none the worse for it.
    let refused = carrel_protocol::vmm::Refused { reason: "no /proc".into() };
    guest.vmm.send_blocking(&FromVmm::from(refused), &[]).unwrap();
    guest.exit(ExitStatus::Code(0));
    assert!(asked(&guest, Duration::from_millis(50)).is_none());
    guest.shut_down();
    assert_eq!(command.join().unwrap().outcome, exited(0));
}

#[test]
fn nobody_asks_where_there_is_no_file_for_it() {
    let (place, mut guest) = clone_with(false);
    let command = run(place);
    start(&mut guest);
    guest.exit(ExitStatus::Code(0));
    assert!(asked(&guest, Duration::from_millis(1200)).is_none());
    guest.shut_down();
    assert_eq!(command.join().unwrap().outcome, exited(0));
}
