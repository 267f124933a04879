//! A room's owner: the process that launches its VMM, answers its agent, hands out its streams, meters it, and cleans up after it.
//!
//! ```text
//!   Launching ──▶ Handshaking ──▶ Preparing ──▶ Starting ──▶ Running ──▶ Draining ──▶ Ending ──▶ Ended(outcome)
//!       │ VMM told     │ Hello        │ Prepared    │ Started    │ Exited      │ output   ▲ VMM gone,
//!       │ its machine  │              │             │            │             │ read     │ cgroup gone
//!       └──────────────┴──────────────┴─────────────┴────────────┴─────────────┴──────────┘
//!            a refusal, a deadline, a signal, a killed command or VMM: the outcome is set, and the end begins
//! ```
//!
//! That is a room which runs its workload. One that becomes a template leaves this way before Starting, or after it: see `room/template.rs`.
//!
//! One thread owns the room: it waits for all that may happen to it (the VMM's packets, its death, the agent's messages, each command's) and makes every transition.
//! Others are there for a while, to copy (a blob into the guest, a stream into the log) or to wait for a stream's token, and tell it over a bounded channel. Bytes of
//! standard streams go between guest and command without passing here.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use carrel_protocol::chain;
use carrel_protocol::vmm::{MAX_DESCRIPTORS, Mark};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use thiserror::Error;

use crate::home::{Order, Task, TemplateFiles};
use crate::launch::{self, LaunchError, Launched};
use crate::outcome::Outcome;
use crate::packet::{Connection, PacketError};
use crate::patience::Patience;
use crate::resident::{Admitted, Resting, Starting};
use crate::session::socket_address;
use crate::spec::RoomId;
use crate::timestamp::mark;

pub mod api;
mod blobs;
mod events;
pub(crate) mod journal;
mod pace;
mod room;
mod streams;

use api::{FromClient, Supply};
pub(crate) use events::accept;
pub use journal::Journal;
use room::{Ownership, Room};

/// The owner can't own its room. Whoever made the room hears of it by the connection's end.
#[derive(Debug, Error)]
pub enum OwnerError {
    /// Started by hand, or by a command that died at once.
    #[error("this command is started by `carrel run`, never by hand")]
    NoCreator(#[source] PacketError),
    /// The order can't be read.
    #[error("the room's order {0} can't be read")]
    Order(String, #[source] io::Error),
    /// Something of the host's failed.
    #[error("the room's owner can't begin")]
    Io(#[from] io::Error),
}

/// Owns a room from its launch to its end: the body of `carrel owner DIR`. Standard input is the connection of whoever made the room.
///
/// # Errors
///
/// There is no room to own, or nobody who wants it.
pub fn run(directory: &Path) -> Result<(), OwnerError> {
    // A session of its own: no terminal's signals. It fails only for a leader of a process group, which has one already.
    let _ = rustix::process::setsid();
    // For `ps`; without a name of its own it would be called `exe`.
    let _ = rustix::thread::set_name(c"carrel-owner");
    let timeline = vec![mark("owner started")];
    let creator = Connection::from(io::stdin().as_fd().try_clone_to_owned()?);
    let order = read_order(directory)?;
    let supplies = supplies(&creator, order.patience).map_err(OwnerError::NoCreator)?;
    let assignment = Assignment { directory, order, supplies, creator, timeline, held: Held::default() };
    assignment.own(|order, id, template| {
        let verbose = tracing::enabled!(tracing::Level::DEBUG);
        launch::launch(order, id, directory, verbose, template)
    })
}

/// A room that is to be owned.
#[derive(Debug)]
pub(crate) struct Assignment<'a> {
    pub(crate) directory: &'a Path,
    pub(crate) order: Order,
    /// The lock, a template's files where there is one, then the blobs.
    pub(crate) supplies: Vec<OwnedFd>,
    pub(crate) creator: Connection,
    pub(crate) timeline: Vec<Mark>,
    pub(crate) held: Held,
}

/// What a resident owner has of a room while it is there; nothing where a process owns one room alone.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// Until the workload runs: what the resident owner does beside waits for that.
    pub(crate) starting: Option<Starting>,
    /// Taken back before the room's end is told: whoever heard of that may ask for another.
    pub(crate) promised: Option<Admitted>,
    /// Where it is counted while it rests.
    pub(crate) resting: Resting,
}

impl Assignment<'_> {
    /// Owns it, from its launch to its end.
    pub(crate) fn own<L>(self, launch: L) -> Result<(), OwnerError>
    where
        L: FnOnce(&Order, &RoomId, Option<TemplateFiles>) -> Result<Launched, LaunchError>,
    {
        let Self { directory, order, supplies, creator, mut timeline, held } = self;
        let mut supplies = supplies.into_iter();
        let mut next = || supplies.next().ok_or(OwnerError::NoCreator(PacketError::Truncated));
        let lock = next()?;
        let template = match order.task {
            Task::Run => None,
            Task::Clone | Task::Template => Some(TemplateFiles::from_order(order.extras, &mut next)?),
        };
        let blobs = supplies.map(File::from).collect();
        timeline.push(mark("supplied"));
        let id = order.spec.id.clone().ok_or_else(|| io::Error::other("the room has no id"))?;
        let launched = launch(&order, &id, template);
        timeline.push(mark("VMM launched"));
        let Order { spec, task, patience, .. } = order;
        let directory = directory.to_owned();
        let ownership = Ownership { id, spec, task, directory, blobs, lock, patience, timeline, held };
        match launched {
            Ok(launched) => {
                if let (Some(promised), Some(cgroup)) = (&ownership.held.promised, &launched.cgroup) {
                    promised.meter(cgroup);
                }
                if let Some(room) = Room::begin(ownership, launched, creator) {
                    room.serve();
                }
            }
            Err(error) => {
                tracing::error!(error = %chain(&error), "the room can't be launched");
                let outcome = Outcome::OwnerFailed { message: chain(&error) };
                room::end_without_vmm(ownership, &creator, outcome);
            }
        }
        Ok(())
    }

