//! How each subject is told to run a work: the command lines and configurations, side by side.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::image::{WORK, copy_sparse};
use super::room::{Clock, Expect, Leave, Plan};
use super::snapshot::Restore;
use super::stage::{GUEST_MIB, Stage};
use super::subjects::Subject;
use crate::engine::{Disk, Engine, Machine};

const PYTHON: &str = "/usr/bin/python3";
/// Says that it is ready where it is going to be cloned (docs/agent.md, *The call*), and elsewhere goes on.
const IMPORTS: &str = "
import asyncio, decimal, json, logging, os, socket
if os.path.exists('/run/carrel/clone.sock'):
    agent = socket.socket(socket.AF_UNIX)
    agent.connect('/run/carrel/clone.sock')
    agent.sendall(b'ready\\n')
    agent.makefile().readline()
print(1)
";
/// What keeps an image's room there while nothing is to be done.
const WAIT: &str = "import time; time.sleep(1e9)";

/// What a room is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Say that it is there, and end.
    True,
    /// Python's `print(1)`.
    Python,
    /// The same after imports.
    Imports,
    /// Say that it is there, and stay when whoever started it is gone, where there is a way to ask for that.
    Idle,
    /// Say that it is there, and stay until it is ended.
    Stay,
    /// Measure from inside.
    Inside,
    /// Listen on vsock.
    Serve,
}

impl Work {
    /// As our program knows it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::True => "true",
            Self::Python => "python",
            Self::Imports => "imports",
            Self::Idle | Self::Stay => "idle",
            Self::Inside => "inside",
            Self::Serve => "serve",
        }
    }

    /// What says that it is done.
    pub(crate) fn expect(self) -> Expect {
        match self {
            Self::Python | Self::Imports => Expect::One,
            Self::True | Self::Idle | Self::Stay | Self::Inside | Self::Serve => Expect::Ready,
        }
    }

    /// The words of its command line in a container.
    fn words(self) -> Vec<&'static str> {
        match self {
            Self::Python => vec![PYTHON, "-c", "print(1)"],
            Self::Imports => vec![PYTHON, "-c", IMPORTS],
            Self::True | Self::Idle | Self::Stay | Self::Inside | Self::Serve => vec![WORK, self.name()],
        }
    }

    /// Whether it is the Python image's, and not that of our own program.
    pub(crate) fn is_python(self) -> bool {
        matches!(self, Self::Python | Self::Imports)
    }

    fn ends(self) -> bool {
        match self {
            Self::True | Self::Python | Self::Imports | Self::Inside => true,
            Self::Idle | Self::Stay | Self::Serve => false,
        }
    }
}

/// A room of a subject that will do a work.
pub(crate) fn plan(stage: &Stage, subject: Subject, work: Work) -> Result<Plan> {
    let mut plan = Plan {
        command: Command::new(WORK),
        root: None,
        restore: None,
        leave: if work.ends() { Leave::Alone } else { Leave::Killed },
        clock: Clock::Fork,
        folder: stage.room_folder()?,
        cgroup: stage.tree.room()?,
    };
    let folder = plan.folder.path().to_owned();
    match subject {
        Subject::Plain => {
            let (program, arguments) = split(work);
            plan.command = Command::new(program);
            plan.command.args(arguments).env_clear();
            plan.root = Some(stage.root.clone());
            if work == Work::Inside {
                // It shares our mount namespace: its scratch directory is there for the next one too, and empty again.
                bind_scratch(stage)?;
            }
        }
        Subject::Bubblewrap => plan.command = bubblewrap(stage, work, &folder)?,
        Subject::Runc | Subject::Crun => {
            let program = stage.program(subject)?;
            let config = bundle(stage, work, &folder, &plan.cgroup.for_container())?;
            fs::write(folder.join("config.json"), serde_json::to_vec(&config)?)?;
            let id = folder.file_name().unwrap_or_default().to_string_lossy().replace('.', "-");
            // Its records are in the room's folder, and go with it.
            let state = folder.join("state");
            plan.command = Command::new(program);
            plan.command.arg("--root").arg(&state).arg("run").arg("--bundle").arg(&folder);
            if work == Work::Idle {
                plan.command.arg("--detach");
            }
            plan.command.arg(&id);
        }
        Subject::QemuMicrovm => plan.command = qemu(stage, &stage.kernel, Some(work), &folder)?,
        Subject::Firecracker => {
            let engine = Engine::Firecracker { binary: stage.program(subject)?.to_owned() };
            plan.command = engine.command(&machine(stage, work, &folder)?, &folder)?;
        }
        Subject::FirecrackerSnapshot | Subject::FirecrackerResident => {
            let resident = subject == Subject::FirecrackerResident;
            plan.command = Command::new(stage.program(subject)?);
            plan.command.args(["--api-sock", "api", "--log-path", "/dev/null", "--level", "Off"]);
            plan.command.current_dir(&folder);
            plan.restore = Some(Restore { snapshot: stage.snapshot(subject)?.clone(), work, resident });
            // Its guest goes on listening.
            plan.leave = Leave::Killed;
        }
        Subject::Carrel | Subject::CarrelClone | Subject::CarrelPool | Subject::CarrelResident => {
            plan.command = carrel(stage, subject, work)?;
            plan.clock = if subject == Subject::CarrelResident { Clock::Resident } else { plan.clock };
            plan.leave = match work {
                Work::Idle => Leave::Alone,
                // What its owner does at the end is in nobody's time.
                Work::Stay => Leave::Asked,
                Work::True | Work::Python | Work::Imports | Work::Inside | Work::Serve => plan.leave,
            };
        }
        Subject::CarrelWarm => {
            let room = stage.warm_room(work)?;
            let (program, arguments) = split(work);
            plan.command = command_of(stage, subject)?;
            plan.command.args(["exec", room, program]).args(arguments);
        }
    }
    Ok(plan)
}

