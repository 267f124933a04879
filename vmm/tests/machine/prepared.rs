//! VMMs that are prepared before anybody knows what they go on from.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use carrel_protocol::units::{MemoryMib, VcpuCount};
use carrel_protocol::vmm::{
    self, Configure, Descriptor, End, Ended, FromOwner, FromVmm, Pause, Prepare, Restore, RestoreConfig,
    SerialConfig, SnapshotKind, Stop, VmConfig,
};
use carrel_vmm::owner::{Connection, Packet};

use super::run::has_kvm;
use super::snapshots::{Saved, assert_counts, counting};

const PATIENCE: Duration = Duration::from_secs(60);
/// Where a VMM is told to look for its owner.
const PLACE: i32 = 100;

/// A `carrel-vmm` whose owner the test is; killed when dropped.
pub(crate) struct Owned {
    owner: Option<Connection>,
    child: Child,
}

impl Drop for Owned {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Owned {
    fn start() -> Self {
        let (owner, theirs) = Connection::pair().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_carrel-vmm"));
        // Namespaces and cgroup are the launcher's part; filters and the rest are here.
        command.args(["--owner-fd", &PLACE.to_string(), "--unconfined=cgroup,namespaces"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let socket = theirs.as_fd().as_raw_fd();
        // SAFETY: dup2 may be called between fork and exec, and `theirs` lives until the child was made.
        let child = unsafe {
            command.pre_exec(move || match libc::dup2(socket, PLACE) {
                PLACE => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            })
        }
        .spawn()
        .unwrap();
        drop(theirs);
        Self { owner: Some(owner), child }
    }

    fn owner(&self) -> &Connection {
        self.owner.as_ref().unwrap()
    }

    pub(crate) fn say(&self, message: impl Into<FromOwner>, descriptors: &[BorrowedFd<'_>]) {
        self.owner().send(&message.into(), descriptors).unwrap();
    }

    pub(crate) fn hear(&self) -> FromVmm {
        let Packet { message, .. } = self.owner().receive_first().unwrap();
        message
    }

    /// Prepared for so many vCPUs, and ready.
    pub(crate) fn prepared(vcpus: u8, mib: u64) -> Self {
        let owned = Self::start();
        owned.say(prepare(vcpus, mib), &[kvm().as_fd()]);
        let FromVmm::Prepared(prepared) = owned.hear() else { panic!("not prepared") };
        assert!(prepared.timeline.iter().any(|mark| mark.done == "vcpus"), "{prepared:?}");
        owned
    }

    fn end(mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it goes on for ever");
            sleep(Duration::from_millis(2));
        }
    }

    /// What it says for its last word, and its status.
    fn breaks(self) -> (String, i32) {
        let FromVmm::Broken(broken) = self.hear() else { panic!("not broken") };
        let status = self.end().code().unwrap();
        assert_eq!(status, i32::from(broken.end.status()));
        (broken.message, status)
    }
}

fn kvm() -> File {
    OpenOptions::new().read(true).write(true).open("/dev/kvm").unwrap()
}

fn prepare(vcpus: u8, mib: u64) -> Prepare {
    Prepare {
        version: vmm::VERSION,
        kvm: Descriptor(0),
        vcpus: VcpuCount::try_from(u64::from(vcpus)).unwrap(),
        memory_mib: MemoryMib::try_from(mib).unwrap(),
    }
}

/// A guest of one vCPU and 64 MiB that counts, as it was saved, and the number that it says next.
pub(crate) fn saved() -> (Saved, u8) {
    let mut original = counting(1, |_| {});
    original.pause();
    let saved = Saved::new();
    original.save(&saved, SnapshotKind::Full);
    let said = original.stop();
    (saved, u8::try_from(said.len() % 256).unwrap())
}

/// What a prepared VMM is told to go on from, and where its guest is heard.
pub(crate) fn restore(saved: &Saved) -> (Restore, Vec<OwnedFd>, std::io::PipeReader) {
    let (heard, output) = std::io::pipe().unwrap();
    let vm = RestoreConfig {
        kvm: None,
        state: Descriptor(0),
        memory: Descriptor(1),
        vsock: None,
        working_set: None,
        blocks: Vec::new(),
        serial: Some(SerialConfig { output: Descriptor(2), limit_bytes: 1 << 20 }),
        control: None,
        track_dirty: false,
    };
    let files = vec![
        File::open(saved.state()).unwrap().into(),
        File::open(saved.memory()).unwrap().into(),
        output.into(),
    ];
    (Restore { version: vmm::VERSION, vm }, files, heard)
}

pub(crate) fn borrowed(files: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    files.iter().map(AsFd::as_fd).collect()
}

#[test]
fn a_prepared_vmm_goes_on_from_what_it_is_given_later() {
    if !has_kvm() {
        return;
    }
    let (saved, next) = saved();
    let waiting: Vec<Owned> = (0..3).map(|_| Owned::prepared(1, 64)).collect();
    for (n, vmm) in waiting.into_iter().enumerate() {
        let (restore, files, mut heard) = restore(&saved);
        vmm.say(restore, &borrowed(&files));
        drop(files);
        let FromVmm::Booted(booted) = vmm.hear() else { panic!("not booted") };
        assert_eq!(booted.timeline[0].done, "asked", "what was before is not this start's");
        let mut said = [0; 100];
        heard.read_exact(&mut said).unwrap();
        assert_counts(&said, next);
        if n == 0 {
            // It is a machine like any other.
            vmm.say(Pause {}, &[]);
            assert!(matches!(vmm.hear(), FromVmm::Done(_)));
        }
        vmm.say(Stop {}, &[]);
        assert!(matches!(vmm.hear(), FromVmm::Ended(Ended { end: End::Stopped, .. })));
        assert_eq!(vmm.end().code(), Some(13));
    }
}

#[test]
fn one_that_is_told_at_once_goes_on_when_it_is_ready() {
    if !has_kvm() {
        return;
    }
    let (saved, next) = saved();
    let vmm = Owned::start();
    let (restore, files, mut heard) = restore(&saved);
    vmm.say(prepare(1, 64), &[kvm().as_fd()]);
    vmm.say(restore, &borrowed(&files));
    assert!(matches!(vmm.hear(), FromVmm::Prepared(_)));
    assert!(matches!(vmm.hear(), FromVmm::Booted(_)));
    let mut said = [0; 10];
    heard.read_exact(&mut said).unwrap();
    assert_counts(&said, next);
}

#[test]
fn a_snapshot_of_another_shape_is_refused_with_both_shapes() {
    if !has_kvm() {
        return;
    }
    let (saved, _) = saved();
    for (vcpus, mib, word) in [(2, 64, "2 vCPUs and 64 MiB"), (1, 128, "1 vCPU and 128 MiB")] {
        let vmm = Owned::prepared(vcpus, mib);
        let (restore, files, mut heard) = restore(&saved);
        vmm.say(restore, &borrowed(&files));
        drop(files);
        let (message, status) = vmm.breaks();
        assert!(message.contains(word) && message.contains("1 vCPU and 64 MiB"), "{message}");
        assert_eq!(status, 2);
        assert_eq!(heard.read(&mut [0]).unwrap(), 0, "a guest ran");
    }
}

#[test]
fn what_is_damaged_or_misses_something_never_runs() {
    if !has_kvm() {
        return;
    }
    let (saved, _) = saved();
    let refused = |change: &dyn Fn(&mut RestoreConfig<Descriptor>, &mut Vec<OwnedFd>)| {
        let vmm = Owned::prepared(1, 64);
        let (mut restore, mut files, mut heard) = restore(&saved);
        change(&mut restore.vm, &mut files);
        vmm.say(restore, &borrowed(&files));
        drop(files);
        let broken = vmm.breaks();
        assert_eq!(heard.read(&mut [0]).unwrap(), 0, "a guest ran");
        broken
    };
    let (message, status) = refused(&|vm, files| {
        vm.kvm = Some(Descriptor(3));
        files.push(kvm().into());
    });
    assert!(message.contains("/dev/kvm once") && status == 2, "{message}");
    let (message, status) = refused(&|vm, _| vm.memory = Descriptor(7));
    assert!(message.contains("memory file") && status == 2, "{message}");
    let (message, status) = refused(&|_, files| files.swap(0, 1));
    assert!(message.contains("state file") && status == 3, "{message}");
    let state = fs::read(saved.state()).unwrap();
    let damaged = [&state[..state.len() / 2], b"x", &state[state.len() / 2 + 1..]].concat();
    fs::write(saved.state(), damaged).unwrap();
    let (message, status) = refused(&|_, _| {});
    assert!(message.contains("checksum") && status == 3, "{message}");
}

#[test]
fn only_a_snapshot_comes_after_a_prepare() {
    if !has_kvm() {
        return;
    }
    let vmm = Owned::prepared(1, 64);
    vmm.say(Pause {}, &[]);
    let (message, status) = vmm.breaks();
    assert!(message.contains("names none") && status == 2, "{message}");
    let text = r#"{"kvm":0,"vcpus":1,"memory_mib":64,"kernel":{"image":1,"command_line":""}}"#;
    let vm: VmConfig<Descriptor> = serde_json::from_str(text).unwrap();
    let vmm = Owned::prepared(1, 64);
    vmm.say(Configure { version: vmm::VERSION, vm }, &[]);
    assert!(vmm.breaks().0.contains("names none"));
    let vmm = Owned::prepared(1, 64);
    vmm.say(prepare(1, 64), &[kvm().as_fd()]);
    assert!(vmm.breaks().0.contains("names none"), "once is enough");
    let vmm = Owned::prepared(1, 64);
    // SAFETY: the buffer is valid for its length.
    let sent = unsafe { libc::send(vmm.owner().as_fd().as_raw_fd(), b"garbage!!".as_ptr().cast(), 9, 0) };
    assert_eq!(sent, 9);
    assert!(vmm.breaks().0.contains("not a message"));
}

#[test]
fn another_version_and_a_missing_kvm_are_told_apart() {
    if !has_kvm() {
        return;
    }
    let vmm = Owned::start();
    vmm.say(Prepare { version: vmm::VERSION + 1, ..prepare(1, 64) }, &[kvm().as_fd()]);
    let (message, status) = vmm.breaks();
    assert!(message.contains("install both from one build") && status == 2, "{message}");
    let vmm = Owned::start();
    vmm.say(prepare(1, 64), &[]);
    let (message, status) = vmm.breaks();
    assert!(message.contains("kvm") && status == 2, "{message}");
    let (saved, _) = saved();
    let vmm = Owned::start();
    let (restore, files, _heard) = restore(&saved);
    vmm.say(restore, &borrowed(&files));
    let (message, status) = vmm.breaks();
    assert!(message.contains("/dev/kvm once") && status == 2, "{message}");
}

#[test]
fn one_that_nobody_wants_any_more_ends_by_itself() {
    if !has_kvm() {
        return;
    }
    let mut vmm = Owned::prepared(2, 64);
    drop(vmm.owner.take());
    assert_eq!(vmm.end().code(), Some(13));
    let vmm = Owned::prepared(1, 64);
    vmm.say(Stop {}, &[]);
    assert!(matches!(vmm.hear(), FromVmm::Ended(Ended { end: End::Stopped, .. })));
    assert_eq!(vmm.end().code(), Some(13));
    let vmm = Owned::prepared(1, 64);
    // SAFETY: the process is this test's child and was not waited for.
    assert_eq!(unsafe { libc::kill(vmm.child.id().cast_signed(), libc::SIGTERM) }, 0);
    assert!(matches!(vmm.hear(), FromVmm::Ended(Ended { end: End::Stopped, .. })));
    assert_eq!(vmm.end().code(), Some(13));
}

#[test]
fn one_that_waits_is_under_the_set_up_filter_and_its_vcpus_under_theirs() {
    if !has_kvm() {
        return;
    }
    let vmm = Owned::prepared(2, 64);
    let mut filters = Vec::new();
    for task in fs::read_dir(format!("/proc/{}/task", vmm.child.id())).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap().trim().to_owned()
        };
        // KVM's own, in the kernel alone (nx_huge_pages).
        if !field("Name:").starts_with("kvm-") {
            filters.push((field("Name:"), field("Seccomp_filters:")));
        }
    }
    filters.sort();
    let expected = [("carrel-vmm", "1"), ("vcpu0", "2"), ("vcpu1", "2")];
    assert_eq!(filters, expected.map(|(name, count)| (name.to_owned(), count.to_owned())));
}
