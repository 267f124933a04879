//! Guests that misbehave, and a neighbour that must not notice. The clear sentence, the status and the leftovers are
//! checked as in `bad_input.rs`.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use carrel_tests::initramfs::assets_with;
use carrel_tests::processes::{self, Process};
use carrel_tests::{Carrel, Running, fixtures};

/// A room that says its heart beats.
struct Neighbour<'a> {
    carrel: &'a Carrel,
}

impl<'a> Neighbour<'a> {
    fn new(carrel: &'a Carrel) -> Self {
        let script = "echo begun; while :; do sleep 0.2; done";
        carrel.detach(&["--name", "neighbour", "-m", "128m", &fixtures::busybox(), "sh", "-c", script]);
        carrel.wait_for_log("neighbour", "begun");
        Self { carrel }
    }

    fn must_be_well(self) {
        let done = self.carrel.run(&["exec", "neighbour", "echo", "well"]).succeeds();
        assert_eq!(done.text(), "well\n");
        self.carrel.run(&["kill", "neighbour"]).succeeds();
    }
}

#[test]
fn a_guest_that_panics() {
    let carrel = Carrel::new();
    let neighbour = Neighbour::new(&carrel);
    // Our kernel, and an initramfs without an init: the kernel finds no root and panics.
    let assets = assets_with(&carrel, None);
    let mut command = carrel.command(&["run", "--cold", &fixtures::busybox(), "true"]);
    Running::spawn(command.env("CARREL_ASSETS", &assets))
        .done()
        .complains(125, &["panicked", "last words", "Kernel panic - not syncing: VFS"]);
    neighbour.must_be_well();
}

#[test]
fn a_kernel_that_is_none() {
    let carrel = Carrel::new();
    let kernel = carrel.scratch().join("kernel");
    fs::write(&kernel, "no kernel").unwrap();
    let path = kernel.to_str().unwrap();
    carrel.run(&["run", "--kernel", path, &fixtures::busybox()]).complains(125, &["kernel"]);
    carrel
        .run(&["run", "--kernel", "/no/such/kernel", &fixtures::busybox()])
        .complains(125, &["/no/such/kernel"]);
}

#[test]
fn a_guest_that_floods_its_log() {
    let carrel = Carrel::new();
    let neighbour = Neighbour::new(&carrel);
    let script =
        "echo begun; yes 'a line that says nothing at all, again and again' & sleep 20; kill $!; exit 4";
    carrel.detach(&["--name", "flood", &fixtures::busybox(), "sh", "-c", script]);
    assert_eq!(carrel.run(&["wait", "flood"]).succeeds().text(), "4\n");
    let bytes = disk_usage(&carrel.home().join("rooms"));
    assert!(bytes < 64 << 20, "the flood took {bytes} bytes of the host's disk");
    let tail = carrel.run(&["logs", "--tail", "3", "flood"]).succeeds();
    assert!(tail.text().lines().count() <= 3, "{tail:?}");
    neighbour.must_be_well();
}

/// The most that a room's processes had while they were watched.
#[derive(Debug, Default)]
struct Most {
    processes: usize,
    /// Of one process, and which.
    descriptors: (usize, String),
    /// Memory that is no file's: with the VMM's is its guest's.
    vmm_mib: u64,
    others_mib: u64,
}

impl Most {
    /// Looks at all of carrel's processes but those that were there before.
    fn watch(&mut self, before: &[Process]) {
        let room: Vec<Process> = processes::all().into_iter().filter(|it| !before.contains(it)).collect();
        self.processes = self.processes.max(room.len());
        for process in room {
            let descriptors = process.descriptors();
            if descriptors > self.descriptors.0 {
                self.descriptors = (descriptors, process.line.clone());
            }
            let mib = process.status("RssAnon").unwrap_or(0) >> 10;
            let most =
                if process.line.contains("carrel-vmm") { &mut self.vmm_mib } else { &mut self.others_mib };
            *most = mib.max(*most);
        }
    }
}

