//! Rooms that run by themselves: `-d`, `ps`, `logs`, `exec`, `stats`, `stop`, `kill`, `wait`; and what a SIGKILL leaves.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, Instant};

use carrel_tests::{Carrel, Running, fixtures, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const FOREVER: &str =
    "trap 'echo ended; exit 3' TERM; echo begun; echo oops >&2; while :; do sleep 0.1; done";

fn forever(carrel: &Carrel, name: &str) -> String {
    let id = carrel.detach(&["--name", name, &fixtures::busybox(), "sh", "-c", FOREVER]);
    carrel.wait_for_log(name, "begun");
    id
}

/// With the image's template made, so that the next VMM is the next room's.
fn with_template() -> Carrel {
    let carrel = Carrel::new();
    carrel.run(&["run", &fixtures::busybox(), "true"]).succeeds();
    carrel
}

fn state(carrel: &Carrel, name: &str) -> Option<String> {
    let rooms = carrel.rooms(true);
    let room = rooms.iter().find(|room| room["name"] == name)?;
    room["state"].as_str().map(str::to_owned)
}

/// Processes whose command line contains all of these words.
fn processes(words: &[&str]) -> Vec<Pid> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if words.iter().all(|word| line.contains(word)) {
            found.extend(Pid::from_raw(pid));
        }
    }
    found
}

/// The one VMM of a room that runs: tests take turns, so there is no other.
fn vmm() -> Pid {
    wait_for("one VMM", || match processes(&["carrel-vmm", " --owner-fd "])[..] {
        [one] => Some(one),
        _ => None,
    })
}

fn owner(carrel: &Carrel) -> Pid {
    wait_for("one owner", || match processes(&["carrel", " owner ", carrel.home().to_str().unwrap()])[..] {
        [one] => Some(one),
        _ => None,
    })
}

#[test]
fn a_detached_room_is_listed_logged_stopped_and_waited_for() {
    let carrel = Carrel::new();
    let id = forever(&carrel, "desk");
    let rooms = carrel.rooms(false);
    assert_eq!(rooms.len(), 1, "{rooms:?}");
    assert_eq!((&rooms[0]["id"], &rooms[0]["name"]), (&Value::from(id.as_str()), &Value::from("desk")));
    assert_eq!(rooms[0]["state"], "running");
    let table = carrel.run(&["ps"]).succeeds();
    assert!(table.text().starts_with("ROOM"), "{table:?}");
    assert!(table.text().contains("desk"), "{table:?}");
    let ids = carrel.run(&["ps", "-q"]).succeeds();
    assert_eq!(ids.text().lines().count(), 1);

    let log = carrel.run(&["logs", "desk"]).succeeds();
    assert_eq!((log.text(), log.errors()), ("begun\n", "oops\n"));
    let stamped = carrel.run(&["logs", "--timestamps", "desk"]).succeeds();
    for (line, said) in [(stamped.text(), " begun\n"), (stamped.errors(), " oops\n")] {
        assert!(line.starts_with("20") && line.ends_with(said), "{stamped:?}");
    }

    let waiting = carrel.start(&["wait", "desk"]);
    carrel.run(&["stop", "desk"]).succeeds();
    assert_eq!(waiting.done().succeeds().text(), "3\n");
    assert_eq!(state(&carrel, "desk").as_deref(), Some("exited"));
    assert!(carrel.rooms(false).is_empty());
    // Its log outlives it, until it is removed.
    assert_eq!(carrel.run(&["logs", "desk"]).succeeds().text(), "begun\nended\n");
    carrel.run(&["rm", "desk"]).succeeds();
    assert_eq!(state(&carrel, "desk"), None);
}

#[test]
fn logs_follow_until_the_room_ends() {
    let carrel = Carrel::new();
    let script = "for i in 1 2 3 4 5; do echo line $i; sleep 0.3; done";
    carrel.detach(&["--name", "counter", &fixtures::busybox(), "sh", "-c", script]);
    let followed = carrel.run(&["logs", "-f", "counter"]).succeeds();
    assert_eq!(followed.text(), "line 1\nline 2\nline 3\nline 4\nline 5\n");
    let tail = carrel.run(&["logs", "--tail", "2", "counter"]).succeeds();
    assert_eq!(tail.text(), "line 4\nline 5\n");
}

