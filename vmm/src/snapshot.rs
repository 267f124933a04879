//! The state file: everything of a machine but its memory and disks.
//!
//! A sealed file (`sealed.rs`: magic `carrelSN`, version, length, checksum) around a [`MachineState`] in postcard's form, of at most [`MAX_BYTES`]. There is no
//! migration between versions: a snapshot is a cache of work that can be done again, and is (docs/snapshots.md).

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use carrel_protocol::units::{MemoryMib, VcpuCount};
use carrel_protocol::vmm::Cache;
use kvm_bindings::kvm_clock_data;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::arch::current::ioapic;
use crate::arch::current::state::VcpuState;
use crate::devices::serial::SerialState;
use crate::devices::state::TransportState;
use crate::sealed::{Broken, Kind};

/// Changes with every change of what is saved, in form or meaning.
pub const VERSION: u32 = 2;
/// Bytes of a state file at most; 16 vCPUs with every device take less than 200 KiB.
pub const MAX_BYTES: u64 = 1 << 20;
const KIND: Kind = Kind { magic: *b"carrelSN", version: VERSION };

/// A state file can't be read or written.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// The file failed.
    #[error("the snapshot's state file can't be {doing}")]
    File {
        /// `read` or `written`.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something else than a state file.
    #[error("the snapshot's state file is none of carrel's")]
    Magic,
    /// Another version.
    #[error("the snapshot is of version {found} and this carrel-vmm's is {VERSION}; make the snapshot anew")]
    Version {
        /// The file's.
        found: u32,
    },
    /// Too long, too short, or not as long as it says.
    #[error("the snapshot's state file is cut short or longer than it says; make the snapshot anew")]
    Length,
    /// Bytes were changed.
    #[error("the snapshot's state file is damaged: its checksum is wrong; make the snapshot anew")]
    Checksum,
    /// The body is no state.
    #[error(
        "the snapshot's state file holds something that this carrel-vmm can't read; make the snapshot anew"
    )]
    Body(#[source] postcard::Error),
}

impl From<Broken> for SnapshotError {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Magic => Self::Magic,
            Broken::Version(found) => Self::Version { found },
            Broken::Length => Self::Length,
            Broken::Checksum => Self::Checksum,
        }
    }
}

/// See the module's page.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// Where things lie.
    pub layout: Layout,
    /// `uname -r` of the host. What KVM keeps in registers and how it reads them back changes between kernels.
    pub host_kernel: String,
    /// What the machine is made of.
    pub shape: Shape,
    /// Each vCPU, in order.
    pub vcpus: Vec<VcpuState>,
    /// kvm-clock.
    pub clock: kvm_clock_data,
    /// The I/O APIC.
    pub io_apic: ioapic::Registers,
    /// virtio devices, in the order of their addresses.
    pub devices: Vec<TransportState>,
    /// The serial port, where there is one.
    pub serial: Option<SerialState>,
}

/// Addresses and numbers that a guest has found at its boot and holds on to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Where each range of memory begins, and its bytes.
    pub memory: Vec<(u64, u64)>,
    /// Where device 0 has its registers.
    pub devices: u64,
    /// Bytes between two devices.
    pub window: u64,
    /// Device 0's interrupt.
    pub first_interrupt: u32,
}

/// What a machine is made of, without the resources behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// vCPUs.
    pub vcpus: VcpuCount,
    /// Memory.
    pub memory_mib: MemoryMib,
    /// vsock's address and its connections at most.
    pub vsock: Option<(u32, u16)>,
    /// Disks.
    pub blocks: Vec<BlockShape>,
    /// virtio-rng.
    pub entropy: bool,
    /// virtio-balloon, and whether it has free-page reporting.
    pub balloon: Option<bool>,
    /// The serial port.
    pub serial: bool,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockShape {
    /// Its id.
    pub id: String,
    /// Its size, bytes.
    pub size_bytes: u64,
    /// Whether its driver was offered flushes.
    pub cache: Cache,
    /// It has no overlay.
    pub read_only: bool,
}

impl MachineState {
    /// Reads a state file from its beginning.
    ///
    /// # Errors
    ///
    /// It isn't whole, or of another version.
    pub fn read(mut file: &File) -> Result<Self, SnapshotError> {
        let failed = |source| SnapshotError::File { doing: "read", source };
        let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if length > MAX_BYTES {
            return Err(SnapshotError::Length);
        }
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| SnapshotError::Length)?];
        // By offset: its position is shared with whoever else has the file open, other clones' VMMs for one.
        file.read_exact_at(&mut bytes, 0).map_err(failed)?;
        Self::decode(&bytes)
    }

    /// Reads a state file's bytes.
    ///
    /// # Errors
    ///
    /// They aren't a whole one of this version.
    pub fn decode(bytes: &[u8]) -> Result<Self, SnapshotError> {
        let body = KIND.open(bytes)?;
        match postcard::take_from_bytes(body).map_err(SnapshotError::Body)? {
            (state, []) => Ok(state),
            (_, _) => Err(SnapshotError::Length),
        }
    }

    /// The bytes of a state file.
    ///
    /// # Errors
    ///
    /// It would be larger than any that is read.
    pub fn encode(&self) -> Result<Vec<u8>, SnapshotError> {
        let body = postcard::to_allocvec(self).map_err(SnapshotError::Body)?;
        let bytes = sealed(&body);
        match u64::try_from(bytes.len()) {
            Ok(length) if length <= MAX_BYTES => Ok(bytes),
            Ok(_) | Err(_) => Err(SnapshotError::Length),
        }
    }

    /// Writes an empty file and returns how many bytes that were.
    ///
    /// # Errors
    ///
    /// The file's.
    pub fn write(&self, file: &File) -> Result<u64, SnapshotError> {
        let bytes = self.encode()?;
        file.write_all_at(&bytes, 0).map_err(|source| SnapshotError::File { doing: "written", source })?;
        Ok(u64::try_from(bytes.len()).unwrap_or(u64::MAX))
    }
}

/// A body behind its header.
pub fn sealed(body: &[u8]) -> Vec<u8> {
    KIND.seal(body)
}

#[cfg(test)]
mod tests;
