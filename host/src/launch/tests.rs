use std::io::Read;
use std::os::unix::fs::FileExt;

use carrel_protocol::units::{MemoryMib, VcpuCount};

use super::process::{ChildEnd, Plan, spawn, wait_until_ended};
use super::*;

fn id() -> RoomId {
    "0123456789ab".parse().unwrap()
}

fn machine() -> Machine {
    Machine {
        vcpus: VcpuCount::try_from(2).unwrap(),
        memory_mib: MemoryMib::try_from(512).unwrap(),
        cpu_millis: 1500,
        disk_bytes: (64 << 20) + 1,
        kernel: None,
    }
}

/// Runs a shell in the VMM's place; descriptor 3 is its only one.
fn shell(script: &str, namespaces: bool) -> (ChildEnd, String) {
    let program = File::open(std::fs::canonicalize("/bin/sh").unwrap()).unwrap();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let child = spawn(&Plan {
        program: program.as_fd(),
        path: "/bin/sh".as_ref(),
        arguments: ["sh", "-c", script].map(str::to_owned).into(),
        socket: theirs.as_fd(),
        cgroup: None,
        user: namespaces.then(|| user_of(&id())),
    })
    .unwrap();
    drop(theirs);
    let mut said = String::new();
    let mut ours = ours;
    ours.read_to_string(&mut said).unwrap();
    let end = wait_until_ended(child.descriptor().unwrap().as_fd()).unwrap();
    assert_eq!(child.wait().unwrap(), end, "a zombie tells the same");
    (end, said)
}

#[test]
fn the_child_has_the_socket_and_nothing_else() {
    let (end, said) = shell(
        "for fd in 0 1 2 4 5 6 7 8 9; do [ -e /proc/self/fd/$fd ] && echo $fd >&3; done; echo done >&3",
        false,
    );
    assert_eq!((end, said.as_str()), (ChildEnd::Status(0), "done\n"));
}

#[test]
fn the_child_is_user_0_of_namespaces_of_its_own() {
    let (end, said) =
        shell("{ echo $$; while read -r line; do echo $line; done < /proc/self/uid_map; } >&3", true);
    let own = user_of(&id());
    assert_eq!((end, said), (ChildEnd::Status(0), format!("1\n0 {own} 1\n")));
}

/// Each child waits for its own pipe's end, and is born with a copy of whatever pipes other threads have open just then.
#[test]
fn children_of_many_threads_do_not_wait_for_each_other() {
    let (tell, hear) = std::sync::mpsc::channel();
    for _ in 0..8 {
        let tell = tell.clone();
        std::thread::spawn(move || {
            for _ in 0..25 {
                assert_eq!(shell("exit 7", true).0, ChildEnd::Status(7));
            }
            let _ = tell.send(());
        });
    }
    for _ in 0..8 {
        hear.recv_timeout(std::time::Duration::from_secs(60)).unwrap();
    }
}

#[test]
fn a_program_that_can_not_be_executed_is_an_error_that_names_it() {
    let nothing = tempfile::NamedTempFile::new().unwrap();
    let (_ours, theirs) = Connection::pair().unwrap();
    let error = spawn(&Plan {
        program: nothing.as_file().as_fd(),
        path: nothing.path(),
        arguments: vec!["x".into()],
        socket: theirs.as_fd(),
        cgroup: None,
        user: None,
    })
    .unwrap_err();
    assert!(matches!(&error, LaunchError::Execute { path, .. } if path == nothing.path()), "{error}");
}

#[test]
fn the_way_in_which_a_child_ended_is_told() {
    assert_eq!(shell("exit 7", false).0, ChildEnd::Status(7));
    assert_eq!(shell("kill -KILL $$", false).0, ChildEnd::Signal(9));
}

#[test]
fn a_rooms_disk_is_sparse_and_has_no_name() {
    let directory = tempfile::tempdir().unwrap();
    let disk = File::from(overlay(directory.path(), disk_bytes(&machine())).unwrap());
    assert_eq!(disk.metadata().unwrap().len(), (64 << 20) + 4096);
    disk.write_all_at(b"x", 1 << 20).unwrap();
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn limits_leave_room_for_the_vmm_itself() {
    let limits = limits(&machine());
    assert_eq!(limits.memory_bytes, (512 << 20) + (4 << 20) + (96 << 20));
    assert_eq!(limits.cpu_millis, 2250);
    assert_eq!(running_cpu_millis(&machine()), 1750);
}

#[test]
fn what_is_left_out_is_told_to_the_vmm_too() {
    assert_eq!(arguments(&[]), ["carrel-vmm", "--owner-fd", "3"]);
    let without = [Part::Cgroup, Part::Seccomp];
    assert_eq!(arguments(&without)[3], "--unconfined=cgroup,seccomp");
}
