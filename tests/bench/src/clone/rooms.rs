//! Clones: what is there before the request, the request, and the guest's first tick after it.
//!
//! ```text
//!                       before the clock                     the clock runs                            ends
//!   carrel, prepared    process, confinement, VM, vCPUs      open the template's files, Restore        first tick
//!   carrel              nothing                              fork, exec, confinement, VM, restore      first tick
//!   Firecracker         nothing                              fork, exec, API listens, load, resume     first tick
//!   Firecracker, API    process whose API listens            load, resume                              first tick
//! ```
//!
//! A tick is a byte on the serial port, read from a pipe that was made for this clone: neither VMM has any output of its own.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use carrel_host::RoomId;
use carrel_host::launch::{Going, LaunchError, Standing};
use carrel_host::spec::Part;
use carrel_protocol::units::{MemoryMib, VcpuCount};
use carrel_protocol::vmm::{Descriptor, RestoreConfig, RestoreFile, SerialConfig};
use serde_json::json;

use super::template::{Template, firecracker_command, spawn};
use crate::guest_images::READY;
use crate::isolation::room::Patience;
use crate::isolation::snapshot::{await_api, hear_answer, send};
use crate::prompt::Prompt;

/// Above what any clone needs, many at once in an emulated host too.
const HEARD: Duration = Duration::from_secs(60);
/// What a guest may say at most, bytes: far more than any of the bench's does.
const SERIAL_BYTES: u64 = 1 << 20;

/// Who makes the clone, and what it has ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// carrel's VMM, prepared as the pool's are.
    Prepared,
    /// carrel's VMM from its process's start.
    Carrel,
    /// Firecracker from its process's start.
    Firecracker,
    /// Firecracker whose API process is there already.
    FirecrackerApi,
}

impl Side {
    /// What it is called where something is said of it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Prepared => "carrel, prepared",
            Self::Carrel => "carrel, from process start",
            Self::Firecracker => "firecracker, from process start",
            Self::FirecrackerApi => "firecracker, API up",
        }
    }
}

/// The programs, and where clones are made.
pub(crate) struct Bed {
    /// carrel-vmm.
    pub(crate) carrel_vmm: PathBuf,
    /// Firecracker.
    pub(crate) firecracker: PathBuf,
    /// What carrel's launcher has to do without on this host.
    pub(crate) without: Vec<Part>,
}

/// What is there before the request. Dropped, it is gone.
pub(crate) enum Ready {
    /// A command that the request starts, and its files.
    Process(Side, Command, tempfile::TempDir),
    /// A VMM that waits.
    Vmm(Standing),
    /// A Firecracker that listens.
    Api(Room),
}

/// A clone whose guest was heard.
pub(crate) struct Started {
    /// From the request to the first tick.
    pub(crate) took: Duration,
    /// The clone, until dropped.
    pub(crate) room: Room,
}

/// A VMM and its guest's console. Dropped, it is killed and waited for.
pub(crate) struct Room {
    /// Where the guest's ticks come from.
    pub(crate) output: OwnedFd,
    /// Who runs it.
    pub(crate) process: Process,
}

/// A VMM's process.
pub(crate) enum Process {
    /// One that was started here.
    Child {
        /// It.
        child: Child,
        /// Its files.
        folder: tempfile::TempDir,
    },
    /// One that was prepared by carrel's launcher.
    Prepared(Going),
}

impl Bed {
    /// Finds out what of the confinement this host can give, once, by preparing a VMM.
    pub(crate) fn new(carrel_vmm: PathBuf, firecracker: PathBuf) -> Result<Self> {
        let mut bed = Self { carrel_vmm, firecracker, without: Vec::new() };
        match bed.prepare(128) {
            Ok(_) => {}
            Err(error) if matches!(error.downcast_ref(), Some(LaunchError::Cgroup(_))) => {
                eprintln!("bench: carrel's VMMs are prepared without a cgroup of their own here: {error:#}");
                bed.without.push(Part::Cgroup);
                bed.prepare(128)?;
            }
            Err(error) => return Err(error),
        }
        Ok(bed)
    }

