//! `carrel run`: streams, statuses, the process's surroundings, terminals, signals.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::process::Stdio;

use carrel_tests::pty::Terminal;
use carrel_tests::{Carrel, Running, fixtures, wait_for};
use rustix::process::Signal;

#[test]
fn streams_are_kept_apart_and_the_status_is_the_workloads_own() {
    let carrel = Carrel::new();
    let image = fixtures::busybox();
    let done = carrel.run(&["run", &image, "sh", "-c", "echo out; echo err >&2; exit 7"]).ends_with(7);
    assert_eq!(done.text(), "out\n");
    assert_eq!(done.errors(), "err\n");
}

#[test]
fn a_room_has_our_kernel_and_an_image_its_own_command() {
    let carrel = Carrel::new();
    let done = carrel.run(&["run", &fixtures::busybox(), "uname", "-r"]).succeeds();
    assert!(done.text().trim().ends_with("-carrel"), "not the host's: {done:?}");
    let scratch = carrel.run(&["run", "--cold", &fixtures::image("scratch")]).succeeds();
    assert_eq!(scratch.text(), "from scratch\n");
}

/// `$CARREL_TEST_STREAM_MIB` of bytes that don't compress, 256 by default, through a room and back.
#[test]
fn binary_streams_come_back_unchanged() {
    let mib: u64 =
        std::env::var("CARREL_TEST_STREAM_MIB").ok().and_then(|text| text.parse().ok()).unwrap_or(256);
    let carrel = Carrel::new();
    let mut command = carrel.command(&["run", "-i", &fixtures::busybox(), "cat"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let writer = std::thread::spawn(move || {
        let (mut noise, mut block) = (Noise::default(), vec![0; 1 << 20]);
        for _ in 0..mib {
            noise.fill(&mut block);
            stdin.write_all(&block).unwrap();
        }
    });
    let (mut noise, mut expected, mut block) = (Noise::default(), vec![0; 1 << 20], vec![0; 1 << 20]);
    for n in 0..mib {
        noise.fill(&mut expected);
        stdout.read_exact(&mut block).unwrap();
        assert!(block == expected, "block {n} came back changed");
    }
    assert_eq!(stdout.read(&mut block).unwrap(), 0, "more came back than was sent");
    writer.join().unwrap();
    assert!(child.wait().unwrap().success());
}

/// xorshift64: every byte value, no period in sight. Quicker than a digest where the host is emulated.
struct Noise(u64);

impl Default for Noise {
    fn default() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }
}

impl Noise {
    fn fill(&mut self, block: &mut [u8]) {
        for word in block.chunks_exact_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            word.copy_from_slice(&self.0.to_ne_bytes());
        }
    }
}

#[test]
fn without_i_standard_input_is_empty() {
    let carrel = Carrel::new();
    let done = carrel.run_with_input(&["run", &fixtures::busybox(), "wc", "-c"], b"not for you").succeeds();
    assert_eq!(done.text().trim(), "0");
}

#[test]
fn a_command_that_ends_before_its_input_does_not_hang() {
    let carrel = Carrel::new();
    let input = vec![b'x'; 4 << 20];
    let done =
        carrel.run_with_input(&["run", "-i", &fixtures::busybox(), "head", "-c", "3"], &input).succeeds();
    assert_eq!(done.text(), "xxx");
}

#[test]
fn a_reader_that_leaves_ends_the_writer_quietly() {
    let carrel = Carrel::new();
    let mut command = carrel.command(&["run", &fixtures::busybox(), "yes"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 2];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"y\n");
    drop(child.stdout.take());
    let done = Running::from(child).done();
    assert!(!done.errors().contains("panicked"), "{done:?}");
}

