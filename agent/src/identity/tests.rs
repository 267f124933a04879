//! An invented kernel, whose generator gives the same from the same state, and the true one where that does no harm.

use std::cell::RefCell;
use std::rc::Rc;

use carrel_protocol::agent::Entropy;
use rustix::ioctl::opcode;
use sha2::{Digest, Sha256};

use super::*;

/// What was called, in order, with what a test wants to know of that moment.
pub(crate) type Calls = Rc<RefCell<Vec<String>>>;

/// A kernel whose whole randomness is what it was given. A copy is a clone.
#[derive(Debug, Clone)]
pub(crate) struct Invented {
    pub(crate) calls: Calls,
    /// Looked at with each call.
    watched: Option<PathBuf>,
    state: RefCell<State>,
    /// Whether RNDRESEEDCRNG does anything, and whether the generator goes on by itself.
    works: bool,
}

#[derive(Debug, Clone)]
struct State {
    pool: Vec<u8>,
    key: Vec<u8>,
    realtime_ns: u64,
}

impl Invented {
    pub(crate) fn new() -> Self {
        let state = State { pool: b"template".into(), key: b"template".into(), realtime_ns: 5_000 };
        Self { calls: Calls::default(), watched: None, state: state.into(), works: true }
    }

    /// Writes the file's content beside each call.
    pub(crate) fn watching(path: PathBuf) -> Self {
        Self { watched: Some(path), ..Self::new() }
    }

    fn call(&self, what: &str) {
        let seen = self.watched.as_ref().map(|path| std::fs::read_to_string(path).unwrap());
        self.calls.borrow_mut().push(seen.map_or(what.to_owned(), |seen| format!("{what} {seen}")));
    }

    pub(crate) fn draw(&self) -> [u8; SEED] {
        let mut drawn = [0; SEED];
        self.random(&mut drawn).unwrap();
        drawn
    }
}

impl Guest for Invented {
    fn credit(&self, entropy: &[u8; SEED]) -> io::Result<()> {
        self.call("credit");
        self.state.borrow_mut().pool.extend(entropy);
        Ok(())
    }
    fn reseed(&self) -> io::Result<()> {
        self.call("reseed");
        let mut state = self.state.borrow_mut();
        if self.works {
            state.key = Sha256::digest(&state.pool).to_vec();
        }
        Ok(())
    }
    fn random(&self, into: &mut [u8]) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        for byte in into {
            let next = Sha256::digest(&state.key).to_vec();
            *byte = next[0];
            if self.works {
                state.key = next;
            }
        }
        Ok(())
    }
    fn realtime_ns(&self) -> u64 {
        self.state.borrow().realtime_ns
    }
    fn set_realtime(&self, nanoseconds: u64) -> io::Result<()> {
        self.call("clock");
        self.state.borrow_mut().realtime_ns = nanoseconds;
        Ok(())
    }
    fn set_hostname(&self, name: &str) -> io::Result<()> {
        self.call(&format!("hostname={name}"));
        Ok(())
    }
    fn rename(&self, container: Renaming) -> Pin<Box<dyn Future<Output = io::Result<()>>>> {
        self.call(&format!("rename={}>{}", container.from, container.to));
        Box::pin(async { Ok(()) })
    }
}

pub(crate) fn identity(id: &str, realtime_ns: u64, entropy: u8) -> Identity {
    Identity { id: id.into(), hostname: id.into(), realtime_ns, entropy: Entropy([entropy; SEED]) }
}

#[test]
fn two_clones_never_draw_the_same() {
    let template = Invented::new();
    adopt(&template, &identity("t", 10, 1)).unwrap();
    let (one, other) = (template.clone(), template.clone());
    // The invented kernel is honest: without anything done, clones are alike.
    let copies = [template.clone(), template.clone()];
    assert_eq!(copies[0].draw(), copies[1].draw());
    adopt(&one, &identity("a", 20, 2)).unwrap();
    adopt(&other, &identity("b", 20, 3)).unwrap();
    let second = one.clone();
    adopt(&second, &identity("c", 30, 4)).unwrap();
    let drawn = [one.draw(), other.draw(), second.draw(), template.draw()];
    for (n, draw) in drawn.iter().enumerate() {
        assert!(!drawn[n + 1..].contains(draw));
    }
}