/// carrel's VMM or another one by itself, with the work on its kernel's command line: what is measured of a VMM and not of a command.
pub(crate) fn bare(stage: &Stage, subject: Subject, work: Work) -> Result<Plan> {
    if subject != Subject::Carrel {
        return plan(stage, subject, work);
    }
    let mut plan = plan(stage, subject, work)?;
    let folder = plan.folder.path().to_owned();
    plan.command = stage.carrel_vmm.command(&machine(stage, work, &folder)?, &folder)?;
    plan.leave = Leave::Killed;
    Ok(plan)
}

/// A VMM with the guest of three instructions.
pub(crate) fn tiny(stage: &Stage, subject: Subject) -> Result<Plan> {
    let mut plan = bare(stage, subject, Work::Idle)?;
    let folder = plan.folder.path().to_owned();
    let [kernel, pvh] = &stage.tiny;
    let machine = Machine {
        kernel: kernel.clone(),
        initramfs: None,
        command_line: "quiet".into(),
        memory_mib: GUEST_MIB,
        vcpus: 1,
        vsock: false,
        disks: Vec::new(),
    };
    plan.command = match subject {
        Subject::QemuMicrovm => qemu(stage, pvh, None, &folder)?,
        Subject::Firecracker => {
            Engine::Firecracker { binary: stage.program(subject)?.to_owned() }.command(&machine, &folder)?
        }
        Subject::Carrel => stage.carrel_vmm.command(&machine, &folder)?,
        Subject::Plain
        | Subject::Bubblewrap
        | Subject::Runc
        | Subject::Crun
        | Subject::FirecrackerSnapshot
        | Subject::FirecrackerResident
        | Subject::CarrelClone
        | Subject::CarrelPool
        | Subject::CarrelResident
        | Subject::CarrelWarm => bail!("{} starts no guest of its own", subject.name()),
    };
    Ok(plan)
}

fn split(work: Work) -> (&'static str, Vec<&'static str>) {
    let mut words = work.words();
    let program = words.remove(0);
    (program, words)
}

/// The scratch directory of processes that share our root: one, bound once.
fn bind_scratch(stage: &Stage) -> Result<()> {
    let at = stage.root.join("scratch");
    let shared = stage.home.with_file_name("scratch");
    if fs::create_dir(&shared).is_ok() {
        let none: Option<&str> = None;
        nix::mount::mount(Some(&shared), &at, none, nix::mount::MsFlags::MS_BIND, none)?;
    }
    Ok(())
}

fn bubblewrap(stage: &Stage, work: Work, folder: &Path) -> Result<Command> {
    let scratch = folder.join("scratch");
    fs::create_dir(&scratch)?;
    let mut command = Command::new(stage.program(Subject::Bubblewrap)?);
    command.args(["--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--ro-bind"]);
    command.arg(&stage.root).arg("/").args(["--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp", "--bind"]);
    command.arg(&scratch).args(["/scratch", "--"]).args(work.words());
    Ok(command)
}

/// An OCI bundle's config.json (runtime-spec 1.0).
fn bundle(stage: &Stage, work: Work, folder: &Path, cgroup: &str) -> Result<Value> {
    let scratch = folder.join("scratch");
    fs::create_dir(&scratch)?;
    let namespaces: Vec<Value> = ["pid", "mount", "ipc", "uts", "network", "cgroup"]
        .iter()
        .map(|kind| json!({ "type": kind }))
        .collect();
    Ok(json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false, "user": { "uid": 0, "gid": 0 }, "cwd": "/", "noNewPrivileges": true,
            "args": work.words(), "env": ["PATH=/usr/bin:/bin"],
            "capabilities": { "bounding": [], "effective": [], "permitted": [] },
        },
        "root": { "path": stage.root, "readonly": true },
        "hostname": "bench",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/scratch", "type": "bind", "source": scratch, "options": ["bind", "rw"] },
        ],
        "linux": { "cgroupsPath": cgroup, "namespaces": namespaces },
    }))
}

