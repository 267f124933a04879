//! The harness itself: a room that runs is seen in every way in which one that was left behind would be, and in which one that hangs
//! would be told of. Without this, a check that sees nothing looks like a room that leaves nothing.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use carrel_tests::leftovers::Leftovers;
use carrel_tests::{Carrel, evidence, fixtures, processes};

#[test]
fn a_room_that_runs_is_seen_in_every_way_that_leftovers_are() {
    let carrel = Carrel::new();
    let before = Leftovers::now(carrel.home(), carrel.store());
    let room = carrel.detach(&["-m", "128m", &fixtures::busybox(), "sleep", "1000"]);
    let seen = Leftovers::now(carrel.home(), carrel.store()).beyond(&before);
    let has = |kind: &str, word: &str| {
        seen.lines().any(|line| line.trim().starts_with(kind) && line.contains(word))
    };
    for (kind, word) in [
        ("process", "carrel owner"),
        ("process", "carrel-vmm"),
        ("cgroup", "carrel"),
        ("socket", "owner.sock"),
        ("room", &room[..12]),
    ] {
        assert!(has(kind, word), "no {kind} with '{word}' in\n{seen}");
    }
    carrel.run(&["kill", &room]).succeeds();
    carrel.expect_nothing_left();
}

#[test]
fn a_room_that_runs_is_told_with_its_threads_counters_and_record() {
    let carrel = Carrel::new();
    let room = carrel.detach(&["-m", "128m", &fixtures::busybox(), "sh", "-c", "while :; do :; done"]);
    let vmm = processes::all().into_iter().find(|process| process.line.contains("carrel-vmm")).unwrap();
    let told = evidence::gathered(Some(carrel.home()));
    println!("{told}");
    for part in [
        format!("process {} {}", vmm.pid, vmm.line),
        "ticks in 1 s".into(),
        "wchan".into(),
        "KVM's counters of ".into(),
        " exits ".into(),
        format!("\"id\": \"{room}\""),
        "owner.log".into(),
        "state.json".into(),
        "MemAvailable".into(),
    ] {
        assert!(told.contains(&part), "no '{part}' in\n{told}");
    }
    // The guest spins: one of the VMM's threads takes CPU.
    let spins = |line: &str| {
        let took = line.split(" took ").nth(1)?.split(' ').next()?;
        took.split('+').map(str::parse::<u64>).sum::<Result<u64, _>>().ok()
    };
    assert!(told.lines().filter_map(spins).any(|ticks| ticks > 10), "{told}");
    carrel.run(&["kill", &room]).succeeds();
}
