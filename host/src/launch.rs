//! Launching: from a room's order to a confined VMM that was told its machine.
//!
//! ```text
//!   open kernel, initramfs, disks, /dev/kvm ─▶ cgroup ─▶ clone3 into it and into new namespaces ─▶ map its user
//!                                                          └─ child: become that user, close all, execveat carrel-vmm
//!   Configure + descriptors ─▶ its socket
//! ```
//!
//! Or ahead of need, by whoever stays ([`prepare`]): the same with Prepare in Configure's place, and a template's files when there is a room for it.
//!
//! Whatever fails takes back what was made before it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use carrel_protocol::agent::GUEST_CID;
use carrel_protocol::units::{MemoryMib, VcpuCount};
use carrel_protocol::vmm::{
    self, BalloonConfig, BlockConfig, Cache, Configure, Descriptor, EntropyConfig, FromOwner, Kernel,
    Restore, RestoreConfig, RestoredBlock, SerialConfig, VmConfig, VsockConfig,
};
use rustix::fs::{Mode, OFlags};
use thiserror::Error;

use crate::cgroup::{Cgroup, CgroupError, Limits};
use crate::home::{Order, Task, TemplateFiles};
use crate::packet::{Connection, PacketError};
use crate::spec::{Machine, Part, RoomId};

mod prepared;
#[expect(unsafe_code, reason = "clone3 and what a child may do before execve have no safe form")]
mod process;

pub use prepared::{Going, Standing};
pub(crate) use prepared::{Prepared, prepare};
pub(crate) use process::{Child, ChildEnd, OWNER_FD, Plan, owner_socket, spawn, wait_until_ended};

/// What the VMM itself takes beside the guest's memory, at most: its own pages, KVM's, and dirty pages of the room's disk.
const VMM_BYTES: u64 = 96 << 20;
/// What the guest reads as its disk's serial, and a template's clones know it by.
const DISK: &str = "room";
/// Threads of a VMM beside its vCPUs.
const VMM_THREADS: u64 = 16;
/// What the VMM's own threads may use beside the guest, in thousandths of one CPU.
const VMM_CPU_MILLIS: u64 = 250;
/// What the guest's kernel may say on its console, bytes.
const CONSOLE_BYTES: u64 = 1 << 20;
/// The first of the users that VMMs run as when root starts them: far above what systems give to people and subordinate ranges.
const FIRST_USER: u32 = 0x7000_0000;
/// So many there are.
const USERS: u32 = 0x0800_0000;

