//! The resident owner, `carrel pool`: one process that owns the rooms of attached commands, and has ready what the next ones need.
//!
//! ```text
//!   command ── Own + lock, template, blobs ──▶ accept ─▶ a thread a room: admitted? ─▶ a VMM from the shelf goes on ─▶ owned to its end
//!           ◀── Mine ──                                     │ no: told why             └ none there: launched as by any owner
//!                                              keeper: a VMM that was taken is replaced once no room is starting
//!   command ── Keep + a function's room that waits ──▶ warm ──▶ Wake ─▶ another command's event in it; too old: the room ends
//! ```
//!
//! Rooms are the same as with an owner of their own: the same directory, lock, record and socket, so every command finds them as always. A command that finds no
//! resident owner starts an owner by itself; so does one whose room is to outlive it, since a resident owner that dies takes its rooms with it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use carrel_protocol::chain;
use carrel_protocol::units::{MemoryMib, VcpuCount};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::FlockOperation;
use rustix::process::Resource;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::function::invocation;
use crate::home::{Home, Order, Task, TemplateFiles};
use crate::launch::{self, LaunchError, Launched};
use crate::outcome::Outcome;
use crate::owner::{self, Assignment, Held};
use crate::packet::{Connection, Packet, PacketError};
use crate::patience::Patience;
use crate::session::{self, Session, SessionError};
use crate::spec::{Machine, RoomId};
use crate::timestamp::mark;

mod admission;
pub mod api;
mod demand;
mod shelf;
mod starts;
mod warm;

pub(crate) use admission::Admitted;
pub use admission::{Factor, Overcommit, OvercommitError};
pub use shelf::Ready;
pub(crate) use shelf::Starting;
pub(crate) use warm::{Resting, Rests};

use admission::{Admission, Refusal};
use api::{FromResident, Keep, Kept, Look, Looked, Mine, Own, ToResident, VERSION, Wake, Woken};
use shelf::{Shape, Shelf};
use warm::Warm;

/// Its socket, below the home.
const SOCKET: &str = "pool.sock";
/// Locked by the one resident owner of a home.
const LOCK: &str = "pool.lock";
/// Commands that may wait to be accepted.
const BACKLOG: i32 = 1024;
/// From a command that could not be accepted to the next attempt.
const AGAIN: Duration = Duration::from_millis(200);
/// From one look at whether a room's promise was taken back to the next.
const ENDING: Duration = Duration::from_millis(5);
/// How long a command may take to clear away after a resident owner that was killed.
const CLEARED: Duration = Duration::from_millis(500);
/// A room's thread waits for one thing at a time.
const STACK_BYTES: usize = 512 << 10;

