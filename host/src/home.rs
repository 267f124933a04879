//! The home: the directory under which all rooms are.
//!
//! ```text
//!   HOME/rooms.lock          held for a moment while a room is made, so that no sweep takes it for a dead one
//!   HOME/rooms/ID/lock       locked by the room's owner while it lives
//!                 room.json  the order: specification and assets
//!                 state.json the record
//!                 owner.sock where commands find the owner
//!                 log*       what a detached room wrote
//!                 owner.log* what the owner has to say when the log level asks for it
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use carrel_protocol::FrameError;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::cgroup;
use crate::outcome::Outcome;
use crate::owner::{self, journal};
use crate::packet::{Connection, PacketError};
use crate::patience::Patience;
use crate::record::{Phase, Record};
use crate::resident;
use crate::session::{Ended, Session, SessionError};
use crate::spec::{LEAST_DISK_BYTES, MOST_BLOBS, Machine, Part, RoomId, RoomName, RoomSpec};
use crate::timestamp::now_ms;

mod sweep;

/// The home, or a room in it, can't be used.
#[derive(Debug, Error)]
pub enum HomeError {
    /// The operating system refused.
    #[error("{} can't be {doing}", .path.display())]
    Io {
        /// `made`, `opened`, ….
        doing: &'static str,
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file that every room needs isn't there.
    #[error("the {what} {} can't be opened; run scripts/build, or set CARREL_ASSETS or CARREL_VMM", .path.display())]
    Asset {
        /// `kernel`, ….
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The name is taken.
    #[error("there is a room named {0} already; remove it with `carrel rm {0}`, or choose another name")]
    NameTaken(RoomName),
    /// No room is called so.
    #[error("there is no room {0:?}; see `carrel ps -a`")]
    NoSuchRoom(String),
    /// More than one room's id begins so.
    #[error("{0:?} is the beginning of more than one room's id; give more of it")]
    Ambiguous(String),
    /// The room runs.
    #[error("the room {0} still runs; stop it first, or use `rm --force`")]
    Running(String),
    /// The disk is too small for any file system.
    #[error("a room's disk needs 64 MiB at least, not {0} bytes; see --disk")]
    DiskTooSmall(u64),
    /// The payload has too many parts.
    #[error("the image has {0} layers; a room takes {MOST_BLOBS} at most")]
    TooManyBlobs(usize),
    /// Blobs and specification don't fit.
    #[error("the room's payload has {expected} parts, but {given} were handed over")]
    Blobs {
        /// By the specification.
        expected: usize,
        /// Descriptors given.
        given: usize,
    },
    /// The owner can't be started.
    #[error("the room's owner can't be started")]
    Owner(#[source] io::Error),
    /// The owner doesn't take what it is handed.
    #[error("the room's owner ended before the room began")]
    Supply(#[source] PacketError),
    /// What the guest is told of the workload has no room in a message.
    #[error(
        "command, variables and mounts are {bytes} bytes long as they are sent, and {most} is the most; put some of them into a file of the image's"
    )]
    TooLong {
        /// Encoded, bytes.
        bytes: u32,
        /// By the protocol, bytes.
        most: u32,
    },
    /// The room's owner can't be reached.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A specification can't be written as JSON.
    #[error("the room's specification can't be written")]
    Json(#[from] serde_json::Error),
}

fn failed<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> HomeError + use<'a> {
    move |source| HomeError::Io { doing, path: path.to_owned(), source }
}

/// What every room needs, as files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assets {
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The agent's initramfs.
    pub initramfs: PathBuf,
    /// The small, formatted, empty disk that every room's disk begins as.
    pub scratch: PathBuf,
    /// `carrel-vmm`.
    pub vmm: PathBuf,
}

impl Assets {
    /// Opens each, so that a missing one is named before a room is made.
    pub fn check(&self) -> Result<(), HomeError> {
        let all = [
            ("guest kernel", &self.kernel),
            ("initramfs", &self.initramfs),
            ("empty disk", &self.scratch),
            ("VMM", &self.vmm),
        ];
        all.into_iter().try_for_each(|(what, path)| check_file(what, path))
    }
}

fn check_file(what: &'static str, path: &Path) -> Result<(), HomeError> {
    let opened = File::open(path).and_then(|file| file.metadata());
    let checked = opened.and_then(|found| match found.is_file() {
        true => Ok(()),
        false => Err(io::Error::other("it is no regular file")),
    });
    checked.map_err(|source| HomeError::Asset { what, path: path.to_owned(), source })
}

/// What an owner is told: `room.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Order {
    pub(crate) spec: RoomSpec,
    pub(crate) assets: Assets,
    /// Rooms that an older carrel made have none.
    #[serde(default)]
    pub(crate) patience: Patience,
    #[serde(default)]
    pub(crate) task: Task,
    #[serde(default)]
    pub(crate) extras: Extras,
}

