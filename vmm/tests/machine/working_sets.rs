//! Working sets: written by one clone, had ahead by others, and believed by none.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use carrel_protocol::vmm::{Booted, Descriptor, FromOwner, FromVmm, RecordWorkingSet};
use carrel_vmm::working_set::{Run, WorkingSet};

use super::prepared::{Owned, borrowed, restore, saved};
use super::run::has_kvm;
use super::snapshots::{COUNTER, Saved, assert_counts, counting};

const PAGES: u64 = (64 << 20) / 4096;

/// A clone that goes on with this working set, after it has said so many numbers.
fn clone_with(saved: &Saved, next: u8, working_set: Option<&File>) -> (Owned, Booted) {
    let vmm = Owned::prepared(1, 64);
    let (mut restore, mut files, mut heard) = restore(saved);
    if let Some(file) = working_set {
        restore.vm.working_set = Some(Descriptor(3));
        files.push(file.try_clone().unwrap().into());
    }
    vmm.say(restore, &borrowed(&files));
    let FromVmm::Booted(booted) = vmm.hear() else { panic!("not booted") };
    let mut said = [0; 50];
    heard.read_exact(&mut said).unwrap();
    assert_counts(&said, next);
    (vmm, booted)
}

fn record(vmm: &Owned) -> File {
    let file = tempfile::tempfile().unwrap();
    vmm.say(RecordWorkingSet { file: Descriptor(0) }, &[file.as_fd()]);
    assert!(matches!(vmm.hear(), FromVmm::Done(_)));
    file
}

fn covers(runs: &[Run], page: u32) -> bool {
    runs.iter().any(|run| (run.first..run.first + run.pages).contains(&page))
}

#[test]
fn what_one_clone_touched_others_have_ahead() {
    if !has_kvm() {
        return;
    }
    let (saved, next) = saved();
    let (first, booted) = clone_with(&saved, next, None);
    assert!(booted.timeline.iter().all(|mark| !mark.done.starts_with("working set")));
    let file = record(&first);
    let set = WorkingSet::read(&file, PAGES).unwrap();
    assert!(covers(set.written(), COUNTER >> 12), "{set:?}: where it counts");
    assert!(covers(set.read_only(), 0x100), "{set:?}: its code");
    let (second, booted) = clone_with(&saved, next, Some(&file));
    assert_eq!(booted.notice, None);
    assert!(booted.timeline.iter().any(|mark| mark.done == "working set"), "{booted:?}");
    // All that it has now is what it was given, and what it was given is what it touches.
    let again = WorkingSet::read(&record(&second), PAGES).unwrap();
    assert!(covers(again.written(), COUNTER >> 12));
}

#[test]
fn one_that_is_damaged_or_of_another_memory_is_named_and_not_used() {
    if !has_kvm() {
        return;
    }
    let (saved, next) = saved();
    let good = record(&clone_with(&saved, next, None).0);
    let damaged = |change: &dyn Fn(&File)| {
        let file = tempfile::tempfile().unwrap();
        let mut bytes = vec![0; usize::try_from(good.metadata().unwrap().len()).unwrap()];
        good.read_exact_at(&mut bytes, 0).unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        change(&file);
        let (_vmm, booted) = clone_with(&saved, next, Some(&file));
        assert!(booted.timeline.iter().all(|mark| !mark.done.starts_with("working set")), "it was used");
        booted.notice.unwrap()
    };
    let notice = damaged(&|file| file.write_all_at(b"x", 50).unwrap());
    assert!(notice.contains("checksum"), "{notice}");
    let notice = damaged(&|file| file.set_len(20).unwrap());
    assert!(notice.contains("cut short"), "{notice}");
    let notice = damaged(&|file| {
        file.set_len(0).unwrap();
        file.write_all_at(&WorkingSet::new(PAGES * 2).encode(), 0).unwrap();
    });
    assert!(notice.contains("of a memory of"), "{notice}");
}

#[test]
fn a_booted_machine_has_none() {
    if !has_kvm() {
        return;
    }
    let original = counting(1, |_| {});
    let file = tempfile::tempfile().unwrap();
    let request = FromOwner::from(RecordWorkingSet { file: Descriptor(0) });
    original.owner.send(&request, &[file.as_fd()]).unwrap();
    let FromVmm::Refused(refused) = original.owner.receive_first::<FromVmm>().unwrap().message else {
        panic!("not refused")
    };
    assert!(refused.reason.contains("does not go on from a snapshot"), "{}", refused.reason);
    assert_eq!(file.metadata().unwrap().len(), 0);
    original.stop();
}