/// The resident owner can't begin.
#[derive(Debug, Error)]
pub enum ResidentError {
    /// There is one already.
    #[error("this home has a resident owner already; see `carrel pool status`")]
    Taken,
    /// A file of it.
    #[error("{} can't be {doing}", .path.display())]
    Io {
        /// `opened`, `bound`, ….
        doing: &'static str,
        /// What.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What the service manager handed over.
    #[error(
        "the socket that the service manager hands over is none (LISTEN_FDS); it must be one of ListenSequentialPacket="
    )]
    Activation(#[source] io::Error),
    /// A thread or a pipe.
    #[error("the host has no thread or descriptor left")]
    Host(#[from] io::Error),
    /// The host's memory and CPUs can't be counted.
    #[error(transparent)]
    Overcommit(#[from] OvercommitError),
    /// Nobody is there.
    #[error("this home has no resident owner; start one with `carrel pool`")]
    Absent(#[source] io::Error),
    /// It doesn't answer, or not so that it could be understood.
    #[error("the resident owner does not answer, or is of another version")]
    Answer(#[source] PacketError),
}

/// How a resident owner is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// vCPUs and memory of the rooms that are expected before any was asked for.
    pub usual: (VcpuCount, MemoryMib),
    /// VMMs that are kept ready for each kind of machine that was asked for lately: as many as were asked for at once, within this.
    pub ready: RangeInclusive<usize>,
    /// It ends when it had no room for so long; without it never.
    pub idle: Option<Duration>,
    /// What it promises beyond what the host has.
    pub overcommit: Overcommit,
    /// Rooms of functions are kept so long for another event; without it not at all.
    pub warm: Option<Duration>,
}

/// What a resident owner has and had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its process.
    pub pid: u32,
    /// For how long it has been there, s.
    pub up_seconds: u64,
    /// Rooms that it owns now.
    pub rooms: u64,
    /// Rooms whose workloads do not run yet, of these.
    pub starting: u64,
    /// Rooms that it was given.
    pub given: u64,
    /// Of these, clones that went on in a VMM that was ready.
    pub from_shelf: u64,
    /// Rooms of functions, of those that it owns, that wait for another event.
    pub warm: u64,
    /// Of these, those whose guests stand still.
    pub resting: u64,
    /// Events that were handled in such a room.
    pub woken: u64,
    /// Rooms for which the host had nothing left.
    pub refused: u64,
    /// VMMs that are ready.
    pub ready: Vec<Ready>,
    /// Guest memory and VMMs' own that its rooms may take, bytes.
    pub memory_promised: u64,
    /// The most that it promises.
    pub memory_limit: u64,
    /// Memory that its rooms take now, bytes: what their guests wrote and did not give back, and the kernel's for them.
    pub memory_taken: u64,
    /// CPUs that its rooms may use, in thousandths.
    pub cpu_promised_millis: u64,
    /// The most that it promises.
    pub cpu_limit_millis: u64,
}

/// A resident owner that listens.
#[derive(Debug)]
pub struct Resident {
    listener: OwnedFd,
    /// Removed at the end; none where a service manager holds the socket.
    socket: Option<PathBuf>,
    idle: Option<Duration>,
    news: io::PipeReader,
    shared: Arc<Shared>,
    _lock: File,
}

#[derive(Debug)]
struct Shared {
    home: Home,
    begun: Instant,
    shelf: Shelf,
    warm: Warm,
    resting: Resting,
    admission: Admission,
    /// Held by who has rooms that wait end for another.
    ending: Mutex<()>,
    given: AtomicU64,
    from_shelf: AtomicU64,
    woken: AtomicU64,
    refused: AtomicU64,
    /// Connections that are served, a room's or another's.
    served: AtomicU64,
    /// One byte for each piece of news: [`STOP`] or [`LEFT`].
    news: io::PipeWriter,
}

const SIGKILL: u8 = 9;
const STOP: u8 = b's';
const LEFT: u8 = b'l';

/// Tells a resident owner to end.
#[derive(Debug)]
pub struct Stopper(Arc<Shared>);

impl Stopper {
    /// It takes no more rooms, and ends when it has none; told once more, it ends at once, and its rooms with it.
    pub fn stop(&self) {
        self.0.tell(STOP);
    }
}

impl Resident {
    /// Listens at the home's socket, or at the one that a service manager handed over (`LISTEN_FDS`, sd_listen_fds(3)).
    ///
    /// # Errors
    ///
    /// There is another one, or the host refuses something.
    pub fn open(home: Home, options: Options) -> Result<Self, ResidentError> {
        let lock = claim_patiently(home.root())?;
        raise_descriptors();
        let activated = activated();
        let path = home.root().join(SOCKET);
        let failed = |doing| {
            let path = path.clone();
            move |source| ResidentError::Io { doing, path, source }
        };
        let (listener, socket) = match activated {
            true => (launch::owner_socket().map_err(ResidentError::Activation)?, None),
            false => {
                if let Err(error) = fs::remove_file(&path)
                    && error.kind() != io::ErrorKind::NotFound
                {
                    return Err(failed("removed")(error));
                }
                let listener = owner::listen(home.root(), SOCKET, BACKLOG).map_err(failed("bound"))?;
                (listener, Some(path.clone()))
            }
        };
        rustix::io::ioctl_fionbio(&listener, true).map_err(|e| failed("used")(e.into()))?;
        let (news, tell) = io::pipe()?;
        let shared = Arc::new(Shared {
            begun: Instant::now(),
            shelf: Shelf::new(options.ready, home.assets().vmm.clone(), options.usual),
            warm: Warm::new(options.warm)?,
            resting: Resting::default(),
            admission: Admission::new(options.overcommit)?,
            ending: Mutex::new(()),
            home,
            given: AtomicU64::new(0),
            from_shelf: AtomicU64::new(0),
            woken: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            served: AtomicU64::new(0),
            news: tell,
        });
        Ok(Self { listener, socket, idle: options.idle, news, shared, _lock: lock })
    }

    /// What ends it, for whoever hears signals.
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Owns rooms until it is told to stop, or has been idle for long enough.
    ///
    /// # Errors
    ///
    /// The host refuses a thread or a descriptor from the beginning on.
    pub fn serve(self) -> Result<(), ResidentError> {
        let Self { listener, socket, idle, mut news, shared, _lock } = self;
        // The thread that starts a VMM has to outlive it (PR_SET_PDEATHSIG, prctl(2)): this one stays until the last room is over.
        let keeper = Arc::clone(&shared);
        let (over, is_over) = mpsc::channel::<()>();
        let keep = move || {
            keeper.shelf.keep();
            let _ = is_over.recv();
        };
        let keeper = thread::Builder::new().name("keeper".into()).spawn(keep)?;
        let watcher = Arc::clone(&shared);
        let watcher = thread::Builder::new().name("watcher".into()).spawn(move || watcher.warm.watch())?;
        let told = accept_until_stopped(&shared, &listener, &mut news, idle)?;
        // Whoever is not accepted by now starts an owner by itself, or finds the next one behind a service manager's socket.
        if let Some(path) = socket {
            let _ = fs::remove_file(path);
        }
        drop(listener);
        shared.warm.close();
        shared.shelf.close();
        let _ = watcher.join();
        let left = shared.served.load(Ordering::SeqCst);
        if told && left > 0 {
            tracing::info!(
                rooms = left,
                "no more rooms are taken; those that are there are owned to their ends"
            );
        }
        while shared.served.load(Ordering::SeqCst) > 0 {
            if hear(&mut news)? == STOP {
                tracing::warn!("told to stop once more: the rooms end with their owner");
                break;
            }
        }
        drop(over);
        let _ = keeper.join();
        Ok(())
    }
}

/// Says whether it was told to stop, or had nothing to do for so long.
fn accept_until_stopped(
    shared: &Arc<Shared>,
    listener: &OwnedFd,
    news: &mut io::PipeReader,
    idle: Option<Duration>,
) -> Result<bool, ResidentError> {
    let mut idle_since = Instant::now();
    loop {
        let busy = shared.served.load(Ordering::SeqCst) > 0;
        let left = idle.filter(|_| !busy).map(|idle| idle.saturating_sub(idle_since.elapsed()));
        let timeout = left.and_then(|left| left.try_into().ok());
        let mut sources = [PollFd::new(listener, PollFlags::IN), PollFd::new(news, PollFlags::IN)];
        match rustix::event::poll(&mut sources, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(ResidentError::Host(error.into())),
        }
        let [command, told] = sources.map(|source| !source.revents().is_empty());
        if told && hear(news)? == STOP {
            return Ok(true);
        }
        if command {
            accept(shared, listener);
        }
        if busy || command || told {
            idle_since = Instant::now();
        } else if left.is_some_and(|left| left.is_zero()) {
            return Ok(false);
        }
    }
}

fn hear(news: &mut io::PipeReader) -> io::Result<u8> {
    let mut byte = [0];
    news.read_exact(&mut byte)?;
    Ok(byte[0])
}

/// Accepts a command, of root or of this process's own user, and serves it on a thread. One that is not served starts an owner by itself.
fn accept(shared: &Arc<Shared>, listener: &OwnedFd) {
    let socket = match owner::accept(listener) {
        Ok(Some(socket)) => socket,
        Ok(None) => return,
        // Too many descriptors, here or on the whole host, or no memory: that passes, and the command waits meanwhile.
        Err(error) => {
            tracing::warn!(%error, "a command can't be accepted yet");
            return thread::sleep(AGAIN);
        }
    };
    let served = Served::new(shared);
    let thread = thread::Builder::new().name("room".into()).stack_size(STACK_BYTES);
    if let Err(error) = thread.spawn(move || served.0.serve(socket.into())) {
        tracing::warn!(%error, "a command can't be served");
    }
}

/// A connection that is served, whatever becomes of its thread.
#[derive(Debug)]
struct Served(Arc<Shared>);

impl Served {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.served.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(shared))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.0.served.fetch_sub(1, Ordering::SeqCst);
        self.0.tell(LEFT);
    }
}

