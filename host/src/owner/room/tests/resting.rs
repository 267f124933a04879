//! Functions' rooms between two events: what they give back, that they stand still, and what wakes them.

use carrel_protocol::vmm::{Done, Metrics, Pause, Resume, SetBalloon, Stop};

use super::invocations::{function, invoked, response};
use super::*;

/// Waits are a tenth of what they are for users: a room rests 100 ms after it was told to.
fn impatient() -> Patience {
    "0.1".parse().unwrap()
}

/// A room whose function can be given events, by its creator's session.
struct Kept {
    guest: Guest,
    place: Place,
    _streams: [UnixStream; 3],
}

impl Kept {
    fn new(spec: RoomSpec) -> Self {
        let (place, mut guest) = begin_with(spec, impatient());
        let streams = guest.boot();
        place.session.limit(Some(TIME)).unwrap();
        let kept = Self { guest, place, _streams: streams };
        // Three streams and that it runs, in any order.
        (0..4).for_each(|_| drop(kept.told()));
        kept
    }

    fn told(&self) -> api::ToClient {
        self.place.session.receive().unwrap().message
    }

    /// Another command's session.
    fn another(&self) -> Session {
        Session::connect(&self.place.path(), impatient()).unwrap()
    }

    fn rest(&self) {
        self.place.session.remote().send(api::Rest {}).unwrap();
    }

    /// The guest is asked what it can spare.
    fn asked(&mut self, spare_mib: u64) {
        assert!(matches!(self.guest.hear(), FromHost::ReportUsage(_)));
        self.guest.report(spare_mib);
    }

    /// What its VMM is told next, of anything but its counters: these say that the balloon holds so much.
    fn ordered(&self, held_mib: u64) -> FromOwner {
        loop {
            let order = self.guest.vmm.receive::<FromOwner>().unwrap().message;
            let asked = matches!(order, FromOwner::ReadMetrics(_));
            let metrics = Metrics { balloon_bytes: held_mib << 20, reclaimed_bytes: 7, ..Metrics::default() };
            let answer = if asked { FromVmm::from(metrics) } else { Done {}.into() };
            self.guest.vmm.send_blocking(&answer, &[]).unwrap();
            if !asked {
                return order;
            }
        }
    }

    /// A room that rests.
    fn at_rest() -> Self {
        let mut kept = Self::new(function());
        kept.rest();
        kept.asked(0);
        assert_eq!(kept.ordered(0), Pause {}.into());
        kept
    }

    fn event(&self) {
        let mut event = tempfile::tempfile().unwrap();
        event.write_all(b"{}").unwrap();
        let id = "id".to_owned();
        let invoke = api::Invoke { id, event_bytes: 2, timeout_ms: 3000, headers: BTreeMap::new() };
        self.place.session.remote().send_with(invoke, &event).unwrap();
    }

    fn answers(&mut self) {
        let FromHost::Invoke(invoke) = self.guest.hear() else { panic!("no event") };
        self.guest.dial(&invoke.event);
        self.guest.dial(&invoke.response);
        self.guest.say(invoked(response()));
        // After the response's stream.
        while !matches!(self.told(), api::ToClient::Invoked(_)) {}
    }

    /// What its VMM is told next, if that is soon: within several times as long as anything takes here.
    fn ordered_soon(&self) -> Option<FromOwner> {
        self.guest.vmm.limit(Some(Duration::from_millis(700))).unwrap();
        let order = self.guest.vmm.receive().ok().map(|packet| packet.message);
        self.guest.vmm.limit(None).unwrap();
        order
    }

    /// It is awake, and stays so: its VMM is asked for its counters and nothing else.
    fn stays_awake(&self) -> bool {
        self.ordered_soon().is_none_or(|order| matches!(order, FromOwner::ReadMetrics(_)))
    }
}

impl Guest {
    fn report(&mut self, spare_mib: u64) {
        let containers = BTreeMap::from([(0, GuestUsage { wall_us: 5, ..GuestUsage::default() })]);
        self.say(Usage { containers, spare_bytes: spare_mib << 20, last: false });
    }
}