/// Which of a template's optional files there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Extras {
    pub(crate) working_set: bool,
    pub(crate) record: bool,
}

/// What an owner does with its room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Task {
    /// Boot it, have its payload unpacked, run its workload.
    #[default]
    Run,
    /// Go on from a template, run its workload.
    Clone,
    /// Boot it, have its payload unpacked, save it.
    Template,
}

/// A template's files, in the order in which an owner gets them.
#[derive(Debug)]
pub struct TemplateFiles {
    /// The VMM's state.
    pub state: OwnedFd,
    /// The guest's memory.
    pub memory: OwnedFd,
    /// The disk.
    pub disk: OwnedFd,
    /// Of a clone: which pages to have ahead of its guest.
    pub working_set: Option<OwnedFd>,
    /// Of a clone: an empty file into which its VMM writes which pages were touched, once the workload has come to a result.
    pub record: Option<OwnedFd>,
}

/// The directory of all rooms.
#[derive(Clone, Debug)]
pub struct Home {
    root: PathBuf,
    assets: Assets,
    patience: Patience,
    /// The program that is started as `PROGRAM owner DIR`.
    owner: PathBuf,
    /// Whether the resident owner is asked first.
    asks_resident: bool,
}

impl Home {
    /// Makes what is missing, and sweeps up what rooms left whose owner was killed, if no command did so within the last second.
    ///
    /// ```no_run
    /// # fn example(
    /// #     spec: carrel_host::RoomSpec,
    /// #     blobs: Vec<std::os::fd::OwnedFd>,
    /// #     assets: carrel_host::Assets,
    /// # ) -> Result<(), Box<dyn std::error::Error>> {
    /// let home = carrel_host::Home::open("/var/lib/carrel".as_ref(), assets, carrel_host::Patience::default())?;
    /// let (room, session) = home.create(spec, blobs)?;
    /// let ended = session.run(carrel_host::session::Streams::standard()?, &mut |notice| eprintln!("{notice}"))?;
    /// std::process::exit(ended.outcome.exit_status().into());
    /// # }
    /// ```
    pub fn open(root: &Path, assets: Assets, patience: Patience) -> Result<Self, HomeError> {
        let home = Self {
            root: root.to_owned(),
            assets,
            patience,
            owner: "/proc/self/exe".into(),
            asks_resident: true,
        };
        let rooms = home.rooms_directory();
        DirBuilder::new().recursive(true).mode(0o700).create(&rooms).map_err(failed("made", &rooms))?;
        home.sweep_if_due()?;
        Ok(home)
    }

    /// Another program as the rooms' owner: it is started as `PROGRAM owner DIR`, standard input being its connection. The same program reads templates ahead
    /// ([`crate::pool::ahead`]).
    pub fn with_owner(self, owner: PathBuf) -> Self {
        Self { owner, ..self }
    }

    /// The program that is started for the rooms' sake.
    pub(crate) fn owner(&self) -> &Path {
        &self.owner
    }

