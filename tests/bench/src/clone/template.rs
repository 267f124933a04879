//! One guest, saved by each VMM once: what all its clones go on from.
//!
//! ```text
//!   carrel-vmm --config ─ ticks ─ control socket: Pause, Snapshot ─▶ state, memory
//!   firecracker --api-sock ─ ticks ─ PATCH Paused, PUT snapshot/create ─▶ state, memory
//! ```
//!
//! Each VMM boots the same kernel, initramfs, command line and machine, and is saved after the guest's first tick. Then a byte of the saved memory is changed, by which the
//! guest knows that it is a clone: it ticks once more, and is idle. One that ticked on would take the others' time.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use carrel_protocol::vmm::{Descriptor, FromOwner, FromVmm, Pause, Snapshot, SnapshotKind};
use carrel_vmm::owner::Connection;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde_json::{Value, json};

use super::rooms::{Bed, Process, Room, Side};
use crate::engine::{Engine, Machine};
use crate::guest_images::marks;
use crate::isolation::room::Patience;
use crate::isolation::snapshot::{await_api, request};

/// Making one includes a boot, and writing the guest's memory.
const MAKING: Duration = Duration::from_secs(180);
/// Between two looks for a control socket.
const AGAIN: Duration = Duration::from_millis(1);

/// A saved machine's two files.
#[derive(Clone, Debug)]
pub(crate) struct Files {
    /// vCPUs and devices.
    pub(crate) state: PathBuf,
    /// The guest's memory.
    pub(crate) memory: PathBuf,
}

/// A guest that was saved. Its files go with its last copy.
#[derive(Clone)]
pub(crate) struct Template {
    /// Its memory, MiB.
    pub(crate) memory_mib: u32,
    /// As carrel's VMM saved it.
    pub(crate) carrel: Files,
    /// Which pages its clones have ahead, once one of them was asked what it had touched.
    pub(crate) working_set: Option<PathBuf>,
    /// As Firecracker did, where it is wanted.
    pub(crate) firecracker: Option<Files>,
    folder: Arc<tempfile::TempDir>,
}

impl Template {
    /// Boots the machine in each VMM and saves it below `work`.
    pub(crate) fn make(
        machine: &Machine,
        carrel_vmm: &Path,
        firecracker: Option<&Path>,
        work: &Path,
    ) -> Result<Self> {
        let folder = tempfile::tempdir_in(work)?;
        let files = |name: &str| Files {
            state: folder.path().join(format!("{name}.state")),
            memory: folder.path().join(format!("{name}.memory")),
        };
        let carrel = files("carrel");
        save_carrel(machine, carrel_vmm, &carrel)
            .and_then(|()| tell_clones(&carrel.memory))
            .context("carrel's template can't be made")?;
        let theirs = match firecracker {
            Some(binary) => {
                let files = files("firecracker");
                save_firecracker(machine, binary, &files)
                    .and_then(|()| tell_clones(&files.memory))
                    .context("Firecracker's snapshot can't be made")?;
                Some(files)
            }
            None => None,
        };
        let (memory_mib, folder) = (machine.memory_mib, Arc::new(folder));
        Ok(Self { memory_mib, carrel, working_set: None, firecracker: theirs, folder })
    }

    /// Starts the first clone and has it say what it has touched until its tick: what the pool does with a template's first clone.
    pub(crate) fn learn(mut self, bed: &Bed) -> Result<Self> {
        let first = bed.ready(Side::Prepared, &self, &[])?.start(&self)?.room;
        let path = self.folder.path().join("carrel.working-set");
        first.record_working_set(&File::create_new(&path)?)?;
        self.working_set = Some(path);
        Ok(self)
    }

    /// The same, of which nothing was learnt.
    pub(crate) fn unlearnt(&self) -> Self {
        Self { working_set: None, ..self.clone() }
    }
}

fn save_carrel(machine: &Machine, binary: &Path, to: &Files) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let control = folder.path().join("control");
    let engine = Engine::Carrel { binary: binary.to_owned(), arguments: Vec::new() };
    let mut command = engine.command(machine, folder.path())?;
    let config = folder.path().join("vm.json");
    let mut vm: Value = serde_json::from_slice(&fs::read(&config)?)?;
    vm["control"] = json!(control);
    fs::write(&config, serde_json::to_vec(&vm)?)?;
    let patience = Patience::alone(MAKING);
    let mut room = spawn(&mut command, folder)?;
    let owner = take_over(&control)?;
    room.hear_tick(&patience)?;
    tick_on()?;
    ask(&owner, &Pause {}.into(), &[])?;
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
    let state = File::create(&to.state)?;
    let memory = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&to.memory)?;
    memory.set_len(u64::from(machine.memory_mib) << 20)?;
    let snapshot = Snapshot {
        kvm: Descriptor(0),
        state: Descriptor(1),
        memory: Descriptor(2),
        kind: SnapshotKind::Full,
    };
    ask(&owner, &snapshot.into(), &[kvm.as_fd(), state.as_fd(), memory.as_fd()])
}

