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
//! One thread owns the room and makes every transition; the others wait for one thing each (the VMM's packets, its death, the agent's
//! messages, each command's messages, a stream's token) and tell it over a bounded channel. Bytes of standard streams go between guest
//! and command without passing here.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use carrel_protocol::chain;
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use thiserror::Error;

use crate::home::{Order, Task, TemplateFiles};
use crate::launch;
use crate::outcome::Outcome;
use crate::packet::{Connection, PacketError};
use crate::patience::Patience;
use crate::session::socket_address;
use crate::timestamp::mark;

pub mod api;
mod blobs;
mod events;
pub(crate) mod journal;
mod pace;
mod room;
mod streams;

use api::FromClient;
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
pub fn run(directory: &Path) -> Result<(), OwnerError> {
    // A session of its own: no terminal's signals. It fails only for a leader of a process group, which has one already.
    let _ = rustix::process::setsid();
    // For `ps`; without a name of its own it would be called `exe`.
    let _ = rustix::thread::set_name(c"carrel-owner");
    let mut timeline = vec![mark("owner started")];
    let creator = Connection::from(io::stdin().as_fd().try_clone_to_owned()?);
    let path = directory.join("room.json");
    let order: Order = fs::read(&path)
        .and_then(|text| Ok(serde_json::from_slice(&text)?))
        .map_err(|e| OwnerError::Order(path.display().to_string(), e))?;
    let patience = order.patience;
    let mut supplies = supplies(&creator, patience).map_err(OwnerError::NoCreator)?.into_iter();
    let mut next = || supplies.next().ok_or(OwnerError::NoCreator(PacketError::Truncated));
    let lock = next()?;
    let template = match order.task {
        Task::Run => None,
        Task::Clone | Task::Template => {
            Some(TemplateFiles { state: next()?, memory: next()?, disk: next()? })
        }
    };
    let blobs = supplies.map(File::from).collect();
    timeline.push(mark("supplied"));
    let id = order.spec.id.clone().ok_or_else(|| io::Error::other("the room has no id"))?;
    let verbose = tracing::enabled!(tracing::Level::DEBUG);
    let launched = launch::launch(&order, &id, directory, verbose, template);
    timeline.push(mark("VMM launched"));
    let directory = directory.to_owned();
    let ownership =
        Ownership { id, spec: order.spec, task: order.task, directory, blobs, lock, patience, timeline };
    match launched {
        Ok(launched) => {
            if let Some(room) = Room::begin(ownership, launched, creator) {
                room.serve();
            }
        }
        Err(error) => {
            tracing::error!(error = %chain(&error), "the room can't be launched");
            room::end_without_vmm(ownership, &creator, Outcome::OwnerFailed { message: chain(&error) });
        }
    }
    Ok(())
}

/// What the creator hands over: the lock, a template's files where there is one, then the blobs.
fn supplies(creator: &Connection, patience: Patience) -> Result<Vec<OwnedFd>, PacketError> {
    let limit = |time| {
        rustix::net::sockopt::set_socket_timeout(creator, rustix::net::sockopt::Timeout::Recv, time)
            .map_err(io::Error::from)
    };
    limit(Some(patience.owner()))?;
    let mut all = Vec::new();
    loop {
        let packet = creator.receive::<FromClient>()?;
        let FromClient::Supply(supply) = packet.message else { return Err(PacketError::Truncated) };
        all.extend(packet.descriptors);
        if supply.last {
            limit(None)?;
            return Ok(all);
        }
    }
}

/// The socket at which commands find this owner, bound through a descriptor: a path may be longer than a socket's address.
fn listen(directory: &Path) -> io::Result<OwnedFd> {
    let folder = rustix::fs::open(directory, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::net::bind(&socket, &socket_address(&folder)?)?;
    rustix::net::listen(&socket, 16)?;
    Ok(socket)
}
