//! The doctor: whether this host can run rooms, found out by running guests rather than by reading names.
//!
//! ```text
//!   requirements ─▶ what must be there: kernel, /dev/kvm, assets, what KVM offers, a home with space
//!        │ the VMM is there
//!        ▼
//!   guests ──────▶ one tiny guest under each part of the confinement
//!        │         the probe: instructions that some /dev/kvm can't run
//!        │         the guest's kernel and the agent, up to the agent's first word
//!        ▼
//!   settings ────▶ what makes rooms slow or lets them look at each other: warnings
//! ```
//!
//! Nothing is mended here. What a check tried is cleared away before the next, and by the next command if the doctor is killed.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::home::Assets;
use crate::patience::Patience;

mod guests;
mod probe;
mod readings;
mod requirements;
mod settings;
mod trial;

use readings::Readings;

/// What was found. Checks are added from version to version, not renamed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// In the order in which they were made: a later one may fail because an earlier one did.
    pub checks: Vec<Check>,
}

impl Report {
    /// Whether rooms can run here: nothing is missing.
    pub fn is_fit(&self) -> bool {
        self.missing().next().is_none()
    }

    /// Names of what is missing.
    pub fn missing(&self) -> impl Iterator<Item = &str> {
        self.checks.iter().filter(|check| check.status == Status::Missing).map(|check| check.name.as_str())
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// A word, stable for scripts.
    pub name: String,
    /// How it is.
    pub status: Status,
    /// One sentence that says what was found.
    pub detail: String,
    /// The command that mends it, or what to do where no command does; `null` if all is well.
    pub mend: Option<String>,
}

impl Check {
    fn ok(name: &str, detail: &str) -> Self {
        Self { name: name.into(), status: Status::Ok, detail: detail.into(), mend: None }
    }

    fn warning(name: &str, detail: &str, mend: &str) -> Self {
        Self { status: Status::Warning, mend: Some(mend.into()), ..Self::ok(name, detail) }
    }

    fn missing(name: &str, detail: &str, mend: &str) -> Self {
        Self { status: Status::Missing, mend: Some(mend.into()), ..Self::ok(name, detail) }
    }

    fn is_ok(&self) -> bool {
        self.status == Status::Ok
    }
}

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Rooms run, but slower or less apart from each other than they could be.
    Warning,
    /// Rooms can't run.
    Missing,
}

/// Examines this host. `home` is made if it isn't there; it holds the disk of the room that is tried. So is `store`, which is a check of its own where it
/// is not in the home. Takes a second or two on hardware.
pub fn examine(home: &Path, store: &Path, assets: &Assets, patience: Patience) -> Report {
    // What an earlier doctor left that was killed.
    crate::cgroup::sweep();
    let readings = Readings::of_this_host();
    let mut checks = vec![
        requirements::kernel(&readings),
        requirements::kvm_device(&readings),
        requirements::assets(assets),
        requirements::place("home", "CARREL_HOME", home),
    ];
    if !store.starts_with(home) {
        checks.push(requirements::place("store", "CARREL_STORE", store));
    }
    if assets.vmm.is_file() {
        checks.push(requirements::kvm_capabilities(&assets.vmm));
        checks.extend(guests::examine(assets, home, &readings, patience));
    }
    checks.extend(settings::examine(&readings));
    Report { checks }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_keeps_no_room_from_running_and_what_is_missing_does() {
        let warned = Report { checks: vec![Check::ok("a", "x"), Check::warning("b", "x", "y")] };
        assert!(warned.is_fit());
        let checks = [&warned.checks[..], &[Check::missing("c", "x", "y")]].concat();
        let report = Report { checks };
        assert!(!report.is_fit());
        assert_eq!(report.missing().collect::<Vec<_>>(), ["c"]);
    }

    #[test]
    fn the_form_for_programs_is_what_the_documentation_says() {
        let report = Report { checks: vec![Check::ok("a", "x"), Check::missing("b", "y", "z")] };
        assert_eq!(
            serde_json::to_string(&report).unwrap(),
            r#"{"checks":[{"name":"a","status":"ok","detail":"x","mend":null},{"name":"b","status":"missing","detail":"y","mend":"z"}]}"#
        );
    }

    #[test]
    fn without_a_vmm_the_rest_is_examined_still() {
        let home = tempfile::tempdir().unwrap();
        let nowhere = Path::new("/nowhere");
        let assets = Assets {
            kernel: nowhere.join("vmlinux"),
            initramfs: nowhere.join("initramfs.cpio"),
            scratch: nowhere.join("scratch.ext4"),
            vmm: nowhere.join("carrel-vmm"),
        };
        let within = home.path().join("store");
        let report = examine(home.path(), &within, &assets, Patience::default());
        assert!(report.missing().any(|name| name == "assets"), "{report:?}");
        assert!(report.checks.iter().any(|check| check.name == "swap"), "{report:?}");
        assert!(report.checks.iter().all(|check| check.is_ok() == check.mend.is_none()), "{report:?}");
        let asked = |report: &Report| report.checks.iter().any(|check| check.name == "store");
        assert!(!asked(&report), "it is the home's disk: {report:?}");
        let elsewhere = tempfile::tempdir().unwrap();
        let report = examine(home.path(), &elsewhere.path().join("store"), &assets, Patience::default());
        assert!(asked(&report), "{report:?}");
    }
}
