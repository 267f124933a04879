//! Machines that are saved, and machines that go on from what was saved.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use carrel_protocol::vmm::{
    Descriptor, Done, FromOwner, FromVmm, Pause, Resume, Snapshot, SnapshotKind, Snapshotted, Stop,
};
use carrel_vmm::arch::current::cpuid;
use carrel_vmm::arch::current::state::{VcpuState, Wanted};
use carrel_vmm::owner::Connection;
use carrel_vmm::snapshot::MachineState;
use kvm_bindings::{CpuId, KVM_CAP_SPLIT_IRQCHIP, Msrs, kvm_enable_cap, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::guest::Guest;
use super::owners::{ask, take_over};
use super::run::{Vmm, has_kvm};

const MEMORY: u64 = 64 << 20;
/// Where the guest keeps what it counts.
pub(crate) const COUNTER: u32 = 0x30_0000;

/// A guest that counts, its control socket, and where its snapshots go.
pub(crate) struct Counting {
    vmm: Vmm,
    pub(crate) owner: Connection,
    heard: Vec<u8>,
}

pub(crate) fn counting(vcpus: u8, change: impl Fn(&mut Value)) -> Counting {
    let vmm = Vmm::start_with(
        &Guest::new().count(COUNTER, 2_000),
        |vm| {
            let folder = vm["kernel"]["image"].as_str().unwrap().rsplit_once('/').unwrap().0.to_owned();
            vm["vcpus"] = vcpus.into();
            vm["control"] = format!("{folder}/control").into();
            change(vm);
        },
        &[],
    );
    let mut counting = Counting { owner: connect(&vmm.folder().join("control")), vmm, heard: Vec::new() };
    counting.hear(5);
    counting
}

/// Becomes its owner as soon as there is a control socket that somebody listens on.
fn connect(control: &Path) -> Connection {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match take_over(control) {
            Ok(owner) => return owner,
            Err(e) => assert!(Instant::now() < deadline, "no control socket: {e}"),
        }
        sleep(Duration::from_millis(2));
    }
}

impl Counting {
    fn hear(&mut self, count: usize) {
        let bytes = self.vmm.hear_bytes(count);
        self.heard.extend(bytes);
    }

    /// Pauses it, and hears what it has said: what is heard after a resume is said after it.
    pub(crate) fn pause(&mut self) {
        assert_eq!(ask(&self.owner, Pause {}), Done {}.into());
        self.hear(self.vmm.unheard());
    }

    fn resume(&self) {
        assert_eq!(ask(&self.owner, Resume {}), Done {}.into());
    }

    pub(crate) fn save(&self, to: &Saved, kind: SnapshotKind) -> Snapshotted {
        let answer = self.try_save(to, kind);
        let FromVmm::Snapshotted(snapshotted) = answer else { panic!("{answer:?}") };
        snapshotted
    }

    fn try_save(&self, to: &Saved, kind: SnapshotKind) -> FromVmm {
        self.try_save_with(to, kind, &File::create(to.state()).unwrap())
    }

    fn try_save_with(&self, to: &Saved, kind: SnapshotKind, state: &File) -> FromVmm {
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").unwrap();
        let memory = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(to.memory());
        let memory = memory.unwrap();
        if kind == SnapshotKind::Full {
            memory.set_len(0).unwrap();
            memory.set_len(MEMORY).unwrap();
        }
        let request = Snapshot { kvm: Descriptor(0), state: Descriptor(1), memory: Descriptor(2), kind };
        self.owner.send(&FromOwner::from(request), &[kvm.as_fd(), state.as_fd(), memory.as_fd()]).unwrap();
        self.owner.receive_first::<FromVmm>().unwrap().message
    }

    /// Ends it, and returns all that it ever said.
    pub(crate) fn stop(mut self) -> Vec<u8> {
        assert!(matches!(ask(&self.owner, Stop {}), FromVmm::Ended(_)));
        let over = self.vmm.over();
        self.heard.extend(over.said);
        self.heard
    }
}

/// A snapshot's files.
pub(crate) struct Saved(TempDir);

impl Saved {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.0.path().join("state")
    }

    pub(crate) fn memory(&self) -> PathBuf {
        self.0.path().join("memory")
    }

    fn clone_of(&self) -> Value {
        json!({
            "kvm": "/dev/kvm",
            "state": self.state(),
            "memory": self.memory(),
            "serial": {"output": "/dev/stdout", "limit_bytes": 1 << 20},
        })
    }
}

