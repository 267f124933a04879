//! The resident owner: rooms that it owns behave as others do, start in VMMs that it has ready, and end with it.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use carrel_tests::{Carrel, Done, Running, fixtures, wait_for};
use rustix::process::Signal;
use serde_json::Value;

/// Small, so that saving one takes seconds under emulation.
const MEMORY: &str = "128m";

fn status(carrel: &Carrel) -> Value {
    carrel.json(&["pool", "status", "--json"])
}

fn count(status: &Value, name: &str) -> u64 {
    status[name].as_u64().unwrap_or_else(|| panic!("no {name} in {status}"))
}

/// VMMs of rooms with this test's memory that are ready.
fn ready(status: &Value) -> u64 {
    let kinds = status["ready"].as_array().unwrap();
    kinds.iter().filter(|kind| kind["memory_mib"] == 128).map(|kind| count(kind, "count")).sum()
}

/// A resident owner that listens.
fn pool(carrel: &Carrel, options: &[&str]) -> Running {
    let line: Vec<&str> = ["pool"].into_iter().chain(options.iter().copied()).collect();
    let pool = carrel.start(&line);
    wait_for("the resident owner", || (carrel.run(&["pool", "status"]).status == 0).then_some(()));
    pool
}

fn run(carrel: &Carrel, script: &str) -> Done {
    carrel.run(&["run", "-m", MEMORY, "--timeline", &fixtures::busybox(), "sh", "-c", script])
}

fn ends(carrel: &Carrel, pool: Running) {
    pool.signal(Signal::TERM);
    let done = pool.done().succeeds();
    assert_eq!(done.errors(), "", "it had nothing to complain about");
    carrel.run(&["pool", "status"]).complains(1, &["no resident owner"]);
    carrel.expect_nothing_left();
}

#[test]
fn rooms_go_on_in_vmms_that_are_ready_and_are_as_any_others() {
    let carrel = Carrel::new();
    let pool = pool(&carrel, &["--ready", "2"]);
    // The first makes the template; a VMM of its kind is prepared from then on.
    run(&carrel, "true").succeeds();
    for n in 0..3 {
        wait_for("a VMM that is ready", || (ready(&status(&carrel)) == 2).then_some(()));
        let done = run(&carrel, "echo out; echo err >&2; hostname; exit 7").ends_with(7);
        assert!(done.text().starts_with("out\n") && done.errors().contains("err\n"), "{done:?}");
        for step in ["request read", "workload started", "first output"] {
            assert!(done.errors().contains(step), "{step}: {done:?}");
        }
        assert!(!done.errors().contains("owner started"), "it has no owner of its own: {done:?}");
        assert_eq!(count(&status(&carrel), "from_shelf"), n + 1);
    }
    // What is found by its directory is found as ever.
    let sleeping =
        carrel.start(&["run", "-m", MEMORY, "--name", "desk", &fixtures::busybox(), "sleep", "1000"]);
    wait_for("the room", || (carrel.run(&["exec", "desk", "true"]).status == 0).then_some(()));
    let promised = status(&carrel);
    assert_eq!((count(&promised, "rooms"), count(&promised, "starting")), (1, 0), "{promised}");
    assert!(count(&promised, "memory_promised") >= 128 << 20, "{promised}");
    let taken = count(&promised, "memory_taken");
    assert!((1 << 20..128 << 20).contains(&taken), "{promised}");
    let used = carrel.json(&["stats", "--no-stream", "--json", "desk"]);
    assert!(used.to_string().contains("pss"), "{used}");
    carrel.run(&["stop", "desk"]).succeeds();
    sleeping.done().ends_with(143);
    wait_for("its promise", || (count(&status(&carrel), "memory_promised") == 0).then_some(()));
    ends(&carrel, pool);
}

#[test]
fn a_room_that_outlives_its_command_has_an_owner_of_its_own_and_so_has_every_room_where_it_is_asked_for() {
    let carrel = Carrel::new();
    let pool = pool(&carrel, &["--ready", "0"]);
    let room = carrel.detach(&["-m", MEMORY, &fixtures::busybox(), "sleep", "1000"]);
    pool.signal(Signal::KILL);
    pool.done().ends_with(137);
    carrel.run(&["exec", &room, "true"]).succeeds();
    carrel.run(&["rm", "--force", &room]).succeeds();
    let pool = self::pool(&carrel, &[]);
    let mut alone = carrel.command(&["run", "-m", MEMORY, "--timeline", &fixtures::busybox(), "true"]);
    let done = Running::spawn(alone.env("CARREL_POOL", "off")).done().succeeds();
    assert!(done.errors().contains("owner started"), "{done:?}");
    assert_eq!(count(&status(&carrel), "given"), 0);
    ends(&carrel, pool);
}

