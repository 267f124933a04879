//! The confined process: from its first instruction to its exit status.

use std::os::fd::{AsFd, AsRawFd};

use carrel_protocol::chain;
use carrel_protocol::confinement::Part;
use carrel_protocol::vmm::{self, Broken, Configure, End, FromOwner, FromVmm, Restore};

use crate::jail::{self, Without};
use crate::machine::Machine;
use crate::owner::{Connection, Packet};
use crate::seccomp::{self, Stage};
use crate::start::{self, Surroundings};
use crate::timeline::Timeline;

/// Confines this process, receives a configuration or a snapshot from the owner, makes its machine and serves it. Returns how it ended.
pub fn run(connection: Connection, without: &Without) -> End {
    let mut timeline = Timeline::default();
    timeline.mark("start");
    share_one_heap();
    let machine = match set_up(&connection, without, &mut timeline) {
        Ok(machine) => machine,
        Err((end, message)) => {
            // Nobody to tell is nobody to tell; the status says it too.
            let _ = connection.send(&FromVmm::from(Broken { end, message }), &[]);
            return end;
        }
    };
    machine.serve(connection, timeline).0
}

/// All threads allocate from one heap. glibc gives each thread one of its own, 128 MiB of address space and four system calls at its start, and
/// at the ninth it opens `/sys/devices/system/cpu/online` to find out how many there may be: with nine vCPUs the filter ended the VMM.
/// vCPU threads hardly allocate.
fn share_one_heap() {
    // SAFETY: no pointers; there is one thread yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

fn set_up(owner: &Connection, without: &Without, timeline: &mut Timeline) -> Result<Machine, (End, String)> {
    let host_kernel = host_kernel();
    jail::enter(owner.as_fd().as_raw_fd(), without).map_err(|e| (End::Host, chain(&e)))?;
    timeline.mark("jail");
    let filters = !without.leaves_out(Part::Seccomp);
    if filters {
        seccomp::install(Stage::SetUp).map_err(|e| (End::Host, chain(&e)))?;
    }
    timeline.mark("set-up filter");
    let Packet { message, descriptors } =
        owner.receive_first::<FromOwner>().map_err(|e| (End::Host, chain(&e)))?;
    let surroundings = Surroundings { filters, host_kernel };
    let started = match message {
        FromOwner::Configure(Configure { version: vmm::VERSION, vm }) => {
            start::boot(vm, descriptors, surroundings, timeline)
        }
        FromOwner::Restore(Restore { version: vmm::VERSION, vm }) => {
            start::restore(vm, descriptors, surroundings, timeline)
        }
        FromOwner::Configure(Configure { version, .. }) | FromOwner::Restore(Restore { version, .. }) => {
            let message = format!(
                "the owner speaks version {version} and this carrel-vmm version {}; install both from one build",
                vmm::VERSION
            );
            return Err((End::BadConfiguration, message));
        }
        FromOwner::SetBalloon(_)
        | FromOwner::Pause(_)
        | FromOwner::Resume(_)
        | FromOwner::ReadMetrics(_)
        | FromOwner::Stop(_)
        | FromOwner::Snapshot(_) => {
            return Err((End::BadConfiguration, "the owner's first message is not a configuration".into()));
        }
    };
    started.map_err(|e| (e.end(), chain(&e)))
}

/// `uname -r`, asked for before there are filters.
fn host_kernel() -> String {
    // SAFETY: a utsname is plain data.
    let mut names: libc::utsname = unsafe { std::mem::zeroed() };
    // SAFETY: `names` is valid for the write.
    unsafe { libc::uname(&raw mut names) };
    names.release.iter().take_while(|c| **c != 0).map(|c| char::from(c.cast_unsigned())).collect()
}
