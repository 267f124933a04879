//! The doctor: a host that runs rooms is found fit, and what is missing is named with what mends it.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use carrel_tests::Carrel;
use serde_json::Value;

/// A check's status and mend.
fn check<'a>(report: &'a Value, name: &str) -> (&'a str, Option<&'a str>) {
    let checks = report["checks"].as_array().expect("a report has checks");
    let found = checks.iter().find(|check| check["name"] == name);
    let found = found.unwrap_or_else(|| panic!("no check {name} in {report:#}"));
    (found["status"].as_str().unwrap(), found["mend"].as_str())
}

#[test]
fn a_host_that_runs_rooms_is_fit_and_nothing_is_left_of_the_trial() {
    let carrel = Carrel::new();
    let report = carrel.json(&["doctor", "--json"]);
    for name in [
        "host-kernel",
        "kvm-device",
        "kvm-capabilities",
        "assets",
        "home",
        "cgroup",
        "namespaces",
        "no-capabilities",
        "seccomp",
        "tiny-guest",
        "guest-kernel",
    ] {
        assert_eq!(check(&report, name), ("ok", None), "{report:#}");
    }
    for check in report["checks"].as_array().unwrap() {
        assert_eq!(check["status"] == "ok", check["mend"].is_null(), "{check:#}");
        assert!(!check["detail"].as_str().unwrap().is_empty(), "{check:#}");
    }
    carrel.expect_nothing_left();
    let said = carrel.run(&["doctor"]).succeeds();
    assert!(said.text().contains("Rooms can run on this host"), "{said:?}");
}

#[test]
fn a_host_without_assets_is_told_what_to_build() {
    let carrel = Carrel::new();
    let nothing = carrel.scratch();
    let mut command = carrel.command(&["doctor", "--json"]);
    let output = command.env("CARREL_ASSETS", &nothing).output().expect("carrel runs");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("a report all the same");
    let (status, mend) = check(&report, "assets");
    assert!(status == "missing" && mend.is_some_and(|mend| mend.contains("scripts/build")), "{report:#}");
    assert_eq!(check(&report, "guest-kernel").0, "missing", "{report:#}");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.starts_with("carrel: ") && error.contains("assets"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
}
