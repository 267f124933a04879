//! A `carrel-vmm --config` and what it says.

use std::fs;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::guest::Guest;

/// Far above what any of these guests needs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether guests can run here. `scripts/test` runs these tests twice: with the unit tests, on a machine that need not have
/// `/dev/kvm`, and among the whole-system tests with `$CARREL_TEST_KVM` set, where it must be.
pub(crate) fn has_kvm() -> bool {
    let has = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !has {
        assert!(std::env::var_os("CARREL_TEST_KVM").is_none(), "/dev/kvm can't be opened");
        eprintln!("/dev/kvm can't be opened: left to the whole-system tests");
    }
    has
}

/// Whether a VMM can have a cgroup of its own here. Like `/dev/kvm`, among the whole-system tests it must.
pub(crate) fn has_cgroups() -> bool {
    // One try for all tests of this process: two at once would be of one name.
    static HAS: LazyLock<bool> = LazyLock::new(|| {
        let has = carrel_vmm::cgroup::Cgroup::below_own();
        assert!(has.is_ok() || std::env::var_os("CARREL_TEST_KVM").is_none(), "{has:?}");
        has.is_ok()
    });
    *HAS
}

/// A machine of one vCPU and 64 MiB that runs this guest, with its serial port on standard output.
pub(crate) fn machine(folder: &Path, guest: &Guest) -> Value {
    let image = folder.join("kernel");
    fs::write(&image, guest.elf()).unwrap();
    json!({
        "kvm": "/dev/kvm",
        "vcpus": 1,
        "memory_mib": 64,
        "huge_pages": false,
        "kernel": {"image": image, "command_line": ""},
        "serial": {"output": "/dev/stdout", "limit_bytes": 1 << 20},
    })
}

/// A running one; killed and waited for when dropped.
pub(crate) struct Vmm {
    child: Child,
    folder: TempDir,
}

/// What was left of one.
#[derive(Debug)]
pub(crate) struct Over {
    pub(crate) status: ExitStatus,
    pub(crate) said: Vec<u8>,
    pub(crate) errors: String,
}

impl Over {
    /// Its exit status, or 128 + n for signal n.
    pub(crate) fn code(&self) -> i32 {
        self.status.code().or_else(|| self.status.signal().map(|signal| 128 + signal)).unwrap()
    }
}

impl Vmm {
    /// Starts a guest in the smallest machine.
    pub(crate) fn start(guest: &Guest) -> Self {
        Self::start_with(guest, |_| {}, &[])
    }

    /// The same, the configuration changed and options added.
    pub(crate) fn start_with(guest: &Guest, change: impl Fn(&mut Value), options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut vm = machine(folder.path(), guest);
        change(&mut vm);
        Self::spawn("--config", &vm, folder, options)
    }

    /// A machine that goes on from a snapshot, its serial port on standard output.
    pub(crate) fn restore(vm: &Value) -> Self {
        Self::spawn("--restore", vm, tempfile::tempdir().unwrap(), &[])
    }

    fn spawn(beginning: &str, vm: &Value, folder: TempDir, options: &[&str]) -> Self {
        let config = folder.path().join("vm.json");
        fs::write(&config, serde_json::to_vec(vm).unwrap()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_carrel-vmm"));
        command.arg(beginning).arg(config).args(options);
        if !has_cgroups() && !options.contains(&"--unconfined") {
            command.arg("--unconfined=cgroup");
        }
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        Self { child, folder }
    }

    /// Waits until the guest has said this byte.
    pub(crate) fn hear(&mut self, mark: u8) {
        let mut byte = [0];
        let output = self.child.stdout.as_mut().unwrap();
        while byte[0] != mark {
            if output.read(&mut byte).unwrap() == 0 {
                let mut errors = String::new();
                self.child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
                panic!("it ended before it said {:?}: {errors}", char::from(mark));
            }
        }
    }

    /// The next so many bytes that the guest says.
    pub(crate) fn hear_bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        let heard = self.child.stdout.as_mut().unwrap().read_exact(&mut bytes);
        if heard.is_err() {
            let mut errors = String::new();
            self.child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
            panic!("it ended before it had said {count} bytes: {errors}");
        }
        bytes
    }

    /// How many bytes it has said that nobody has heard.
    pub(crate) fn unheard(&self) -> usize {
        let mut count: libc::c_int = 0;
        let output = self.child.stdout.as_ref().unwrap().as_raw_fd();
        // SAFETY: `count` is valid for the write.
        assert_eq!(unsafe { libc::ioctl(output, libc::FIONREAD, &raw mut count) }, 0);
        usize::try_from(count).unwrap()
    }

    /// Where its files are.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The process that was started.
    pub(crate) fn launcher(&self) -> u32 {
        self.child.id()
    }

    /// The confined process.
    pub(crate) fn confined(&self) -> u32 {
        let children = self.children();
        assert_eq!(children.len(), 1, "one child");
        children[0]
    }

    /// The launcher's children that have not been waited for.
    fn children(&self) -> Vec<u32> {
        let id = self.launcher();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        children.split_whitespace().map(|child| child.parse().unwrap()).collect()
    }

    /// Sends a signal.
    pub(crate) fn signal(process: u32, signal: i32) {
        // SAFETY: no pointers; the process was started by this test and has not been waited for.
        assert_eq!(unsafe { libc::kill(process.cast_signed(), signal) }, 0);
    }

    /// Waits for its end.
    pub(crate) fn over(mut self) -> Over {
        let deadline = Instant::now() + PATIENCE;
        // What it says fits into a pipe: nothing has to be read meanwhile.
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it goes on for ever");
            std::thread::sleep(Duration::from_millis(2));
        };
        let (mut said, mut errors) = (Vec::new(), String::new());
        self.child.stdout.take().unwrap().read_to_end(&mut said).unwrap();
        self.child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
        Over { status, said, errors }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            // The confined process dies with its owner's socket, but not one that waits for another owner.
            for confined in self.children() {
                Self::signal(confined, libc::SIGKILL);
            }
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
    }
}