#[test]
fn entropy_is_credited_then_taken_and_only_then_come_clock_and_name() {
    let guest = Invented::new();
    let behind = adopt(&guest, &identity("a", 5_900, 2)).unwrap();
    assert_eq!(*guest.calls.borrow(), ["credit", "reseed", "clock", "hostname=a"]);
    assert_eq!((behind, guest.realtime_ns()), (-900, 5_900));
    // A clock that is ahead is set back.
    assert_eq!(adopt(&guest, &identity("b", 5_000, 3)).unwrap(), 900);
    assert_eq!(adopt(&guest, &identity("c", u64::MAX, 3)).unwrap(), i64::MIN);
    assert_eq!(adopt(&guest, &identity("d", 0, 3)).unwrap(), i64::MAX);
}

#[test]
fn a_generator_that_goes_on_as_before_is_found_out() {
    let guest = Invented { works: false, ..Invented::new() };
    assert!(matches!(adopt(&guest, &identity("a", 1, 2)), Err(IdentityError::Repeats)));
    assert_eq!(*guest.calls.borrow(), ["credit", "reseed"]);
}

/// Needs root. More entropy does no machine any harm.
#[test]
fn the_kernels_own_generator_takes_entropy_and_gives_bytes() {
    Kernel.credit(&[7; SEED]).unwrap();
    Kernel.reseed().unwrap();
    let (mut one, mut other) = ([0; SEED], [0; SEED]);
    Kernel.random(&mut one).unwrap();
    Kernel.random(&mut other).unwrap();
    assert!(one != other && one != [0; SEED]);
    let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assert!(Kernel.realtime_ns().abs_diff(u64::try_from(now.as_nanos()).unwrap()) < 10 * SECOND);
}

/// Needs root: a process with a UTS namespace of its own is renamed from outside.
#[test]
fn a_running_containers_name_is_changed_from_within() {
    let rootfs = tempfile::tempdir().unwrap();
    std::fs::create_dir(rootfs.path().join("etc")).unwrap();
    std::fs::write(rootfs.path().join("etc/hostname"), "old\n").unwrap();
    let renamed = |init: OwnedFd| {
        let renaming =
            Renaming { init, rootfs: rootfs.path().into(), from: "old".into(), to: "new-room".into() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(Kernel.rename(renaming))
    };
    let separate = Separate { namespaces: libc::CLONE_NEWUTS, cgroup: None };
    let init = fork::fork(separate, || {
        loop {
            // SAFETY: waits for a signal, and there is none but the last.
            unsafe { libc::pause() };
        }
    })
    .unwrap();
    let pidfd = || init.pidfd().try_clone_to_owned().unwrap();
    renamed(pidfd()).unwrap();
    let seen = {
        let pidfd = pidfd();
        std::thread::spawn(move || {
            let uts = ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME;
            move_into_thread_name_spaces(pidfd.as_fd(), uts).unwrap();
            rustix::system::uname().nodename().to_string_lossy().into_owned()
        })
    };
    assert_eq!(seen.join().unwrap(), "new-room");
    assert_eq!(std::fs::read_to_string(rootfs.path().join("etc/hostname")).unwrap(), "new-room\n");
    assert_ne!(rustix::system::uname().nodename().to_bytes(), b"new-room", "the agent's own");

    // One that ends meanwhile needs no name.
    let pidfd = pidfd();
    init.kill();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(init.wait()).unwrap();
    renamed(pidfd).unwrap();
}

#[test]
fn every_time_of_the_host_is_a_time() {
    for (nanoseconds, seconds, rest) in [
        (0, 0, 0),
        (999_999_999, 0, 999_999_999),
        (1_700_000_000_123_456_789, 1_700_000_000, 123_456_789),
        (u64::MAX, 18_446_744_073, 709_551_615),
    ] {
        assert_eq!(since_epoch(nanoseconds), Timespec { tv_sec: seconds, tv_nsec: rest });
    }
}

#[test]
fn requests_of_the_random_device_are_as_its_header_makes_them() {
    // include/uapi/linux/random.h; `rand_pool_info` is two numbers, then the bytes.
    assert_eq!(RNDADDENTROPY, u64::from(opcode::write::<[i32; 2]>(b'R', 3)));
    assert_eq!(RNDRESEEDCRNG, u64::from(opcode::none(b'R', 7)));
    assert_eq!((size_of::<Seed>(), std::mem::offset_of!(Seed, pool)), (8 + SEED, 8));
}