/// It was refused, for a reason in which this occurs.
fn refused(answer: FromVmm, word: &str) {
    let FromVmm::Refused(refused) = answer else { panic!("{answer:?}") };
    assert!(refused.reason.contains(word), "{}", refused.reason);
}

/// Each number is the one before it and one more.
pub(crate) fn assert_counts(numbers: &[u8], from: u8) {
    for (expected, number) in
        (0..numbers.len()).map(|n| from.wrapping_add(u8::try_from(n % 256).unwrap())).zip(numbers)
    {
        assert_eq!(*number, expected, "in {numbers:?}");
    }
}

/// A vCPU of a machine with nothing else in it.
fn bare_vcpu(kvm: &Kvm, offered: &CpuId) -> (VmFd, VcpuFd) {
    let vm = kvm.create_vm().unwrap();
    let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    split.args[0] = 24;
    vm.enable_cap(&split).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid2(offered).unwrap();
    (vm, vcpu)
}

#[test]
fn a_vcpu_of_another_tsc_rate_is_scaled_or_refused_with_both_rates() {
    if !has_kvm() {
        return;
    }
    let kvm = Kvm::new().unwrap();
    let offered = cpuid::for_vcpu(&cpuid::supported(&kvm).unwrap(), &kvm, 0, 1).unwrap();
    let (_vm, first) = bare_vcpu(&kvm, &offered);
    let saved = VcpuState::save(&first, 0, &Wanted::of(&kvm, 1).unwrap()).unwrap();
    let here = first.get_tsc_khz().unwrap();
    // Two clocks of one rate are measured a little differently at each of the host's boots.
    for (khz, is_another) in [(here + here / 10_000, false), (here / 2, true), (here + here / 3, true)] {
        let mut fields = serde_json::to_value(&saved).unwrap();
        fields["tsc_khz"] = khz.into();
        let state: VcpuState = serde_json::from_value(fields).unwrap();
        let (_vm, second) = bare_vcpu(&kvm, &offered);
        match state.restore(&second) {
            Ok(()) if is_another => assert_eq!(second.get_tsc_khz().unwrap(), khz),
            Ok(()) => assert_eq!(second.get_tsc_khz().unwrap(), here),
            Err(error) => {
                assert!(is_another && error.is_misfit(), "{error}");
                let said = error.to_string();
                assert!(
                    said.contains(&format!("{khz} kHz")) && said.contains(&format!("{here} kHz")),
                    "{said}"
                );
            }
        }
    }
}

#[test]
fn a_vcpu_comes_back_with_registers_that_kvm_does_not_name() {
    if !has_kvm() {
        return;
    }
    let kvm = Kvm::new().unwrap();
    let offered = cpuid::for_vcpu(&cpuid::supported(&kvm).unwrap(), &kvm, 0, 1).unwrap();
    let vcpu = || bare_vcpu(&kvm, &offered);
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    // The default memory type; a variable and a fixed range; what errors of the first machine-check bank are enabled.
    let told =
        [msr(0x2ff, 1 << 11 | 6), msr(0x200, 0x8000_0000), msr(0x250, 0x0606_0606_0606_0606), msr(0x400, 0)];
    let (_vm, first) = vcpu();
    assert_eq!(first.set_msrs(&Msrs::from_entries(&told).unwrap()).unwrap(), told.len());
    let saved = VcpuState::save(&first, 0, &Wanted::of(&kvm, 1).unwrap()).unwrap();
    let (_vm, second) = vcpu();
    saved.check_cpu(offered.as_slice()).unwrap();
    saved.restore(&second).unwrap();
    let mut heard = Msrs::from_entries(&told.map(|entry| msr(entry.index, 1))).unwrap();
    assert_eq!(second.get_msrs(&mut heard).unwrap(), told.len());
    assert_eq!(heard.as_slice(), told);
}

#[test]
fn clones_go_on_where_their_template_stood_and_each_by_itself() {
    if !has_kvm() {
        return;
    }
    for vcpus in [1, 2] {
        let mut original = counting(vcpus, |_| {});
        original.hear(20);
        original.pause();
        let saved = Saved::new();
        let snapshotted = original.save(&saved, SnapshotKind::Full);
        assert_eq!(snapshotted.state_bytes, fs::metadata(saved.state()).unwrap().len());
        assert!(snapshotted.memory_bytes < 1 << 20, "{snapshotted:?}: zeros are left out");
        assert!(fs::metadata(saved.memory()).unwrap().blocks() * 512 <= snapshotted.memory_bytes + 65536);
        let before = fs::read(saved.memory()).unwrap();
        let said = original.stop();
        assert_counts(&said, 0);
        let next = u8::try_from(said.len() % 256).unwrap();
        let mut clones: Vec<Vmm> = (0..3).map(|_| Vmm::restore(&saved.clone_of())).collect();
        for clone in &mut clones {
            assert_counts(&clone.hear_bytes(300), next);
        }
        drop(clones);
        assert!(fs::read(saved.memory()).unwrap() == before, "clones write to memory of their own");
    }
}

