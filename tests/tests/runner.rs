//! `carrel runner`: programs of this host's in rooms, as if they ran here. What runs in the room is a shell of this host's, which comes with its loader and its
//! libraries, or this very test program, whose [`guest`] has the room's half of a case.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use carrel_tests::pty::Terminal;
use carrel_tests::{Carrel, Running, wait_for};
use rustix::process::Signal;

/// Tests that other tests have run in a room; here they do nothing.
mod guest {
    use std::io::Read;

    /// Whether this is the room.
    fn is_here() -> bool {
        std::env::var_os("CARREL_TEST_IN_ROOM").is_some()
    }

    #[test]
    fn passes_and_has_a_kernel_of_its_own() {
        if is_here() {
            let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
            println!("\nkernel {}", release.trim());
        }
    }

    #[test]
    fn fails() {
        assert!(!is_here(), "as it should in a room");
    }

    #[test]
    fn dies() {
        if is_here() {
            std::process::abort();
        }
    }

    #[test]
    fn reads_all_and_ends_with_seven() {
        if is_here() {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).unwrap();
            println!("\nread {} bytes", text.len());
            eprintln!("\nto the other stream");
            std::process::exit(7);
        }
    }
}

/// The command in a folder of the test's own, with nothing of a surrounding Cargo's.
fn runner(carrel: &Carrel, arguments: &[&str]) -> Command {
    let line: Vec<&str> = std::iter::once("runner").chain(arguments.iter().copied()).collect();
    let mut command = carrel.command(&line);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO") || name.to_string_lossy().starts_with("NEXTEST") {
            command.env_remove(name);
        }
    }
    command.current_dir(carrel.scratch());
    command
}

/// This program, as a runner of tests calls it.
fn this(carrel: &Carrel, arguments: &[&str]) -> Command {
    let program = std::env::current_exe().unwrap();
    let line: Vec<&str> = ["--env=CARREL_TEST_IN_ROOM=1", program.to_str().unwrap()]
        .into_iter()
        .chain(arguments.iter().copied())
        .collect();
    runner(carrel, &line)
}