#[test]
fn a_killed_one_takes_its_rooms_with_it_and_leaves_nothing_that_the_next_command_does_not_sweep_up() {
    let carrel = Carrel::new();
    let pool = pool(&carrel, &["--ready", "2"]);
    let rooms: Vec<Running> = (0..2)
        .map(|n| {
            let name = format!("desk-{n}");
            let line = ["run", "-m", MEMORY, "--name", &name, &fixtures::busybox(), "sleep", "1000"];
            let room = carrel.start(&line);
            wait_for("the room", || (carrel.run(&["exec", &name, "true"]).status == 0).then_some(()));
            room
        })
        .collect();
    pool.signal(Signal::KILL);
    pool.done().ends_with(137);
    for room in rooms {
        room.done().complains(125, &["owner"]);
    }
    carrel.run(&["ps"]).succeeds();
    carrel.expect_nothing_left();
    // Without it all goes on as before, and another one finds its socket in nobody's way: whoever finds that nobody listens removes it.
    assert!(carrel.home().join("pool.sock").exists());
    run(&carrel, "true").succeeds();
    assert!(!carrel.home().join("pool.sock").exists());
    ends(&carrel, self::pool(&carrel, &[]));
}

#[test]
fn told_to_end_it_waits_for_its_rooms_and_takes_no_others() {
    let carrel = Carrel::new();
    let mut pool = pool(&carrel, &["--ready", "1"]);
    run(&carrel, "true").succeeds();
    wait_for("a VMM that is ready", || (ready(&status(&carrel)) == 1).then_some(()));
    let mut command = carrel.command(&["run", "-i", "-m", MEMORY, &fixtures::busybox(), "cat"]);
    let mut room = Running::spawn(command.stdin(std::process::Stdio::piped()));
    let stdin = room.stdin();
    // In a VMM that was ready: whoever prepared it has no other work left, and must not go before it.
    wait_for("the room", || (count(&status(&carrel), "from_shelf") == 1).then_some(()));
    pool.signal(Signal::TERM);
    wait_for("the end of its socket", || (!carrel.home().join("pool.sock").exists()).then_some(()));
    let done = run(&carrel, "true").succeeds();
    assert!(done.errors().contains("owner started"), "{done:?}");
    assert!(!pool.has_ended(), "a room is there still");
    drop(stdin);
    room.done().succeeds();
    pool.done().succeeds();
}

#[test]
fn what_the_host_has_not_is_not_promised() {
    let carrel = Carrel::new();
    run(&carrel, "true").succeeds();
    let pool = pool(&carrel, &["--memory-overcommit", "0.1"]);
    let limit = count(&status(&carrel), "memory_limit") >> 20;
    let more = format!("{}m", limit + 64);
    carrel
        .run(&["run", "-m", &more, &fixtures::busybox(), "true"])
        .complains(125, &["was not begun", "promised", "--memory-overcommit"]);
    assert_eq!(count(&status(&carrel), "refused"), 1);
    // There is room for one of these at a time: who heard of one's end is not refused the next.
    let most = format!("{}m", limit * 2 / 3);
    for _ in 0..3 {
        carrel.run(&["run", "--cold", "-m", &most, &fixtures::busybox(), "true"]).succeeds();
    }
    let now = status(&carrel);
    assert_eq!((count(&now, "refused"), count(&now, "memory_promised")), (1, 0));
    ends(&carrel, pool);
}