#[test]
fn a_kept_room_gives_back_what_it_can_spare_and_then_stands_still() {
    let mut kept = Kept::new(function());
    kept.rest();
    // Beside a reserve of 4 MiB.
    kept.asked(34);
    assert_eq!(kept.ordered(0), SetBalloon { size_mib: 30 }.into());
    // Emptied before it is paused: it has its memory when it is woken.
    assert_eq!(kept.ordered(30), SetBalloon { size_mib: 0 }.into());
    assert_eq!(kept.ordered(0), Pause {}.into());
    assert_eq!(kept.ordered_soon(), None, "nobody asks a room that rests, nor its VMM");
    kept.event();
    assert_eq!(kept.ordered(0), Resume {}.into());
    kept.answers();
    // The same again, when it is told again.
    kept.rest();
    kept.asked(0);
    assert_eq!(kept.ordered(0), Pause {}.into());
}

#[test]
fn a_guest_that_gives_nothing_or_never_takes_back_or_is_mute_is_paused_all_the_same() {
    // It never fills it.
    let mut kept = Kept::new(function());
    kept.rest();
    kept.asked(u64::MAX >> 20);
    assert_eq!(kept.ordered(0), SetBalloon { size_mib: u32::MAX }.into());
    assert_eq!(kept.ordered(0), SetBalloon { size_mib: 0 }.into());
    assert_eq!(kept.ordered(0), Pause {}.into());
    // It never empties it.
    let mut kept = Kept::new(function());
    kept.rest();
    kept.asked(20);
    assert_eq!(kept.ordered(0), SetBalloon { size_mib: 16 }.into());
    assert_eq!(kept.ordered(99), SetBalloon { size_mib: 0 }.into());
    assert_eq!(kept.ordered(99), Pause {}.into());
    // It doesn't say what it can spare.
    let mut kept = Kept::new(function());
    kept.rest();
    assert!(matches!(kept.guest.hear(), FromHost::ReportUsage(_)));
    assert_eq!(kept.ordered(0), Pause {}.into());
}

#[test]
fn a_guest_that_gives_page_after_page_is_paused_in_time() {
    let mut kept = Kept::new(function());
    kept.rest();
    kept.asked(1 << 20);
    let begun = Instant::now();
    let mut held = 0;
    let mut orders = Vec::new();
    // It gives a page whenever somebody looks, and says that it takes it back as slowly.
    while orders.last() != Some(&FromOwner::from(Pause {})) {
        let order = kept.guest.vmm.receive::<FromOwner>().unwrap().message;
        held += 4096;
        let metrics = Metrics { balloon_bytes: held, ..Metrics::default() };
        let asked = matches!(order, FromOwner::ReadMetrics(_));
        let answer = if asked { FromVmm::from(metrics) } else { Done {}.into() };
        kept.guest.vmm.send_blocking(&answer, &[]).unwrap();
        orders.extend(Some(order).filter(|_| !asked));
    }
    assert_eq!(orders[1], SetBalloon { size_mib: 0 }.into());
    let took = begun.elapsed();
    // Twice a second, by this test's patience.
    assert!((Duration::from_millis(1900)..Duration::from_secs(10)).contains(&took), "{took:?}");
}

#[test]
fn an_event_in_the_middle_is_handed_over_at_once_and_the_balloon_let_go() {
    let mut kept = Kept::new(function());
    kept.rest();
    kept.asked(100);
    assert_eq!(kept.ordered(0), SetBalloon { size_mib: 96 }.into());
    kept.event();
    assert_eq!(kept.ordered(10), SetBalloon { size_mib: 0 }.into());
    kept.answers();
    assert!(kept.stays_awake(), "it was not told to rest again");
}

#[test]
fn an_event_that_follows_at_once_finds_a_room_that_was_never_asked() {
    let mut kept = Kept::new(function());
    for _ in 0..3 {
        kept.rest();
        kept.event();
        kept.answers();
    }
    assert!(kept.stays_awake());
}