fn blobs(carrel: &Carrel) -> BTreeSet<PathBuf> {
    let folder = fs::read_dir(carrel.store().join("blobs/sha256")).unwrap();
    folder.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn streams_status_and_directory_are_the_programs_own() {
    let carrel = Carrel::cold();
    let mut command = runner(&carrel, &["--with", "cat", "sh", "-c", "cat; echo err >&2; pwd; exit 7"]);
    let mut running = Running::spawn(command.stdin(Stdio::piped()));
    running.stdin().write_all(b"from outside\n").unwrap();
    let done = running.done().ends_with(7);
    assert_eq!(done.text(), format!("from outside\n{}\n", carrel.scratch().display()));
    assert_eq!(done.errors(), "err\n");
}

#[test]
fn tests_are_listed_and_run_one_by_one_as_a_runner_of_tests_does() {
    let carrel = Carrel::new();
    let listed = Running::spawn(&mut this(&carrel, &["--list", "--format", "terse"])).done().succeeds();
    for name in ["guest::passes_and_has_a_kernel_of_its_own: test", "guest::fails: test", "guest::dies: test"]
    {
        assert!(listed.text().lines().any(|line| line == name), "no {name}: {listed:?}");
    }
    let before = blobs(&carrel);
    let run = |name: &str| Running::spawn(&mut this(&carrel, &["--exact", name, "--nocapture"])).done();
    let passes = run("guest::passes_and_has_a_kernel_of_its_own").succeeds();
    assert!(passes.text().contains("-carrel\n"), "not a room's kernel: {passes:?}");
    assert!(passes.text().contains("1 passed"), "{passes:?}");
    let fails = run("guest::fails").ends_with(101);
    assert!(format!("{}{}", fails.text(), fails.errors()).contains("as it should in a room"), "{fails:?}");
    assert_eq!(blobs(&carrel), before, "the same program is the same layers");
}

/// As a runner of tests does: each call with other arguments, variables and streams, and one template for all of them.
#[test]
fn a_program_begins_as_a_clone_whatever_it_is_told() {
    let carrel = Carrel::with_own_store();
    for n in 0..2_u8 {
        let script = format!("echo {n}; exit {n}");
        let line = ["-m", "128m", "--domain=tests", "--timeline", "-e", "N", "sh", "-c", &script];
        let mut command = runner(&carrel, &line);
        let done = Running::spawn(command.env("N", n.to_string())).done().ends_with(n.into());
        assert_eq!(done.text(), format!("{n}\n"));
        assert!(done.errors().starts_with("start: clone\n"), "{done:?}");
        for step in ["program found", "template found", "first output", "workload ended", "VMM gone", "ended"]
        {
            assert!(
                done.errors().lines().any(|line| line.ends_with(&format!("  {step}"))),
                "{step}: {done:?}"
            );
        }
        assert_eq!(done.errors().contains("template made"), n == 0, "{done:?}");
    }
    let templates = carrel.json(&["template", "ls", "--json"]);
    let templates = templates.as_array().unwrap();
    assert_eq!(templates.len(), 1, "{templates:?}");
    assert_eq!(templates[0]["description"]["domain"], "domain tests", "{templates:?}");
}

/// A virtual environment with pytest and the plugin and nothing else, as if they had been installed there; its interpreter.
fn environment(folder: &Path) -> PathBuf {
    let run = |line: &mut Command| {
        let done = line.output().unwrap_or_else(|error| panic!("{line:?}: {error}"));
        assert!(done.status.success(), "{line:?}: {done:?}");
    };
    run(Command::new("/usr/bin/python3").args(["-m", "venv", "--without-pip"]).arg(folder));
    let python = folder.join("bin/python");
    let site =
        Command::new(&python).args(["-c", "import site; print(site.getsitepackages()[0])"]).output().unwrap();
    let site = PathBuf::from(String::from_utf8(site.stdout).unwrap().trim());
    let debian = Path::new("/usr/lib/python3/dist-packages");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../integrations/pytest/src/carrel_pytest");
    // What pytest 7 imports, and the plugin, whose folder has a link in it here.
    for package in ["_pytest", "pytest", "pluggy", "iniconfig", "packaging", "attr", "attrs", "py"] {
        run(Command::new("cp").args(["-rL", "--"]).arg(debian.join(package)).arg(&site));
    }
    run(Command::new("cp").args(["-rL", "--"]).arg(&source).arg(&site));
    python
}

/// pytest's plugin with real rooms; what it makes of reports is tested with itself. Each is a clone of one in which pytest had collected.
#[test]
fn pytests_tests_have_a_kernel_and_a_process_of_their_own() {
    const TESTS: &str = "import os, random\n\
        SEEN = []\n\
        def tell():\n    \
            SEEN.append(1)\n    \
            print('drew', random.random(), os.urandom(8).hex(), os.uname().release)\n    \
            assert len(SEEN) == 1\n\
        def test_one(): tell()\n\
        def test_two(): tell()\n\
        def test_fails(): assert 1 + 1 == 3, 'arithmetic'\n";
    let carrel = Carrel::with_own_store();
    let project = carrel.scratch().join("project");
    fs::create_dir(&project).unwrap();
    fs::write(project.join("test_rooms.py"), TESTS).unwrap();
    let python = environment(&carrel.scratch().join("venv"));
    let mut command = runner(&carrel, &[]);
    let variables: Vec<_> =
        command.get_envs().map(|(name, value)| (name.to_owned(), value.map(ToOwned::to_owned))).collect();
    command = Command::new(python);
    for (name, value) in variables {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.env("PYTHONDONTWRITEBYTECODE", "1").current_dir(&project);
    command.args([
        "-m",
        "pytest",
        "-p",
        "carrel_pytest.plugin",
        "-p",
        "no:cacheprovider",
        "-rA",
        "--color=no",
    ]);
    command
        .args(["--carrel", "--carrel-initialised"])
        .arg(format!("--carrel-runner={} runner", carrel_tests::binary().display()));
    let done = Running::spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()))
        .done()
        .ends_with(1);
    assert!(done.text().contains("1 failed, 2 passed") && done.text().contains("arithmetic"), "{done:?}");
    let drawn: Vec<&str> = done.text().lines().filter(|line| line.starts_with("drew ")).collect();
    assert_eq!(drawn.len(), 2, "{done:?}");
    assert!(drawn.iter().all(|line| line.ends_with("-carrel")), "not a room's kernel: {done:?}");
    for word in [1, 2] {
        let words: BTreeSet<_> = drawn.iter().filter_map(|line| line.split(' ').nth(word)).collect();
        assert_eq!(words.len(), 2, "two clones drew the same: {done:?}");
    }
    let templates = carrel.json(&["template", "ls", "--json"]);
    let templates = templates.as_array().unwrap();
    assert_eq!(
        (templates.len(), &templates[0]["point"]),
        (1, &serde_json::json!("initialised")),
        "{templates:?}"
    );
}

#[test]
fn whoever_waits_sees_the_signal_that_ended_the_program() {
    let carrel = Carrel::new();
    let mut command = this(&carrel, &["--exact", "guest::dies", "--nocapture"]);
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
    assert_eq!((status.signal(), status.core_dumped()), (Some(Signal::ABORT.as_raw()), false), "{status}");
    for signal in [Signal::KILL, Signal::SEGV, Signal::TERM] {
        let line = format!("kill -{} $$", signal.as_raw());
        let status = runner(&carrel, &["sh", "-c", &line]).status().unwrap();
        assert_eq!(status.signal(), Some(signal.as_raw()), "{status}");
    }
}