#[test]
fn the_environment_comes_from_image_files_and_options_in_this_order() {
    let carrel = Carrel::new();
    let file = carrel.scratch().join("env");
    std::fs::write(&file, "# comment\nFROM_FILE=file\nBOTH=file\nFROM_IMAGE=file\n").unwrap();
    let file = file.to_str().unwrap();
    let image = fixtures::busybox();
    let mut command = carrel.command(&[
        "run",
        "--env-file",
        file,
        "-e",
        "BOTH=option",
        "-e",
        "CARREL_TEST_OWN",
        "-e",
        "CARREL_TEST_MISSING",
        &image,
        "env",
    ]);
    let done = Running::spawn(command.env("CARREL_TEST_OWN", "own")).done().succeeds();
    let lines: Vec<&str> = done.text().lines().collect();
    for line in ["FROM_FILE=file", "BOTH=option", "FROM_IMAGE=file", "CARREL_TEST_OWN=own", "PATH=/bin"] {
        assert!(lines.contains(&line), "no {line}: {done:?}");
    }
    assert!(lines.iter().any(|line| line.starts_with("HOME=")), "{done:?}");
    assert!(lines.iter().any(|line| line.starts_with("HOSTNAME=")), "{done:?}");
    assert!(!done.text().contains("CARREL_TEST_MISSING"), "{done:?}");
}

#[test]
fn users_and_groups_are_looked_up_in_the_image() {
    let carrel = Carrel::new();
    let image = fixtures::busybox();
    for (user, expected) in [
        ("reader", "uid=1000(reader) gid=1000(readers) groups=1000(readers),2000(quiet)"),
        ("1000:quiet", "uid=1000(reader) gid=2000(quiet)"),
        ("4242:4343", "uid=4242 gid=4343"),
    ] {
        let done = carrel.run(&["run", "-u", user, &image, "id"]).succeeds();
        assert!(done.text().starts_with(expected), "{user}: {done:?}");
    }
}

#[test]
fn the_working_directory_and_the_entry_point_can_be_replaced() {
    let carrel = Carrel::new();
    let image = fixtures::busybox();
    let inherited = carrel.run(&["run", &image, "pwd"]).succeeds();
    assert_eq!(inherited.text(), "/work\n");
    let replaced = carrel.run(&["run", "-w", "/made/for/this", "--entrypoint", "pwd", &image]).succeeds();
    assert_eq!(replaced.text(), "/made/for/this\n");
    let scratch = carrel.run(&["run", "--cold", &fixtures::image("scratch"), "other"]).succeeds();
    assert_eq!(scratch.text(), "other\n");
}

#[test]
fn a_read_only_root_can_be_written_only_where_it_was_allowed() {
    let carrel = Carrel::new();
    let script = "echo x > /tmp/a && cat /tmp/a; cat /var/lib/declared/file; echo y > /var/lib/declared/b && echo volume; \
                  mount | grep ' /tmp '; echo z > /etc/c || echo refused";
    let done = carrel
        .run(&["run", "--read-only", "--tmpfs", "/tmp:size=1m", &fixtures::busybox(), "sh", "-c", script])
        .succeeds();
    let text = done.text();
    assert!(text.starts_with("x\nfrom the image\nvolume\n"), "{done:?}");
    assert!(text.contains("size=1024k"), "{done:?}");
    assert!(text.ends_with("refused\n"), "{done:?}");
    assert!(done.errors().contains("Read-only file system"), "{done:?}");
}

#[test]
fn the_usual_files_and_devices_are_there() {
    let carrel = Carrel::new();
    let script = "set -e; test -c /dev/null; test -c /dev/urandom; test -d /dev/pts; test -d /dev/shm; test -L /dev/stdin; \
                  grep -q ' /proc ' /proc/mounts; test -d /sys/kernel; grep -q localhost /etc/hosts; \
                  grep -q \"$(hostname)\" /etc/hosts; dd if=/dev/zero of=/dev/shm/x bs=4096 count=1 2>/dev/null; echo all";
    let done = carrel.run(&["run", &fixtures::busybox(), "sh", "-c", script]).succeeds();
    assert_eq!(done.text(), "all\n");
}