    /// Every room has an owner of its own, whether there is a resident one or not.
    #[must_use]
    pub fn without_resident(self) -> Self {
        Self { asks_resident: false, ..self }
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What its rooms need.
    pub fn assets(&self) -> &Assets {
        &self.assets
    }

    /// By what its deadlines are stretched.
    pub fn patience(&self) -> Patience {
        self.patience
    }

    /// Where the room of this id has its files, if there is one.
    pub(crate) fn directory_of(&self, room: &RoomId) -> PathBuf {
        self.rooms_directory().join(room.as_str())
    }

    fn rooms_directory(&self) -> PathBuf {
        self.root.join("rooms")
    }

    /// Says what [`Self::create`] would refuse whatever the payload is: asked before an image is fetched, which may take long. A name may still
    /// be taken meanwhile.
    ///
    /// # Errors
    ///
    /// Missing assets or kernel, too small a disk, a name that another room has.
    pub fn foresee(&self, name: Option<&RoomName>, machine: &Machine) -> Result<(), HomeError> {
        self.check_machine(machine)?;
        self.free_names_of_the_dead(name)?;
        let _looking = self.lock_rooms(FlockOperation::LockShared)?;
        self.check_name(name)
    }

    fn check_machine(&self, machine: &Machine) -> Result<(), HomeError> {
        self.assets.check()?;
        if let Some(kernel) = &machine.kernel {
            check_file("kernel", kernel)?;
        }
        match machine.disk_bytes {
            bytes if bytes < LEAST_DISK_BYTES => Err(HomeError::DiskTooSmall(bytes)),
            _ => Ok(()),
        }
    }

    /// Before the rooms are locked, which sweeping does too.
    fn free_names_of_the_dead(&self, name: Option<&RoomName>) -> Result<(), HomeError> {
        if name.is_some() { self.sweep() } else { Ok(()) }
    }

    /// With the rooms locked.
    fn check_name(&self, name: Option<&RoomName>) -> Result<(), HomeError> {
        match name {
            Some(name) if self.listed()?.iter().any(|room| room.spec.name.as_ref() == Some(name)) => {
                Err(HomeError::NameTaken(name.clone()))
            }
            _ => Ok(()),
        }
    }

    /// Makes a room and starts its owner. `blobs` are the payload's, layers then zips, opened for reading by somebody who made sure
    /// that nobody collects them before this returns.
    ///
    /// The session is the workload's own: for an attached room it is run to the end, and the room ends with it; for a detached one
    /// [`Session::wait_started`] tells whether the workload came up.
    pub fn create(&self, spec: RoomSpec, blobs: Vec<OwnedFd>) -> Result<(Room, Session), HomeError> {
        check_blobs(&spec, &blobs)?;
        self.make(spec, Task::Run, Extras::default(), blobs)
    }

    /// The same for a room that goes on from a template of this payload and machine ([`crate::template::key`]).
    pub fn create_clone(
        &self,
        spec: RoomSpec,
        template: TemplateFiles,
    ) -> Result<(Room, Session), HomeError> {
        let extras = template.extras();
        self.make(spec, Task::Clone, extras, template.into_order().collect())
    }

    /// Makes a room that has its payload unpacked, is saved into these files (a state file, one as long as its memory, one as long as its disk, all of them
    /// empty) and ends, with [`Outcome::Saved`] if all went well. Its VMM is gone then, and with it everybody here who could write to them.
    pub fn create_template(
        &self,
        spec: RoomSpec,
        blobs: Vec<OwnedFd>,
        template: TemplateFiles,
    ) -> Result<(Room, Session), HomeError> {
        check_blobs(&spec, &blobs)?;
        let extras = template.extras();
        self.make(spec, Task::Template, extras, template.into_order().chain(blobs).collect())
    }

    fn make(
        &self,
        mut spec: RoomSpec,
        task: Task,
        extras: Extras,
        supplies: Vec<OwnedFd>,
    ) -> Result<(Room, Session), HomeError> {
        self.check_machine(&spec.machine)?;
        if let Err(FrameError::TooLong { length, limit, .. }) = spec.check_start() {
            return Err(HomeError::TooLong { bytes: length, most: limit });
        }
        if !spec.without.contains(&Part::Cgroup) {
            cgroup::make_way();
        }
        let (room, lock) = self.make_directory(&mut spec)?;
        let order = Order { spec, assets: self.assets.clone(), patience: self.patience, task, extras };
        let supplies: Vec<OwnedFd> = std::iter::once(OwnedFd::from(lock)).chain(supplies).collect();
        let begun = self.begin(&room, &order, &supplies);
        match begun {
            Ok(session) => Ok((room, session)),
            Err(error) => {
                let _ = fs::remove_dir_all(&room.directory);
                Err(error)
            }
        }
    }

    /// Whether commands ask a resident owner, and one may be there.
    pub(crate) fn may_have_resident(&self) -> bool {
        self.asks_resident && resident::may_be_there(&self.root)
    }

    /// Writes the order and finds an owner for it: the resident one, if there is one and the room is not to outlive its command, or one of its own.
    fn begin(&self, room: &Room, order: &Order, supplies: &[OwnedFd]) -> Result<Session, HomeError> {
        let path = room.directory.join("room.json");
        Record::new(now_ms())
            .write(&room.directory.join("state.json"))
            .and_then(|()| fs::write(&path, serde_json::to_vec(order)?))
            .map_err(failed("written", &path))?;
        if self.asks_resident && !order.spec.detached {
            let taken = resident::offer(&self.root, &room.id, supplies, order.patience)?;
            if let Some(session) = taken {
                return Ok(session);
            }
        }
        self.start_owner(room, order, supplies)
    }

    fn start_owner(&self, room: &Room, order: &Order, supplies: &[OwnedFd]) -> Result<Session, HomeError> {
        let (ours, theirs) = Connection::pair().map_err(HomeError::Owner)?;
        let path = room.directory.join("owner.log");
        let says = journal::append(&path).map_err(failed("made", &path))?;
        Command::new(&self.owner)
            .arg0("carrel")
            .arg("owner")
            .arg(&room.directory)
            .current_dir("/")
            .stdin(Stdio::from(theirs.into_inner()))
            .stdout(Stdio::null())
            .stderr(says)
            .spawn()
            .map_err(HomeError::Owner)?;
        owner::supply(&ours, supplies).map_err(HomeError::Supply)?;
        Ok(Session::new(ours, order.patience))
    }

    /// Makes the directory of a fresh id, locked.
    fn make_directory(&self, spec: &mut RoomSpec) -> Result<(Room, File), HomeError> {
        self.free_names_of_the_dead(spec.name.as_ref())?;
        let _making = self.lock_rooms(FlockOperation::LockExclusive)?;
        self.check_name(spec.name.as_ref())?;
        loop {
            let id = fresh_id().map_err(HomeError::Owner)?;
            let directory = self.rooms_directory().join(id.as_str());
            match DirBuilder::new().mode(0o700).create(&directory) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made.map_err(failed("made", &directory))?,
            }
            let path = directory.join("lock");
            let lock = File::create(&path).map_err(failed("made", &path))?;
            rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
                .map_err(|e| failed("locked", &path)(e.into()))?;
            spec.id = Some(id.clone());
            return Ok((Room { id, directory, spec: spec.clone(), patience: self.patience }, lock));
        }
    }

