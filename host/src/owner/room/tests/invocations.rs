//! Functions' rooms: an event in, an answer out, and the room's end.

use carrel_protocol::agent::{Invoke, Invoked, Outcome as Answer};

use super::*;
use crate::function::invocation::{Audience, Call, Called, Warm};
use crate::session::SessionError;
use crate::spec::FunctionSpec;

const ID: &str = "8476a536-e9f4-11e8-9739-2dfe598c3fcd";

pub(super) fn function() -> RoomSpec {
    let function = FunctionSpec {
        name: "f".into(),
        memory_mb: 128,
        timeout_ms: 3000,
        init_timeout_ms: 13_000,
        response_bytes: 100,
    };
    RoomSpec { function: Some(function), stop_signal: SIGKILL, stop_timeout_ms: 0, ..spec(false) }
}

/// The command's side on a thread; and what its files hold in the end.
fn invoke(place: Place) -> (JoinHandle<Result<Called, SessionError>>, File, File) {
    let (command, kept, log) = invoke_often(place, 1);
    let command = std::thread::spawn(move || {
        let (called, begun, answered) = command.join().unwrap();
        assert_eq!((begun, answered.len()), (1, 0));
        called
    });
    (command, kept, log)
}

fn call() -> Call {
    let mut event = tempfile::tempfile().unwrap();
    event.write_all(b"{\"n\":1}").unwrap();
    Call {
        id: ID.into(),
        event,
        event_bytes: 7,
        timeout_ms: 3000,
        headers: BTreeMap::from([("Invoked-Function-Arn".to_owned(), "arn".to_owned())]),
    }
}

type Often = (Result<Called, SessionError>, usize, Vec<Invoked>);

/// The same with so many events.
fn invoke_often(place: Place, times: usize) -> (JoinHandle<Often>, File, File) {
    let response = tempfile::tempfile().unwrap();
    let (streams, log, _) = files(b"");
    let kept = response.try_clone().unwrap();
    let command = std::thread::spawn(move || {
        let _files = place.directory;
        let (mut begun, mut answered) = (0, Vec::new());
        let audience = Audience {
            log: streams,
            response,
            started: &mut |_| begun += 1,
            answered: &mut |_, invoked| answered.push(invoked.clone()),
            notice: &mut |_| (),
            keep: None,
        };
        let mut rest = (1..times).map(|_| call());
        let called = place.session.invoke(call(), &mut || Ok(rest.next()), audience);
        (called, begun, answered)
    });
    (command, kept, log)
}

pub(super) fn invoked(outcome: Answer) -> Invoked {
    Invoked {
        id: ID.into(),
        outcome,
        init_us: Some(100),
        duration_us: 10,
        memory_peak_bytes: 1,
        response_bytes: 999,
    }
}

pub(super) fn response() -> Answer {
    Answer::Response { content_type: "application/json".into() }
}

impl Guest {
    fn event(&mut self) -> Invoke {
        let FromHost::Invoke(invoke) = self.hear() else { panic!("no event") };
        assert_eq!((invoke.id.as_str(), invoke.event_bytes, invoke.timeout_ms), (ID, 7, 3000));
        assert_eq!(invoke.headers["Invoked-Function-Arn"], "arn");
        let mut event = String::new();
        self.dial(&invoke.event).read_to_string(&mut event).unwrap();
        assert_eq!(event, "{\"n\":1}");
        invoke
    }

    /// The room is asked to kill its workload, and then to end.
    fn killed(mut self) {
        let FromHost::Signal(signal) = self.hear() else { panic!("no signal") };
        assert_eq!((signal.process, signal.signal), (WORKLOAD, SIGKILL));
        self.exit(ExitStatus::Signal(SIGKILL));
        self.shut_down();
    }
}

#[test]
fn an_event_is_answered_and_then_the_room_ends() {
    let (place, mut guest) = begin(function());
    let (command, answer, log) = invoke(place);
    let [_stdin, mut stdout, stderr] = guest.boot();
    let invoke = guest.event();
    guest.dial(&invoke.response).write_all(b"[1]").unwrap();
    guest.say(invoked(response()));
    // What the function wrote arrives after its answer.
    std::thread::sleep(Duration::from_millis(50));
    stdout.write_all(b"late\n").unwrap();
    drop((stdout, stderr));
    guest.killed();
    let called = command.join().unwrap().unwrap();
    let said = called.invoked.unwrap();
    assert_eq!((said.outcome, said.response_bytes), (response(), 3));
    assert_eq!(called.room.unwrap().usage.unwrap().guest.unwrap().wall_us, 77);
    assert_eq!((text(answer).as_str(), text(log).as_str()), ("[1]", "late\n"));
}

#[test]
fn events_follow_each_other_while_the_runtime_lives() {
    let (place, mut guest) = begin(function());
    let (command, answer, _log) = invoke_often(place, 3);
    let streams = guest.boot();
    for n in 0..3 {
        let invoke = guest.event();
        let word = if n == 1 { Answer::Error { error_type: "ValueError".into() } } else { response() };
        // The end of the second overtakes its bytes.
        if n == 1 {
            guest.say(invoked(word));
            std::thread::sleep(Duration::from_millis(50));
            guest.dial(&invoke.response).write_all(b"[error]").unwrap();
        } else {
            guest.dial(&invoke.response).write_all(format!("[{n}]").as_bytes()).unwrap();
            guest.say(invoked(word));
        }
    }
    drop(streams);
    guest.killed();
    let (called, begun, answered) = command.join().unwrap();
    assert_eq!((begun, answered.len()), (3, 2));
    assert_eq!((answered[0].response_bytes, answered[1].response_bytes), (3, 7));
    assert_eq!(called.unwrap().invoked.unwrap().outcome, response());
    assert_eq!(text(answer), "[0][error][2]");
}

