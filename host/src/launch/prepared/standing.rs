//! A prepared VMM without a room around it: what the pool keeps ready, for who measures it by itself.
//!
//! ```text
//!   prepare ─▶ await_ready ─▶ go_on(snapshot's descriptors) ─▶ Going: a guest that runs, until dropped
//! ```

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use carrel_protocol::units::{MemoryMib, VcpuCount};
use carrel_protocol::vmm::{self, Descriptor, FromOwner, Restore, RestoreConfig};
use rustix::event::{PollFd, PollFlags, poll};

use super::{OwnCgroup, Prepared, prepare};
use crate::launch::{Child, LaunchError, limits_of};
use crate::packet::Connection;
use crate::spec::{Part, RoomId};

/// A VMM that waits for its snapshot. Dropped, it is killed and its cgroup removed.
#[derive(Debug)]
pub struct Standing(Prepared);

/// A VMM whose guest goes on from a snapshot. Dropped, it is killed and its cgroup removed; in that order, which is the fields'.
#[derive(Debug)]
pub struct Going {
    _connection: Connection,
    child: Child,
    _cgroup: OwnCgroup,
}

impl Standing {
    /// Starts a VMM as the pool does, with its confinement but for the parts `without`, for a snapshot of this shape.
    ///
    /// It is killed when the *thread* that called this ends (PR_SET_PDEATHSIG).
    ///
    /// # Errors
    ///
    /// As every launch.
    pub fn prepare(
        id: &RoomId,
        without: &[Part],
        vmm: &Path,
        vcpus: VcpuCount,
        memory_mib: MemoryMib,
    ) -> Result<Self, LaunchError> {
        prepare(id, without, vmm, limits_of(vcpus, memory_mib), vcpus, memory_mib).map(Self)
    }

    /// Waits until it is ready.
    ///
    /// # Errors
    ///
    /// It is broken, or its process is over.
    pub fn await_ready(&mut self) -> Result<(), LaunchError> {
        while !self.0.look()? {
            match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(LaunchError::Io(e.into())),
            }
        }
        Ok(())
    }

    /// Lets it go on from a snapshot, whose descriptors `vm` names by their places. Returns when it has been told; what it makes of it is heard from its guest.
    ///
    /// # Errors
    ///
    /// The VMM is over.
    pub fn go_on(
        self,
        vm: RestoreConfig<Descriptor>,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Going, LaunchError> {
        let Prepared { connection, child, cgroup, .. } = self.0;
        let restore = Restore { version: vmm::VERSION, vm };
        connection.send_blocking(&FromOwner::from(restore), descriptors)?;
        Ok(Going { _connection: connection, child, _cgroup: cgroup })
    }
}

impl AsFd for Standing {
    /// Its connection.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Going {
    /// Its process's number.
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }
}