#[test]
fn the_kernel_can_be_a_bzimage_that_the_user_names() {
    let carrel = Carrel::new();
    let assets = carrel.json(&["--print-config"])["assets"].as_str().unwrap().to_owned();
    let kernel = format!("{assets}/bzImage");
    let line = ["run", "--cold", "--kernel", &kernel, &fixtures::busybox(), "uname", "-r"];
    let named = carrel.run(&line).succeeds();
    // Both are made of one kernel.
    let own = carrel.run(&["run", &fixtures::busybox(), "uname", "-r"]).succeeds();
    assert_eq!(named.text(), own.text());
}

#[test]
fn the_least_memory_is_enough_for_a_small_image() {
    let carrel = Carrel::new();
    let done = carrel.run(&["run", "--cold", "-m", "64m", &fixtures::image("scratch")]).succeeds();
    assert_eq!(done.text(), "from scratch\n");
}

#[test]
fn a_workload_has_carrels_init_as_process_one_above_it_and_sees_no_other() {
    let carrel = Carrel::new();
    // Builtins alone: no process but the two.
    let script = "echo $$ $PPID; cd /proc; echo [0-9]*; kill -TERM $$; echo survived";
    let done = carrel.run(&["run", &fixtures::busybox(), "sh", "-c", script]).ends_with(128 + 15);
    assert_eq!(done.text(), "2 1\n1 2\n", "an unhandled signal does what it does to any process: {done:?}");
}

#[test]
fn workloads_have_no_vsock() {
    let carrel = Carrel::new();
    // Python is the shortest way to ask for a socket family, and for any system call. io_uring has an operation that makes a socket
    // (425 to 427 are its setup, enter and register; the arguments are such that a kernel with io_uring makes a ring of them).
    let script = "import ctypes, errno, socket\n\
        for kind in socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM:\n\
        \x20   try:\n\
        \x20       socket.socket(socket.AF_VSOCK, kind)\n\
        \x20       print('open')\n\
        \x20   except OSError as error:\n\
        \x20       print(errno.errorcode[error.errno])\n\
        libc = ctypes.CDLL(None, use_errno=True)\n\
        for call in 425, 426, 427:\n\
        \x20   done = libc.syscall(call, 4, ctypes.create_string_buffer(120), 0, 0, 0, 0)\n\
        \x20   print(done, errno.errorcode.get(ctypes.get_errno()))";
    let done = carrel.run(&["run", &fixtures::image("debian"), "python3", "-c", script]).succeeds();
    let expected = ["EAFNOSUPPORT\n".repeat(3), "-1 ENOSYS\n".repeat(3)].concat();
    assert_eq!(done.text(), expected);
}

/// Writes each limit of the container's cgroup, as root of user, mount and cgroup namespaces of the workload's own (`unshare`): at the root
/// of its cgroup namespace, and from another namespace below that, through the mount made before.
const LIFT: &str = r#"
mkdir /tmp/c && mount -t cgroup2 none /tmp/c || exit 9
lift='for limit in cpu.max memory.max pids.max cgroup.max.descendants; do
    (echo max >/tmp/c/$limit) 2>/dev/null && echo lifted $limit
done'
sh -c "$lift"
mkdir /tmp/c/below 2>/dev/null && echo $$ >/tmp/c/below/cgroup.procs && echo went below
unshare -C sh -c "$lift"
cat /tmp/c/cpu.max /tmp/c/pids.max /tmp/c/cgroup.max.descendants
"#;

#[test]
fn a_workload_cannot_lift_its_containers_limits() {
    let carrel = Carrel::new();
    let image = fixtures::image("debian");
    let line = ["run", "--cpus", "0.5", &image, "unshare", "-U", "-r", "-m", "-C", "sh", "-c", LIFT];
    let done = carrel.run(&line).succeeds();
    assert_eq!(done.text(), "50000 100000\n16384\n0\n");
}