#[test]
fn usage_of_a_room_at_rest_is_its_last_report_and_wakes_nobody() {
    let kept = Kept::at_rest();
    let report = kept.another().usage().unwrap();
    assert_eq!(report.guest.unwrap().wall_us, 5);
    assert!(report.host.pss_bytes.is_some(), "the host's own part is of now");
    assert_eq!(kept.ordered_soon(), None);
}

#[test]
fn a_process_beside_a_function_at_rest_wakes_it_and_it_rests_again_after_its_end() {
    let mut kept = Kept::at_rest();
    let command = kept.another();
    let process = ProcessSpec { arguments: vec!["true".into()], ..function().process };
    command.remote().send(api::Exec { process }).unwrap();
    assert_eq!(kept.ordered(0), Resume {}.into());
    let FromHost::Exec(exec) = kept.guest.hear() else { panic!("no process") };
    let id = exec.process.id;
    kept.guest.say(Started { process: id });
    assert!(kept.stays_awake(), "as long as it runs");
    let streams = [exec.process.stdio.stdin, exec.process.stdio.stdout, exec.process.stdio.stderr];
    let _streams = streams.map(|stream| stream.map(|stream| kept.guest.dial(&stream)));
    kept.guest.say(Exited { process: id, status: ExitStatus::Code(0), out_of_memory: false });
    kept.asked(0);
    assert_eq!(kept.ordered(0), Pause {}.into());
}

#[test]
fn a_room_at_rest_is_stopped_as_one_that_is_awake() {
    let mut kept = Kept::at_rest();
    kept.another().remote().stop(None).unwrap();
    assert_eq!(kept.ordered(0), Resume {}.into());
    let FromHost::Signal(signal) = kept.guest.hear() else { panic!("no signal") };
    assert_eq!((signal.process, signal.signal), (WORKLOAD, SIGKILL));
}

#[test]
fn a_timeout_wakes_a_room_at_rest() {
    let mut kept = Kept::new(RoomSpec { timeout_ms: Some(1000), ..function() });
    kept.rest();
    kept.asked(0);
    assert_eq!(kept.ordered(0), Pause {}.into());
    assert_eq!(kept.ordered(0), Resume {}.into());
    assert!(matches!(kept.guest.hear(), FromHost::Signal(_)));
}

#[test]
fn a_room_at_rest_whose_creator_goes_ends_without_its_guest() {
    let kept = Kept::at_rest();
    let waiting = kept.another();
    let Kept { guest, place, .. } = kept;
    let Place { session, owner, directory: _directory } = place;
    drop(session);
    assert_eq!(guest.order().unwrap().message, Stop {}.into());
    guest.end(End::Stopped);
    let ended = waiting.wait().unwrap();
    assert_eq!(ended.outcome, Outcome::Stopped { signal: SIGKILL });
    assert_eq!(ended.usage.unwrap().guest.unwrap().wall_us, 5, "its last report is of before");
    owner.join().unwrap();
}

#[test]
fn a_guest_that_ends_its_function_while_it_should_rest_ends_the_room() {
    let mut kept = Kept::at_rest();
    // Said before it was paused, and heard after.
    kept.guest.exit(ExitStatus::Code(1));
    assert!(matches!(kept.told(), api::ToClient::Exited(_)));
    let Kept { guest, place, .. } = kept;
    let Place { session, owner, directory: _directory } = place;
    drop(session);
    assert_eq!(guest.order().unwrap().message, Stop {}.into());
    guest.end(End::Stopped);
    owner.join().unwrap();
}

#[test]
fn only_functions_rest_and_only_by_their_creators_word() {
    let kept = Kept::new(spec(false));
    kept.rest();
    assert!(kept.stays_awake(), "no function");
    let kept = Kept::new(function());
    kept.another().remote().send(api::Rest {}).unwrap();
    assert!(kept.stays_awake(), "somebody else");
}