    fn rooms_lock(&self) -> PathBuf {
        self.root.join("rooms.lock")
    }

    fn lock_rooms(&self, how: FlockOperation) -> Result<File, HomeError> {
        let path = self.rooms_lock();
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed("opened", &path))?;
        rustix::fs::flock(&lock, how).map_err(|e| failed("locked", &path)(e.into()))?;
        Ok(lock)
    }

    /// Every room, oldest first; those of dead owners are swept up before.
    pub fn rooms(&self) -> Result<Vec<Room>, HomeError> {
        self.sweep()?;
        self.listed()
    }

    fn listed(&self) -> Result<Vec<Room>, HomeError> {
        let folder = self.rooms_directory();
        let mut rooms = Vec::new();
        for entry in fs::read_dir(&folder).map_err(failed("read", &folder))? {
            let entry = entry.map_err(failed("read", &folder))?;
            // One that is just being made, or being removed, has no order.
            rooms.extend(
                entry.file_name().to_str().and_then(|id| id.parse().ok()).and_then(|id| self.room(id)),
            );
        }
        rooms.sort_by_key(|room| (room.record().created_ms, room.id.clone()));
        Ok(rooms)
    }

    fn room(&self, id: RoomId) -> Option<Room> {
        let directory = self.rooms_directory().join(id.as_str());
        let order: Order = serde_json::from_slice(&fs::read(directory.join("room.json")).ok()?).ok()?;
        Some(Room { id, directory, spec: order.spec, patience: self.patience })
    }

    /// The room of this name, this id, or whose id alone begins so.
    pub fn find(&self, word: &str) -> Result<Room, HomeError> {
        let rooms = self.rooms()?;
        let by_name = |room: &&Room| room.spec.name.as_ref().is_some_and(|name| name.as_str() == word);
        if let Some(room) = rooms.iter().find(by_name) {
            return Ok(room.clone());
        }
        let mut beginning =
            rooms.into_iter().filter(|room| !word.is_empty() && room.id.as_str().starts_with(word));
        match (beginning.next(), beginning.next()) {
            (Some(room), None) => Ok(room),
            (Some(_), Some(_)) => Err(HomeError::Ambiguous(word.into())),
            (None, _) => Err(HomeError::NoSuchRoom(word.into())),
        }
    }
}