#[test]
fn memory_and_cpus_are_what_was_asked_for() {
    let carrel = Carrel::new();
    let script = "grep MemTotal /proc/meminfo; nproc";
    let done = carrel
        .run(&["run", "--cold", "-m", "256m", "--cpus", "2", &fixtures::busybox(), "sh", "-c", script])
        .succeeds();
    let mut words = done.text().split_whitespace();
    let kib: u64 = words.nth(1).unwrap().parse().unwrap();
    assert!((180 * 1024..=256 * 1024).contains(&kib), "{done:?}");
    assert_eq!(words.next_back(), Some("2"), "{done:?}");
}

#[test]
fn the_timeout_ends_the_room_with_124() {
    let carrel = Carrel::new();
    let done = carrel.run(&[
        "run",
        "--timeout",
        "3s",
        "--stop-timeout",
        "1s",
        &fixtures::busybox(),
        "sh",
        "-c",
        "echo begun; sleep 1000",
    ]);
    let done = done.ends_with(124);
    assert!(done.text().starts_with("begun"), "{done:?}");
}

#[test]
fn a_missing_command_is_127_and_one_that_cannot_run_126() {
    let carrel = Carrel::new();
    let image = fixtures::busybox();
    carrel.run(&["run", &image, "no-such-command"]).complains(127, &["no-such-command"]);
    carrel.run(&["run", &image, "/no/such/command"]).complains(127, &["/no/such/command"]);
    carrel.run(&["run", &image, "/bin/not-executable"]).complains(126, &["not-executable"]);
    carrel.run(&["run", &image, "/etc"]).complains(126, &["/etc"]);
    let long = "x".repeat(200 << 10);
    let file = carrel.scratch().join("long.env");
    std::fs::write(&file, format!("LONG={long}\n")).unwrap();
    let line = ["run", "--env-file", file.to_str().unwrap(), &image, "true"];
    let done = carrel.run(&line).complains(126, &["'true'", "128 KiB each"]);
    assert!(!done.errors().contains("executable file"), "that is no advice here: {done:?}");
}

#[test]
fn a_workload_that_a_signal_ended_gives_128_and_its_number() {
    let carrel = Carrel::new();
    carrel.run(&["run", &fixtures::busybox(), "sh", "-c", "kill -KILL $$"]).ends_with(137);
    carrel.run(&["run", &fixtures::busybox(), "sh", "-c", "sh -c 'kill -SEGV $$'"]).ends_with(139);
}

#[test]
fn signals_are_forwarded_to_the_workload() {
    let carrel = Carrel::new();
    let script = "for s in HUP INT QUIT USR1 USR2; do trap \"echo got $s\" $s; done; trap 'echo got TERM; exit 5' TERM; \
                  echo ready; while :; do sleep 0.1; done";
    let mut command = carrel.command(&["run", &fixtures::busybox(), "sh", "-c", script]);
    let file = carrel.scratch().join("out");
    let running = Running::spawn(command.stdout(std::fs::File::create(&file).unwrap()));
    let shown = |text: &str| {
        wait_for(text, || std::fs::read_to_string(&file).unwrap().contains(text).then_some(()));
    };
    shown("ready");
    for (signal, name) in [
        (Signal::HUP, "HUP"),
        (Signal::INT, "INT"),
        (Signal::QUIT, "QUIT"),
        (Signal::USR1, "USR1"),
        (Signal::USR2, "USR2"),
        (Signal::TERM, "TERM"),
    ] {
        running.signal(signal);
        shown(&format!("got {name}"));
    }
    running.done().ends_with(5);
}

