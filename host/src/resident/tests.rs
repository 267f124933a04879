//! Without a VMM: what a resident owner takes, refuses and answers, and how it ends.

use std::thread::JoinHandle;

use super::*;
use crate::home::{Assets, Task};
use crate::session::Beginning;
use crate::spec::{RoomSpec, testing};

const TIME: Duration = Duration::from_secs(20);

fn home(root: &Path) -> Home {
    let nowhere = Path::new("/nowhere").to_owned();
    let assets = Assets {
        kernel: nowhere.clone(),
        initramfs: nowhere.clone(),
        scratch: nowhere.clone(),
        vmm: nowhere,
    };
    Home::open(root, assets, Patience::default()).unwrap()
}

fn options() -> Options {
    let usual = (VcpuCount::ONE, MemoryMib::try_from(128).unwrap());
    Options { usual, ready: 0..=0, idle: None, overcommit: Overcommit::default(), warm: None }
}

/// A resident owner on a thread.
struct Place {
    root: tempfile::TempDir,
    stopper: Stopper,
    thread: JoinHandle<Result<(), ResidentError>>,
}

fn begin(options: Options) -> Place {
    let root = tempfile::tempdir().unwrap();
    let resident = Resident::open(home(root.path()), options).unwrap();
    let stopper = resident.stopper();
    Place { root, stopper, thread: thread::spawn(move || resident.serve()) }
}

impl Place {
    /// A room's directory, its order, and its lock.
    fn room(&self, id: &str) -> (RoomId, PathBuf, Vec<OwnedFd>) {
        let id: RoomId = id.parse().unwrap();
        let home = home(self.root.path());
        let directory = home.directory_of(&id);
        fs::create_dir(&directory).unwrap();
        let lock = File::create(directory.join("lock")).unwrap();
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        let order = Order {
            spec: RoomSpec { id: Some(id.clone()), ..testing::room() },
            assets: home.assets().clone(),
            patience: Patience::default(),
            task: Task::Run,
            extras: crate::home::Extras::default(),
        };
        fs::write(directory.join("room.json"), serde_json::to_vec(&order).unwrap()).unwrap();
        (id, directory, vec![lock.into()])
    }

    fn end(self) {
        self.stopper.stop();
        self.thread.join().unwrap().unwrap();
        assert!(!self.root.path().join(SOCKET).exists(), "its socket goes with it");
    }
}

#[test]
fn a_home_has_one_resident_owner_at_a_time() {
    let place = begin(options());
    let second = Resident::open(home(place.root.path()), options());
    assert!(matches!(second, Err(ResidentError::Taken)));
    let status = status(&home(place.root.path())).unwrap();
    assert_eq!((status.pid, status.rooms, status.given), (std::process::id(), 0, 0));
    assert!(status.memory_limit > 0 && status.cpu_limit_millis >= 100_000, "{status:?}");
    let root = place.root.path().to_owned();
    place.end();
    // The directory is gone with the place; another home's question finds nobody.
    assert!(!root.exists());
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(super::status(&home(empty.path())), Err(ResidentError::Absent(_))));
}

#[test]
fn a_socket_that_a_killed_one_left_is_in_nobodys_way() {
    let root = tempfile::tempdir().unwrap();
    let left = owner::listen(root.path(), SOCKET, 1).unwrap();
    drop(left);
    let room = "00000000000a".parse().unwrap();
    assert!(offer(root.path(), &room, &[], Patience::default()).unwrap().is_none(), "nobody listens there");
    let resident = Resident::open(home(root.path()), options()).unwrap();
    let stopper = resident.stopper();
    let thread = thread::spawn(move || resident.serve());
    status(&home(root.path())).unwrap();
    stopper.stop();
    thread.join().unwrap().unwrap();
}

