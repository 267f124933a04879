//! A machine without carrel around it: `carrel-vmm` with a guest of a test's own, whose owner is the test.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use carrel_protocol::vmm::{
    Descriptor, Done, FromOwner, FromVmm, Pause, Resume, Snapshot, SnapshotKind, Snapshotted,
};
use carrel_vmm::owner::Connection;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde_json::{Value, json};

use crate::initramfs;
use crate::{patience, wait_for};

/// The guest that [`Machine::boot`] boots has so much memory, MiB.
pub const MEMORY_MIB: u64 = 64;
/// Bytes of its disk.
pub const DISK: u64 = 16 << 20;

/// A running machine; killed when dropped.
pub struct Machine {
    child: Child,
    owner: Connection,
    folder: PathBuf,
}

/// A snapshot's files: `state`, `memory`, `disk`.
pub struct Saved(pub PathBuf);

/// What a guest said when it dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The number of its next block.
    pub next: u64,
    /// CLOCK_MONOTONIC, ns.
    pub clock_ns: u64,
}

impl Machine {
    /// Boots the worker (`guests/worker.rs`) in `folder`, with a disk and an empty overlay.
    pub fn boot(kernel: &Path, worker: &Path, folder: &Path, vcpus: u8, track_dirty: bool) -> Self {
        fs::create_dir_all(folder).unwrap();
        let (base, initramfs) = (folder.join("base"), folder.join("initramfs"));
        File::create(&base).unwrap().set_len(DISK).unwrap();
        fs::write(&initramfs, initramfs::archive(Some(&fs::read(worker).unwrap()))).unwrap();
        let vm = json!({
            "kvm": "/dev/kvm",
            "vcpus": vcpus,
            "memory_mib": MEMORY_MIB,
            "kernel": {
                "image": kernel,
                "command_line": "reboot=t,panic_warm panic=-1 quiet clocksource=kvm-clock console=ttyS0",
            },
            "initramfs": initramfs,
            "vsock": {"guest_cid": 3},
            "blocks": [{"id": "room", "base": base, "overlay": overlay(folder), "size_bytes": DISK}],
            "entropy": {},
            "balloon": {"free_page_reporting": true},
            "serial": {"output": folder.join("console"), "limit_bytes": 1 << 20},
            "control": folder.join("control"),
            "track_dirty": track_dirty,
        });
        Self::start("--config", &vm, folder)
    }

    /// A clone: memory and disk are the snapshot's until it writes to them.
    pub fn restore(saved: &Saved, folder: &Path) -> Self {
        Self::restored(saved, folder, false)
    }

    /// One of which there can be a differential snapshot, over the memory that it began with.
    pub fn restore_tracked(saved: &Saved, folder: &Path) -> Self {
        Self::restored(saved, folder, true)
    }

    fn restored(saved: &Saved, folder: &Path, track_dirty: bool) -> Self {
        fs::create_dir_all(folder).unwrap();
        let vm = json!({
            "kvm": "/dev/kvm",
            "state": saved.0.join("state"),
            "memory": saved.0.join("memory"),
            "blocks": [{"id": "room", "base": saved.0.join("disk"), "overlay": overlay(folder)}],
            "serial": {"output": folder.join("console"), "limit_bytes": 1 << 20},
            "control": folder.join("control"),
            "track_dirty": track_dirty,
        });
        Self::start("--restore", &vm, folder)
    }