impl Shared {
    fn tell(&self, news: u8) {
        // A full pipe has news enough.
        let _ = (&self.news).write_all(&[news]);
    }

    /// One connection: a question, or a room to its end.
    fn serve(&self, connection: Connection) {
        let patience = self.home.patience();
        if connection.limit(Some(patience.owner())).is_err() {
            return;
        }
        let Packet { message: asked, descriptors } = match connection.receive::<ToResident>() {
            Ok(packet) => packet,
            Err(error) => return tracing::debug!(error = %chain(&error), "a command said nothing"),
        };
        let served = match asked {
            ToResident::Own(Own { version, room }) if version == VERSION => self.own(connection, &room),
            ToResident::Look(Look { version }) if version == VERSION => {
                let answer = FromResident::from(Looked { status: self.status() });
                connection.send(&answer, &[]).map_err(|e| chain(&e))
            }
            ToResident::Keep(Keep { version, key }) if version == VERSION => {
                match self.warm.keep(key, descriptors) {
                    true => connection.send(&FromResident::from(Kept {}), &[]).map_err(|e| chain(&e)),
                    false => Ok(()),
                }
            }
            ToResident::Wake(Wake { version, key }) if version == VERSION => self.wake(&connection, &key),
            ToResident::Own(_) | ToResident::Look(_) | ToResident::Keep(_) | ToResident::Wake(_) => {
                Err("a command speaks another version".into())
            }
        };
        if let Err(error) = served {
            tracing::debug!(error, "a command was not served");
        }
    }

