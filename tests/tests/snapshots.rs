//! Machines that are saved while they work, and their clones: nothing of memory, disk, clock and conversation is lost, said twice or shared.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};

use carrel_protocol::vmm::SnapshotKind;
use carrel_tests::Carrel;
use carrel_tests::machine::{Machine, Saved};
use carrel_tests::times;
use serde_json::Value;

const WORKER: &str = env!("CARGO_BIN_EXE_carrel-tests-worker");

fn kernel(carrel: &Carrel) -> PathBuf {
    let configuration: Value = carrel.json(&["--print-config"]);
    Path::new(configuration["assets"].as_str().unwrap()).join("vmlinux")
}

#[test]
fn a_machine_that_is_paused_and_saved_again_and_again_under_load_loses_nothing() {
    let carrel = Carrel::new();
    let folder = carrel.scratch();
    let machine = Machine::boot(&kernel(&carrel), Path::new(WORKER), &folder.join("machine"), 1, true);
    let mut talk = machine.dialled();
    for round in 0..times(10, 100) {
        talk.echo(5 + round % 7);
        machine.pause();
        let kind = if round % 5 == 0 { SnapshotKind::Full } else { SnapshotKind::Differential };
        machine.save(&folder.join("saved"), kind);
        machine.resume();
    }
    talk.echo(50);
    // The last ones were differentials over a full one: together they are the machine, whose clone looks at every page and block.
    machine.pause();
    machine.save(&folder.join("saved"), SnapshotKind::Differential);
    let next = talk.next();
    drop((talk, machine));
    let clone = Machine::restore(&Saved(folder.join("saved")), &folder.join("clone"));
    let mut talk = clone.dialled();
    assert!((next - 1..=next + 1).contains(&talk.hello.next), "{:?} after {next}", talk.hello);
    talk.echo(100);
}

#[test]
fn clones_of_a_working_machine_go_on_each_with_memory_and_disk_of_its_own() {
    let carrel = Carrel::new();
    let folder = carrel.scratch();
    let saved = folder.join("saved");
    let machine = Machine::boot(&kernel(&carrel), Path::new(WORKER), &folder.join("machine"), 2, false);
    let mut talk = machine.dialled();
    talk.echo(100);
    machine.pause();
    machine.save(&saved, SnapshotKind::Full);
    let next = talk.next();
    drop((talk, machine));
    let saved = Saved(saved);
    let clones: Vec<Machine> =
        (0..3).map(|n| Machine::restore(&saved, &folder.join(format!("clone{n}")))).collect();
    let mut hellos = Vec::new();
    for (n, clone) in clones.iter().enumerate() {
        let mut talk = clone.dialled();
        hellos.push(talk.hello);
        talk.echo(30 + 20 * n);
    }
    for hello in &hellos {
        // What was under way when the connection ended, there or back, is sent again.
        assert!((next - 1..=next + 1).contains(&hello.next), "{hello:?} after {next}");
    }
    // The clock goes on from where it stood: the clones' birth is seconds apart, their time is not.
    let clocks = hellos.iter().map(|hello| hello.clock_ns);
    let (first, last) = (clocks.clone().min().unwrap(), clocks.max().unwrap());
    assert!(last - first < 5_000_000_000, "{hellos:?}");
    // And a clone of a clone, from a differential over the template's memory.
    drop(clones);
    let clone = Machine::restore_tracked(&saved, &folder.join("parent"));
    let mut talk = clone.dialled();
    talk.echo(25);
    clone.pause();
    let second = folder.join("second");
    fs::create_dir(&second).unwrap();
    let whole = fs::copy(saved.0.join("memory"), second.join("memory")).unwrap();
    let saved = clone.save(&second, SnapshotKind::Differential);
    assert!(saved.memory_bytes < whole / 2, "{saved:?}");
    let next = talk.next();
    drop((talk, clone));
    let grandchild = Machine::restore(&Saved(folder.join("second")), &folder.join("grandchild"));
    let mut talk = grandchild.dialled();
    assert!((next - 1..=next + 1).contains(&talk.hello.next));
    talk.echo(25);
}
