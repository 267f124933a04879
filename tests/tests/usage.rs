//! Usage: the schema holds, and the numbers agree with a load that is known.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use carrel_tests::{Carrel, fixtures, wait_for};
use serde_json::Value;

const SCHEMA: &str = include_str!("../../docs/usage.schema.json");

fn valid(report: &Value) {
    let schema: Value = serde_json::from_str(SCHEMA).unwrap();
    let validator = jsonschema::validator_for(&schema).expect("the schema is one");
    let wrong: Vec<String> =
        validator.iter_errors(report).map(|error| format!("{}: {error}", error.instance_path())).collect();
    assert!(wrong.is_empty(), "{wrong:#?}\n{report:#}");
}

/// Runs a Python script in the Debian image and returns what it printed and the usage report.
fn measured(carrel: &Carrel, script: &str) -> (String, Value) {
    let file = carrel.scratch().join("usage.json");
    let image = fixtures::image("debian");
    let line =
        ["run", "--usage=json", "--usage-file", file.to_str().unwrap(), &image, "python3", "-c", script];
    let done = carrel.run(&line).succeeds();
    let report: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    valid(&report);
    (done.text().to_owned(), report)
}

fn number(report: &Value, path: &str) -> f64 {
    report.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path} in {report:#}"))
}

/// Within 10 % of what is known.
fn agrees(what: &str, measured: f64, known: f64) {
    let ratio = measured / known;
    assert!((0.9..=1.1).contains(&ratio), "{what}: {measured} measured, {known} known, ratio {ratio:.3}");
}

#[test]
fn cpu_time_agrees_with_a_spin_of_one_cpu_second() {
    let carrel = Carrel::new();
    // The script spins for one second of its own clock. What the room had used by then is known too: what its start costs depends on how the room
    // began, since a clone's first touch of each page is paid for by whoever does it. It ends at once, for its end costs something too.
    let script = "import os, time\n\
        before = int(open('/sys/fs/cgroup/cpu.stat').read().split()[1])\n\
        begun = time.process_time()\n\
        while time.process_time() - begun < 1.0: pass\n\
        print(before / 1e6 + 1.0, flush=True)\n\
        os._exit(0)";
    let (printed, report) = measured(&carrel, script);
    let known: f64 = printed.trim().parse().unwrap();
    let cpu = number(&report, "/guest/cpu/user_us") + number(&report, "/guest/cpu/system_us");
    agrees("CPU µs", cpu, known * 1e6);
    assert!(number(&report, "/guest/wall_us") >= 1e6, "{report:#}");
    // The host's meter counts the whole room, so it can't be less.
    let host = number(&report, "/host/cpu_user_us") + number(&report, "/host/cpu_system_us");
    assert!(host >= cpu * 0.9, "host {host}, guest {cpu}");
}

#[test]
fn memory_agrees_with_an_allocation_of_64_mib() {
    let carrel = Carrel::new();
    let peak = |mib: u32| {
        let script = format!("x = bytearray(b'x') * ({mib} << 20)\nimport time\ntime.sleep(0.5)");
        let (_, report) = measured(&carrel, &script);
        number(&report, "/guest/memory/peak_bytes")
    };
    // The interpreter alone is the base line: what 64 MiB add is known.
    agrees("memory peak", peak(64) - peak(0), f64::from(64 << 20));
}

#[test]
fn what_a_room_was_denied_is_counted() {
    let carrel = Carrel::new();
    let file = carrel.scratch().join("usage.json");
    let used = |image: String, options: &[&str], command: &[&str], status: i32| {
        let report = ["run", "--usage-file", file.to_str().unwrap()];
        carrel.run(&[&report, options, &[&image], command].concat()).ends_with(status);
        let report: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        valid(&report);
        report
    };
    // Half a CPU for a spin of a second or two: the other half of the time it was held back.
    let spin = "n=0; while [ $n -lt 20000 ]; do n=$((n + 1)); done";
    let report = used(fixtures::busybox(), &["--cpus", "0.5"], &["sh", "-c", spin], 0);
    let cpu = number(&report, "/guest/cpu/user_us") + number(&report, "/guest/cpu/system_us");
    let held_back = number(&report, "/guest/cpu/throttled_us");
    assert!(held_back > cpu / 4.0, "{held_back} µs of {cpu}: {report:#}");
    let hungry = "x = [bytearray(b'x') * (1 << 20) for _ in range(200)]";
    let report = used(fixtures::image("debian"), &["--cold", "-m", "64m"], &["python3", "-c", hungry], 137);
    assert!(number(&report, "/guest/memory/oom_kills") >= 1.0, "{report:#}");
    assert!(number(&report, "/guest/memory/byte_seconds") > 0.0, "{report:#}");
}

