//! A prepared VMM without a room around it: what the pool keeps ready, for who measures it by itself.
//!
//! ```text
//!   prepare ─▶ await_ready ─▶ go_on(snapshot's descriptors) ─▶ Going: a guest that runs, until dropped
//!                                                                └─ record_working_set
//! ```

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use carrel_protocol::units::{MemoryMib, VcpuCount};
use carrel_protocol::vmm::{self, Descriptor, FromOwner, FromVmm, RecordWorkingSet, Restore, RestoreConfig};
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
    connection: Connection,
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
        Ok(Going { connection, child, _cgroup: cgroup })
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

    /// Has its VMM write down, into an empty file, which pages the guest has touched so far, as a room's owner does for a template's first clone.
    ///
    /// # Errors
    ///
    /// The VMM is over, or says why it can't.
    pub fn record_working_set(&self, file: BorrowedFd<'_>) -> Result<(), LaunchError> {
        let request = RecordWorkingSet { file: Descriptor(0) };
        self.connection.send_blocking(&FromOwner::from(request), &[file])?;
        loop {
            match self.connection.receive::<FromVmm>()?.message {
                FromVmm::Done(_) => return Ok(()),
                FromVmm::Refused(refused) => return Err(LaunchError::Working(refused.reason)),
                FromVmm::Broken(broken) => return Err(LaunchError::Working(broken.message)),
                FromVmm::Ended(_) => return Err(LaunchError::Working("it ended".into())),
                FromVmm::Booted(_)
                | FromVmm::Dialled(_)
                | FromVmm::Metrics(_)
                | FromVmm::DeviceStopped(_)
                | FromVmm::Snapshotted(_)
                | FromVmm::Prepared(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    use carrel_protocol::vmm::{Broken, Done, End, Refused};

    use super::*;
    use crate::launch::testing;

    /// A VMM that is played by the test.
    fn going() -> (Going, Connection, UnixStream) {
        let (connection, vmm) = Connection::pair().unwrap();
        let (life, held) = UnixStream::pair().unwrap();
        let child = testing::stand_in(held.as_fd());
        (Going { connection, child, _cgroup: OwnCgroup(None) }, vmm, life)
    }

    #[test]
    fn a_working_set_is_recorded_into_the_file_or_the_reason_is_said() {
        let file = File::open("/dev/null").unwrap();
        let answers: [(FromVmm, Option<&str>); 3] = [
            (Done {}.into(), None),
            (Refused { reason: "not now".into() }.into(), Some("not now")),
            (Broken { end: End::Kvm, message: "no more".into() }.into(), Some("no more")),
        ];
        for (answer, reason) in answers {
            let (going, vmm, _life) = going();
            vmm.send_blocking(&answer, &[]).unwrap();
            let recorded = going.record_working_set(file.as_fd());
            let asked = vmm.receive::<FromOwner>().unwrap();
            assert!(matches!(asked.message, FromOwner::RecordWorkingSet(_)) && asked.descriptors.len() == 1);
            match (recorded, reason) {
                (Ok(()), None) => {}
                (Err(error), Some(reason)) => assert!(error.to_string().contains(reason), "{error}"),
                (recorded, reason) => panic!("{recorded:?}, not {reason:?}"),
            }
        }
        let (going, vmm, _life) = going();
        drop(vmm);
        assert!(going.record_working_set(file.as_fd()).is_err(), "it is over");
    }
}
