//! The reader's side: confined first, then handed an archive, then gone.

use std::ffi::OsString;
use std::fs::File;
use std::io;

use carrel_protocol::chain;
use carrel_protocol::confinement::Part;
use carrel_store::archive::{InThisProcess, Index, IndexError, Indexer};

use super::api::{Done, ENTRIES_BYTES, Entries, FromReader, Ready, Refused, ToReader, Unconfined};
use super::{confinement, filter};
use crate::launch;
use crate::packet::{Connection, PacketError};

/// The command under which a program that uses [`super::ArchiveReader::of_this_program`] calls [`serve`], before it does anything else.
pub const COMMAND: &str = "read-archive";
const UNCONFINED: &str = "--unconfined=";
/// What a list adds to an entry, in bytes.
const SEPARATOR: usize = 1;

pub(super) fn arguments(without: &[Part]) -> Vec<String> {
    let mut arguments = vec!["carrel-archive".to_owned(), COMMAND.to_owned()];
    arguments.extend(without.iter().map(|part| format!("{UNCONFINED}{part}")));
    arguments
}

fn without(arguments: impl Iterator<Item = OsString>) -> Option<Vec<Part>> {
    arguments.map(|word| word.to_str()?.strip_prefix(UNCONFINED)?.parse().ok()).collect()
}

/// Confines this process, reads the one archive that it is handed, and returns its exit status. `arguments` are those after [`COMMAND`].
#[must_use]
pub fn serve(arguments: impl Iterator<Item = OsString>) -> u8 {
    const STARTED_BY_HAND: u8 = 2;
    let Some(without) = without(arguments) else { return STARTED_BY_HAND };
    // There is nobody to tell but by the socket.
    let Ok(socket) = launch::owner_socket() else { return STARTED_BY_HAND };
    u8::from(answer(&socket.into(), &without).is_err())
}

fn answer(starter: &Connection, without: &[Part]) -> Result<(), PacketError> {
    let confined = confinement::enter(without).and_then(|()| match without.contains(&Part::Seccomp) {
        true => Ok(()),
        false => filter::install(),
    });
    if let Err(missing) = confined {
        return say(starter, Unconfined { part: chain(&missing) });
    }
    say(starter, Ready {})?;
    let packet = starter.receive::<ToReader>()?;
    let ToReader::Read(read) = packet.message;
    let archive = packet.descriptors.into_iter().next().ok_or(PacketError::Truncated)?;
    match InThisProcess.index(&File::from(archive), read.length) {
        Ok(index) => tell(starter, index),
        Err(IndexError::Refused(refusal)) => say(starter, Refused(refusal)),
        Err(IndexError::Failed(error)) => Err(io::Error::other(error).into()),
    }
}

fn tell(starter: &Connection, index: Index) -> Result<(), PacketError> {
    let mut batch = Vec::new();
    let mut bytes = 0;
    for entry in index.into_entries() {
        let encoded = serde_json::to_vec(&entry).map_err(io::Error::other)?.len() + SEPARATOR;
        if bytes + encoded > ENTRIES_BYTES && !batch.is_empty() {
            say(starter, Entries(std::mem::take(&mut batch)))?;
            bytes = 0;
        }
        bytes += encoded;
        batch.push(entry);
    }
    if !batch.is_empty() {
        say(starter, Entries(batch))?;
    }
    say(starter, Done {})
}

fn say(starter: &Connection, word: impl Into<FromReader>) -> Result<(), PacketError> {
    starter.send_blocking(&word.into(), &[])
}
