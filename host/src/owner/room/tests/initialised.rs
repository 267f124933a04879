//! Templates whose workload runs: how they are made, and how their clones go on.

use carrel_protocol::agent::{Attach, Attached, Awake, Frozen, Ready};
use carrel_protocol::vmm::{Done, Snapshotted};

use super::*;
use crate::launch::Saved;
use crate::outcome::Step;
use crate::spec::FunctionSpec;

fn initialised() -> RoomSpec {
    RoomSpec { initialised: true, ..spec(false) }
}

fn saved() -> Saved {
    let file = || tempfile::tempfile().unwrap().into();
    Saved { state: file(), memory: file() }
}

fn begin_template(spec: RoomSpec) -> (Place, Guest) {
    begin_task(spec, Patience::default(), Task::Template, Some(saved()))
}

/// What a template's command does: its input is open and empty.
fn accompany(place: Place) -> (JoinHandle<Outcome>, File, std::io::PipeWriter) {
    let (input, open) = std::io::pipe().unwrap();
    let (streams, said, _) = files(b"");
    let streams = Files { stdin: Some(std::os::fd::OwnedFd::from(input).into()), ..streams };
    let command = std::thread::spawn(move || {
        let _files = place.directory;
        place.session.run(streams, &mut |_| ()).unwrap().outcome
    });
    (command, said, open)
}

impl Guest {
    /// Up to a start for cloning, which is not told yet.
    fn start_for_cloning(&mut self) -> [UnixStream; 3] {
        let start = self.boot_to_start();
        assert!(start.cloning);
        let stdio = start.process.stdio;
        [stdio.stdin, stdio.stdout, stdio.stderr].map(|stream| self.dial(&stream.unwrap()))
    }

    fn ready(&mut self) {
        self.say(Ready { process: WORKLOAD });
    }

    /// The workload's streams end, and all rests; the VMM saves it.
    fn freeze_and_save(mut self, streams: [UnixStream; 3]) {
        assert!(matches!(self.hear(), FromHost::Freeze(_)));
        drop(streams);
        self.say(Frozen {});
        assert!(matches!(self.order().unwrap().message, FromOwner::Pause(_)));
        self.vmm.send_blocking(&FromVmm::from(Done {}), &[]).unwrap();
        let packet = self.order().unwrap();
        assert!(matches!(packet.message, FromOwner::Snapshot(_)));
        assert_eq!(packet.descriptors.len(), 3, "KVM, state, memory");
        let snapshotted = Snapshotted { state_bytes: 1, memory_bytes: 2, took_us: 3 };
        self.vmm.send_blocking(&FromVmm::from(snapshotted), &[]).unwrap();
        assert!(matches!(self.order().unwrap().message, FromOwner::Stop(_)));
        self.end(End::Stopped);
    }

    fn hello_of_a_clone(&mut self) -> Attach {
        self.say(Hello {
            version: agent::VERSION,
            agent: "0".into(),
            kernel: "6".into(),
            booted_us: 1,
            clone: true,
        });
        assert!(matches!(self.hear(), FromHost::Welcome(_)));
        let FromHost::Attach(attach) = self.hear() else { panic!("nothing to attach") };
        assert_eq!(attach.process, WORKLOAD);
        self.say(Awake { behind_ns: 0, took_us: 1 });
        attach
    }
}

#[test]
fn a_workload_is_saved_where_it_says_that_it_is_ready() {
    let (place, mut guest) = begin_template(initialised());
    let path = place.path();
    let (command, said, open) = accompany(place);
    let mut streams = guest.start_for_cloning();
    guest.say(Started { process: WORKLOAD });
    streams[1].write_all(b"imports done\n").unwrap();
    let record = Record::read(&path.join("state.json")).unwrap();
    assert!(matches!(record.phase, Phase::Starting | Phase::Initialising), "{record:?}");
    streams[0].set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let nothing = streams[0].read(&mut [0]).unwrap_err();
    assert_eq!(
        nothing.kind(),
        std::io::ErrorKind::WouldBlock,
        "its input has no end, or every clone's would have one"
    );
    guest.ready();
    guest.freeze_and_save(streams);
    assert_eq!(command.join().unwrap(), Outcome::Saved { state_bytes: 1, memory_bytes: 2 });
    assert_eq!(text(said), "imports done\n");
    assert!(!path.exists());
    drop(open);
}

#[test]
fn readiness_that_overtakes_the_start_is_not_lost() {
    let (place, mut guest) = begin_template(initialised());
    let (command, _, _open) = accompany(place);
    let streams = guest.start_for_cloning();
    guest.ready();
    guest.say(Started { process: WORKLOAD });
    guest.freeze_and_save(streams);
    assert!(matches!(command.join().unwrap(), Outcome::Saved { .. }));
}

#[test]
fn a_workload_that_ends_before_it_is_ready_is_no_template() {
    let (place, mut guest) = begin_template(initialised());
    let (command, said, _open) = accompany(place);
    let mut streams = guest.start_for_cloning();
    guest.say(Started { process: WORKLOAD });
    streams[2].write_all(b"no module\n").unwrap();
    streams[1].write_all(b"why\n").unwrap();
    drop(streams);
    guest.exit(ExitStatus::Code(1));
    guest.shut_down();
    assert_eq!(command.join().unwrap(), exited(1));
    assert_eq!(text(said), "why\n");
}

