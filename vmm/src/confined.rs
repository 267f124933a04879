//! The confined process: from its first instruction to its exit status.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use carrel_protocol::chain;
use carrel_protocol::confinement::Part;
use carrel_protocol::vmm::{
    self, Broken, Configure, Descriptor, End, Ended, FromOwner, FromVmm, Prepare, Restore, RestoreConfig,
};

use crate::jail::{self, Without};
use crate::machine::Machine;
use crate::owner::{Connection, OwnerError, Packet};
use crate::resources;
use crate::seccomp::{self, Stage};
use crate::signal;
use crate::start::{self, Prepared, StartError, Surroundings};
use crate::timeline::Timeline;
use crate::working_set::touched::Pagemap;

/// Confines this process, receives a configuration or a snapshot from the owner, makes its machine and serves it. Returns how it ended.
pub fn run(connection: Connection, without: &Without) -> End {
    let mut timeline = Timeline::default();
    timeline.mark("start");
    share_one_heap();
    let machine = match set_up(&connection, without, &mut timeline) {
        Ok(machine) => machine,
        Err((end, message)) => {
            // Nobody to tell is nobody to tell; the status says it too.
            let _ = connection.send(&last_word(end, message), &[]);
            return end;
        }
    };
    machine.serve(connection, timeline).0
}

/// To stop a machine that is not there yet is no failure of it.
fn last_word(end: End, message: String) -> FromVmm {
    match end {
        End::Stopped => Ended { end, detail: Some(message) }.into(),
        End::Shutdown
        | End::Reset
        | End::TripleFault
        | End::Panic
        | End::BadConfiguration
        | End::BadSnapshot
        | End::Kvm
        | End::Host
        | End::Internal => Broken { end, message }.into(),
    }
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
    // A host without it has no working sets.
    let pagemap = Pagemap::open().ok();
    let mut keep: Vec<RawFd> = pagemap.iter().map(Pagemap::as_raw_fd).collect();
    keep.push(owner.as_fd().as_raw_fd());
    keep.sort_unstable();
    jail::enter(&keep, without).map_err(|e| (End::Host, chain(&e)))?;
    timeline.mark("jail");
    let filters = !without.leaves_out(Part::Seccomp);
    if filters {
        seccomp::install(Stage::SetUp).map_err(|e| (End::Host, chain(&e)))?;
    }
    timeline.mark("set-up filter");
    let Packet { message, descriptors } =
        owner.receive_first::<FromOwner>().map_err(|e| (End::Host, chain(&e)))?;
    let surroundings = Surroundings { filters, host_kernel, pagemap };
    let broken = |e: StartError| (e.end(), chain(&e));
    match message {
        FromOwner::Configure(Configure { version: vmm::VERSION, vm }) => {
            start::boot(vm, descriptors, surroundings, timeline).map_err(broken)
        }
        FromOwner::Restore(Restore { version: vmm::VERSION, vm }) => {
            start::restore(vm, descriptors, surroundings, timeline).map_err(broken)
        }
        FromOwner::Prepare(Prepare { version: vmm::VERSION, kvm, vcpus, memory_mib }) => {
            let kvm = resources::prepared_from_owner(kvm, descriptors).map_err(|e| broken(e.into()))?;
            let prepared = start::prepare(kvm, vcpus, memory_mib, surroundings, timeline).map_err(broken)?;
            prepared.settle().map_err(broken)?;
            timeline.mark("filters of vCPUs");
            let (vm, descriptors) = wait_for_snapshot(owner, &prepared, timeline)?;
            prepared.restore(vm, descriptors, timeline).map_err(broken)
        }
        FromOwner::Configure(Configure { version, .. })
        | FromOwner::Prepare(Prepare { version, .. })
        | FromOwner::Restore(Restore { version, .. }) => Err(other_version(version)),
        FromOwner::SetBalloon(_)
        | FromOwner::Pause(_)
        | FromOwner::Resume(_)
        | FromOwner::ReadMetrics(_)
        | FromOwner::Stop(_)
        | FromOwner::RecordWorkingSet(_)
        | FromOwner::Snapshot(_) => {
            Err((End::BadConfiguration, "the owner's first message is not a configuration".into()))
        }
    }
}

/// Tells the owner that all is prepared, and waits until it says what to go on from. It may take its time, or never want it.
fn wait_for_snapshot(
    owner: &Connection,
    prepared: &Prepared,
    timeline: &mut Timeline,
) -> Result<(RestoreConfig<Descriptor>, Vec<OwnedFd>), (End, String)> {
    let failed = |e: OwnerError| (End::Host, chain(&e));
    owner.send(&FromVmm::from(vmm::Prepared { timeline: timeline.take() }), &[]).map_err(failed)?;
    let signal = signal::came_before_readable(prepared.signals(), owner);
    if signal.map_err(|e| failed(e.into()))? {
        return Err((End::Stopped, "a signal asked".into()));
    }
    let Packet { message, descriptors } = match owner.receive_first::<FromOwner>() {
        Err(e @ OwnerError::Closed) => return Err((End::Stopped, chain(&e))),
        received => received.map_err(failed)?,
    };
    timeline.mark("asked");
    match message {
        FromOwner::Restore(Restore { version: vmm::VERSION, vm }) => Ok((vm, descriptors)),
        FromOwner::Restore(Restore { version, .. }) => Err(other_version(version)),
        FromOwner::Stop(_) => Err((End::Stopped, "the owner asked".into())),
        FromOwner::Configure(_)
        | FromOwner::Prepare(_)
        | FromOwner::SetBalloon(_)
        | FromOwner::Pause(_)
        | FromOwner::Resume(_)
        | FromOwner::ReadMetrics(_)
        | FromOwner::RecordWorkingSet(_)
        | FromOwner::Snapshot(_) => {
            let message = "this carrel-vmm was prepared to go on from a snapshot, and the owner's next message names none";
            Err((End::BadConfiguration, message.into()))
        }
    }
}

fn other_version(version: u32) -> (End, String) {
    let message = format!(
        "the owner speaks version {version} and this carrel-vmm version {}; install both from one build",
        vmm::VERSION
    );
    (End::BadConfiguration, message)
}

/// `uname -r`, asked for before there are filters.
fn host_kernel() -> String {
    // SAFETY: a utsname is plain data.
    let mut names: libc::utsname = unsafe { std::mem::zeroed() };
    // SAFETY: `names` is valid for the write.
    unsafe { libc::uname(&raw mut names) };
    names.release.iter().take_while(|c| **c != 0).map(|c| char::from(c.cast_unsigned())).collect()
}