    /// Hands over a room that was kept. If that fails it ends: who asked for it may have it all the same.
    fn wake(&self, connection: &Connection, key: &str) -> Result<(), String> {
        let descriptors = self.warm.take(key).unwrap_or_default();
        if !descriptors.is_empty() {
            self.woken.fetch_add(1, Ordering::Relaxed);
        }
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        connection.send(&FromResident::from(Woken {}), &descriptors).map_err(|e| chain(&e))
    }

    /// Promises a room what it may take; rooms that only wait end for it if they must.
    fn admit(&self, machine: &Machine) -> Result<Admitted, Refusal> {
        if let Ok(admitted) = self.admission.admit(machine) {
            return Ok(admitted);
        }
        // One after another, so that one room's end is not taken for several's.
        let _turn = self.ending.lock().unwrap_or_else(PoisonError::into_inner);
        let patient = Instant::now() + self.home.patience().answer();
        loop {
            let refusal = match self.admission.admit(machine) {
                Ok(admitted) => return Ok(admitted),
                Err(refusal) if refusal.is_for_ever() => return Err(refusal),
                // No room's end would help, and time does.
                Err(Refusal::Crowded { passes, .. }) if Instant::now() < patient => {
                    thread::sleep(passes.max(ENDING));
                    continue;
                }
                Err(refusal) => refusal,
            };
            let before = self.admission.rooms();
            if !self.warm.end_oldest() {
                return Err(refusal);
            }
            // Its promise is taken back at its end.
            let until = Instant::now() + self.home.patience().answer();
            while self.admission.rooms() >= before && Instant::now() < until {
                thread::sleep(ENDING);
            }
        }
    }