    fn start(beginning: &str, vm: &Value, folder: &Path) -> Self {
        let config = folder.join("vm.json");
        fs::write(&config, vm.to_string()).unwrap();
        let vmm = std::env::var_os("CARREL_VMM").unwrap_or_else(|| "carrel-vmm".into());
        let errors = File::create(folder.join("errors")).unwrap();
        let mut child = Command::new(vmm)
            .arg(beginning)
            .arg(config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .expect("carrel-vmm is there: $CARREL_VMM, or on the PATH");
        let control = folder.join("control");
        let owner = wait_for("the control socket", || {
            assert!(child.try_wait().unwrap().is_none(), "it ended: {}", said(folder));
            take_over(&control)
        });
        Self { child, owner, folder: folder.to_owned() }
    }

    /// The guest's next connection, its first words said.
    pub fn dialled(&self) -> Conversation {
        let packet = self.receive();
        let FromVmm::Dialled(dialled) = packet.message else {
            panic!("{:?}: {}", packet.message, said(&self.folder))
        };
        assert_eq!(dialled.port, 5000);
        let socket: OwnedFd = packet.descriptors.into_iter().next().unwrap();
        Conversation::new(socket.into())
    }

    fn receive(&self) -> carrel_vmm::owner::Packet<FromVmm> {
        self.owner.receive_first().unwrap_or_else(|e| panic!("{e}: {}", said(&self.folder)))
    }

    fn ask(&self, request: impl Into<FromOwner>) -> FromVmm {
        self.owner.send(&request.into(), &[]).unwrap();
        self.receive().message
    }

    /// Stops its vCPUs.
    pub fn pause(&self) {
        assert_eq!(self.ask(Pause {}), Done {}.into());
    }

    /// Lets them go on.
    pub fn resume(&self) {
        assert_eq!(self.ask(Resume {}), Done {}.into());
    }

    /// Saves the paused machine with its disk.
    pub fn save(&self, to: &Path, kind: SnapshotKind) -> Snapshotted {
        fs::create_dir_all(to).unwrap();
        let open = |name: &str| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(to.join(name))
                .unwrap()
        };
        let (state, memory) = (open("state"), open("memory"));
        state.set_len(0).unwrap();
        if kind == SnapshotKind::Full {
            // Zeros are not written.
            memory.set_len(0).unwrap();
        }
        memory.set_len(MEMORY_MIB << 20).unwrap();
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").unwrap();
        let request = Snapshot { kvm: Descriptor(0), state: Descriptor(1), memory: Descriptor(2), kind };
        self.owner.send(&FromOwner::from(request), &[kvm.as_fd(), state.as_fd(), memory.as_fd()]).unwrap();
        let answer = self.receive().message;
        let FromVmm::Snapshotted(snapshotted) = answer else { panic!("{answer:?}") };
        fs::copy(self.folder.join("overlay"), to.join("disk")).unwrap();
        snapshotted
    }

    /// The process that was started.
    pub fn process(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.owner.send(&FromOwner::from(carrel_protocol::vmm::Stop {}), &[]);
        let _ = self.child.wait();
    }
}

fn overlay(folder: &Path) -> PathBuf {
    let path = folder.join("overlay");
    File::create(&path).unwrap().set_len(DISK).unwrap();
    path
}

fn said(folder: &Path) -> String {
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
    format!("{}{}", read("errors"), read("console"))
}

fn take_over(path: &Path) -> Option<Connection> {
    let connection = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    connect(connection.as_raw_fd(), &UnixAddr::new(path).unwrap()).ok()?;
    Some(Connection::new(connection))
}

/// A conversation with a worker, from the host's side.
pub struct Conversation {
    socket: UnixStream,
    /// Its first words.
    pub hello: Hello,
    next: u64,
}

impl Conversation {
    fn new(mut socket: UnixStream) -> Self {
        socket.set_nonblocking(false).unwrap();
        socket.set_read_timeout(Some(patience())).unwrap();
        let mut hello = [0; 16];
        socket.read_exact(&mut hello).unwrap();
        let [n0, n1, n2, n3, n4, n5, n6, n7, clock @ ..] = hello;
        let next = u64::from_le_bytes([n0, n1, n2, n3, n4, n5, n6, n7]);
        Self { socket, hello: Hello { next, clock_ns: u64::from_le_bytes(clock) }, next }
    }

    /// Gives so many blocks back, each the one after the one before.
    pub fn echo(&mut self, blocks: usize) {
        for _ in 0..blocks {
            let mut block = [0; 4096];
            self.socket.read_exact(&mut block).unwrap();
            assert_eq!(block.first_chunk().copied().map(u64::from_le_bytes), Some(self.next));
            self.socket.write_all(&block).unwrap();
            self.next += 1;
        }
    }

    /// The number of the next block.
    pub fn next(&self) -> u64 {
        self.next
    }
}