#[test]
fn a_room_that_can_not_be_launched_ends_with_the_reason_and_leaves_nothing() {
    let place = begin(options());
    let (id, directory, supplies) = place.room("00000000000b");
    let session = offer(place.root.path(), &id, &supplies, Patience::default()).unwrap().unwrap();
    drop(supplies);
    let Beginning::Ended(ended) = session.wait_started().unwrap() else { panic!("it can't have started") };
    assert!(
        matches!(&ended.outcome, Outcome::OwnerFailed { message } if message.contains("/nowhere")),
        "{ended:?}"
    );
    assert!(!directory.exists());
    let status = status(&home(place.root.path())).unwrap();
    assert_eq!((status.given, status.from_shelf, status.refused), (1, 0, 0));
    place.end();
}

#[test]
fn a_room_for_which_the_host_has_nothing_left_is_told_so() {
    let overcommit = Overcommit { memory: "0.1".parse().unwrap(), cpu: "0.1".parse().unwrap() };
    let place = begin(Options { overcommit, ..options() });
    let (id, directory, supplies) = place.room("00000000000c");
    // One whole CPU, of a tenth of each that there is: too much for any host with fewer than ten.
    let session = offer(place.root.path(), &id, &supplies, Patience::default()).unwrap().unwrap();
    let begun = session.wait_started();
    let limit = status(&home(place.root.path())).unwrap().cpu_limit_millis;
    if limit < 1000 {
        let Beginning::Ended(ended) = begun.unwrap() else { panic!("it can't have started") };
        assert!(matches!(ended.outcome, Outcome::NoCapacity { .. }), "{ended:?}");
        assert_eq!(ended.outcome.exit_status(), 125);
        assert!(ended.outcome.sentence().unwrap().contains("--"), "it says what to do");
    }
    assert!(!directory.exists());
    place.end();
}

#[test]
fn who_speaks_another_version_or_nonsense_is_left_to_start_an_owner_by_itself() {
    let place = begin(options());
    let (id, directory, _supplies) = place.room("00000000000d");
    let ask = |message: &ToResident| {
        let connection = session::connected(place.root.path(), SOCKET, Patience::default()).unwrap();
        connection.limit(Some(TIME)).unwrap();
        connection.send_blocking(message, &[]).unwrap();
        connection.receive::<FromResident>()
    };
    let version = || "0.0.0/0".to_owned();
    assert!(matches!(ask(&Look { version: version() }.into()), Err(PacketError::Closed)));
    assert!(matches!(ask(&Own { version: version(), room: id }.into()), Err(PacketError::Closed)));
    let missing = Own { version: VERSION.into(), room: "0000000000ff".parse().unwrap() };
    assert!(matches!(ask(&missing.into()), Err(PacketError::Closed)), "there is no such room");
    // A message of another conversation.
    let connection = session::connected(place.root.path(), SOCKET, Patience::default()).unwrap();
    connection.send_blocking(&crate::owner::api::FromClient::from(crate::owner::api::Wait {}), &[]).unwrap();
    assert!(connection.receive::<FromResident>().is_err());
    assert!(directory.exists(), "the room is its command's still");
    place.end();
}

#[test]
fn who_says_nothing_keeps_nobody_from_being_served_and_a_second_stop_does_not_wait() {
    let place = begin(options());
    let silent = session::connected(place.root.path(), SOCKET, Patience::default()).unwrap();
    let status = status(&home(place.root.path())).unwrap();
    assert!(status.rooms <= 1, "{status:?}");
    place.stopper.stop();
    place.stopper.stop();
    place.thread.join().unwrap().unwrap();
    drop(silent);
}

#[test]
fn it_ends_when_it_was_idle_for_long_enough() {
    let place = begin(Options { idle: Some(Duration::from_secs(1)), ..options() });
    let begun = Instant::now();
    status(&home(place.root.path())).unwrap();
    place.thread.join().unwrap().unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(900) && begun.elapsed() < TIME, "{:?}", begun.elapsed());
}