#[test]
fn a_guest_whose_kernel_opens_a_hundred_thousand_connections() {
    let carrel = Carrel::new();
    let neighbour = Neighbour::new(&carrel);
    let before = processes::all();
    let assets = assets_with(&carrel, Some(Path::new(env!("CARGO_BIN_EXE_carrel-tests-dialler"))));
    let mut command = carrel.command(&["run", "--cold", "-m", "128m", &fixtures::busybox(), "true"]);
    // Half a minute of dials in an emulated host of a quick machine, more than an agent has for its first word.
    command.env("CARREL_PATIENCE", "10");
    let begun = Instant::now();
    let mut running = Running::spawn(command.env("CARREL_ASSETS", &assets));
    let mut most = Most::default();
    while !running.has_ended() && begun.elapsed() < carrel_tests::patience() {
        most.watch(&before);
        sleep(Duration::from_millis(100));
    }
    println!("{most:?} in {:?}", begun.elapsed());
    // It restarts after its last dial. Before it, it would have panicked, or been too late with its agent's first word.
    running.done().complains(125, &["restarted"]);
    assert!(most.processes >= 3, "the command, the owner and the VMM were seen: {most:?}");
    // A room's device takes 256 connections; four turns of 64 dials come before their other ends are handed over; the rest has some forty.
    assert!(most.descriptors.0 < 256 + 4 * 64 + 64, "{most:?}");
    assert!(most.vmm_mib < 128 + 32 && most.others_mib < 32, "{most:?}");
    neighbour.must_be_well();
}

#[test]
fn a_workload_that_opens_a_hundred_thousand_connections() {
    let carrel = Carrel::new();
    let neighbour = Neighbour::new(&carrel);
    // To the host (AF_VSOCK, refused to workloads: none of these gets as far as the guest's kernel's driver); on its own loopback some thousand, which are its own kernel's matter.
    let script = "import socket\n\
        opened = refused = 0\n\
        for port in range(100000):\n\
        \x20   try:\n\
        \x20       s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM); s.connect((2, port)); opened += 1\n\
        \x20   except OSError: refused += 1\n\
        listener = socket.create_server(('127.0.0.1', 0), backlog=1000)\n\
        kept = []\n\
        for _ in range(5000):\n\
        \x20   try: kept.append(socket.create_connection(listener.getsockname(), timeout=1)); kept.append(listener.accept()[0])\n\
        \x20   except OSError: break\n\
        print(opened, refused)";
    let done = carrel.run(&["run", &fixtures::image("debian"), "python3", "-c", script]).succeeds();
    assert_eq!(done.text(), "0 100000\n");
    neighbour.must_be_well();
}

#[test]
fn a_guest_that_forks_without_end() {
    let carrel = Carrel::new();
    let neighbour = Neighbour::new(&carrel);
    // What waits is not what forks: it lives to the end of its time.
    let script = "sleep 1000 & echo begun; (bomb() { bomb & bomb; }; bomb) 2>/dev/null; echo spent; wait";
    let done = carrel.run(&[
        "run",
        "--timeout",
        "10s",
        "--stop-timeout",
        "1s",
        &fixtures::busybox(),
        "sh",
        "-c",
        script,
    ]);
    assert!(done.text().starts_with("begun\n"), "{done:?}");
    done.complains(124, &["timeout of 10"]);
    neighbour.must_be_well();
}

#[test]
fn a_guest_that_fills_its_disk() {
    let carrel = Carrel::new();
    let neighbour = Neighbour::new(&carrel);
    let script = "dd if=/dev/zero of=/work/fill bs=1M; echo status $?; rm /work/fill; echo fits > /work/again; cat /work/again";
    let done =
        carrel.run(&["run", "--cold", "--disk", "96m", &fixtures::busybox(), "sh", "-c", script]).succeeds();
    assert_eq!(done.text(), "status 1\nfits\n");
    assert!(done.errors().contains("No space left on device"), "{done:?}");
    neighbour.must_be_well();
}

#[test]
fn an_image_that_does_not_fit_its_disk() {
    let carrel = Carrel::new();
    carrel
        .run(&["run", "--cold", "--disk", "64m", &fixtures::image("debian"), "true"])
        .complains(125, &["disk"]);
}

fn disk_usage(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => disk_usage(&entry.path()),
            // What it takes, not what it claims: disks are sparse.
            Ok(metadata) => metadata.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}
