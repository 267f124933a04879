//! What an owner asks of a machine that runs under its filters.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use carrel_protocol::vmm::{
    Done, End, Ended, FromOwner, FromVmm, Pause, ReadMetrics, Resume, SetBalloon, Stop,
};
use carrel_vmm::owner::Connection;
use serde_json::json;

use super::guest::Guest;
use super::run::{Vmm, has_kvm};

/// Becomes the machine's owner through its control socket.
pub(crate) fn take_over(path: &Path) -> io::Result<Connection> {
    // SAFETY: no pointers are passed.
    let raw = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0) };
    // SAFETY: the descriptor was just made and is owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: a sockaddr_un is plain data.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).unwrap();
    let bytes = path.as_os_str().as_bytes();
    assert!(bytes.len() < address.sun_path.len());
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    let size = u32::try_from(size_of::<libc::sockaddr_un>()).unwrap();
    // SAFETY: the address is a whole sockaddr_un.
    match unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size) } {
        0 => Ok(Connection::new(socket)),
        _ => Err(io::Error::last_os_error()),
    }
}

pub(crate) fn ask(owner: &Connection, request: impl Into<FromOwner>) -> FromVmm {
    owner.send(&request.into(), &[]).unwrap();
    owner.receive_first::<FromVmm>().unwrap().message
}

/// A guest of two vCPUs that runs for ever, with a control and a vsock socket.
fn running() -> (Vmm, PathBuf) {
    let mut vmm = Vmm::start_with(
        &Guest::new().say(b'!').spin(),
        |vm| {
            let folder = vm["kernel"]["image"].as_str().unwrap().rsplit_once('/').unwrap().0.to_owned();
            vm["vcpus"] = 2.into();
            vm["balloon"] = json!({});
            vm["vsock"] = json!({"guest_cid": 3, "socket": format!("{folder}/vsock")});
            vm["control"] = format!("{folder}/control").into();
        },
        &[],
    );
    vmm.hear(b'!');
    let folder = vmm.folder().to_owned();
    (vmm, folder)
}

/// User time of the thread that runs the guest, in ticks (proc(5), `stat`, field 14).
fn guest_ticks(process: u32) -> u64 {
    let thread = fs::read_dir(format!("/proc/{process}/task"))
        .unwrap()
        .map(|task| task.unwrap().path())
        .find(|task| fs::read_to_string(task.join("comm")).unwrap() == "vcpu0\n")
        .unwrap();
    let stat = fs::read_to_string(thread.join("stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn a_new_owner_pauses_a_spinning_guest_resumes_and_stops_it() {
    if !has_kvm() {
        return;
    }
    let (vmm, folder) = running();
    let process = vmm.confined();
    let owner = take_over(&folder.join("control")).unwrap();
    for _ in 0..3 {
        assert_eq!(ask(&owner, Pause {}), Done {}.into());
        let before = guest_ticks(process);
        std::thread::sleep(Duration::from_millis(100));
        assert!(guest_ticks(process) <= before + 1, "a paused guest takes no time");
        assert_eq!(ask(&owner, Resume {}), Done {}.into());
        // A busy machine may let it wait.
        let deadline = Instant::now() + Duration::from_secs(30);
        while guest_ticks(process) <= before + 1 {
            assert!(Instant::now() < deadline, "it goes on");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    assert_eq!(ask(&owner, SetBalloon { size_mib: 16 }), Done {}.into());
    assert!(matches!(ask(&owner, SetBalloon { size_mib: 64 }), FromVmm::Refused(_)), "all of its memory");
    let FromVmm::Metrics(metrics) = ask(&owner, ReadMetrics {}) else { panic!("no metrics") };
    assert!(metrics.exits >= metrics.port_exits && metrics.port_exits >= 1, "{metrics:?}");
    let FromVmm::Ended(Ended { end, .. }) = ask(&owner, Stop {}) else { panic!("no end") };
    assert_eq!(end, End::Stopped);
    assert_eq!(vmm.over().code(), 13);
}

#[test]
fn an_owner_replaces_the_one_before_and_leaves_the_guest_running() {
    if !has_kvm() {
        return;
    }
    let (vmm, folder) = running();
    let first = take_over(&folder.join("control")).unwrap();
    assert!(matches!(ask(&first, ReadMetrics {}), FromVmm::Metrics(_)));
    let second = take_over(&folder.join("control")).unwrap();
    assert!(matches!(ask(&second, ReadMetrics {}), FromVmm::Metrics(_)));
    assert!(first.receive_first::<FromVmm>().is_err(), "hung up on");
    drop(second);
    let third = take_over(&folder.join("control")).unwrap();
    assert!(matches!(ask(&third, Stop {}), FromVmm::Ended(_)));
    assert_eq!(vmm.over().code(), 13);
}

#[test]
fn a_guest_without_a_driver_answers_no_dial_and_nobody_waits_for_ever() {
    if !has_kvm() {
        return;
    }
    let (_vmm, folder) = running();
    let mut host = UnixStream::connect(folder.join("vsock")).unwrap();
    host.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    host.write_all(b"CONNECT 52\n").unwrap();
    assert_eq!(host.read(&mut [0; 16]).unwrap(), 0, "hung up on after two seconds");
}