    /// All that this side may have ready before it is asked. `wrapper` is put in front of a process's command (one of a prepared VMM is started by the launcher), or nothing.
    pub(crate) fn ready(&self, side: Side, template: &Template, wrapper: &[String]) -> Result<Ready> {
        Ok(match side {
            Side::Prepared => Ready::Vmm(self.prepare(template.memory_mib)?),
            Side::Carrel => {
                let folder = scratch()?;
                let command = self.carrel(template, folder.path())?;
                Ready::Process(side, wrapped(command, wrapper), folder)
            }
            Side::Firecracker => {
                let folder = scratch()?;
                let command = firecracker_command(&self.firecracker, folder.path());
                Ready::Process(side, wrapped(command, wrapper), folder)
            }
            Side::FirecrackerApi => {
                let folder = scratch()?;
                let command = firecracker_command(&self.firecracker, folder.path());
                Ready::Api(listening(&mut wrapped(command, wrapper), folder)?)
            }
        })
    }

    /// So many at once, each as [`Bed::ready`] makes them; VMMs get ready beside each other.
    pub(crate) fn several(&self, side: Side, template: &Template, count: u32) -> Result<VecDeque<Ready>> {
        if side != Side::Prepared {
            return (0..count).map(|_| self.ready(side, template, &[])).collect();
        }
        let mut standing: Vec<Standing> =
            (0..count).map(|_| self.begin(template.memory_mib)).collect::<Result<_>>()?;
        standing.iter_mut().try_for_each(Standing::await_ready)?;
        Ok(standing.into_iter().map(Ready::Vmm).collect())
    }

    /// One clone where nothing is ready.
    pub(crate) fn start(&self, side: Side, template: &Template) -> Result<Started> {
        match side {
            // It hears what it goes on from when it has come so far.
            Side::Prepared => Ready::Vmm(self.begin(template.memory_mib)?),
            Side::Carrel | Side::Firecracker | Side::FirecrackerApi => self.ready(side, template, &[])?,
        }
        .start(template)
    }

    fn prepare(&self, memory_mib: u32) -> Result<Standing> {
        let mut standing = self.begin(memory_mib)?;
        standing.await_ready()?;
        Ok(standing)
    }

    /// Starts a VMM that will be ready.
    fn begin(&self, memory_mib: u32) -> Result<Standing> {
        let (vcpus, memory) = (VcpuCount::try_from(1)?, MemoryMib::try_from(u64::from(memory_mib))?);
        let mut random = [0; 6];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        let id = RoomId::from_random(random);
        Ok(Standing::prepare(&id, &self.without, &self.carrel_vmm, vcpus, memory)?)
    }

    /// carrel's VMM, with the snapshot named in a file.
    fn carrel(&self, template: &Template, folder: &Path) -> Result<Command> {
        let vm = RestoreFile {
            kvm: Some("/dev/kvm".into()),
            state: template.carrel.state.clone(),
            memory: template.carrel.memory.clone(),
            working_set: template.working_set.clone(),
            vsock: None,
            blocks: Vec::new(),
            serial: Some(SerialConfig { output: "/dev/stdout".into(), limit_bytes: SERIAL_BYTES }),
            control: None,
            track_dirty: false,
        };
        let config = folder.join("vm.json");
        fs::write(&config, serde_json::to_vec(&vm)?)?;
        let mut command = Command::new(&self.carrel_vmm);
        command.arg("--restore").arg(&config);
        Ok(command)
    }
}

impl Ready {
    /// The request: one clone, from what is ready.
    pub(crate) fn start(self, template: &Template) -> Result<Started> {
        let began = Instant::now();
        let patience = Patience::alone(HEARD);
        let (room, _prompt) = match self {
            Self::Vmm(standing) => go_on(standing, template)?.until_tick(&patience)?,
            Self::Process(Side::Carrel | Side::Prepared, mut command, folder) => {
                spawn(&mut command, folder)?.until_tick(&patience)?
            }
            Self::Process(Side::Firecracker | Side::FirecrackerApi, mut command, folder) => {
                load(listening(&mut command, folder)?, template, &patience)?
            }
            Self::Api(room) => load(room, template, &patience)?,
        };
        Ok(Started { took: began.elapsed(), room })
    }
}

/// A folder for one clone's files and sockets: in memory where the host has that, since a disk's file system adds milliseconds to each file that many make at once.
fn scratch() -> io::Result<tempfile::TempDir> {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())
}

/// Starts a Firecracker and waits until it listens.
fn listening(command: &mut Command, folder: tempfile::TempDir) -> Result<Room> {
    let api = folder.path().join("api");
    let room = spawn(command, folder)?;
    await_api(&api, &Patience::alone(HEARD)).with_context(|| room.last_words())?;
    Ok(room)
}

