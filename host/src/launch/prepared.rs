//! VMMs that are kept ready: processes, confined, with a VM and its vCPUs, that wait for a snapshot to go on from.
//!
//! ```text
//!   prepare ─▶ getting ready ── Prepared ─▶ ready
//!                   └────────────┬────────────┴─▶ go_on: limits, Restore + descriptors ─▶ Launched
//!                                └─▶ broken, ended: look says so
//! ```
//!
//! A VMM's cgroup, and as root its user, are named by an id of its own: the room that it becomes has another, and finds the cgroup by what it is handed.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use carrel_protocol::one_line;
use carrel_protocol::units::{MemoryMib, VcpuCount};
use carrel_protocol::vmm::{self, Descriptor, FromOwner, FromVmm, Mark, Prepare};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Child, LaunchError, Launched, going_on, open_kvm, start};
use crate::cgroup::{Cgroup, Limits};
use crate::home::{Order, TemplateFiles};
use crate::packet::Connection;
use crate::spec::{Part, RoomId};

mod standing;

pub use standing::{Going, Standing};

/// Characters of a VMM's complaint.
const COMPLAINT: usize = 400;

/// A VMM that is ready, or about to be. Dropped, it is killed, and its cgroup removed; in that order, which is the fields'.
#[derive(Debug)]
pub(crate) struct Prepared {
    connection: Connection,
    child: Child,
    cgroup: OwnCgroup,
    limits: Limits,
    /// What it took, once it has said that it is ready.
    timeline: Option<Vec<Mark>>,
}

/// Removed when dropped.
#[derive(Debug)]
struct OwnCgroup(Option<Cgroup>);

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        if let Some(cgroup) = &self.0 {
            cgroup.remove();
        }
    }
}

/// Starts a VMM that waits to go on from a snapshot with so many vCPUs and so much memory. It gets ready while the caller goes on: its descriptor is readable when it
/// has something to say, see [`Prepared::look`].
///
/// It is killed when the *thread* that called this ends (PR_SET_PDEATHSIG), so that must be one that stays.
///
/// # Errors
///
/// As every launch.
pub(crate) fn prepare(
    id: &RoomId,
    without: &[Part],
    vmm: &Path,
    limits: Limits,
    vcpus: VcpuCount,
    memory_mib: MemoryMib,
) -> Result<Prepared, LaunchError> {
    let first = Prepare { version: vmm::VERSION, kvm: Descriptor(0), vcpus, memory_mib };
    let Launched { connection, child, cgroup, saved: _, record: _ } =
        start(id, without, vmm, limits, &first.into(), &[open_kvm()?])?;
    Ok(Prepared { connection, child, cgroup: OwnCgroup(cgroup), limits, timeline: None })
}

impl Prepared {
    /// Hears what the VMM has said, without waiting, and returns whether it is ready. One that is not yet goes on all the same, when it is.
    ///
    /// # Errors
    ///
    /// It is broken, or its process is over.
    pub(crate) fn look(&mut self) -> Result<bool, LaunchError> {
        while is_readable(self.connection.as_fd())? {
            match self.connection.receive::<FromVmm>()?.message {
                FromVmm::Prepared(prepared) => self.timeline = Some(prepared.timeline),
                FromVmm::Broken(broken) => {
                    return Err(LaunchError::NotPrepared(one_line(&broken.message, COMPLAINT)));
                }
                FromVmm::Ended(ended) => {
                    let detail = ended.detail.unwrap_or_else(|| "it ended".into());
                    return Err(LaunchError::NotPrepared(one_line(&detail, COMPLAINT)));
                }
                FromVmm::Booted(_)
                | FromVmm::Dialled(_)
                | FromVmm::Done(_)
                | FromVmm::Refused(_)
                | FromVmm::Metrics(_)
                | FromVmm::DeviceStopped(_)
                | FromVmm::Snapshotted(_) => {
                    return Err(LaunchError::NotPrepared("it spoke out of turn".into()));
                }
            }
        }
        Ok(self.timeline.is_some())
    }

    /// What happened when while it got ready; empty before.
    #[cfg(test)]
    pub(crate) fn timeline(&self) -> &[Mark] {
        self.timeline.as_deref().unwrap_or_default()
    }

    /// Lets it be the VMM of a room that goes on from this template, within these limits. The room's disk goes into its directory.
    ///
    /// # Errors
    ///
    /// A limit can't be set, no disk made, or the VMM is over; it is then killed and cleared away.
    pub(crate) fn go_on(
        self,
        order: &Order,
        directory: &Path,
        mut template: TemplateFiles,
        limits: Limits,
    ) -> Result<Launched, LaunchError> {
        let record = template.record.take();
        let (restore, parts) = going_on(None, &order.spec.machine, directory, template)?;
        if let Some(cgroup) = self.cgroup.0.as_ref().filter(|_| limits != self.limits) {
            cgroup.limit(limits)?;
        }
        let borrowed: Vec<BorrowedFd<'_>> = parts.0.iter().map(AsFd::as_fd).collect();
        self.connection.send_blocking(&FromOwner::from(restore), &borrowed)?;
        let Self { connection, child, mut cgroup, .. } = self;
        Ok(Launched { connection, child, cgroup: cgroup.0.take(), saved: None, record })
    }
}

impl AsFd for Prepared {
    /// Its connection.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

fn is_readable(connection: BorrowedFd<'_>) -> Result<bool, LaunchError> {
    let mut polled = [PollFd::from_borrowed_fd(connection, PollFlags::IN)];
    let now = Timespec::try_from(Duration::ZERO).map_err(std::io::Error::other)?;
    loop {
        match poll(&mut polled, Some(&now)) {
            Err(rustix::io::Errno::INTR) => {}
            ready => return Ok(ready.map_err(std::io::Error::from)? > 0),
        }
    }
}

#[cfg(test)]
mod tests;