/// A command's side, which nobody listens to; and the function's log.
fn serve(
    keep: Option<&mut dyn FnMut(&Warm) -> bool>,
    invoke: impl FnOnce(Audience<'_>) -> Result<Called, SessionError>,
) -> (Called, String) {
    let (streams, log, _) = files(b"");
    let called = invoke(Audience {
        log: streams,
        response: tempfile::tempfile().unwrap(),
        started: &mut |_| (),
        answered: &mut |_, _| (),
        notice: &mut |_| (),
        keep: keep.map(|keep| keep as _),
    });
    (called.unwrap(), text(log))
}

#[test]
fn a_room_that_is_kept_handles_anothers_event_and_ends_with_who_does_not_keep_it() {
    let (place, mut guest) = begin(function());
    let commands = std::thread::spawn(move || {
        let _files = place.directory;
        let mut kept = None;
        let mut keep = |warm: &Warm| {
            let handed = warm.descriptors().map(|it| it.try_clone_to_owned().unwrap());
            kept = Warm::from_descriptors(handed.into(), Patience::default());
            true
        };
        let first =
            serve(Some(&mut keep), |audience| place.session.invoke(call(), &mut || Ok(None), audience));
        let second = serve(None, |audience| kept.unwrap().invoke(call(), &mut || Ok(None), audience));
        (first, second)
    });
    let [_stdin, mut stdout, stderr] = guest.boot();
    for said in ["one", "two"] {
        let invoke = guest.event();
        stdout.write_all(said.as_bytes()).unwrap();
        guest.dial(&invoke.response).write_all(b"[]").unwrap();
        guest.say(invoked(response()));
    }
    drop((stdout, stderr));
    guest.killed();
    let ((first, log), (second, second_log)) = commands.join().unwrap();
    assert_eq!((first.invoked.unwrap().response_bytes, first.room), (2, None));
    assert!(second.invoked.is_some() && second.room.is_some());
    assert_eq!((log.as_str(), second_log.as_str()), ("one", "two"));
}

#[test]
fn events_after_a_runtimes_end_are_left_to_another_room() {
    let (place, mut guest) = begin(function());
    let (command, ..) = invoke_often(place, 3);
    let streams = guest.boot();
    let invoke = guest.event();
    guest.dial(&invoke.response);
    guest.say(invoked(Answer::TimedOut));
    drop(streams);
    guest.killed();
    let (called, begun, answered) = command.join().unwrap();
    assert_eq!((begun, answered.len()), (1, 0));
    assert_eq!(called.unwrap().invoked.unwrap().outcome, Answer::TimedOut);
}

#[test]
fn a_response_that_its_end_overtakes_is_waited_for() {
    let (place, mut guest) = begin(function());
    let (command, answer, _log) = invoke(place);
    let streams = guest.boot();
    let invoke = guest.event();
    guest.say(invoked(response()));
    std::thread::sleep(Duration::from_millis(50));
    guest.dial(&invoke.response).write_all(b"[2]").unwrap();
    drop(streams);
    guest.killed();
    assert!(command.join().unwrap().unwrap().invoked.is_some());
    assert_eq!(text(answer), "[2]");
}

#[test]
fn a_runtime_that_ends_first_is_reported_as_the_agent_has_it() {
    let (place, mut guest) = begin(function());
    let (command, ..) = invoke(place);
    let streams = guest.boot();
    let FromHost::Invoke(invoke) = guest.hear() else { panic!("no event") };
    drop(streams);
    guest.exit(ExitStatus::Code(1));
    std::thread::sleep(Duration::from_millis(50));
    guest.dial(&invoke.response).write_all(b"no module").unwrap();
    guest.say(invoked(Answer::InitError { error_type: "Runtime.ImportModuleError".into() }));
    guest.shut_down();
    let said = command.join().unwrap().unwrap().invoked.unwrap();
    assert!(matches!(said.outcome, Answer::InitError { .. }), "{said:?}");
}

#[test]
fn a_room_that_ends_before_the_answer_says_how() {
    let (place, mut guest) = begin(function());
    let (command, ..) = invoke(place);
    // Whoever holds a stream's other end, the room's end is its end.
    let _streams = guest.boot();
    guest.event();
    guest.end(End::Panic);
    let called = command.join().unwrap().unwrap();
    assert_eq!(
        (called.invoked, called.room.unwrap().outcome),
        (None, Outcome::GuestPanicked { last_words: None })
    );
}

#[test]
fn a_room_that_ends_before_its_event_says_how_too() {
    let (mut place, mut guest) = begin(function());
    let _streams = guest.boot();
    guest.end(End::Panic);
    let owner = std::mem::replace(&mut place.owner, std::thread::spawn(|| ()));
    owner.join().unwrap();
    let (command, ..) = invoke(place);
    let called = command.join().unwrap().unwrap();
    assert_eq!(
        (called.invoked, called.room.unwrap().outcome),
        (None, Outcome::GuestPanicked { last_words: None })
    );
}

#[test]
fn an_event_that_the_agent_refuses_is_an_error() {
    let (place, mut guest) = begin(function());
    let (command, ..) = invoke(place);
    let _streams = guest.boot();
    let FromHost::Invoke(_) = guest.hear() else { panic!("no event") };
    let request = Request::Invoke(ID.into());
    guest.say(Failed { request, failure: Failure::BadRequest, message: "no\x07".into() });
    let refused = command.join().unwrap().unwrap_err();
    assert!(matches!(refused, SessionError::Refused(message) if message == "no"));
    guest.shut_down();
}