    fn own(&self, creator: Connection, id: &RoomId) -> Result<(), String> {
        let mut timeline = vec![mark("request read")];
        let starting = self.shelf.starting();
        let directory = self.home.directory_of(id);
        let order = owner::read_order(&directory).map_err(|e| chain(&e))?;
        let supplies = owner::supplies(&creator, order.patience).map_err(|e| chain(&e))?;
        // From here on the room is this process's, whatever comes.
        creator.send(&FromResident::from(Mine {}), &[]).map_err(|e| chain(&e))?;
        self.given.fetch_add(1, Ordering::Relaxed);
        starting.wait_for_its_turn();
        timeline.push(mark("its turn"));
        let (promised, refusal) = if creator.has_hung_up().map_err(|e| chain(&e))? {
            // Who asked was killed while it waited: its room would end as soon as it began.
            (None, Some(Outcome::Stopped { signal: SIGKILL }))
        } else {
            match self.admit(&order.spec.machine) {
                Ok(promised) => (Some(promised), None),
                Err(refusal) => {
                    self.refused.fetch_add(1, Ordering::Relaxed);
                    (None, Some(Outcome::NoCapacity { message: refusal.to_string() }))
                }
            }
        };
        let held = Held { starting: Some(starting), promised, resting: self.resting.clone() };
        let assignment = Assignment { directory: &directory, order, supplies, creator, timeline, held };
        let owned = match refusal {
            None => assignment.own(|order, id, template| self.launch(order, id, &directory, template)),
            Some(outcome) => assignment.refuse(outcome),
        };
        owned.map_err(|e| chain(&e))
    }

    /// A clone goes on in a VMM from the shelf, if there is one of its kind.
    fn launch(
        &self,
        order: &Order,
        id: &RoomId,
        directory: &Path,
        template: Option<TemplateFiles>,
    ) -> Result<Launched, LaunchError> {
        let verbose = tracing::enabled!(tracing::Level::DEBUG);
        if order.task == Task::Clone
            && let Some(files) = &template
            && let Some(prepared) = self.shelf.take(&Shape::of(order))
        {
            // One that broke since is no reason to fail: nothing has begun.
            match prepared.go_on(order, directory, files.try_clone()?, launch::limits(&order.spec.machine)) {
                Ok(launched) => {
                    self.from_shelf.fetch_add(1, Ordering::Relaxed);
                    return Ok(launched);
                }
                Err(error) => tracing::warn!(error = %chain(&error), "a VMM that was ready is none any more"),
            }
        }
        launch::launch(order, id, directory, verbose, template)
    }

    fn status(&self) -> Status {
        let (memory, cpu) = self.admission.promised();
        Status {
            pid: std::process::id(),
            up_seconds: self.begun.elapsed().as_secs(),
            rooms: self.admission.rooms(),
            starting: self.shelf.being_started(),
            given: self.given.load(Ordering::Relaxed),
            from_shelf: self.from_shelf.load(Ordering::Relaxed),
            warm: self.warm.count(),
            resting: self.resting.count(),
            woken: self.woken.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            ready: self.shelf.ready(),
            memory_promised: memory.promised,
            memory_limit: memory.limit,
            memory_taken: self.admission.taken(),
            cpu_promised_millis: cpu.promised,
            cpu_limit_millis: cpu.limit,
        }
    }
}

/// Makes sure that a home has one resident owner. A command that clears away after one has the lock for a moment.
fn claim_patiently(root: &Path) -> Result<File, ResidentError> {
    let until = Instant::now() + CLEARED;
    loop {
        match claim(root) {
            Err(ResidentError::Taken) if Instant::now() < until => thread::sleep(ENDING),
            claimed => return claimed,
        }
    }
}

fn claim(root: &Path) -> Result<File, ResidentError> {
    let path = root.join(LOCK);
    let failed = |source| ResidentError::Io { doing: "opened", path: path.clone(), source };
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(failed)?;
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(ResidentError::Taken),
        Err(error) => Err(ResidentError::Io { doing: "locked", path, source: error.into() }),
    }
}

/// Whether a service manager started this process, and it alone, with a socket.
fn activated() -> bool {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    number("LISTEN_PID") == Some(std::process::id()) && number("LISTEN_FDS") == Some(1)
}

