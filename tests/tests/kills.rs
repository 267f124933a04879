//! SIGKILL at every moment of a room's life: of the command, of the owner before and after it wrote down what it has, of the VMM before and
//! after it boots, and of the doctor. What is left then is gone after the next command, whichever that is.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use carrel_tests::chance::Chance;
use carrel_tests::{Carrel, Running, fixtures};
use rustix::process::{Pid, Signal, kill_process};

/// From a process's first sight to its end, ms: close together where an owner or a VMM is being set up.
const MOMENTS: [u64; 11] = [0, 2, 5, 10, 20, 40, 80, 160, 320, 800, 2000];

fn room(carrel: &Carrel) -> Running {
    carrel.start(&["run", "-m", "128m", &fixtures::busybox(), "sh", "-c", "sleep 1000"])
}

/// The next command sweeps, and after it nothing is there.
fn expect_swept(carrel: &Carrel, killed: &str, moment: u64) {
    carrel.run(&["ps", "-a"]).succeeds();
    println!("{killed} killed after {moment} ms");
    carrel.expect_nothing_left();
    let rooms = fs::read_dir(carrel.home().join("rooms")).map_or(0, Iterator::count);
    assert_eq!(rooms, 0, "{killed} killed after {moment} ms left a room's directory");
}

/// Processes whose command line has all these words and whose parent is this one, where one is asked for.
fn processes(words: &[&str], parent: Option<Pid>) -> Vec<Pid> {
    let is_one = |pid: &str| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let of = parent.map_or(String::new(), |parent| format!("PPid:\t{}\n", parent.as_raw_nonzero()));
        words.iter().all(|word| line.contains(word)) && status.contains(&of)
    };
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|pid| is_one(pid)).filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

/// Waits, with hardly a pause, for a process.
fn appears(words: &[&str], parent: Option<Pid>) -> Pid {
    let deadline = Instant::now() + carrel_tests::patience();
    loop {
        if let Some(pid) = processes(words, parent).first() {
            return *pid;
        }
        assert!(Instant::now() < deadline, "waited in vain for {words:?}");
        sleep(Duration::from_micros(200));
    }
}

fn owner(carrel: &Carrel) -> Pid {
    appears(&["carrel", " owner ", carrel.home().to_str().unwrap()], None)
}

#[test]
fn a_command_killed_at_any_moment() {
    let carrel = Carrel::cold();
    for moment in MOMENTS {
        let running = room(&carrel);
        sleep(Duration::from_millis(moment));
        running.signal(Signal::KILL);
        running.done().ends_with(137);
        expect_swept(&carrel, "the command", moment);
    }
}

#[test]
fn an_owner_killed_at_any_moment() {
    let carrel = Carrel::cold();
    for moment in MOMENTS {
        let running = room(&carrel);
        let owner = owner(&carrel);
        sleep(Duration::from_millis(moment));
        let _ = kill_process(owner, Signal::KILL);
        running.done().complains(125, &["owner"]);
        expect_swept(&carrel, "the owner", moment);
    }
}

#[test]
fn a_vmm_killed_at_any_moment() {
    let carrel = Carrel::cold();
    for moment in MOMENTS {
        let running = room(&carrel);
        // As soon as it is born it is named as its owner is, before it is another program.
        let vmm = appears(&[], Some(owner(&carrel)));
        sleep(Duration::from_millis(moment));
        let _ = kill_process(vmm, Signal::KILL);
        running.done().complains(125, &[]);
        expect_swept(&carrel, "the VMM", moment);
    }
}

/// As a host that is too busy does it: longer than the two seconds after which Linux gives a vsock connection up.
#[test]
fn a_vmm_stopped_for_a_while_at_any_moment_goes_on() {
    const WHILE: Duration = Duration::from_millis(2500);
    let carrel = Carrel::cold();
    let mut chance = Chance::new();
    for nth in 0..carrel_tests::times(5, 100) {
        let running = carrel.start(&["run", "-m", "128m", &fixtures::busybox(), "echo", "there"]);
        let vmm = appears(&[], Some(owner(&carrel)));
        // Most dials come late in a start.
        let moment = if nth == 0 { 0 } else { 500 + chance.below(3000) };
        sleep(Duration::from_millis(moment.try_into().unwrap()));
        println!("stopped {moment} ms after its birth");
        let _ = kill_process(vmm, Signal::STOP);
        sleep(WHILE);
        let _ = kill_process(vmm, Signal::CONT);
        assert_eq!(running.done().succeeds().text(), "there\n");
    }
    carrel.expect_nothing_left();
}

#[test]
fn command_owner_and_vmm_killed_at_once_at_any_moment() {
    let carrel = Carrel::cold();
    for moment in MOMENTS {
        let running = room(&carrel);
        let owner = owner(&carrel);
        sleep(Duration::from_millis(moment));
        // All three are stopped first, so that none sees another's end.
        let vmm = processes(&[], Some(owner));
        let all: Vec<Pid> = [running.pid(), owner].into_iter().chain(vmm).collect();
        for signal in [Signal::STOP, Signal::KILL] {
            for pid in &all {
                let _ = kill_process(*pid, signal);
            }
        }
        running.done().ends_with(137);
        expect_swept(&carrel, "all", moment);
    }
}

#[test]
fn a_doctor_killed_at_any_moment() {
    let carrel = Carrel::cold();
    for moment in MOMENTS {
        let running = carrel.start(&["doctor"]);
        sleep(Duration::from_millis(moment));
        running.signal(Signal::KILL);
        let _ = running.done();
        expect_swept(&carrel, "the doctor", moment);
    }
}
