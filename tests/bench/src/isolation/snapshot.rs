//! Firecracker's snapshot: made once, restored many times, through its API.
//!
//! ```text
//!  make:     API process ─ machine, kernel, disk, vsock ─ start ─ guest listens ─ pause ─ create
//!  restore:  API process ─ load, resume ─ CONNECT 5000 ─ "x" and which work ─ the work's output
//!            ^ clock                 ^ clock, resident
//! ```
//!
//! Paths in a snapshot are as they were given: the vsock's socket is relative, so that each process makes its own in its folder.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::plans::{Work, command_line};
use super::room::{Clock, Expect, Leave, Patience, Plan, read_until};
use super::stage::{GUEST_MIB, Stage};
use crate::engine::{Disk, try_connect};
use crate::vsock::PORT;

/// Between two attempts at what is not there yet.
const AGAIN: Duration = Duration::from_micros(200);
/// Making it includes writing the guest's memory.
const MAKING: Duration = Duration::from_secs(180);

/// A saved machine.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    state: PathBuf,
    memory: PathBuf,
}

/// A snapshot to load, and what to ask of it.
pub(crate) struct Restore {
    /// What.
    pub(crate) snapshot: Snapshot,
    /// Asked for once it runs.
    pub(crate) work: Work,
    /// Whether the clock begins with the request, not with the process.
    pub(crate) resident: bool,
}

impl Snapshot {
    /// Boots a guest up to where it listens, and saves it below `into`.
    pub(crate) fn make(stage: &Stage, firecracker: &Path, into: &Path) -> Result<Self> {
        let folder = stage.room_folder()?;
        let api = folder.path().join("api");
        let mut command = Command::new(firecracker);
        command
            .args(["--api-sock", "api", "--log-path", "/dev/null", "--level", "Off"])
            .current_dir(folder.path());
        let plan = Plan {
            command,
            root: None,
            restore: Some(Restore {
                snapshot: Self { state: into.join("snapshot.state"), memory: into.join("snapshot.memory") },
                work: Work::Serve,
                resident: false,
            }),
            leave: Leave::Killed,
            clock: Clock::Fork,
            folder,
            cgroup: stage.tree.room()?,
        };
        // `Serve` in a restore means: nothing is loaded, the process alone is waited for.
        let patience = Patience::new(MAKING, &stage.interrupted);
        let mut room = plan.start(Expect::Ready, &patience)?.room;
        let root = Disk { path: stage.root_disk.clone(), read_only: true };
        let put = |path: &str, body: &Value| request(&api, "PUT", path, body, &patience);
        put("/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": GUEST_MIB }))?;
        put(
            "/boot-source",
            &json!({ "kernel_image_path": stage.kernel, "boot_args": command_line(Work::Serve) }),
        )?;
        put("/drives/disk0", &root.drive(0))?;
        put("/vsock", &json!({ "guest_cid": 3, "uds_path": "vsock" }))?;
        put("/actions", &json!({ "action_type": "InstanceStart" }))?;
        room.hear_again(Expect::Ready, &patience)?;
        request(&api, "PATCH", "/vm", &json!({ "state": "Paused" }), &patience)?;
        let (state, memory) = (into.join("snapshot.state"), into.join("snapshot.memory"));
        put(
            "/snapshot/create",
            &json!({ "snapshot_type": "Full", "snapshot_path": state, "mem_file_path": memory }),
        )?;
        ensure!(fs::metadata(&state)?.len() > 0, "Firecracker wrote an empty snapshot");
        Ok(Self { state, memory })
    }
}

impl Restore {
    /// Loads it into the process whose folder this is, asks for the work, and returns what it said.
    pub(crate) fn run(
        &self,
        folder: &Path,
        expect: Expect,
        patience: &Patience,
        began: &mut Instant,
    ) -> Result<Vec<u8>> {
        let api = folder.join("api");
        await_api(&api, patience)?;
        let asked = match self.work {
            // A new process to be configured: that it answers is all.
            Work::Serve => return Ok(Vec::new()),
            Work::True | Work::Idle | Work::Stay => 0_u64,
            Work::Python => 1,
            Work::Inside | Work::Imports => {
                bail!("a restored guest of the bench does no {}", self.work.name())
            }
        };
        if self.resident {
            *began = Instant::now();
        }
        let body = json!({
            "snapshot_path": self.snapshot.state,
            "mem_backend": { "backend_type": "File", "backend_path": self.snapshot.memory },
            "resume_vm": true,
        });
        request(&api, "PUT", "/snapshot/load", &body, patience)?;
        // The guest resets what it had of connections when it is told to, and the first of ours may be among them: then once more.
        loop {
            patience.check()?;
            let said = try_connect(&folder.join("vsock"), PORT).and_then(|mut stream| {
                let mut words = vec![b'x'];
                words.extend(asked.to_le_bytes());
                stream.write_all(&words)?;
                read_until(&mut stream, expect, patience)
            });
            match said {
                Ok(said) => return Ok(said),
                Err(error) if patience.check().is_err() => return Err(error),
                Err(_) => std::thread::sleep(AGAIN),
            }
        }
    }
}

/// Waits until a Firecracker process listens.
pub(crate) fn await_api(socket: &Path, patience: &Patience) -> Result<()> {
    while UnixStream::connect(socket).is_err() {
        patience.check()?;
        std::thread::sleep(AGAIN);
    }
    Ok(())
}

/// One request of HTTP/1.1, and its answer's status.
pub(crate) fn request(
    socket: &Path,
    method: &str,
    path: &str,
    body: &Value,
    patience: &Patience,
) -> Result<()> {
    let stream = send(socket, method, path, body)?;
    hear_answer(stream, patience).with_context(|| format!("Firecracker refused {method} {path}"))
}

/// The request alone; its answer can be read from what this returns.
pub(crate) fn send(socket: &Path, method: &str, path: &str, body: &Value) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).context("Firecracker's API does not answer")?;
    let body = body.to_string();
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    )?;
    Ok(stream)
}

/// An error unless the answer is a good one.
pub(crate) fn hear_answer(mut stream: UnixStream, patience: &Patience) -> Result<()> {
    let (mut answer, mut bytes) = (Vec::new(), [0; 1024]);
    // Its answers to these requests are short: the head, and an error's body, come at once.
    while !answer.windows(4).any(|four| four == b"\r\n\r\n") {
        patience.readable(&stream)?;
        let read = stream.read(&mut bytes)?;
        ensure!(read > 0, "Firecracker closed its API");
        answer.extend(bytes.iter().take(read));
    }
    let text = String::from_utf8_lossy(&answer);
    let status = text.split_whitespace().nth(1).unwrap_or_default();
    ensure!(status.starts_with('2'), "it answered: {text}");
    Ok(())
}
