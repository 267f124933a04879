//! The two VMMs under measurement behind one face: the same machine, written in each one's own configuration.

use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use carrel_protocol::units::{MemoryMib, VcpuCount};
use carrel_protocol::vmm::{BlockConfig, Cache, Kernel, SerialConfig, VmFile, VsockConfig};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::guest_images::READY;

/// How long any guest may take to be ready: far above what an emulated host needs.
const READY_DEADLINE: Duration = Duration::from_secs(120);

/// How long a VMM has to end when it is asked to.
const GRACE: Duration = Duration::from_secs(2);

/// A VMM to measure.
#[derive(Clone, Debug)]
pub(crate) enum Engine {
    /// `carrel-vmm --config`.
    Carrel {
        /// The binary.
        binary: PathBuf,
        /// Further arguments: `--unconfined`, for the comparison with a VMM that confines nothing by itself.
        arguments: Vec<String>,
    },
    /// `firecracker --no-api --config-file`.
    Firecracker {
        /// The binary.
        binary: PathBuf,
    },
}

/// What both boot.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    /// ELF kernel.
    pub(crate) kernel: PathBuf,
    /// cpio archive.
    pub(crate) initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub(crate) command_line: String,
    /// Memory.
    pub(crate) memory_mib: u32,
    /// Number of vCPUs.
    pub(crate) vcpus: u8,
    /// Whether it has a vsock device, with its socket at `vsock` in the run's folder.
    pub(crate) vsock: bool,
    /// Raw disks, in the order in which the guest names them.
    pub(crate) disks: Vec<Disk>,
}

/// A raw disk.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    /// The file.
    pub(crate) path: PathBuf,
    /// Whether the guest may only read it.
    pub(crate) read_only: bool,
}

/// A VMM process that has been started; killed and waited for when dropped.
pub(crate) struct Running {
    child: Child,
    folder: tempfile::TempDir,
}

impl Disk {
    fn block(&self) -> Result<BlockConfig<PathBuf>> {
        let size_bytes = fs::metadata(&self.path)?.len();
        let path = Some(self.path.clone());
        let (base, overlay) = if self.read_only { (path, None) } else { (None, path) };
        Ok(BlockConfig { id: "bench".into(), base, overlay, size_bytes, cache: Cache::Unsafe, limit: None })
    }

    /// As Firecracker's API has it; the guest is told of its root by the command line alone.
    pub(crate) fn drive(&self, number: u32) -> serde_json::Value {
        json!({
            "drive_id": format!("disk{number}"),
            "path_on_host": self.path,
            "is_root_device": false,
            "is_read_only": self.read_only,
            "cache_type": "Unsafe",
        })
    }
}

impl Engine {
    /// What it is called where something is said of it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Carrel { arguments, .. } if !arguments.is_empty() => "carrel, unconfined",
            Self::Carrel { .. } => "carrel",
            Self::Firecracker { .. } => "firecracker",
        }
    }

    /// Writes the machine's configuration into a fresh folder and returns the command that runs it.
    pub(crate) fn command(&self, machine: &Machine, folder: &Path) -> Result<Command> {
        let socket = machine.vsock.then(|| folder.join("vsock"));
        let config = folder.join("vm.json");
        let mut command;
        match self {
            Self::Carrel { binary, arguments } => {
                let vm = VmFile {
                    kvm: "/dev/kvm".into(),
                    vcpus: VcpuCount::try_from(u64::from(machine.vcpus))?,
                    memory_mib: MemoryMib::try_from(u64::from(machine.memory_mib))?,
                    huge_pages: true,
                    kernel: Kernel {
                        image: machine.kernel.clone(),
                        command_line: machine.command_line.clone(),
                    },
                    initramfs: machine.initramfs.clone(),
                    vsock: socket.map(|path| VsockConfig {
                        guest_cid: 3,
                        socket: Some(path),
                        connections: 256,
                    }),
                    blocks: machine.disks.iter().map(Disk::block).collect::<Result<_>>()?,
                    entropy: None,
                    balloon: None,
                    serial: Some(SerialConfig { output: "/dev/stdout".into(), limit_bytes: 1 << 20 }),
                    control: None,
                    track_dirty: false,
                };
                fs::write(&config, serde_json::to_vec(&vm)?)?;
                command = Command::new(binary);
                command.arg("--config").arg(&config).args(arguments);
            }
            Self::Firecracker { binary } => {
                let drives: Vec<_> = (0..).zip(&machine.disks).map(|(i, disk)| disk.drive(i)).collect();
                let mut vm = json!({
                    "boot-source": {
                        "kernel_image_path": machine.kernel,
                        "initrd_path": machine.initramfs,
                        "boot_args": machine.command_line,
                    },
                    "drives": drives,
                    "machine-config": { "vcpu_count": machine.vcpus, "mem_size_mib": machine.memory_mib },
                });
                if let Some(path) = socket {
                    vm["vsock"] = json!({ "guest_cid": 3, "uds_path": path });
                }
                fs::write(&config, serde_json::to_vec(&vm)?)?;
                command = Command::new(binary);
                command.arg("--no-api").arg("--config-file").arg(&config);
                command.args(["--log-path", "/dev/null", "--level", "Off"]);
            }
        }
        Ok(command)
    }

    /// Starts the machine and waits for [`READY`] from its serial port. Returns the time from just before the spawn.
    ///
    /// `wrapper` is put in front of the command (`strace …`), or nothing.
    pub(crate) fn start(&self, machine: &Machine, wrapper: &[String]) -> Result<(Duration, Running)> {
        let folder = tempfile::tempdir()?;
        let plain = self.command(machine, folder.path())?;
        let mut command = match wrapper.split_first() {
            None => plain,
            Some((program, arguments)) => {
                let mut wrapped = Command::new(program);
                wrapped.args(arguments).arg(plain.get_program()).args(plain.get_args());
                wrapped
            }
        };
        let errors = fs::File::create(folder.path().join("stderr"))?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors);
        let began = Instant::now();
        let child = command.spawn().with_context(|| format!("{command:?} can't be started"))?;
        let mut running = Running { child, folder };
        running.await_ready()?;
        Ok((began.elapsed(), running))
    }
}