/// Tells a prepared VMM what it goes on from.
fn go_on(standing: Standing, template: &Template) -> Result<Room> {
    let (heard, output) = io::pipe()?;
    let (state, memory) = (File::open(&template.carrel.state)?, File::open(&template.carrel.memory)?);
    let working_set = template.working_set.as_ref().map(File::open).transpose()?;
    let vm = RestoreConfig {
        kvm: None,
        state: Descriptor(0),
        memory: Descriptor(1),
        working_set: working_set.as_ref().map(|_| Descriptor(3)),
        vsock: None,
        blocks: Vec::new(),
        serial: Some(SerialConfig { output: Descriptor(2), limit_bytes: SERIAL_BYTES }),
        control: None,
        track_dirty: false,
    };
    let files = [Some(state.as_fd()), Some(memory.as_fd()), Some(output.as_fd())];
    let files: Vec<_> = files.into_iter().chain([working_set.as_ref().map(AsFd::as_fd)]).flatten().collect();
    let going = standing.go_on(vm, &files)?;
    Ok(Room { output: heard.into(), process: Process::Prepared(going) })
}

/// Asks Firecracker to load and resume, and waits for the tick, not for the answer: that comes when it comes.
fn load(mut room: Room, template: &Template, patience: &Patience) -> Result<(Room, Prompt)> {
    let files = template.firecracker.as_ref().context("this template was not made for Firecracker")?;
    let body = json!({
        "snapshot_path": files.state,
        "mem_backend": { "backend_type": "File", "backend_path": files.memory },
        "resume_vm": true,
    });
    let api = room.folder().context("Firecracker has a folder")?.join("api");
    let answer = send(&api, "PUT", "/snapshot/load", &body)?;
    match room.hear_tick(patience) {
        Ok(prompt) => Ok((room, prompt)),
        Err(error) => match hear_answer(answer, &Patience::alone(Duration::from_secs(1))) {
            Ok(()) => Err(error),
            Err(refusal) => Err(error.context(format!("{refusal:#}"))),
        },
    }
}

/// The command with another's words before it.
fn wrapped(command: Command, wrapper: &[String]) -> Command {
    let Some((program, arguments)) = wrapper.split_first() else { return command };
    let mut outer = Command::new(program);
    outer.args(arguments).arg(command.get_program()).args(command.get_args());
    if let Some(folder) = command.get_current_dir() {
        outer.current_dir(folder);
    }
    outer
}

impl Room {
    fn until_tick(mut self, patience: &Patience) -> Result<(Self, Prompt)> {
        let prompt = self.hear_tick(patience)?;
        Ok((self, prompt))
    }

    /// Waits until the guest ticks, and comes before all others from then on, until what is returned is dropped.
    pub(crate) fn hear_tick(&mut self, patience: &Patience) -> Result<Prompt> {
        let prompt = Prompt::now();
        let mut output = File::from(self.output.try_clone()?);
        let mut bytes = [0; 256];
        loop {
            patience.readable(&output).with_context(|| self.last_words())?;
            let read = match output.read(&mut bytes) {
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                other => other?,
            };
            ensure!(read > 0, "the VMM ended before its guest ticked; {}", self.last_words());
            if bytes.iter().take(read).any(|&byte| byte == READY) {
                return Ok(prompt);
            }
        }
    }

    /// Has carrel's VMM write down what its guest has touched.
    pub(crate) fn record_working_set(&self, to: &File) -> Result<()> {
        match &self.process {
            Process::Prepared(going) => Ok(going.record_working_set(to.as_fd())?),
            Process::Child { .. } => bail!("nobody owns this VMM"),
        }
    }

    fn folder(&self) -> Option<&Path> {
        match &self.process {
            Process::Child { folder, .. } => Some(folder.path()),
            Process::Prepared(_) => None,
        }
    }

    /// The process that was started; a VMM may have children of its own.
    pub(crate) fn pid(&self) -> u32 {
        match &self.process {
            Process::Child { child, .. } => child.id(),
            Process::Prepared(going) => going.pid(),
        }
    }

    fn last_words(&self) -> String {
        let Some(folder) = self.folder() else {
            return "it was prepared, and says why to its owner alone".into();
        };
        let text = fs::read_to_string(folder.join("stderr")).unwrap_or_default();
        if text.trim().is_empty() { "it wrote no error".into() } else { format!("it wrote: {}", text.trim()) }
    }
}

impl AsFd for Room {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.output.as_fd()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let Self::Child { child, .. } = self else { return };
        // The launcher of a confined VMM ends it, and removes its cgroup, when it is told to; Firecracker ends by the signal itself.
        crate::engine::end(child);
    }
}
