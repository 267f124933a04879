//! The confinement of a running `carrel-vmm`, as the host's kernel tells of it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;

use serde_json::json;

use super::guest::Guest;
use super::run::{Vmm, has_cgroups, has_kvm};

/// Where the users of root's VMMs begin, standalone.
const FIRST_USER: u32 = 0x6000_0000;

fn is_root() -> bool {
    // SAFETY: can't fail.
    unsafe { libc::geteuid() == 0 }
}

/// A machine of two vCPUs with every kind of device, whose guest has run.
fn running(options: &[&str]) -> (Vmm, u32) {
    let mut vmm = Vmm::start_with(
        &Guest::new().say(b'!').wait(),
        |vm| {
            let folder = vm["kernel"]["image"].as_str().unwrap().rsplit_once('/').unwrap().0.to_owned();
            fs::write(format!("{folder}/overlay"), [0; 4096]).unwrap();
            vm["vcpus"] = 2.into();
            vm["vsock"] = json!({"guest_cid": 3, "socket": format!("{folder}/vsock")});
            vm["blocks"] = json!([{"id": "x", "overlay": format!("{folder}/overlay"), "size_bytes": 4096}]);
            vm["entropy"] = json!({});
            vm["balloon"] = json!({"free_page_reporting": true});
            vm["control"] = format!("{folder}/control").into();
        },
        options,
    );
    vmm.hear(b'!');
    let confined = vmm.confined();
    (vmm, confined)
}

/// The lines of a status file by their names.
fn status(path: &str) -> BTreeMap<String, String> {
    let text = fs::read_to_string(path).unwrap();
    let field =
        |line: &str| line.split_once(':').map(|(name, rest)| (name.to_owned(), rest.trim().to_owned()));
    text.lines().filter_map(field).collect()
}

#[test]
fn every_thread_is_a_user_of_its_own_without_capabilities_and_under_its_filters() {
    if !has_kvm() {
        return;
    }
    let (_vmm, process) = running(&[]);
    let mut names = Vec::new();
    for task in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
        let status = status(task.unwrap().path().join("status").to_str().unwrap());
        // KVM's own, in the kernel alone (nx_huge_pages); it never comes to user space.
        if status["Name"].starts_with("kvm-") {
            continue;
        }
        let user = if is_root() {
            (FIRST_USER + process).to_string()
        } else {
            status["Uid"].split('\t').next().unwrap().into()
        };
        let four = [user.as_str(); 4].join("\t");
        assert_eq!((&status["Uid"], &status["Gid"]), (&four, &four));
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status[set], "0000000000000000", "{set}");
        }
        assert_eq!(status["NoNewPrivs"], "1");
        assert_eq!(status["Seccomp"], "2", "a filter");
        assert_eq!(status["Seccomp_filters"], "2", "of the set-up and of its kind");
        assert_eq!(status["NSpid"].split('\t').count(), 2, "a PID namespace of its own");
        names.push(status["Name"].clone());
    }
    names.sort();
    assert_eq!(names.len(), 3, "{names:?}");
    assert!(
        names.iter().any(|name| name == "vcpu0") && names.iter().any(|name| name == "vcpu1"),
        "{names:?}"
    );
}

#[test]
fn its_namespaces_are_its_own_and_its_root_is_empty() {
    if !has_kvm() {
        return;
    }
    let (_vmm, process) = running(&[]);
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts"] {
        let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{kind}")).unwrap();
        assert_ne!(of(&process.to_string()), of("self"), "{kind}");
    }
    let root = format!("/proc/{process}/root");
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0, "nothing to see");
    assert!(fs::write(format!("{root}/x"), "").is_err(), "nowhere to write");
    let mounts = fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    for option in ["ro", "nosuid", "nodev", "noexec"] {
        assert!(mounts.split(' ').any(|word| word.split(',').any(|o| o == option)), "{option}: {mounts}");
    }
    let network = fs::read_to_string(format!("/proc/{process}/net/dev")).unwrap();
    assert_eq!(
        network.lines().filter(|line| line.contains(':') && !line.contains("lo:")).count(),
        0,
        "{network}"
    );
}

/// Who takes over one VMM must not reach into another of the same user.
#[test]
fn its_own_user_can_neither_read_its_memory_nor_trace_it() {
    if !has_kvm() {
        return;
    }
    let (_vmm, process) = running(&[]);
    for file in ["mem", "environ", "maps", "auxv"] {
        let mut cat = Command::new("head");
        cat.args(["-c", "1", &format!("/proc/{process}/{file}")]);
        if is_root() {
            cat.uid(FIRST_USER + process).gid(FIRST_USER + process);
        }
        let output = cat.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("ermission denied"), "{file}: {output:?}");
    }
    let limits = fs::read_to_string(format!("/proc/{process}/limits")).unwrap();
    let both = |name: &str| -> Vec<String> {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..].split_whitespace().take(2).map(str::to_owned).collect()
    };
    assert_eq!(both("Max core file size"), ["0", "0"]);
    assert_eq!(both("Max locked memory"), ["0", "0"]);
    for limit in both("Max open files") {
        assert!(limit.parse::<u32>().unwrap() <= 4096, "{limit}");
    }
}