#[test]
fn large_input_reaches_a_program_that_ends_as_it_likes() {
    let carrel = Carrel::cold();
    let mut command = this(&carrel, &["--exact", "guest::reads_all_and_ends_with_seven", "--nocapture"]);
    let mut running = Running::spawn(command.stdin(Stdio::piped()));
    running.stdin().write_all(&vec![b'x'; 1 << 20]).unwrap();
    let done = running.done().ends_with(7);
    assert!(done.text().contains("read 1048576 bytes"), "{done:?}");
    assert!(done.errors().contains("to the other stream"), "{done:?}");
}

#[test]
fn signals_reach_the_program() {
    let carrel = Carrel::cold();
    let script = "for s in HUP INT USR1; do trap \"echo got $s\" $s; done; trap 'echo got TERM; exit 5' TERM; \
                  echo ready; while :; do sleep 0.1; done";
    let file = carrel.scratch().join("out");
    let mut command = runner(&carrel, &["--with", "sleep", "sh", "-c", script]);
    let running = Running::spawn(command.stdout(fs::File::create(&file).unwrap()));
    let shown = |text: &str| {
        wait_for(text, || fs::read_to_string(&file).unwrap().contains(text).then_some(()));
    };
    shown("ready");
    for (signal, name) in
        [(Signal::HUP, "HUP"), (Signal::INT, "INT"), (Signal::USR1, "USR1"), (Signal::TERM, "TERM")]
    {
        running.signal(signal);
        shown(&format!("got {name}"));
    }
    running.done().ends_with(5);
}