#[test]
fn exec_runs_beside_the_workload_with_streams_status_user_and_directory() {
    let carrel = Carrel::new();
    forever(&carrel, "desk");
    let script = "cat; echo err >&2; id -u; pwd; echo $A $FROM_IMAGE; exit 6";
    let done = carrel
        .run_with_input(
            &["exec", "-i", "-u", "reader", "-w", "/tmp", "-e", "A=1", "desk", "sh", "-c", script],
            b"in\n",
        )
        .ends_with(6);
    assert_eq!(done.text(), "in\n1000\n/tmp\n1 yes\n");
    assert_eq!(done.errors(), "err\n");
    let processes = carrel.run(&["exec", "desk", "ps"]).succeeds();
    assert!(processes.text().contains("sleep") || processes.text().contains("trap"), "{processes:?}");
    carrel.run(&["exec", "desk", "no-such-command"]).complains(127, &["no-such-command"]);
    carrel.run(&["exec", "-u", "nobody-here", "desk", "true"]).complains(125, &["nobody-here"]);
    // None of this disturbed the workload.
    assert_eq!(state(&carrel, "desk").as_deref(), Some("running"));
}

#[test]
fn kill_sends_the_signal_that_was_asked_for() {
    let carrel = Carrel::new();
    let script = "trap 'echo got USR1' USR1; echo begun; while :; do sleep 0.1; done";
    carrel.detach(&["--name", "desk", &fixtures::busybox(), "sh", "-c", script]);
    carrel.wait_for_log("desk", "begun");
    carrel.run(&["kill", "-s", "USR1", "desk"]).succeeds();
    carrel.wait_for_log("desk", "got USR1");
    carrel.run(&["kill", "desk"]).succeeds();
    assert_eq!(carrel.run(&["wait", "desk"]).succeeds().text(), "137\n");
}

#[test]
fn stop_kills_a_workload_that_does_not_listen() {
    let carrel = Carrel::new();
    let script = "trap '' TERM; echo begun; while :; do sleep 0.1; done";
    carrel.detach(&["--name", "deaf", &fixtures::busybox(), "sh", "-c", script]);
    carrel.wait_for_log("deaf", "begun");
    let begun = Instant::now();
    carrel.run(&["stop", "-t", "2s", "deaf"]).succeeds();
    assert!(begun.elapsed() >= Duration::from_secs(2), "it was given its time");
    assert_eq!(carrel.run(&["wait", "deaf"]).succeeds().text(), "137\n");
}

#[test]
fn kill_goes_on_past_rooms_that_have_ended() {
    let carrel = Carrel::new();
    carrel.detach(&["--name", "over", &fixtures::busybox(), "true"]);
    carrel.run(&["wait", "over"]).succeeds();
    forever(&carrel, "desk");
    let done = carrel.run(&["kill", "over", "desk"]).complains(1, &["over", "ended", "1 of 2"]);
    assert_eq!(done.text(), "desk\n");
    assert_eq!(carrel.run(&["wait", "desk"]).succeeds().text(), "137\n");
}

#[test]
fn a_detached_shell_with_a_terminal_waits_for_keys_that_nobody_types() {
    let carrel = Carrel::new();
    carrel.detach(&["-it", "--name", "shell", &fixtures::busybox(), "sh"]);
    let input = carrel.run(&["exec", "shell", "readlink", "/proc/2/fd/0"]).succeeds();
    assert!(input.text().starts_with("/dev/pts/"), "{input:?}");
    assert_eq!(state(&carrel, "shell").as_deref(), Some("running"));
    carrel.run(&["stop", "-t", "0", "shell"]).succeeds();
    // What a terminal shows is in the log; without one, input that is open has nothing to read.
    carrel.detach(&["-t", "--name", "sized", &fixtures::busybox(), "sh", "-c", "stty size; echo oops >&2"]);
    carrel.run(&["wait", "sized"]).succeeds();
    assert_eq!(carrel.run(&["logs", "sized"]).succeeds().text(), "24 80\r\noops\r\n");
    let script = "timeout 1 cat; echo status $?";
    carrel.detach(&["-i", "--name", "piped", &fixtures::busybox(), "sh", "-c", script]);
    carrel.run(&["wait", "piped"]).succeeds();
    let log = carrel.run(&["logs", "piped"]).succeeds();
    assert!(log.text().contains("status 143\n"), "{log:?}");
}