#[test]
fn a_terminal_follows_its_window_and_is_given_back() {
    let carrel = Carrel::new();
    let command = carrel.command(&["run", "-it", &fixtures::busybox(), "sh"]);
    let (terminal, running) = Terminal::run(&command, 24, 80);
    wait_for("raw mode", || terminal.is_raw().then_some(()));
    terminal.type_in("tty; stty size\r");
    terminal.wait_for("/dev/pts/");
    terminal.wait_for("24 80");
    // Its console is the same terminal, whoever writes there.
    terminal.type_in("test -c /dev/console && echo by-the-'console' >/dev/console\r");
    terminal.wait_for("by-the-console");
    terminal.resize(50, 132);
    terminal.type_in("while ! stty size | grep '50 132'; do sleep 0.1; done; echo TERM=$TERM.\r");
    terminal.wait_for("TERM=xterm");
    // Ctrl-C interrupts what runs inside, not carrel.
    terminal.type_in("sleep 1000\r");
    terminal.wait_for("sleep 1000");
    terminal.type_in("\x03");
    terminal.type_in("exit 9\r");
    running.done().ends_with(9);
    assert!(!terminal.is_raw(), "the terminal stays raw: {}", terminal.shown());
}

#[test]
fn a_terminal_is_given_back_when_carrel_fails() {
    let carrel = Carrel::new();
    let command = carrel.command(&["run", "-it", &fixtures::busybox(), "no-such-command"]);
    let (terminal, running) = Terminal::run(&command, 24, 80);
    running.done().ends_with(127);
    assert!(!terminal.is_raw(), "the terminal stays raw: {}", terminal.shown());
    // The sentence is there, and nothing that a library has to say about terminals.
    let shown = terminal.shown();
    assert!(shown.contains("carrel: ") && !shown.contains("tracing"), "{shown}");
}

#[test]
fn a_terminal_needs_one_at_the_other_end() {
    let carrel = Carrel::new();
    carrel.run(&["run", "-it", &fixtures::busybox(), "true"]).complains(125, &["terminal"]);
}

#[test]
fn capabilities_setuid_and_limits_are_those_of_an_ordinary_container() {
    let carrel = Carrel::new();
    let script = "grep CapEff /proc/self/status; ulimit -n; cat /proc/sys/kernel/randomize_va_space";
    let done = carrel.run(&["run", "-u", "reader", &fixtures::busybox(), "sh", "-c", script]).succeeds();
    assert!(done.text().starts_with("CapEff:\t0000000000000000\n"), "{done:?}");
    assert!(done.text().ends_with("\n65536\n2\n"), "{done:?}");
    // Root has Docker's capabilities, and a program of root's that is set-user-ID makes its user root.
    let script = "grep CapEff /proc/self/status\n\
        cp /usr/bin/python3.11 /usr/local/bin/lift && chmod 4755 /usr/local/bin/lift\n\
        setpriv --reuid 1000 --regid 1000 --clear-groups lift -c 'import os; print(os.getuid(), os.geteuid())'";
    let done = carrel.run(&["run", &fixtures::image("debian"), "sh", "-c", script]).succeeds();
    assert_eq!(done.text(), "CapEff:\t00000000a80425fb\n1000 0\n");
}

#[test]
fn a_wrong_command_line_is_125_and_names_the_option() {
    let carrel = Carrel::new();
    let image = fixtures::busybox();
    carrel.run(&["run", "-m", "lots", &image]).complains(125, &["--memory", "512m"]);
    carrel.run(&["run", "--no-such-option", &image]).complains(125, &["--no-such-option"]);
    carrel.run(&["run"]).complains(125, &["IMAGE"]);
    carrel.run(&["run", "--env-file", "/no/such/file", &image]).complains(125, &["/no/such/file"]);
}

#[test]
fn what_can_not_be_read_or_written_is_said_before_anything_runs() {
    let carrel = Carrel::new();
    let image = fixtures::busybox();
    let done = carrel.run(&["run", "--usage-file", "/no/such/file", &image, "echo", "ran"]);
    let done = done.complains(125, &["usage", "/no/such/file"]);
    assert_eq!(done.text(), "");
    let mut command = carrel.command(&["run", "-i", &image, "cat"]);
    let running = Running::spawn(command.stdin(std::fs::File::open("/").unwrap()));
    running.done().complains(125, &["directory", "-i"]);
}
