use std::path::PathBuf;

use carrel_protocol::agent::Hello;

use super::super::Status;
use super::*;
use crate::launch::ChildEnd;

fn shown(marks: &[(u8, u64)], conclusion: Conclusion) -> Shown {
    let marks = marks.iter().map(|&(mark, ms)| (mark, Duration::from_millis(ms))).collect();
    Shown { marks, took: Duration::from_millis(900), conclusion }
}

fn all_marks(counted_ms: u64) -> Vec<(u8, u64)> {
    vec![
        (probe::RUNS, 10),
        (probe::HAS_COUNTED, 10 + counted_ms),
        (probe::HAS_EXCHANGED, 10 + counted_ms),
        (probe::HAS_TRAPPED, 10 + counted_ms),
    ]
}

fn off() -> Conclusion {
    Conclusion::Ended(End::Shutdown, None)
}

#[test]
fn a_probe_that_got_through_lets_a_kernel_be_tried() {
    let (check, goes_on) = tiny_guest(&shown(&all_marks(1), off()));
    assert_eq!((check.status, goes_on), (Status::Ok, true));
    assert!(check.detail.starts_with("10.0 ms"), "{}", check.detail);
    let (check, goes_on) = tiny_guest(&shown(&all_marks(500), off()));
    assert_eq!((check.status, goes_on), (Status::Warning, true), "slow is no proof");
}

#[test]
fn a_probe_that_stops_says_where_and_keeps_the_kernel_from_being_tried() {
    for (marks, place) in [(1, "loop"), (2, "cmpxchg16b"), (3, "int3"), (4, "powered off")] {
        let (check, goes_on) = tiny_guest(&shown(&all_marks(500)[..marks], Conclusion::Overdue));
        assert_eq!((check.status, goes_on), (Status::Missing, false), "{check:?}");
        assert!(check.detail.contains(place), "{}", check.detail);
        if marks > 1 {
            assert!(check.detail.contains("1000 thousand instructions a second"), "{}", check.detail);
        }
    }
    let (check, goes_on) =
        tiny_guest(&shown(&[], Conclusion::Ended(End::Kvm, Some("KVM refused to create a VM".into()))));
    assert!(!goes_on && check.detail.ends_with("KVM refused to create a VM"), "{}", check.detail);
}

#[test]
fn a_part_holds_when_its_guest_ran_or_only_kvm_was_missing() {
    let nothing = tempfile::tempdir().unwrap();
    let readings = Readings::below(nothing.path());
    let kvm = || Conclusion::Ended(End::Kvm, Some("KVM refused to speak version 12".into()));
    for conclusion in [Conclusion::Enough, off(), kvm(), Conclusion::Overdue] {
        let check = confined(Part::Seccomp, &shown(&[], conclusion), &readings);
        assert_eq!(check.status, Status::Ok, "{check:?}");
    }
    let error = CgroupError::NotDelegated(PathBuf::from("/sys/fs/cgroup"));
    let controller = |source| CgroupError::Controller { controller: "cpu", path: "/sys".into(), source };
    let refused = Some(io::Error::from(io::ErrorKind::ResourceBusy));
    let missing = [
        (Part::Cgroup, Conclusion::NotLaunched(controller(None).into()), "cgroup_no_v1"),
        (Part::Cgroup, Conclusion::NotLaunched(controller(refused).into()), "leaf"),
        (Part::Cgroup, Conclusion::NotLaunched(error.into()), "Delegate=yes"),
        (Part::Namespaces, Conclusion::Ended(End::Host, Some("an empty root".into())), "CONFIG_USER_NS"),
        (Part::Seccomp, Conclusion::Gone(ChildEnd::Signal(31)), "CONFIG_SECCOMP_FILTER"),
    ];
    for (part, conclusion, mend) in missing {
        let check = confined(part, &shown(&[], conclusion), &readings);
        assert_eq!(check.status, Status::Missing, "{check:?}");
        assert!(check.mend.as_ref().is_some_and(|text| text.contains(mend)), "{check:?}");
    }
}

#[test]
fn the_setting_that_forbids_user_namespaces_is_the_one_to_change() {
    for (path, value) in [
        ("user/max_user_namespaces", "0\n"),
        ("kernel/unprivileged_userns_clone", "0\n"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1\n"),
    ] {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("proc/sys").join(path);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, value).unwrap();
        let mend = part_mend(Part::Namespaces, &Readings::below(root.path()));
        assert!(mend.contains(&path.replace('/', ".")), "{mend}");
    }
}

#[test]
fn the_agents_greeting_is_believed_if_it_is_of_this_build() {
    let greeted = |version| {
        let hello = Hello {
            version,
            agent: "0.1.0".into(),
            kernel: "6.12.1".into(),
            booted_us: 600_000,
            clone: false,
        };
        guest_kernel(&shown(&[], Conclusion::Greeted(Box::new(hello))))
    };
    assert_eq!(greeted(agent::VERSION).status, Status::Ok);
    assert!(greeted(agent::VERSION).detail.contains("6.12.1"));
    assert_eq!(greeted(agent::VERSION + 1).status, Status::Missing);
    for conclusion in
        [Conclusion::Overdue, Conclusion::Ended(End::Panic, None), Conclusion::Gone(ChildEnd::Signal(9))]
    {
        let check = guest_kernel(&shown(&[], conclusion));
        assert!(check.status == Status::Missing && check.mend.is_some(), "{check:?}");
    }
}

#[test]
fn an_ordinary_user_is_told_what_his_rooms_share() {
    assert_eq!(user_per_room(true).status, Status::Ok);
    let check = user_per_room(false);
    assert_eq!(check.status, Status::Warning);
    assert!(check.detail.contains("this same user") && check.mend.is_some(), "{check:?}");
}