    /// Ends it before it has begun.
    pub(crate) fn refuse(self, outcome: Outcome) -> Result<(), OwnerError> {
        let Self { directory, order, supplies, creator, timeline, held } = self;
        let lock = supplies.into_iter().next().ok_or(OwnerError::NoCreator(PacketError::Truncated))?;
        let Order { spec, task, patience, .. } = order;
        let id = spec.id.clone().ok_or_else(|| io::Error::other("the room has no id"))?;
        let (directory, blobs) = (directory.to_owned(), Vec::new());
        let ownership = Ownership { id, spec, task, directory, blobs, lock, patience, timeline, held };
        room::end_without_vmm(ownership, &creator, outcome);
        Ok(())
    }
}

/// The order in a room's directory.
pub(crate) fn read_order(directory: &Path) -> Result<Order, OwnerError> {
    let path = directory.join("room.json");
    fs::read(&path)
        .and_then(|text| Ok(serde_json::from_slice(&text)?))
        .map_err(|e| OwnerError::Order(path.display().to_string(), e))
}

/// What the creator hands over: the lock, a template's files where there is one, then the blobs.
pub(crate) fn supplies(creator: &Connection, patience: Patience) -> Result<Vec<OwnedFd>, PacketError> {
    creator.limit(Some(patience.owner()))?;
    let mut all = Vec::new();
    loop {
        let packet = creator.receive::<FromClient>()?;
        let FromClient::Supply(supply) = packet.message else { return Err(PacketError::Truncated) };
        all.extend(packet.descriptors);
        if supply.last {
            creator.limit(None)?;
            return Ok(all);
        }
    }
}

/// Hands over what [`supplies`] takes.
pub(crate) fn supply(owner: &Connection, supplies: &[OwnedFd]) -> Result<(), PacketError> {
    let mut parts = supplies.chunks(MAX_DESCRIPTORS).peekable();
    while let Some(part) = parts.next() {
        let borrowed: Vec<_> = part.iter().map(AsFd::as_fd).collect();
        let supply = FromClient::from(Supply { last: parts.peek().is_none() });
        owner.send_blocking(&supply, &borrowed)?;
    }
    Ok(())
}

/// The socket of this name at which commands find an owner, bound through a descriptor: a path may be longer than a socket's address.
pub(crate) fn listen(directory: &Path, name: &str, backlog: i32) -> io::Result<OwnedFd> {
    let folder = rustix::fs::open(directory, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::net::bind(&socket, &socket_address(&folder, name)?)?;
    rustix::net::listen(&socket, backlog)?;
    Ok(socket)
}