#[test]
fn a_stopped_owner_is_named_and_not_waited_for() {
    let carrel = Carrel::new();
    forever(&carrel, "desk");
    let owner = owner(&carrel);
    kill_process(owner, Signal::STOP).unwrap();
    let begun = Instant::now();
    let name = format!("process {}", owner.as_raw_nonzero());
    for line in [&["stop", "desk"][..], &["stats", "--no-stream", "desk"]] {
        let mut command = carrel.command(line);
        Running::spawn(command.env("CARREL_PATIENCE", "0.2")).done().complains(1, &[&name]);
    }
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    kill_process(owner, Signal::CONT).unwrap();
    // The stop was heard after all.
    assert_eq!(carrel.run(&["wait", "desk"]).succeeds().text(), "3\n");
}

#[test]
fn a_stopped_vmm_ends_with_its_room() {
    let carrel = Carrel::new();
    let image = fixtures::busybox();
    let patient = |line: &[&str]| Running::spawn(carrel.command(line).env("CARREL_PATIENCE", "0.5")).done();
    patient(&["run", "-d", "--name", "frozen", &image, "sleep", "1000"]).succeeds();
    kill_process(vmm(), Signal::STOP).unwrap();
    patient(&["stop", "-t", "0", "frozen"]).succeeds();
    assert_eq!(state(&carrel, "frozen").as_deref(), Some("exited"));
}

#[test]
fn stats_show_what_a_room_uses_now() {
    let carrel = Carrel::new();
    carrel.detach(&["--name", "busy", &fixtures::busybox(), "sh", "-c", "echo begun; while :; do :; done"]);
    carrel.wait_for_log("busy", "begun");
    let cpu = || {
        let stats = carrel.json(&["stats", "--json", "--no-stream", "busy"]);
        let cpu = &stats[0]["guest"]["cpu"];
        cpu["user_us"].as_u64().unwrap() + cpu["system_us"].as_u64().unwrap()
    };
    let before = cpu();
    wait_for("more CPU time", || (cpu() > before).then_some(()));
    let table = carrel.run(&["stats", "--no-stream"]).succeeds();
    assert!(table.text().contains("busy"), "{table:?}");
}

#[test]
fn two_rooms_do_not_see_each_other() {
    let carrel = Carrel::cold();
    let image = fixtures::busybox();
    let script = "echo $0 > /work/mine; echo begun; while :; do sleep 0.1; done";
    for name in ["north", "south"] {
        carrel.detach(&["--name", name, &image, "sh", "-c", script, name]);
        carrel.wait_for_log(name, "begun");
    }
    for (name, other) in [("north", "south"), ("south", "north")] {
        let seen = carrel.run(&["exec", name, "sh", "-c", "cat /work/mine; ps"]).succeeds();
        assert!(seen.text().starts_with(&format!("{name}\n")), "{seen:?}");
        assert!(seen.text().contains(&format!("begun; while :; do sleep 0.1; done {name}\n")), "{seen:?}");
        assert!(!seen.text().contains(other), "{seen:?}");
    }
    let hostnames =
        ["north", "south"].map(|name| carrel.run(&["exec", name, "hostname"]).succeeds().text().to_owned());
    assert_ne!(hostnames[0], hostnames[1]);
    let boots: Vec<String> = ["north", "south"]
        .map(|name| {
            carrel.run(&["exec", name, "cat", "/proc/sys/kernel/random/boot_id"]).succeeds().text().to_owned()
        })
        .into();
    assert_ne!(boots[0], boots[1], "each has a kernel of its own");
}

#[test]
fn names_are_unique_and_unknown_rooms_are_named() {
    let carrel = Carrel::new();
    let id = forever(&carrel, "desk");
    carrel.run(&["run", "-d", "--name", "desk", &fixtures::busybox()]).complains(125, &["desk"]);
    carrel.run(&["run", "-d", "--name", "../desk", &fixtures::busybox()]).complains(125, &["name"]);
    for command in [
        &["logs", "nobody"][..],
        &["stop", "nobody"],
        &["kill", "nobody"],
        &["stats", "--no-stream", "nobody"],
    ] {
        carrel.run(command).complains(1, &["nobody"]);
    }
    carrel.run(&["exec", "nobody", "true"]).complains(125, &["nobody"]);
    // The beginning of an id is enough.
    let done = carrel.run(&["exec", &id[..6], "echo", "found"]).succeeds();
    assert_eq!(done.text(), "found\n");
}