#[test]
fn a_machine_that_was_saved_goes_on_and_nothing_is_lost_or_said_twice() {
    if !has_kvm() {
        return;
    }
    let mut original = counting(2, |_| {});
    for _ in 0..20 {
        original.hear(3);
        original.pause();
        original.save(&Saved::new(), SnapshotKind::Full);
        original.resume();
    }
    original.hear(10);
    assert_counts(&original.stop(), 0);
}

#[test]
fn a_differential_snapshot_over_a_full_one_is_a_full_one() {
    if !has_kvm() {
        return;
    }
    let mut original = counting(1, |vm| vm["track_dirty"] = true.into());
    original.pause();
    let (saved, whole) = (Saved::new(), Saved::new());
    original.save(&saved, SnapshotKind::Full);
    for _ in 0..3 {
        original.resume();
        original.hear(10);
        original.pause();
        let snapshotted = original.save(&saved, SnapshotKind::Differential);
        assert!((4096..1 << 20).contains(&snapshotted.memory_bytes), "{snapshotted:?}");
    }
    let none = original.save(&saved, SnapshotKind::Differential);
    assert_eq!(none.memory_bytes, 0, "nothing ran since");
    original.save(&whole, SnapshotKind::Full);
    assert!(fs::read(saved.memory()).unwrap() == fs::read(whole.memory()).unwrap());
    let said = original.stop();
    let mut clone = Vmm::restore(&saved.clone_of());
    assert_counts(&clone.hear_bytes(20), u8::try_from(said.len() % 256).unwrap());
}

#[test]
fn after_a_snapshot_that_failed_there_is_a_full_one_and_no_differential() {
    if !has_kvm() {
        return;
    }
    let mut original = counting(1, |vm| vm["track_dirty"] = true.into());
    original.pause();
    let (saved, whole) = (Saved::new(), Saved::new());
    original.save(&saved, SnapshotKind::Full);
    original.resume();
    original.hear(10);
    original.pause();
    // A disk that is full when memory is written already, and no page counts as written any more.
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    refused(original.try_save_with(&saved, SnapshotKind::Differential, &full), "written");
    refused(original.try_save(&saved, SnapshotKind::Differential), "make a full one");
    original.save(&saved, SnapshotKind::Full);
    original.resume();
    original.hear(10);
    original.pause();
    original.save(&saved, SnapshotKind::Differential);
    original.save(&whole, SnapshotKind::Full);
    assert!(fs::read(saved.memory()).unwrap() == fs::read(whole.memory()).unwrap());
    assert_counts(&original.stop(), 0);
}

#[test]
fn a_clone_can_be_saved_and_cloned_again() {
    if !has_kvm() {
        return;
    }
    let mut original = counting(1, |_| {});
    original.pause();
    let mut saved = Saved::new();
    original.save(&saved, SnapshotKind::Full);
    let mut next = original.stop().len();
    for _ in 0..3 {
        let mut vm = saved.clone_of();
        let folder = tempfile::tempdir().unwrap();
        vm["control"] = folder.path().join("control").to_str().unwrap().into();
        let vmm = Vmm::restore(&vm);
        let owner = connect(&folder.path().join("control"));
        let mut clone = Counting { vmm, owner, heard: Vec::new() };
        clone.hear(7);
        clone.pause();
        saved = Saved::new();
        clone.save(&saved, SnapshotKind::Full);
        let said = clone.stop();
        assert_counts(&said, u8::try_from(next % 256).unwrap());
        next += said.len();
    }
}

#[test]
fn what_can_not_be_saved_is_refused_and_the_machine_goes_on() {
    if !has_kvm() {
        return;
    }
    let mut original = counting(1, |_| {});
    let saved = Saved::new();
    refused(original.try_save(&saved, SnapshotKind::Full), "not paused");
    original.pause();
    refused(original.try_save(&saved, SnapshotKind::Differential), "track_dirty");
    let short = Snapshot {
        kvm: Descriptor(0),
        state: Descriptor(0),
        memory: Descriptor(1),
        kind: SnapshotKind::Full,
    };
    refused(ask(&original.owner, short), "descriptors");
    original.save(&saved, SnapshotKind::Full);
    original.resume();
    original.hear(5);
    assert_counts(&original.stop(), 0);
}