/// The command line of a guest that does a work: our program is its first process.
pub(crate) fn command_line(work: Work) -> String {
    format!("console=ttyS0 quiet reboot=t panic=-1 root=/dev/vda ro init={WORK} work={}", work.name())
}

fn machine(stage: &Stage, work: Work, folder: &Path) -> Result<Machine> {
    let mut disks = vec![Disk { path: stage.root_disk.clone(), read_only: true }];
    if work == Work::Inside {
        let scratch = folder.join("scratch.ext4");
        copy_sparse(&stage.scratch, &scratch)?;
        disks.push(Disk { path: scratch, read_only: false });
    }
    Ok(Machine {
        kernel: stage.kernel.clone(),
        initramfs: None,
        command_line: command_line(work),
        // The transfers' buffers want more than a start does.
        memory_mib: if work == Work::Serve { 2 * GUEST_MIB } else { GUEST_MIB },
        vcpus: 1,
        vsock: work == Work::Serve,
        disks,
    })
}

/// QEMU as its documentation says a microvm is quickest (system/i386/microvm), with the kernel entered by PVH.
fn qemu(stage: &Stage, kernel: &Path, work: Option<Work>, folder: &Path) -> Result<Command> {
    let mut command = Command::new(stage.program(Subject::QemuMicrovm)?);
    command.args([
        "-M",
        "microvm,acpi=off,pic=off,pit=off,rtc=off,isa-serial=on",
        "-accel",
        "kvm",
        "-cpu",
        "host",
    ]);
    command.args([
        "-smp",
        "1",
        "-m",
        &GUEST_MIB.to_string(),
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
    ]);
    command.args(["-serial", "stdio", "-no-reboot"]);
    command.args(["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    command.arg("-kernel").arg(kernel);
    let Some(work) = work else { return Ok(command) };
    command.args(["-append", &command_line(work)]);
    let disks = machine(stage, work, folder)?.disks;
    for (number, disk) in disks.iter().enumerate() {
        let mut drive = OsString::from(format!("id=disk{number},format=raw,if=none,file="));
        drive.push(&disk.path);
        drive.push(if disk.read_only { ",readonly=on" } else { ",cache=writeback" });
        command.arg("-drive").arg(drive);
        // It names its transports to the kernel from the last one down.
        let bus = disks.len() - 1 - number;
        command.args(["-device", &format!("virtio-blk-device,drive=disk{number},bus=virtio-mmio-bus.{bus}")]);
    }
    Ok(command)
}

/// `carrel`, for one of its subjects.
fn command_of(stage: &Stage, subject: Subject) -> Result<Command> {
    let mut command = Command::new(stage.program(subject)?);
    command.arg("--home").arg(&stage.home).env("CARREL_ASSETS", &stage.assets);
    if !matches!(subject, Subject::CarrelPool | Subject::CarrelResident) {
        // The pool of another subject may be there.
        command.env("CARREL_POOL", "off");
    }
    Ok(command)
}

fn carrel(stage: &Stage, subject: Subject, work: Work) -> Result<Command> {
    if matches!(subject, Subject::CarrelPool | Subject::CarrelResident) {
        stage.start_pool()?;
    }
    let mut command = run_of(stage, subject)?;
    if subject == Subject::CarrelResident {
        command.arg("--timeline");
    }
    if subject == Subject::Carrel {
        command.arg("--cold");
    } else if work == Work::Imports {
        command.arg("--initialised");
    }
    if work == Work::Idle {
        command.arg("--detach");
    }
    let (program, arguments) = split(work);
    command.args(["--entrypoint", program]).arg(image_of(stage, work)).args(arguments);
    Ok(command)
}

/// A detached room of the image that a work wants, for `exec`.
pub(crate) fn waiting(stage: &Stage, work: Work, name: &str) -> Result<Plan> {
    let (program, arguments) = if work.is_python() { (PYTHON, vec!["-c", WAIT]) } else { split(Work::Idle) };
    let mut command = run_of(stage, Subject::CarrelWarm)?;
    command.args(["--detach", "--name", name, "--entrypoint", program]);
    command.arg(image_of(stage, work)).args(arguments);
    Ok(Plan {
        command,
        root: None,
        restore: None,
        leave: Leave::Alone,
        clock: Clock::Fork,
        folder: stage.room_folder()?,
        cgroup: stage.tree.room()?,
    })
}

/// `carrel run` of the machine that all guests are.
fn run_of(stage: &Stage, subject: Subject) -> Result<Command> {
    let mut command = command_of(stage, subject)?;
    command.args(["run", "--memory", &format!("{GUEST_MIB}m"), "--cpus", "1"]);
    Ok(command)
}

fn image_of(stage: &Stage, work: Work) -> OsString {
    let [ours, python] = &stage.layouts;
    let mut name = OsString::from("oci:");
    name.push(if work.is_python() { python } else { ours });
    name
}
