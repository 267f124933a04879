//! Each documented exit status, produced.

use std::fs;
use std::process::Command;

use carrel_protocol::vmm::End;

use super::guest::Guest;
use super::run::{Over, Vmm, has_kvm};

fn ends(guest: &Guest, end: End) -> Over {
    let over = Vmm::start(guest).over();
    assert_eq!(over.code(), i32::from(end.status()), "{end:?}: {over:?}");
    over
}

#[test]
fn a_guest_that_powers_off_ends_with_0() {
    if has_kvm() {
        assert_eq!(ends(&Guest::new().say(b'!').power_off().wait(), End::Shutdown).said, b"!");
    }
}

#[test]
fn a_guest_that_resets_itself_ends_with_10() {
    if has_kvm() {
        ends(&Guest::new().out(0x64, 0xfe).wait(), End::Reset);
        ends(&Guest::new().out(0xcf9, 6).wait(), End::Reset);
        ends(&Guest::new().write_u16(0x472, 0).fault().wait(), End::Reset);
    }
}

#[test]
fn a_guest_that_triple_faults_ends_with_11() {
    if has_kvm() {
        ends(&Guest::new().fault().wait(), End::TripleFault);
    }
}

#[test]
fn a_guest_that_panicked_ends_with_12() {
    if has_kvm() {
        ends(&Guest::new().write_u16(0x472, 0x1234).fault().wait(), End::Panic);
    }
}

#[test]
fn a_signal_to_the_launcher_ends_with_13_whatever_the_guest_does() {
    if !has_kvm() {
        return;
    }
    for guest in [Guest::new().say(b'!').wait(), Guest::new().say(b'!').spin()] {
        for signal in [libc::SIGTERM, libc::SIGINT] {
            let mut vmm = Vmm::start(&guest);
            vmm.hear(b'!');
            Vmm::signal(vmm.launcher(), signal);
            let over = vmm.over();
            assert_eq!(over.code(), i32::from(End::Stopped.status()), "{over:?}");
        }
    }
}

#[test]
fn a_killed_vmm_ends_with_its_signal() {
    if !has_kvm() {
        return;
    }
    // A filter's SIGSYS, sent from outside: the first process of a PID namespace would not hear of that one.
    for (signal, word, options) in [
        (libc::SIGKILL, "killed by signal 9", &[][..]),
        (libc::SIGSYS, "system-call filter", &["--unconfined=namespaces"]),
    ] {
        let mut vmm = Vmm::start_with(&Guest::new().say(b'!').wait(), |_| {}, options);
        vmm.hear(b'!');
        Vmm::signal(vmm.confined(), signal);
        let over = vmm.over();
        assert_eq!(over.code(), 128 + signal, "{over:?}");
        assert!(over.errors.contains(word), "{over:?}");
    }
}

#[test]
fn a_vmm_whose_launcher_is_killed_ends() {
    if !has_kvm() {
        return;
    }
    let mut vmm = Vmm::start(&Guest::new().say(b'!').spin());
    vmm.hear(b'!');
    let confined = vmm.confined();
    Vmm::signal(vmm.launcher(), libc::SIGKILL);
    assert_eq!(vmm.over().code(), 128 + libc::SIGKILL);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    // Its parent is now whoever reaps orphans here; a zombie has ended, too.
    while fs::read_to_string(format!("/proc/{confined}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(std::time::Instant::now() < deadline, "it outlives its owner");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn kvm_that_fails_ends_with_20() {
    let over = Vmm::start_with(&Guest::new().wait(), |vm| vm["kvm"] = "/dev/null".into(), &[]).over();
    assert_eq!(over.code(), i32::from(End::Kvm.status()), "{over:?}");
    assert!(over.errors.contains("KVM refused"), "{over:?}");
    if has_kvm() {
        let over = ends(&Guest::new().execute_nothing(), End::Kvm);
        assert!(over.errors.contains("KVM"), "{over:?}");
    }
}

#[test]
fn a_host_that_lacks_something_ends_with_21_and_names_it() {
    let kvm = Vmm::start_with(&Guest::new().wait(), |vm| vm["kvm"] = "/dev/no-kvm".into(), &[]).over();
    assert_eq!(kvm.code(), i32::from(End::Host.status()), "{kvm:?}");
    assert!(kvm.errors.contains("/dev/no-kvm (kvm) can't be opened"), "{kvm:?}");
    if !has_kvm() {
        return;
    }
    let cgroup = Vmm::start_with(&Guest::new().wait(), |_| {}, &["--cgroup", "/proc/no/cgroup"]).over();
    assert_eq!(cgroup.code(), i32::from(End::Host.status()), "{cgroup:?}");
    assert!(cgroup.errors.contains("a cgroup of its own"), "{cgroup:?}");
    // Address space for the VMM, but not for its guest.
    let folder = tempfile::tempdir().unwrap();
    let mut vm = super::run::machine(folder.path(), &Guest::new().wait());
    vm["memory_mib"] = 4096.into();
    let config = folder.path().join("vm.json");
    fs::write(&config, serde_json::to_vec(&vm).unwrap()).unwrap();
    let output = Command::new("sh")
        .args(["-c", "ulimit -v 2000000; exec \"$0\" --config \"$1\"", env!("CARGO_BIN_EXE_carrel-vmm")])
        .arg(config)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(End::Host.status().into()), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("4096 MiB"), "{output:?}");
}

#[test]
fn a_wrong_command_line_ends_with_2() {
    for arguments in [
        &[][..],
        &["--no-such-option"],
        &["--config"],
        &["--owner-fd", "2"],
        &["--config", "/x", "--owner-fd", "3"],
        &["--config", "/x", "--unconfined=everything"],
        &["--config", "/nonexistent/vm.json"],
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_carrel-vmm")).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        assert!(output.stderr.starts_with(b"carrel-vmm: "), "{output:?}");
    }
}

#[test]
fn a_wrong_configuration_ends_with_2_and_names_what_is_wrong() {
    type Change = fn(&mut serde_json::Value);
    let wrong: [(&str, Change); 9] = [
        ("memory in MiB", |vm| vm["memory_mib"] = 63.into()),
        ("memory in MiB", |vm| vm["memory_mib"] = 65_537.into()),
        ("the number of vCPUs", |vm| vm["vcpus"] = 0.into()),
        ("the number of vCPUs", |vm| vm["vcpus"] = 17.into()),
        ("colour", |vm| vm["colour"] = "blue".into()),
        ("kernel", |vm| vm["kernel"]["image"] = "/nonexistent".into()),
        ("command line", |vm| vm["kernel"]["command_line"] = "x".repeat(2048).into()),
        ("neither", |vm| vm["kernel"]["image"] = "/etc/passwd".into()),
        ("guest_cid", |vm| vm["vsock"] = serde_json::json!({"guest_cid": 2})),
    ];
    for (word, change) in wrong {
        let over = Vmm::start_with(&Guest::new().wait(), change, &[]).over();
        // Some are found before KVM is asked, all are found where it answers.
        if over.code() == i32::from(End::BadConfiguration.status()) {
            assert!(over.errors.contains(word), "{word}: {over:?}");
        } else {
            assert!(!has_kvm(), "{word}: {over:?}");
        }
    }
}