/// Each room takes some twenty descriptors; the limit that programs begin with is for those that use select(2).
fn raise_descriptors() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, ..limit };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of descriptors can't be raised");
    }
}

/// Offers a room to the home's resident owner, if there is one: the session, as an owner's creator has it.
///
/// # Errors
///
/// There is one that doesn't say whether it takes the room: two owners of a room would be worse than none.
pub(crate) fn offer(
    root: &Path,
    room: &RoomId,
    supplies: &[OwnedFd],
    patience: Patience,
) -> Result<Option<Session>, SessionError> {
    // Whatever is wrong with a socket at which nobody accepts: nobody has the room.
    let Ok(connection) = connected(root, patience) else { return Ok(None) };
    let own = ToResident::from(Own { version: VERSION.into(), room: room.clone() });
    let sent = connection.send_blocking(&own, &[]).and_then(|()| owner::supply(&connection, supplies));
    if sent.is_err() {
        return Ok(None);
    }
    connection.limit(Some(patience.owner())).map_err(SessionError::Streams)?;
    match connection.receive::<FromResident>() {
        Ok(_) => {
            connection.limit(None).map_err(SessionError::Streams)?;
            Ok(Some(Session::new(connection, patience)))
        }
        Err(error) if error.would_block() => Err(SessionError::Silent),
        // It closed the connection, and nothing was taken.
        Err(_) => Ok(None),
    }
}

/// A connection to the home's resident owner. The socket of one that was killed is removed; a service manager's has somebody who listens.
fn connected(root: &Path, patience: Patience) -> io::Result<Connection> {
    let refused = match session::connected(root, SOCKET, patience) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => error,
        connected => return connected,
    };
    // While this is held none begins; one may have begun since.
    let Ok(_none) = claim(root) else { return session::connected(root, SOCKET, patience) };
    match session::connected(root, SOCKET, patience) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            let _ = fs::remove_file(root.join(SOCKET));
            Err(refused)
        }
        connected => connected,
    }
}

/// Whether somebody listens, or did.
pub(crate) fn may_be_there(root: &Path) -> bool {
    root.join(SOCKET).exists()
}

/// Hands a function's room that waits to the home's resident owner, if there is one that keeps such rooms; says whether it does.
pub(crate) fn keep(root: &Path, key: &str, room: &invocation::Warm, patience: Patience) -> bool {
    let keep = ToResident::from(Keep { version: VERSION.into(), key: key.to_owned() });
    match asked(root, &keep, &room.descriptors(), patience) {
        Ok(packet) => matches!(packet.message, FromResident::Kept(_)),
        // Nobody is there, or it keeps none. One that is silent may have it: two that end a room are no harm.
        Err(_) => false,
    }
}

/// A room that the home's resident owner kept under this key.
pub(crate) fn wake(root: &Path, key: &str, patience: Patience) -> Option<invocation::Warm> {
    let wake = ToResident::from(Wake { version: VERSION.into(), key: key.to_owned() });
    let packet = asked(root, &wake, &[], patience).ok()?;
    invocation::Warm::from_descriptors(packet.descriptors, patience)
}

fn asked(
    root: &Path,
    question: &ToResident,
    descriptors: &[BorrowedFd<'_>],
    patience: Patience,
) -> Result<Packet<FromResident>, ResidentError> {
    let connection = connected(root, patience).map_err(ResidentError::Absent)?;
    connection.limit(Some(patience.answer()))?;
    connection.send_blocking(question, descriptors).map_err(ResidentError::Answer)?;
    connection.receive().map_err(ResidentError::Answer)
}

/// What the home's resident owner has.
///
/// # Errors
///
/// There is none, or it doesn't answer.
pub fn status(home: &Home) -> Result<Status, ResidentError> {
    let look = ToResident::from(Look { version: VERSION.into() });
    match asked(home.root(), &look, &[], home.patience())?.message {
        FromResident::Looked(Looked { status }) => Ok(status),
        FromResident::Mine(_) | FromResident::Kept(_) | FromResident::Woken(_) => {
            Err(ResidentError::Answer(PacketError::Closed))
        }
    }
}

#[cfg(test)]
mod tests;