#[test]
fn variables_and_user_are_the_callers_and_secrets_stay_outside() {
    let carrel = Carrel::cold();
    let script = "env; id -u; id -g; test -w \"$HOME\" && test -w /tmp && echo at home";
    let line = [
        "--with=env",
        "--with=id",
        "-e",
        "SET=1",
        "-e",
        "TAKEN*",
        "--unset-env=RUST_LOG",
        "sh",
        "-c",
        script,
    ];
    let mut command = runner(&carrel, &line);
    command.env("AWS_SECRET_ACCESS_KEY", "x").env("TAKEN_ALONG", "2").env("RUST_LOG", "x").env("LC_ALL", "C");
    let done = Running::spawn(command.env("HOME", "/home/of/the-test")).done().succeeds();
    for line in ["SET=1", "TAKEN_ALONG=2", "LC_ALL=C", "HOME=/home/of/the-test", "at home"] {
        assert!(done.text().lines().any(|found| found == line), "no {line}: {done:?}");
    }
    assert!(!done.text().contains("AWS_") && !done.text().contains("RUST_LOG"), "{done:?}");
    let ids = format!("{}\n{}\n", rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    assert!(done.text().contains(&ids), "{done:?}");
    let other = runner(
        &carrel,
        &["--user=1234:99", "--with=id", "sh", "-c", "id -u; id -g; test -w $HOME && echo home"],
    );
    let done = Running::spawn(&mut { other }).done().succeeds();
    assert!(done.text().starts_with("1234\n99\n"), "{done:?}");
}

#[test]
fn files_come_back_below_what_was_asked_for_and_nowhere_else() {
    let carrel = Carrel::cold();
    let script = "mkdir -p out/sub; echo report >out/sub/report; ln -s sub/report out/good; ln -s /etc/passwd out/bad; \
                  mkfifo out/pipe; chmod 4755 out/sub/report; echo one >one; exit 3";
    let line = [
        "--with=mkdir",
        "--with=ln",
        "--with=mkfifo",
        "--with=chmod",
        "--return=out",
        "--return=one:here/renamed",
        "--return=gone",
        "sh",
        "-c",
        script,
    ];
    let done = Running::spawn(&mut runner(&carrel, &line)).done().ends_with(3);
    assert!(done.errors().contains("gone did not come back"), "{done:?}");
    let scratch = carrel.scratch();
    assert_eq!(fs::read_to_string(scratch.join("out/good")).unwrap(), "report\n");
    assert_eq!(fs::read_to_string(scratch.join("here/renamed")).unwrap(), "one\n");
    assert_eq!(fs::metadata(scratch.join("out/sub/report")).unwrap().permissions().mode() & 0o7777, 0o755);
    for left in ["out/bad", "out/pipe", "one", "gone"] {
        assert!(fs::symlink_metadata(scratch.join(left)).is_err(), "{left}");
    }
    let line = [
        "--return=big",
        "--return-limit=64k",
        "--with=dd",
        "sh",
        "-c",
        "dd if=/dev/zero of=big bs=65537 count=1 2>/dev/null",
    ];
    Running::spawn(&mut runner(&carrel, &line)).done().complains(125, &["65536 bytes", "--return-limit"]);
    assert!(!scratch.join("big").exists());
}

#[test]
fn files_and_folders_are_taken_along() {
    let carrel = Carrel::cold();
    let scratch = carrel.scratch();
    fs::create_dir_all(scratch.join("data/.git")).unwrap();
    fs::write(scratch.join("data/file"), "content").unwrap();
    let script = "cat data/file /elsewhere/file; test ! -e data/.git && test ! -e /root/.ssh && echo alone";
    let line = ["--with=data", "--with=data:/elsewhere", "--with=cat", "sh", "-c", script];
    let done = Running::spawn(&mut runner(&carrel, &line)).done().succeeds();
    assert_eq!(done.text(), "contentcontentalone\n");
    // What changed is what the next room has.
    fs::write(scratch.join("data/file"), "changed").unwrap();
    let done =
        Running::spawn(&mut runner(&carrel, &["--with=data", "--with=cat", "sh", "-c", "cat data/file"]))
            .done();
    assert_eq!(done.succeeds().text(), "changed");
}

#[test]
fn a_terminal_is_there_if_there_is_one() {
    let carrel = Carrel::cold();
    let (terminal, running) = Terminal::run(&runner(&carrel, &["--with=stty", "sh"]), 24, 80);
    wait_for("raw mode", || terminal.is_raw().then_some(()));
    terminal.type_in("test -t 0 && test -t 1 && test -t 2 && stty size\r");
    terminal.wait_for("24 80");
    terminal.type_in("exit 9\r");
    running.done().ends_with(9);
    assert!(!terminal.is_raw(), "the terminal stays raw: {}", terminal.shown());
}

#[test]
fn what_can_not_be_run_has_a_shells_status_and_a_sentence() {
    let carrel = Carrel::cold();
    let run = |line: &[&str]| Running::spawn(&mut runner(&carrel, line)).done();
    run(&["no-such-program"]).complains(127, &["no-such-program", "PATH"]);
    run(&["./no/such/program"]).complains(127, &["./no/such/program"]);
    fs::write(carrel.scratch().join("plain"), "text").unwrap();
    run(&["./plain"]).complains(126, &["plain"]);
    // Nothing of it is read.
    run(&["/"]).complains(126, &["directory"]);
    run(&["--with=missing/file", "true"]).complains(125, &["missing/file"]);
    run(&["--timeout=2s", "--with=sleep", "sh", "-c", "sleep 100"]).ends_with(124);
    run(&[]).complains(125, &["program"]);
}

#[test]
fn options_come_from_the_environment_and_are_shown() {
    let carrel = Carrel::cold();
    let mut command = runner(&carrel, &["--cpus=2", "--print-config"]);
    command.env("CARREL_RUNNER_MEMORY", "128m").env("CARREL_RUNNER_WITH", "a,b");
    let done = Running::spawn(&mut command).done().succeeds();
    let shown: serde_json::Value = serde_json::from_str(done.text()).unwrap();
    assert_eq!((&shown["runner"]["memory"], &shown["runner"]["cpus"]), (&"128m".into(), &"2".into()));
    assert_eq!(shown["runner"]["with"], serde_json::json!(["a", "b"]));
    let mut command = runner(&carrel, &["--with=grep", "sh", "-c", "grep MemTotal /proc/meminfo"]);
    let done = Running::spawn(command.env("CARREL_RUNNER_MEMORY", "96m")).done().succeeds();
    let kib: u64 = done.text().split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib < 96 * 1024, "{done:?}");
    let mut command = runner(&carrel, &["true"]);
    Running::spawn(command.env("CARREL_RUNNER_MEMORY", "lots")).done().complains(125, &["memory", "lots"]);
}

#[test]
fn what_cargo_says_of_a_test_is_understood() {
    let carrel = Carrel::cold();
    let package = carrel.scratch().join("package");
    fs::create_dir_all(package.join("tests")).unwrap();
    fs::write(package.join("tests/fixture"), "read\n").unwrap();
    let mut command = runner(&carrel, &["--with=cat", "sh", "-c", "cat tests/fixture; pwd"]);
    command.env("CARGO_MANIFEST_DIR", &package).env("CARGO_PKG_NAME", "package").current_dir(&package);
    let done = Running::spawn(&mut command).done().succeeds();
    assert_eq!(done.text(), format!("read\n{}\n", Path::new(&package).display()));
}