impl Running {
    /// Reads the serial output up to the signal. The deadline is kept by a poll on the pipe.
    fn await_ready(&mut self) -> Result<()> {
        let output = self.child.stdout.as_mut().context("the child's output is a pipe")?;
        let deadline = Instant::now() + READY_DEADLINE;
        let mut bytes = [0; 4096];
        loop {
            wait_readable(output, deadline)?;
            let read = match output.read(&mut bytes) {
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                other => other?,
            };
            if read == 0 {
                let said = fs::read_to_string(self.folder.path().join("stderr")).unwrap_or_default();
                bail!("the VMM ended before its guest was ready ({:?}): {said}", self.child.wait()?);
            }
            if bytes.iter().take(read).any(|&b| b == READY) {
                return Ok(());
            }
        }
    }

    /// The process that was started; a VMM may have children of its own.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Connects to a guest's vsock port, which may not be listened on yet.
    pub(crate) fn connect(&self, port: u32) -> Result<UnixStream> {
        let path = self.folder.path().join("vsock");
        let deadline = Instant::now() + READY_DEADLINE;
        loop {
            match try_connect(&path, port) {
                Ok(stream) => return Ok(stream),
                Err(e) => {
                    ensure!(Instant::now() < deadline, "nobody listens at the guest's port {port}: {e:#}");
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Ends a VMM's process and what it started.
pub(crate) fn end(child: &mut Child) {
    // It may have something to clean up; what does not listen is killed.
    tell(child.id(), Signal::SIGTERM);
    let deadline = Instant::now() + GRACE;
    while Instant::now() < deadline {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    // Its children too: what strace followed outlives a killed strace. Errors mean that it is gone already.
    for pid in crate::meter::family(child.id()).into_iter().rev() {
        tell(pid, Signal::SIGKILL);
    }
    let _ = child.wait();
}

/// Sends a signal; one that is gone needs none.
fn tell(pid: u32, signal: Signal) {
    if let Ok(pid) = i32::try_from(pid) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// Says `CONNECT port` at a VMM's vsock socket, once.
pub(crate) fn try_connect(path: &Path, port: u32) -> Result<UnixStream> {
    use std::io::Write;
    let mut stream = UnixStream::connect(path)?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let (mut answer, mut byte) = (Vec::new(), [0]);
    while byte != *b"\n" {
        ensure!(stream.read(&mut byte)? == 1 && answer.len() < 32, "refused");
        answer.extend(byte);
    }
    ensure!(answer.starts_with(b"OK "), "refused");
    Ok(stream)
}

fn wait_readable(pipe: &impl std::os::fd::AsFd, deadline: Instant) -> Result<()> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
    let ready = poll(&mut [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)], timeout)?;
    ensure!(ready > 0, "the guest was not ready within {} s", READY_DEADLINE.as_secs());
    Ok(())
}