/// A whole snapshot of a machine that has ended.
fn saved() -> Saved {
    let mut original = counting(1, |_| {});
    original.pause();
    let saved = Saved::new();
    original.save(&saved, SnapshotKind::Full);
    original.stop();
    saved
}

/// Status and errors of a restore that must not succeed.
fn refuses(vm: &Value) -> (i32, String) {
    let over = Vmm::restore(vm).over();
    assert!(over.said.is_empty(), "a guest ran");
    (over.code(), over.errors)
}

#[test]
fn a_damaged_snapshot_never_runs() {
    if !has_kvm() {
        return;
    }
    let saved = saved();
    let good = fs::read(saved.state()).unwrap();
    let with = |bytes: &[u8]| {
        fs::write(saved.state(), bytes).unwrap();
        refuses(&saved.clone_of())
    };
    for (bytes, word) in [
        (good[..good.len() - 1].to_vec(), "cut short"),
        ([&good[..], b"x"].concat(), "cut short"),
        (b"carrel".to_vec(), "cut short"),
        (vec![0; good.len()], "none of carrel's"),
        (vec![7; 2 << 20], "cut short"),
    ] {
        let (code, errors) = with(&bytes);
        assert!(code == 3 && errors.contains(word), "{code} {errors}");
    }
    for place in [24, good.len() / 2, good.len() - 1] {
        let mut bytes = good.clone();
        bytes[place] ^= 0x10;
        let (code, errors) = with(&bytes);
        assert!(code == 3 && errors.contains("checksum"), "{code} {errors}");
    }
    // A thousand places of a real machine's file: one bit, or all from there on.
    for n in 0..1000 {
        let (place, mut bytes) = (n * 0x9e37_79b1 % good.len(), good.clone());
        match n % 9 {
            8 => bytes.truncate(place),
            bit => bytes[place] ^= 1 << bit,
        }
        assert!(MachineState::decode(&bytes).is_err(), "{n}: {place}");
    }
    let mut bytes = good.clone();
    bytes[8] += 1;
    let (code, errors) = with(&bytes);
    assert!(code == 3 && errors.contains("version"), "{code} {errors}");
    fs::write(saved.state(), &good).unwrap();
    File::options().write(true).open(saved.memory()).unwrap().set_len(MEMORY - 4096).unwrap();
    let (code, errors) = refuses(&saved.clone_of());
    assert!(code == 3 && errors.contains("memory file"), "{code} {errors}");
}

#[test]
fn a_snapshot_of_another_kernel_or_layout_never_runs() {
    if !has_kvm() {
        return;
    }
    let saved = saved();
    let good = fs::read(saved.state()).unwrap();
    type Change = fn(&mut MachineState);
    let changes: [(Change, &[&str]); 3] = [
        (|state| state.host_kernel = "5.4.0-another".into(), &["5.4.0-another", "make the snapshot anew"]),
        (|state| state.layout.first_interrupt += 1, &["lays machines out differently"]),
        (|state| state.layout.memory[0].1 -= 4096, &["lays machines out differently"]),
    ];
    for (change, words) in changes {
        let mut state = MachineState::decode(&good).unwrap();
        change(&mut state);
        fs::write(saved.state(), state.encode().unwrap()).unwrap();
        let (code, errors) = refuses(&saved.clone_of());
        assert!(code == 3 && words.iter().all(|word| errors.contains(word)), "{code} {errors}");
    }
}

#[test]
fn what_is_handed_over_must_fit_the_snapshot() {
    if !has_kvm() {
        return;
    }
    let saved = saved();
    let with = |change: &dyn Fn(&mut Value, &Path)| {
        let mut vm = saved.clone_of();
        let folder = tempfile::tempdir().unwrap();
        change(&mut vm, folder.path());
        refuses(&vm)
    };
    let (code, errors) = with(&|vm, _| vm["blocks"] = json!([{"id": "d", "base": "/dev/zero"}]));
    assert!(code == 2 && errors.contains("0 disks"), "{code} {errors}");
    let (code, errors) = with(&|vm, folder| vm["vsock"] = folder.join("vsock").to_str().unwrap().into());
    assert!(code == 2 && errors.contains("no vsock device"), "{code} {errors}");
    let (code, errors) = with(&|vm, _| vm["state"] = "/nonexistent".into());
    assert!(code == 2 && errors.contains("state file"), "{code} {errors}");
}