#[test]
fn memory_that_a_guest_frees_goes_back_to_the_host() {
    let carrel = Carrel::new();
    let script =
        "dd if=/dev/zero of=/fill/x bs=1M count=64 2>/dev/null; echo full; while :; do sleep 1; done";
    let line = [
        "--cold",
        "-m",
        "256m",
        "--tmpfs",
        "/fill",
        "--name",
        "room",
        &fixtures::busybox(),
        "sh",
        "-c",
        script,
    ];
    carrel.detach(&line);
    carrel.wait_for_log("room", "full");
    let pss = || {
        let report = carrel.json(&["stats", "--no-stream", "--json", "room"]);
        number(&report[0], "/host/pss_bytes")
    };
    // Measured on a period: until all of what was just written is seen, and it is no more than it was.
    let mut last = 0.0;
    let full = wait_for("the room's memory to be seen", || {
        let before = std::mem::replace(&mut last, pss());
        std::thread::sleep(std::time::Duration::from_secs(2));
        Some(last).filter(|now| *now > f64::from(64 << 20) && *now <= before)
    });
    carrel.run(&["exec", "room", "rm", "/fill/x"]).succeeds();
    // The guest's kernel reports free pages some seconds later, in blocks of 2 MiB of which no page is in use; the VMM gives them back. That is 44 to 58 MiB of these
    // 64, by where the kernel's own pages lie.
    let mut freed = full;
    wait_for("half of 64 MiB to come back", || {
        freed = pss();
        (full - freed > f64::from(32 << 20)).then_some(())
    });
    let report = carrel.json(&["stats", "--no-stream", "--json", "room"]);
    assert!(number(&report[0], "/host/given_back_bytes") > f64::from(32 << 20), "{report}");
    println!("PSS {:.1} MiB, then {:.1} MiB", full / f64::from(1 << 20), freed / f64::from(1 << 20));
    // It is the guest's all the same: it can have it again.
    let again = "dd if=/dev/zero of=/fill/y bs=1M count=64 && echo again";
    assert_eq!(carrel.run(&["exec", "room", "sh", "-c", again]).succeeds().text(), "again\n");
    carrel.run(&["kill", "room"]).succeeds();
}

#[test]
fn a_report_goes_to_stderr_as_json_or_as_a_table() {
    let carrel = Carrel::new();
    let image = fixtures::busybox();
    let json = carrel.run(&["run", "--usage=json", &image, "echo", "out"]).succeeds();
    assert_eq!(json.text(), "out\n");
    valid(&serde_json::from_str(json.errors()).unwrap());
    let table = carrel.run(&["run", "--usage", &image, "echo", "out"]).succeeds();
    assert_eq!(table.text(), "out\n");
    assert!(table.errors().contains("CPU") && table.errors().contains("MiB"), "{table:?}");
}

#[test]
fn without_a_cgroup_bytes_are_counted_and_operations_are_not() {
    let carrel = Carrel::new();
    let file = carrel.scratch().join("use.json");
    let path = file.to_str().unwrap();
    let script = "dd if=/dev/urandom of=/work/written bs=64k count=128; sync";
    let line = ["run", "--unconfined=cgroup", "--usage-file", path, &fixtures::busybox(), "sh", "-c", script];
    carrel.run(&line).succeeds();
    let report: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    valid(&report);
    assert_eq!(report["host"]["source"], "process");
    // What was written within the room went to its disk, a file of the host's.
    let written = number(&report, "/host/write_bytes");
    assert!(written >= 8.0 * 1024.0 * 1024.0, "{report}");
    assert!(report["host"]["read_bytes"].is_u64(), "{report}");
    for field in ["read_operations", "write_operations"] {
        assert!(report["host"][field].is_null(), "{field}: {report}");
    }
}

#[test]
fn io_and_processes_are_counted() {
    let carrel = Carrel::new();
    let file = carrel.scratch().join("usage.json");
    let script =
        "dd if=/dev/zero of=/work/x bs=1M count=8 2>/dev/null; sync; sleep 1 & sleep 1 & sleep 1 & wait";
    let line = ["run", "--usage-file", file.to_str().unwrap(), &fixtures::busybox(), "sh", "-c", script];
    carrel.run(&line).succeeds();
    let report: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    valid(&report);
    assert!(number(&report, "/guest/io/write_bytes") >= f64::from(8 << 20), "{report:#}");
    assert!(number(&report, "/guest/processes/peak") >= 4.0, "{report:#}");
}

#[test]
fn an_invocation_reports_usage_too() {
    let carrel = Carrel::new();
    let file = carrel.scratch().join("usage.json");
    let zip = fixtures::path("rust-bootstrap").join("bootstrap.zip");
    let line = [
        "invoke",
        "--zip",
        zip.to_str().unwrap(),
        "--runtime",
        "provided",
        "--timeout",
        "600s",
        "--usage-file",
    ];
    carrel.run(&[&line[..], &[file.to_str().unwrap()]].concat()).succeeds();
    valid(&serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap());
}