#[test]
fn a_workload_that_ends_while_it_is_frozen_is_no_template_either() {
    let (place, mut guest) = begin_template(initialised());
    let (command, _, _open) = accompany(place);
    let streams = guest.start_for_cloning();
    guest.say(Started { process: WORKLOAD });
    guest.ready();
    assert!(matches!(guest.hear(), FromHost::Freeze(_)));
    drop(streams);
    guest.exit(ExitStatus::Signal(11));
    assert!(matches!(guest.order().unwrap().message, FromOwner::Stop(_)));
    guest.end(End::Stopped);
    let outcome = command.join().unwrap();
    assert_eq!(outcome, Outcome::Exited { status: ExitStatus::Signal(11), out_of_memory: false });
}

#[test]
fn a_function_has_its_init_to_be_ready_in() {
    let function = FunctionSpec {
        name: "f".into(),
        memory_mb: 128,
        timeout_ms: 100,
        init_timeout_ms: 300,
        response_bytes: 100,
    };
    let (place, mut guest) = begin_template(RoomSpec { function: Some(function), ..initialised() });
    let (command, _, _open) = accompany(place);
    let _streams = guest.start_for_cloning();
    guest.say(Started { process: WORKLOAD });
    assert!(matches!(guest.order().unwrap().message, FromOwner::Stop(_)));
    guest.end(End::Stopped);
    let outcome = command.join().unwrap();
    assert!(matches!(outcome, Outcome::Overdue { step: Step::Initialise, .. }), "{outcome:?}");
}

#[test]
fn a_refusal_to_freeze_is_the_outcome() {
    let (place, mut guest) = begin_template(initialised());
    let (command, _, _open) = accompany(place);
    let _streams = guest.start_for_cloning();
    guest.say(Started { process: WORKLOAD });
    guest.ready();
    assert!(matches!(guest.hear(), FromHost::Freeze(_)));
    guest.say(Failed { request: Request::Freeze, failure: Failure::System, message: "stuck".into() });
    assert!(matches!(guest.order().unwrap().message, FromOwner::Stop(_)));
    guest.end(End::Stopped);
    let refused = Outcome::Refused { failure: Failure::System, message: "stuck".into() };
    assert_eq!(command.join().unwrap(), refused);
}

#[test]
fn a_clone_is_given_streams_in_place_of_a_start() {
    let (place, mut guest) = begin_task(initialised(), Patience::default(), Task::Clone, None);
    let (streams, out, err) = files(b"input");
    let command = std::thread::spawn(move || place.session.run(streams, &mut |_| ()));
    let attach = guest.hello_of_a_clone();
    let stdio = attach.stdio;
    let [mut stdin, mut stdout, mut stderr] =
        [stdio.stdin, stdio.stdout, stdio.stderr].map(|stream| guest.dial(&stream.unwrap()));
    guest.say(Attached { process: WORKLOAD });
    assert!(matches!(guest.hear(), FromHost::ReportUsage(_)));
    let mut read = String::new();
    stdin.read_to_string(&mut read).unwrap();
    assert_eq!(read, "input");
    stdout.write_all(b"out").unwrap();
    stderr.write_all(b"err").unwrap();
    drop((stdout, stderr));
    guest.exit(ExitStatus::Code(7));
    guest.shut_down();
    let ended = command.join().unwrap().unwrap();
    assert_eq!(ended.outcome, exited(7));
    assert_eq!(ended.usage.unwrap().guest.unwrap().wall_us, 77);
    assert!(ended.timeline.iter().any(|mark| mark.done == "workload attached"), "{:?}", ended.timeline);
    assert_eq!((text(out).as_str(), text(err).as_str()), ("out", "err"));
}

#[test]
fn a_workload_that_can_not_be_attached_ends_its_room() {
    let (place, mut guest) = begin_task(initialised(), Patience::default(), Task::Clone, None);
    guest.hello_of_a_clone();
    let message = "process 0 doesn't run".to_owned();
    guest.say(Failed { request: Request::Attach(WORKLOAD), failure: Failure::BadRequest, message });
    assert!(matches!(guest.order().unwrap().message, FromOwner::Stop(_)));
    guest.end(End::Stopped);
    assert!(matches!(place.session.wait().unwrap().outcome, Outcome::Refused { .. }));
}

#[test]
fn who_was_not_asked_to_be_cloned_may_not_say_so() {
    for word in [FromAgent::from(Ready { process: WORKLOAD }), Attached { process: WORKLOAD }.into()] {
        let (place, mut guest) = begin(spec(false));
        guest.boot_to_start();
        guest.say(word);
        assert!(matches!(guest.order().unwrap().message, FromOwner::Stop(_)));
        guest.end(End::Stopped);
        assert!(matches!(place.session.wait().unwrap().outcome, Outcome::AgentFailed { .. }));
    }
}
