//! A VMM that is played by the test; its process is a shell that waits for a socket to close.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use carrel_protocol::vmm::{Broken, End};

use super::super::{limits, testing};
use super::*;
use crate::home::{Assets, Extras, Task};
use crate::patience::Patience;
use crate::spec;

fn prepared() -> (Prepared, Connection, UnixStream) {
    let (connection, vmm) = Connection::pair().unwrap();
    let (life, held) = UnixStream::pair().unwrap();
    let child = testing::stand_in(held.as_fd());
    let limits = limits(&spec::testing::room().machine);
    (Prepared { connection, child, cgroup: OwnCgroup(None), limits, timeline: None }, vmm, life)
}

fn say(vmm: &Connection, message: impl Into<FromVmm>) {
    vmm.send_blocking(&message.into(), &[]).unwrap();
}

fn ready() -> vmm::Prepared {
    vmm::Prepared { timeline: vec![Mark { done: "vm".into(), at_us: 7 }] }
}

fn order() -> Order {
    let nowhere = || "/nonexistent".into();
    Order {
        spec: spec::testing::room(),
        assets: Assets { kernel: nowhere(), initramfs: nowhere(), scratch: nowhere(), vmm: nowhere() },
        patience: Patience::default(),
        task: Task::Clone,
        extras: Extras::default(),
    }
}

fn template() -> TemplateFiles {
    let file = || OwnedFd::from(tempfile::tempfile().unwrap());
    TemplateFiles {
        state: file(),
        memory: file(),
        disk: file(),
        working_set: Some(file()),
        record: Some(file()),
    }
}

#[test]
fn it_is_ready_when_it_says_so_and_nobody_waits_for_it() {
    let (mut prepared, vmm, _life) = prepared();
    assert!(!prepared.look().unwrap() && prepared.timeline().is_empty());
    say(&vmm, ready());
    assert!(prepared.look().unwrap() && prepared.look().unwrap());
    assert_eq!(prepared.timeline(), ready().timeline);
}

#[test]
fn one_that_breaks_ends_or_talks_is_not_used() {
    let breaks: [fn(Connection); 3] = [
        |vmm| say(&vmm, Broken { end: End::Kvm, message: "KVM\nrefused".into() }),
        |vmm| say(&vmm, vmm::Done {}),
        drop,
    ];
    for (breaks, word) in breaks.into_iter().zip(["KVM refused", "out of turn", "before it was told"]) {
        let (mut prepared, vmm, _life) = prepared();
        say(&vmm, ready());
        assert!(prepared.look().unwrap());
        breaks(vmm);
        let error = prepared.look().unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
fn it_goes_on_from_a_template_with_a_disk_of_the_rooms_own_and_without_kvm() {
    let directory = tempfile::tempdir().unwrap();
    // Also one that has not said yet that it is ready.
    for says_so in [true, false] {
        let (prepared, vmm, _life) = prepared();
        if says_so {
            say(&vmm, ready());
        }
        let limits = prepared.limits;
        let launched = prepared.go_on(&order(), directory.path(), template(), limits).unwrap();
        let packet = vmm.receive::<FromOwner>().unwrap();
        let FromOwner::Restore(restore) = packet.message else { panic!("{:?}", packet.message) };
        assert_eq!((restore.version, restore.vm.kvm), (vmm::VERSION, None));
        assert_eq!(
            packet.descriptors.len(),
            5,
            "state, memory, working set, the template's disk, the room's"
        );
        assert!(restore.vm.working_set.is_some() && launched.record.is_some());
        let overlay = restore.vm.blocks[0].overlay.unwrap();
        let disk = std::fs::File::from(packet.descriptors.into_iter().nth(overlay.0.into()).unwrap());
        assert_eq!(disk.metadata().unwrap().len(), order().spec.machine.disk_bytes);
        drop(launched);
    }
}

#[test]
fn one_that_nobody_wants_is_killed() {
    let (prepared, vmm, life) = prepared();
    let process = prepared.child.descriptor().unwrap();
    drop(prepared);
    assert!(crate::launch::wait_until_ended(process.as_fd()).is_err(), "it was waited for");
    assert!(vmm.receive::<FromOwner>().is_err());
    drop(life);
}

/// The rest of the way to the VMM: a process in its place that ends at once.
#[test]
fn a_vmm_that_ends_while_it_gets_ready_is_noticed() {
    if std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        return;
    }
    let machine = spec::testing::room().machine;
    let id = "0123456789ab".parse().unwrap();
    let without = [Part::Cgroup, Part::Namespaces];
    let started =
        prepare(&id, &without, "/bin/true".as_ref(), limits(&machine), machine.vcpus, machine.memory_mib);
    let mut prepared = match started {
        Ok(prepared) => prepared,
        // It may be over before it is told what to get ready for.
        Err(error) => return assert!(matches!(error, LaunchError::Packet(_)), "{error}"),
    };
    let mut polled = [PollFd::from_borrowed_fd(prepared.as_fd(), PollFlags::IN)];
    poll(&mut polled, None).unwrap();
    assert!(prepared.look().is_err());
}