fn save_firecracker(machine: &Machine, binary: &Path, to: &Files) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let api = folder.path().join("api");
    let patience = Patience::alone(MAKING);
    let mut room = spawn(&mut firecracker_command(binary, folder.path()), folder)?;
    await_api(&api, &patience)?;
    let put = |path: &str, body: &Value| request(&api, "PUT", path, body, &patience);
    put("/machine-config", &json!({ "vcpu_count": machine.vcpus, "mem_size_mib": machine.memory_mib }))?;
    let mut boot = json!({ "kernel_image_path": machine.kernel, "boot_args": machine.command_line });
    if let Some(initramfs) = &machine.initramfs {
        boot["initrd_path"] = json!(initramfs);
    }
    put("/boot-source", &boot)?;
    put("/actions", &json!({ "action_type": "InstanceStart" }))?;
    room.hear_tick(&patience)?;
    tick_on()?;
    request(&api, "PATCH", "/vm", &json!({ "state": "Paused" }), &patience)?;
    let create = json!({ "snapshot_type": "Full", "snapshot_path": to.state, "mem_file_path": to.memory });
    put("/snapshot/create", &create)?;
    ensure!(fs::metadata(&to.state)?.len() > 0, "Firecracker wrote an empty snapshot");
    Ok(())
}

/// Has a guest tick on for a while, 20 to 40 ms: it is saved at any point of its way from one tick to the next, whichever VMM is quicker to pause it.
fn tick_on() -> Result<()> {
    let mut random = [0; 2];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    let some = u64::from(u16::from_le_bytes(random)) * 20_000 / u64::from(u16::MAX);
    std::thread::sleep(Duration::from_micros(20_000 + some));
    Ok(())
}

/// Lets a saved ticking guest know that it is a clone.
fn tell_clones(memory: &Path) -> Result<()> {
    let marks = marks(&fs::read(memory)?);
    ensure!(!marks.is_empty(), "the guest's memory was saved without its mark");
    let memory = OpenOptions::new().write(true).open(memory)?;
    for mark in marks {
        memory.write_all_at(&[1], u64::try_from(mark)?)?;
    }
    Ok(())
}

/// Firecracker with its API and nothing else.
pub(crate) fn firecracker_command(binary: &Path, folder: &Path) -> Command {
    let mut command = Command::new(binary);
    command.args(["--api-sock", "api", "--log-path", "/dev/null", "--level", "Off"]).current_dir(folder);
    command
}

/// Starts a process whose output is its guest's console, and which does not outlive the thread that calls this.
pub(crate) fn spawn(command: &mut Command, folder: tempfile::TempDir) -> Result<Room> {
    let errors = File::create(folder.path().join("stderr"))?;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors);
    // SAFETY: one system call without pointers, between fork and exec.
    unsafe { command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?)) };
    let mut child = command.spawn().with_context(|| format!("{command:?} can't be started"))?;
    let output = child.stdout.take().context("the child's output is a pipe")?;
    Ok(Room { output: output.into(), process: Process::Child { child, folder } })
}

/// Becomes the owner of a carrel-vmm that begins.
fn take_over(control: &Path) -> Result<Connection> {
    let deadline = Instant::now() + MAKING;
    let address = UnixAddr::new(control)?;
    loop {
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        match connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &address) {
            Ok(()) => return Ok(Connection::new(socket)),
            Err(errno) => ensure!(Instant::now() < deadline, "carrel-vmm has no control socket: {errno}"),
        }
        std::thread::sleep(AGAIN);
    }
}

/// Asks for something and waits until it is done.
fn ask(owner: &Connection, request: &FromOwner, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
    owner.send(request, descriptors)?;
    loop {
        match owner.receive_first::<FromVmm>()?.message {
            FromVmm::Done(_) | FromVmm::Snapshotted(_) => return Ok(()),
            FromVmm::Refused(refused) => bail!("carrel-vmm refused: {}", refused.reason),
            FromVmm::Broken(broken) => bail!("carrel-vmm broke: {}", broken.message),
            FromVmm::Ended(ended) => bail!("carrel-vmm ended: {:?}", ended.end),
            FromVmm::Booted(_)
            | FromVmm::Dialled(_)
            | FromVmm::Metrics(_)
            | FromVmm::DeviceStopped(_)
            | FromVmm::Prepared(_) => {}
        }
    }
}