#[test]
fn a_service_manager_holds_its_socket_and_starts_it_when_somebody_comes() {
    let carrel = Carrel::new();
    run(&carrel, "true").succeeds();
    let path = carrel.home().join("pool.sock");
    let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
    let flags = rustix::net::SocketFlags::empty();
    let (family, kind) = (rustix::net::AddressFamily::UNIX, rustix::net::SocketType::SEQPACKET);
    let socket = rustix::net::socket_with(family, kind, flags, None).unwrap();
    rustix::net::bind(&socket, &address).unwrap();
    rustix::net::listen(&socket, 16).unwrap();
    // A command comes first, as it would to systemd; the resident owner then finds it waiting. Without `exec` in between the number of the process is not known.
    let waiting = carrel.start(&["run", "-m", MEMORY, "--timeline", &fixtures::busybox(), "true"]);
    let line = format!(
        "exec 3<&{}; export LISTEN_FDS=1 LISTEN_PID=$$; exec \"${{CARREL_BIN:-carrel}}\" pool --idle 2s --ready 1",
        socket.as_raw_fd()
    );
    let mut by_manager = std::process::Command::new("bash");
    by_manager.args(["-c", &line]);
    let surroundings = carrel.command(&[]);
    by_manager.envs(surroundings.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let begun = Instant::now();
    let pool = by_manager.spawn().unwrap();
    let done = waiting.done().succeeds();
    assert!(done.errors().contains("request read"), "{done:?}");
    // Idle, it ends by itself, and the socket stays its manager's.
    let mut pool = Running::from(pool);
    wait_for("its end", || pool.has_ended().then_some(()));
    pool.done().succeeds();
    assert!(begun.elapsed() >= Duration::from_secs(2));
    assert!(path.exists());
    drop(socket);
    fs::remove_file(&path).unwrap();
    run(&carrel, "true").succeeds();
}

#[test]
fn a_functions_room_waits_for_its_next_event_and_for_nothing_else() {
    let carrel = Carrel::new();
    let pool = pool(&carrel, &["--ready", "1", "--memory-overcommit", "0.2"]);
    let zip = fixtures::path("rust-bootstrap").join("bootstrap.zip");
    let invoke = |event: &str, more: &[&str]| {
        let line = ["invoke", "--zip", zip.to_str().unwrap(), "--runtime", "provided", "--timeout", "600s"];
        carrel.run(&[&line[..], &["--event", event], more].concat())
    };
    let is_new = |done: &Done| done.errors().contains("INIT_START");
    let waits = || count(&status(&carrel), "warm");
    let done = invoke(r#"{"n": 1}"#, &[]).succeeds();
    assert!(is_new(&done) && done.errors().contains("Init Duration"), "{done:?}");
    assert_eq!((waits(), carrel.rooms(false).len()), (1, 1));
    // The same function: no start, its own log and its own report.
    let done = invoke(r#"{"n": 2}"#, &["--timeline"]).succeeds();
    let answer: Value = serde_json::from_str(done.text()).unwrap();
    assert_eq!(answer["event"]["n"], 2);
    assert!(!is_new(&done) && !done.errors().contains("Init Duration"), "{done:?}");
    for said in ["start: warm", "the bootstrap was asked {\"n\":2}", "START RequestId", "REPORT RequestId"] {
        assert!(done.errors().contains(said), "{said}: {done:?}");
    }
    assert_eq!((waits(), count(&status(&carrel), "woken")), (1, 1));
    // Another variable is another function; events that share nothing leave nothing.
    assert!(is_new(&invoke("{}", &["--env", "A=1"]).succeeds()));
    assert!(is_new(&invoke("{}", &["--isolation", "event"]).succeeds()));
    assert_eq!(waits(), 2);
    // A runtime that ends takes its room along.
    assert!(!is_new(&invoke(r#"{"do": "exit"}"#, &[]).ends_with(3)));
    assert_eq!(waits(), 1);
    // What waits ends for what is asked for now: beside it there is room for all but what a VMM itself may take.
    let now = status(&carrel);
    let memory = format!("{}m", (count(&now, "memory_limit") - count(&now, "memory_promised")) >> 20);
    carrel.run(&["run", "--cold", "-m", &memory, &fixtures::busybox(), "true"]).succeeds();
    assert_eq!(waits(), 0);
    // And with whoever keeps it.
    assert!(is_new(&invoke("{}", &[]).succeeds()));
    assert_eq!(waits(), 1);
    ends(&carrel, pool);
}

/// An event for the function of these tests.
fn invoke(carrel: &Carrel, event: &str) -> Done {
    let zip = fixtures::path("rust-bootstrap").join("bootstrap.zip");
    let line = ["invoke", "--zip", zip.to_str().unwrap(), "--runtime", "provided", "--timeout", "600s"];
    carrel.run(&[&line[..], &["--event", event]].concat())
}

fn answer(done: &Done) -> Value {
    serde_json::from_str(done.text()).unwrap()
}

/// Waits until the one room that is kept rests; its id, and its VMM's cgroup.
fn at_rest(carrel: &Carrel) -> (String, PathBuf) {
    wait_for("a room at rest", || (count(&status(carrel), "resting") == 1).then_some(()));
    let id = carrel.rooms(false)[0]["id"].as_str().unwrap().to_owned();
    let record = fs::read(carrel.home().join("rooms").join(&id).join("state.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    (id, record["remains"]["cgroup"].as_str().unwrap().into())
}

/// A number of a cgroup's file of names and numbers.
fn keyed(cgroup: &Path, file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(cgroup.join(file)).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    value.unwrap_or_else(|| panic!("no {name} in {text}"))
}

/// How often threads of rooms went to sleep, in the resident owner's process.
fn sleeps(pool: &Running) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{}/task", pool.pid())).unwrap().map(|task| task.unwrap().path());
    let rooms = tasks.filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name == "room\n"));
    rooms.map(|room| keyed(&room, "status", "voluntary_ctxt_switches:")).sum()
}

fn now_ms() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis().try_into().unwrap()
}

#[test]
fn a_functions_room_at_rest_has_given_back_memory_takes_no_time_and_goes_on_where_it_stood() {
    let carrel = Carrel::new();
    let pool = pool(&carrel, &["--ready", "1"]);
    let first = answer(&invoke(&carrel, r#"{"do": "take"}"#).succeeds());
    let (room, cgroup) = at_rest(&carrel);
    let anonymous = || keyed(&cgroup, "memory.stat", "anon ");
    // Longer than the period of samples.
    let time = || (keyed(&cgroup, "cpu.stat", "usage_usec"), sleeps(&pool));
    // It is counted when its VMM is told; what that has under way comes to its end.
    wait_for("a guest that stands still", || {
        let now = time();
        std::thread::sleep(Duration::from_millis(500));
        (time() == now).then_some(())
    });
    let before = time();
    std::thread::sleep(Duration::from_secs(7));
    assert_eq!(time(), before, "µs of CPU time, and sleeps of its owner");
    let took = anonymous();
    let asked = now_ms();
    let done = invoke(&carrel, r#"{"do": "give"}"#).succeeds();
    let second = answer(&done);
    assert_eq!((count(&first, "count"), count(&second, "count")), (1, 2), "the same instance");
    assert!(!done.errors().contains("INIT_START"), "{done:?}");
    // Both of its clocks went on.
    let now = count(&second, "now_ms");
    assert!((asked.saturating_sub(2000)..now_ms() + 500).contains(&now), "{asked} {now} {}", now_ms());
    let [real, up] = ["now_ms", "up_ms"].map(|clock| count(&second, clock) - count(&first, clock));
    assert!(up >= 7000 && real.abs_diff(up) < 2000, "{real} {up}");
    println!("event after rest: {real} ms later by its clock, {up} ms by its monotonic one");
    // What was taken by the first and given up by the second is the host's when it rests again: 34 MiB, but for what
    // stays among the guest's reserve, up to some 18 MiB. The cgroup's file is some seconds behind.
    assert_eq!(at_rest(&carrel).0, room);
    let takes = wait_for("memory that was given back", || {
        let takes = anonymous();
        (takes + (8 << 20) < took).then_some(takes)
    });
    let used = &carrel.json(&["stats", "--no-stream", "--json", &room])[0]["host"];
    let given_back = used["given_back_bytes"].as_u64().unwrap_or_else(|| panic!("{used}"));
    assert!(given_back > 20 << 20, "{used}");
    println!("at rest it takes {takes} bytes of {took}, {given_back} were given back");
    assert_eq!(count(&status(&carrel), "resting"), 1, "it is not woken to be asked");
    // A process beside it wakes it, and then it rests once more, and stops as any other.
    let said = carrel.run(&["exec", &room, "/var/task/bootstrap"]);
    assert_ne!(said.status, 125, "{said:?}");
    assert_eq!(at_rest(&carrel).0, room);
    carrel.run(&["stop", &room]).succeeds();
    wait_for("its end", || (count(&status(&carrel), "rooms") == 0).then_some(()));
    ends(&carrel, pool);
}

#[test]
fn a_functions_room_at_rest_ends_when_it_is_too_old_and_with_whoever_keeps_it() {
    let carrel = Carrel::new();
    let pool = pool(&carrel, &["--ready", "0", "--warm", "30s"]);
    invoke(&carrel, "{}").succeeds();
    let (_, cgroup) = at_rest(&carrel);
    wait_for("its end", || (count(&status(&carrel), "rooms") == 0).then_some(()));
    assert!(!cgroup.exists());
    assert_eq!((count(&status(&carrel), "warm"), count(&status(&carrel), "resting")), (0, 0));
    invoke(&carrel, "{}").succeeds();
    at_rest(&carrel);
    ends(&carrel, pool);
}