impl TemplateFiles {
    /// The same files once more.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            state: self.state.try_clone()?,
            memory: self.memory.try_clone()?,
            disk: self.disk.try_clone()?,
            working_set: self.working_set.as_ref().map(OwnedFd::try_clone).transpose()?,
            record: self.record.as_ref().map(OwnedFd::try_clone).transpose()?,
        })
    }

    fn extras(&self) -> Extras {
        Extras { working_set: self.working_set.is_some(), record: self.record.is_some() }
    }

    fn into_order(self) -> impl Iterator<Item = OwnedFd> {
        [self.state, self.memory, self.disk].into_iter().chain(self.working_set).chain(self.record)
    }

    /// The other way round.
    pub(crate) fn from_order<E>(
        extras: Extras,
        mut next: impl FnMut() -> Result<OwnedFd, E>,
    ) -> Result<Self, E> {
        Ok(Self {
            state: next()?,
            memory: next()?,
            disk: next()?,
            working_set: extras.working_set.then(&mut next).transpose()?,
            record: extras.record.then(&mut next).transpose()?,
        })
    }
}

fn check_blobs(spec: &RoomSpec, blobs: &[OwnedFd]) -> Result<(), HomeError> {
    let expected = spec.payload.layers.len() + spec.payload.zips.len();
    if expected > MOST_BLOBS {
        return Err(HomeError::TooManyBlobs(expected));
    }
    if expected != blobs.len() {
        return Err(HomeError::Blobs { expected, given: blobs.len() });
    }
    Ok(())
}

pub(crate) fn fresh_id() -> io::Result<RoomId> {
    let mut bytes = [0; 6];
    random(&mut bytes)?;
    Ok(RoomId::from_random(bytes))
}

/// Bytes from the kernel's generator.
pub(crate) fn random(bytes: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        filled += rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(())
}

/// A room, as its directory shows it.
#[derive(Clone, Debug)]
pub struct Room {
    id: RoomId,
    directory: PathBuf,
    spec: RoomSpec,
    patience: Patience,
}

impl Room {
    /// Its id.
    pub fn id(&self) -> &RoomId {
        &self.id
    }

    /// What it was to be.
    pub fn spec(&self) -> &RoomSpec {
        &self.spec
    }

    /// Where its files are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its name, or its id where it has none.
    pub fn title(&self) -> &str {
        self.spec.name.as_ref().map_or(self.id.as_str(), RoomName::as_str)
    }

    /// What is known about it now. A room that has no record yet is just being made.
    pub fn record(&self) -> Record {
        Record::read(&self.directory.join("state.json")).unwrap_or_else(|| Record::new(now_ms()))
    }

    /// Whether it is over.
    pub fn has_ended(&self) -> bool {
        self.record().phase == Phase::Ended
    }

    /// How it ended, if it has.
    pub fn outcome(&self) -> Option<Outcome> {
        self.record().outcome
    }

    /// A connection to its owner.
    pub fn connect(&self) -> Result<Session, SessionError> {
        Session::connect(&self.directory, self.patience)
    }

    /// Waits until it has ended, or reads how it did.
    pub fn wait(&self) -> Result<Ended, SessionError> {
        let ended = |room: &Self| {
            let record = room.record();
            record.outcome.filter(|_| record.phase == Phase::Ended).map(|outcome| Ended {
                outcome,
                usage: record.usage,
                started: record.started_ms.is_some(),
                timeline: Vec::new(),
            })
        };
        if let Some(ended) = ended(self) {
            return Ok(ended);
        }
        // It may end between the look and the question.
        self.connect().and_then(|session| session.wait()).or_else(|error| ended(self).ok_or(error))
    }

    /// Removes what is left of a room that has ended.
    pub fn remove(&self) -> Result<(), HomeError> {
        let path = self.directory.join("lock");
        let lock = File::open(&path).map_err(failed("opened", &path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => fs::remove_dir_all(&self.directory).map_err(failed("removed", &self.directory)),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(HomeError::Running(self.title().to_owned())),
            Err(e) => Err(failed("locked", &path)(e.into())),
        }
    }
}