#[test]
fn a_killed_vmm_is_noticed_and_its_room_swept_up() {
    let carrel = with_template();
    let running = carrel.start(&["run", &fixtures::busybox(), "sh", "-c", "echo begun; sleep 1000"]);
    kill_process(vmm(), Signal::KILL).unwrap();
    running.done().complains(125, &["VMM"]);
    carrel.expect_nothing_left();
}

/// Within a second on hardware (DESIGN §8, docs/host.md). In an emulated host the death of a VMM alone, which is KVM's teardown, takes
/// some 300 ms, the owner's half as much, and whatever else the machine does comes on top.
const NOTICED: Duration = Duration::from_secs(5);

#[test]
fn a_killed_vmm_is_noticed_by_its_owner_at_once() {
    let carrel = Carrel::new();
    let id = forever(&carrel, "desk");
    let record = carrel.home().join("rooms").join(&id).join("state.json");
    let phase = || -> Value {
        let record = std::fs::read(&record).unwrap();
        serde_json::from_slice::<Value>(&record).unwrap()["phase"].take()
    };
    assert_eq!(phase(), "running");
    let vmm = vmm();
    let killed = Instant::now();
    kill_process(vmm, Signal::KILL).unwrap();
    // The owner's own word, by its record: no command's start is in this.
    while phase() != "ended" {
        assert!(killed.elapsed() < NOTICED, "the owner's record still says {}", phase());
        std::thread::sleep(Duration::from_millis(5));
    }
    println!("noticed, swept up and written down after {:?}", killed.elapsed());
    assert_eq!(carrel.run(&["wait", "desk"]).succeeds().text(), "125\n");
    carrel.expect_nothing_left();
}

#[test]
fn a_killed_vmm_hurts_no_other_room() {
    let carrel = Carrel::new();
    forever(&carrel, "survivor");
    let survivor = vmm();
    forever(&carrel, "victim");
    let victim = wait_for("the other VMM", || {
        processes(&["carrel-vmm", " --owner-fd "]).into_iter().find(|pid| *pid != survivor)
    });
    kill_process(victim, Signal::KILL).unwrap();
    wait_for("the victim's end", || (state(&carrel, "victim").as_deref() != Some("running")).then_some(()));
    let done = carrel.run(&["exec", "survivor", "echo", "alive"]).succeeds();
    assert_eq!(done.text(), "alive\n");
}

#[test]
fn a_killed_command_leaves_nothing_that_the_next_does_not_sweep_up() {
    let carrel = with_template();
    let running = carrel.start(&["run", &fixtures::busybox(), "sh", "-c", "echo begun; sleep 1000"]);
    let _ = vmm();
    running.signal(Signal::KILL);
    running.done().ends_with(137);
    wait_for("the room's end", || carrel.rooms(false).is_empty().then_some(()));
    carrel.run(&["ps"]).succeeds();
    carrel.expect_nothing_left();
}

#[test]
fn a_killed_owner_leaves_nothing_that_the_next_command_does_not_sweep_up() {
    let carrel = Carrel::new();
    forever(&carrel, "orphan");
    kill_process(owner(&carrel), Signal::KILL).unwrap();
    carrel.run(&["ps"]).succeeds();
    assert_ne!(state(&carrel, "orphan").as_deref(), Some("running"));
    carrel.expect_nothing_left();
}

#[test]
fn a_command_killed_together_with_its_owner_is_swept_up() {
    let carrel = with_template();
    let running: Running = carrel.start(&["run", &fixtures::busybox(), "sh", "-c", "sleep 1000"]);
    let (vmm, owner) = (vmm(), owner(&carrel));
    running.signal(Signal::KILL);
    for pid in [owner, vmm] {
        // Each may have gone with the other.
        let _ = kill_process(pid, Signal::KILL);
    }
    running.done().ends_with(137);
    carrel.run(&["ps"]).succeeds();
    carrel.expect_nothing_left();
}