/// A room can't be launched.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// A file can't be opened.
    #[error("{} can't be opened{}", .path.display(), hint(.path))]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The room's disk can't be made.
    #[error("the room's disk can't be made below {}", .path.display())]
    Disk {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A part of the confinement can't be had.
    #[error(
        "the host can't give this part of the confinement: {part}; see `carrel doctor`, or use --unconfined"
    )]
    Part {
        /// Which.
        part: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The VMM, or carrel itself for another process, can't be executed.
    #[error("{} can't be executed: it must be readable and executable for everybody", .path.display())]
    Execute {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A VMM that was to be kept ready is not.
    #[error("a VMM can't be kept ready: {0}")]
    NotPrepared(String),
    /// A VMM has not written down which pages its guest has touched.
    #[error("the VMM records no working set: {0}")]
    Working(String),
    /// The socket to the VMM failed.
    #[error("the VMM ended before it was told its machine")]
    Packet(#[from] PacketError),
    /// Something else of the host's.
    #[error("the host failed")]
    Io(#[from] io::Error),
}

fn hint(path: &Path) -> &'static str {
    match path.to_str() {
        Some("/dev/kvm") => {
            "; enable virtualisation, load kvm_intel or kvm_amd, and let your user use it (group kvm)"
        }
        Some(_) | None => "",
    }
}

/// A VMM that was launched.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) connection: Connection,
    pub(crate) child: Child,
    pub(crate) cgroup: Option<Cgroup>,
    /// Of a template to be: where it is saved.
    pub(crate) saved: Option<Saved>,
    /// Of a clone: where its working set is written, if its template has none.
    pub(crate) record: Option<OwnedFd>,
}

/// Where a template is saved, beside its disk.
#[derive(Debug)]
pub(crate) struct Saved {
    pub(crate) state: OwnedFd,
    pub(crate) memory: OwnedFd,
}

/// Launches a room's VMM. Its directory is where the disk goes, and the console's output if `verbose`. The template's files are what a clone goes on
/// from, or what a template to be is saved into.
pub(crate) fn launch(
    order: &Order,
    id: &RoomId,
    directory: &Path,
    verbose: bool,
    template: Option<TemplateFiles>,
) -> Result<Launched, LaunchError> {
    match (order.task, template) {
        (Task::Clone, Some(template)) => restore(order, id, directory, template),
        (Task::Template, Some(TemplateFiles { state, memory, disk, .. })) => {
            let launched = boot(order, id, directory, verbose, disk)?;
            Ok(Launched { saved: Some(Saved { state, memory }), ..launched })
        }
        (Task::Run | Task::Clone | Task::Template, _) => {
            let disk = overlay(directory, disk_bytes(&order.spec.machine))?;
            boot(order, id, directory, verbose, disk)
        }
    }
}

fn boot(
    order: &Order,
    id: &RoomId,
    directory: &Path,
    verbose: bool,
    disk: OwnedFd,
) -> Result<Launched, LaunchError> {
    let machine = &order.spec.machine;
    let mut parts = Parts::default();
    let kernel = machine.kernel.as_ref().unwrap_or(&order.assets.kernel);
    let vm = VmConfig {
        kvm: parts.add(open_kvm()?),
        vcpus: machine.vcpus,
        memory_mib: machine.memory_mib,
        huge_pages: true,
        kernel: Kernel { image: parts.add(open(kernel, false)?), command_line: command_line(verbose) },
        initramfs: Some(parts.add(open(&order.assets.initramfs, false)?)),
        vsock: Some(VsockConfig { guest_cid: GUEST_CID, socket: None, connections: 256 }),
        blocks: vec![BlockConfig {
            id: DISK.into(),
            base: Some(parts.add(open(&order.assets.scratch, false)?)),
            overlay: Some(parts.add(disk)),
            size_bytes: disk_bytes(machine),
            // It ends with its room, and a room does not outlive its host.
            cache: Cache::Unsafe,
            limit: None,
        }],
        entropy: Some(EntropyConfig {}),
        balloon: Some(BalloonConfig { size_mib: 0, free_page_reporting: true }),
        serial: match verbose {
            true => {
                let output = parts.add(console(&directory.join("console"))?);
                Some(SerialConfig { output, limit_bytes: CONSOLE_BYTES })
            }
            false => None,
        },
        control: None,
        track_dirty: false,
    };
    let first = Configure { version: vmm::VERSION, vm };
    start(id, &order.spec.without, &order.assets.vmm, limits(machine), &first.into(), &parts.0)
}

/// Launches a clone: state, memory and disk are its template's, what it writes is its own.
fn restore(
    order: &Order,
    id: &RoomId,
    directory: &Path,
    mut template: TemplateFiles,
) -> Result<Launched, LaunchError> {
    let machine = &order.spec.machine;
    let record = template.record.take();
    let (first, parts) = going_on(Some(open_kvm()?), machine, directory, template)?;
    let launched =
        start(id, &order.spec.without, &order.assets.vmm, limits(machine), &first.into(), &parts.0)?;
    Ok(Launched { record, ..launched })
}

/// What a VMM is told that goes on from a template; without KVM, one that has it.
fn going_on(
    kvm: Option<OwnedFd>,
    machine: &Machine,
    directory: &Path,
    template: TemplateFiles,
) -> Result<(Restore, Parts), LaunchError> {
    let mut parts = Parts::default();
    let vm = RestoreConfig {
        kvm: kvm.map(|kvm| parts.add(kvm)),
        state: parts.add(template.state),
        memory: parts.add(template.memory),
        vsock: None,
        working_set: template.working_set.map(|file| parts.add(file)),
        blocks: vec![RestoredBlock {
            id: DISK.into(),
            base: Some(parts.add(template.disk)),
            overlay: Some(parts.add(overlay(directory, disk_bytes(machine))?)),
            limit: None,
        }],
        serial: None,
        control: None,
        track_dirty: false,
    };
    Ok((Restore { version: vmm::VERSION, vm }, parts))
}

/// KVM, as every VMM is handed it.
pub(crate) fn open_kvm() -> Result<OwnedFd, LaunchError> {
    open("/dev/kvm".as_ref(), true)
}

/// Starts a VMM, confined, and tells it its machine.
pub(crate) fn start(
    id: &RoomId,
    without: &[Part],
    vmm: &Path,
    limits: Limits,
    first: &FromOwner,
    descriptors: &[OwnedFd],
) -> Result<Launched, LaunchError> {
    let program = open(vmm, false)?;
    let cgroup = match without.contains(&Part::Cgroup) {
        true => None,
        false => Some(Cgroup::create(id, limits)?),
    };
    let begun = || -> Result<(Connection, Child), LaunchError> {
        let (ours, theirs) = Connection::pair()?;
        let child = process::spawn(&process::Plan {
            program: program.as_fd(),
            path: vmm,
            arguments: arguments(without),
            socket: theirs.as_fd(),
            cgroup: cgroup.as_ref().map(Cgroup::directory).transpose()?,
            user: (!without.contains(&Part::Namespaces)).then(|| user_of(id)),
        })?;
        drop(theirs);
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        ours.send_blocking(first, &borrowed)?;
        Ok((ours, child))
    };
    match begun() {
        Ok((connection, child)) => Ok(Launched { connection, child, cgroup, saved: None, record: None }),
        Err(error) => {
            if let Some(cgroup) = &cgroup {
                cgroup.remove();
            }
            Err(error)
        }
    }
}

fn arguments(without: &[Part]) -> Vec<String> {
    let mut arguments = vec!["carrel-vmm".to_owned(), "--owner-fd".to_owned(), process::OWNER_FD.to_string()];
    if !without.is_empty() {
        let list: Vec<String> = without.iter().map(ToString::to_string).collect();
        arguments.push(format!("--unconfined={}", list.join(",")));
    }
    arguments
}

/// The user that the VMM is outside of its namespace: for root one of its own, found from the room's random id; else oneself.
fn user_of(id: &RoomId) -> u32 {
    let own = rustix::process::geteuid();
    if !own.is_root() {
        return own.as_raw();
    }
    let digits = id.as_str().get(..8).and_then(|digits| u32::from_str_radix(digits, 16).ok()).unwrap_or(0);
    FIRST_USER + digits % USERS
}

/// The same for a process that reads an archive: for root one of its own, above those of rooms, found from the starter's own number.
pub(crate) fn reading_user() -> u32 {
    let own = rustix::process::geteuid();
    if !own.is_root() {
        return own.as_raw();
    }
    FIRST_USER + USERS + std::process::id() % USERS
}

/// What a room's VMM may take from the host. While it boots it may use all of its vCPUs; see [`running_cpu_millis`].
pub(crate) fn limits(machine: &Machine) -> Limits {
    limits_of(machine.vcpus, machine.memory_mib)
}

/// The same of a machine of which no more is known.
pub(crate) fn limits_of(vcpus: VcpuCount, memory: MemoryMib) -> Limits {
    let memory = memory.bytes();
    let vcpus = u64::from(vcpus.get());
    Limits {
        // KVM's page tables for the guest's memory are a 512th of it at most, its metadata as much.
        memory_bytes: memory + memory / 128 + VMM_BYTES,
        cpu_millis: vcpus * 1000 + VMM_CPU_MILLIS,
        threads: vcpus + VMM_THREADS,
    }
}

/// The quota once the workload runs: what the user asked for, and what the VMM's own threads need to serve it.
pub(crate) fn running_cpu_millis(machine: &Machine) -> u64 {
    u64::from(machine.cpu_millis) + VMM_CPU_MILLIS
}

/// The guest's command line: docs/host.md says why each word is there.
pub fn command_line(verbose: bool) -> String {
    let console = if verbose { "console=ttyS0" } else { "quiet 8250.nr_uarts=0" };
    format!("reboot=t,panic_warm panic=-1 {console} swiotlb=noforce clocksource=kvm-clock")
}

/// Descriptors in the order in which they are sent.
#[derive(Default)]
struct Parts(Vec<OwnedFd>);

impl Parts {
    fn add(&mut self, file: OwnedFd) -> Descriptor {
        self.0.push(file);
        Descriptor(u8::try_from(self.0.len() - 1).unwrap_or(u8::MAX))
    }
}

/// Opens what the operator named: links of theirs are followed, so the path is resolved first, and then opened without following any.
fn open(path: &Path, writable: bool) -> Result<OwnedFd, LaunchError> {
    let access = if writable { OFlags::RDWR } else { OFlags::RDONLY };
    let opened = || -> io::Result<OwnedFd> {
        let real = fs::canonicalize(path)?;
        Ok(rustix::fs::open(
            &real,
            access | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NOCTTY,
            Mode::empty(),
        )?)
    };
    opened().map_err(|source| LaunchError::Open { path: path.to_owned(), source })
}

fn disk_bytes(machine: &Machine) -> u64 {
    machine.disk_bytes.next_multiple_of(4096)
}

/// The room's writes: a sparse file that has no name, so that it is gone with its last descriptor.
fn overlay(directory: &Path, bytes: u64) -> Result<OwnedFd, LaunchError> {
    let made = || -> io::Result<OwnedFd> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::EXCL;
        let file = match rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => File::from(file),
            // Not every file system has nameless files.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
                let path = directory.join("disk");
                let file =
                    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
                fs::remove_file(&path)?;
                file
            }
            Err(e) => return Err(e.into()),
        };
        file.set_len(bytes)?;
        Ok(file.into())
    };
    made().map_err(|source| LaunchError::Disk { path: directory.to_owned(), source })
}

fn console(path: &Path) -> Result<OwnedFd, LaunchError> {
    let made = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    made.map(OwnedFd::from).map_err(|source| LaunchError::Open { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A process in the VMM's place that ends when the other end of `life` closes, with the status of a guest that restarted.
    pub(crate) fn stand_in(life: BorrowedFd<'_>) -> Child {
        let program = File::open(fs::canonicalize("/bin/sh").unwrap()).unwrap();
        process::spawn(&process::Plan {
            program: program.as_fd(),
            path: "/bin/sh".as_ref(),
            arguments: ["sh", "-c", "read -r x <&3; exit 10"].map(str::to_owned).into(),
            socket: life,
            cgroup: None,
            user: None,
        })
        .unwrap()
    }
}