#[test]
fn it_holds_the_descriptors_that_it_was_handed_and_what_it_made_of_them() {
    if !has_kvm() {
        return;
    }
    let (_vmm, process) = running(&[]);
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{process}/fd")).unwrap() {
        let target = fs::read_link(entry.unwrap().path()).unwrap().to_string_lossy().into_owned();
        let kind = match target.split_once(":[") {
            // Of sockets and pipes just the number differs.
            Some((kind @ ("socket" | "pipe"), _)) => kind.to_owned(),
            Some(_) | None => target.rsplit('/').next().unwrap().to_owned(),
        };
        *kinds.entry(kind).or_default() += 1;
    }
    let expected = [
        ("null", 3),    // standard streams
        ("socket", 3),  // the owner, the listening vsock and control sockets
        ("pipe", 1),    // the serial port's output
        ("overlay", 1), // the disk
        ("anon_inode:kvm-vm", 1),
        ("anon_inode:kvm-vcpu:0", 1),
        ("anon_inode:kvm-vcpu:1", 1),
        ("anon_inode:[eventpoll]", 1),
        ("anon_inode:[signalfd]", 1),
        // vsock 3 queues, block 1, entropy 1, balloon 3; an interrupt for each of the four and the serial port; the verdict.
        ("anon_inode:[eventfd]", 8 + 5 + 1),
    ];
    let expected: BTreeMap<String, usize> = expected.map(|(kind, n)| (kind.to_owned(), n)).into();
    assert_eq!(kinds, expected, "neither /dev/kvm nor the kernel, no folder, nothing of its launcher's");
}

#[test]
fn what_is_left_out_is_left_out_alone_and_said() {
    if !has_kvm() {
        return;
    }
    let (vmm, process) = running(&["--unconfined=seccomp"]);
    let found = status(&format!("/proc/{process}/status"));
    assert_eq!((found["Seccomp"].as_str(), found["NoNewPrivs"].as_str()), ("0", "1"));
    assert_eq!(found["CapEff"], "0000000000000000");
    Vmm::signal(vmm.launcher(), libc::SIGTERM);
    let over = vmm.over();
    assert!(over.errors.contains("without this part of the confinement: seccomp"), "{over:?}");
    let (vmm, process) = running(&["--unconfined=namespaces"]);
    let found = status(&format!("/proc/{process}/status"));
    assert_eq!((found["Seccomp"].as_str(), found["CapEff"].as_str()), ("2", "0000000000000000"));
    assert_eq!(found["NSpid"].split('\t').count(), status("/proc/self/status")["NSpid"].split('\t').count());
    drop(vmm);
}

#[test]
fn it_is_born_in_a_cgroup_that_goes_with_it() {
    if !has_kvm() || !has_cgroups() {
        return;
    }
    let cgroup = |process: u32| {
        let text = fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap();
        text.lines().find_map(|line| line.strip_prefix("0::").map(str::to_owned)).unwrap()
    };
    let (vmm, process) = running(&[]);
    let launcher = vmm.launcher();
    let own = cgroup(process);
    assert_eq!(
        own.strip_prefix(&cgroup(launcher)).unwrap().trim_start_matches('/'),
        format!("carrel-vmm.{launcher}")
    );
    Vmm::signal(launcher, libc::SIGTERM);
    assert_eq!(vmm.over().code(), 13);
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let root =
        mounts.lines().find(|line| line.contains(" cgroup2 ")).unwrap().split(' ').nth(1).unwrap().to_owned();
    assert!(!std::path::Path::new(&format!("{root}{own}")).exists(), "{root}{own}");
}

/// A stop and a continuation, as a debugger or a freezer of processes makes them, wake calls in the kernel that then start anew.
#[test]
fn a_stopped_vmm_goes_on_under_its_filters() {
    if !has_kvm() {
        return;
    }
    let (vmm, process) = running(&[]);
    for _ in 0..3 {
        Vmm::signal(process, libc::SIGSTOP);
        std::thread::sleep(std::time::Duration::from_millis(20));
        Vmm::signal(process, libc::SIGCONT);
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    Vmm::signal(vmm.launcher(), libc::SIGTERM);
    assert_eq!(vmm.over().code(), 13);
}
