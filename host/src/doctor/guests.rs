//! What is found out by running guests: each part of the confinement, KVM itself, and the guest's kernel with the agent.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::time::Duration;

use carrel_protocol::agent;
use carrel_protocol::vmm::End;

use super::Check;
use super::probe;
use super::readings::Readings;
use super::trial::{self, Conclusion, Shown};
use crate::cgroup::CgroupError;
use crate::home::Assets;
use crate::launch::LaunchError;
use crate::outcome::clean;
use crate::patience::Patience;
use crate::spec::Part;
use carrel_protocol::chain;

/// Slower than this, the counted instructions were interpreted.
const HARDWARE: Duration = Duration::from_millis(200);
const OTHER_HOST: &str = "use a host whose KVM is kvm_intel or kvm_amd; from carrel's sources, `scripts/kvm-host carrel …` emulates one";

/// Tries the parts of the confinement one by one, then the guests. Returns what was found, in the order of docs/host.md.
pub(super) fn examine(
    assets: &Assets,
    directory: &Path,
    readings: &Readings,
    patience: Patience,
) -> Vec<Check> {
    let kvm = || OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let (mut checks, without) = confinement(assets, readings, patience, &kvm);
    checks.push(user_per_room(rustix::process::geteuid().is_root()));
    match kvm() {
        Err(_) => checks.push(Check::missing(
            "tiny-guest",
            "no guest can be tried without /dev/kvm",
            "mend kvm-device first",
        )),
        Ok(device) => {
            let shown = trial::probe(&assets.vmm, device, &without, None, patience.probe());
            let (tiny, goes_on) = tiny_guest(&shown);
            checks.push(tiny);
            if goes_on {
                let shown = trial::boot(assets, directory, &without, patience.first_boot());
                checks.push(guest_kernel(&shown));
            }
        }
    }
    checks
}

/// One tiny guest a part, each under that part alone. Returns also the parts that can't be had.
fn confinement(
    assets: &Assets,
    readings: &Readings,
    patience: Patience,
    kvm: &impl Fn() -> io::Result<File>,
) -> (Vec<Check>, Vec<Part>) {
    let mut missing = Vec::new();
    let mut checks = Vec::new();
    for part in Part::ALL {
        let without: Vec<Part> = Part::ALL.into_iter().filter(|other| *other != part).collect();
        // The confinement is there before KVM is asked, so it can be tried without.
        let Ok(device) = kvm().or_else(|_| File::open("/dev/null")) else { continue };
        let shown = trial::probe(&assets.vmm, device, &without, Some(probe::RUNS), patience.probe());
        let check = confined(part, &shown, readings);
        if !check.is_ok() {
            missing.push(part);
        }
        checks.push(check);
    }
    (checks, missing)
}

fn name_of(part: Part) -> &'static str {
    match part {
        Part::Cgroup => "cgroup",
        Part::Namespaces => "namespaces",
        Part::Capabilities => "no-capabilities",
        Part::Seccomp => "seccomp",
    }
}

fn confined(part: Part, shown: &Shown, readings: &Readings) -> Check {
    let name = name_of(part);
    match &shown.conclusion {
        // That the guest got no further is the next check's business.
        Conclusion::Enough | Conclusion::Ended(End::Shutdown | End::Kvm, _) | Conclusion::Overdue => {
            Check::ok(name, held(part))
        }
        Conclusion::NotLaunched(LaunchError::Cgroup(error)) => not_confined(name, shown, cgroup_mend(error)),
        Conclusion::Ended(..)
        | Conclusion::Greeted(_)
        | Conclusion::NotLaunched(_)
        | Conclusion::Gone(_)
        | Conclusion::Unwatched(_) => not_confined(name, shown, part_mend(part, readings)),
    }
}

fn not_confined(name: &str, shown: &Shown, mend: &str) -> Check {
    Check::missing(name, &format!("a VMM can't be confined so: {}", told(&shown.conclusion)), mend)
}

fn held(part: Part) -> &'static str {
    match part {
        Part::Cgroup => "a VMM is born in a cgroup of its own, with limits on CPU, memory and threads",
        Part::Namespaces => {
            "a VMM has namespaces and an empty root of its own, in which there is no other user"
        }
        Part::Capabilities => "a VMM has no capabilities and can gain none",
        Part::Seccomp => "a VMM's threads are under system-call filters",
    }
}

/// Only root can give each room's VMM a user of its own: an ordinary user has one to give, and that is himself.
fn user_per_room(is_root: bool) -> Check {
    const NAME: &str = "user-per-room";
    match is_root {
        true => Check::ok(NAME, "outside of its namespaces too a VMM is an unprivileged user of its own"),
        false => Check::warning(
            NAME,
            "outside of their namespaces all rooms' VMMs are this same user: one that broke out of namespaces and filters would meet no second user \
             between it and this user's other rooms, processes and files",
            "run carrel as root, which gives each room a user of its own",
        ),
    }
}

fn cgroup_mend(error: &CgroupError) -> &'static str {
    match error {
        CgroupError::NotMounted => "mount -t cgroup2 none /sys/fs/cgroup",
        CgroupError::NotDelegated(_) => {
            "run carrel as root, or by `systemd-run --user --scope -p Delegate=yes carrel …`"
        }
        CgroupError::Controller { source: None, .. } => {
            "boot with cgroup v2 alone: add `systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all` to the kernel's command line"
        }
        CgroupError::Occupied { .. } => "run the command that the sentence has, or carrel as root",
        // Refused, though it is there.
        CgroupError::Controller { source: Some(_), .. } => {
            "run carrel in a leaf below the cgroup that the sentence names, as `systemd-run --user --scope -p Delegate=yes carrel …` does"
        }
        CgroupError::Io { .. } => {
            "let carrel's user write below the cgroup that the sentence names, or run carrel as root"
        }
    }
}

fn part_mend(part: Part, readings: &Readings) -> &'static str {
    let is = |path: &str, value: &str| readings.text(path).is_some_and(|text| text == value);
    match part {
        Part::Namespaces if is("proc/sys/user/max_user_namespaces", "0") => {
            "sysctl -w user.max_user_namespaces=15000"
        }
        Part::Namespaces if is("proc/sys/kernel/unprivileged_userns_clone", "0") => {
            "sysctl -w kernel.unprivileged_userns_clone=1"
        }
        Part::Namespaces if is("proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1") => {
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile that lets carrel make user namespaces"
        }
        Part::Namespaces => {
            "allow user namespaces (CONFIG_USER_NS); in a container, run it with `--privileged` or carrel outside"
        }
        Part::Capabilities => {
            "run carrel where nothing forbids prctl(2) and capset(2); in a container, outside of it"
        }
        Part::Seccomp => "boot a kernel with CONFIG_SECCOMP_FILTER",
        Part::Cgroup => "run carrel as root, or in a delegated scope",
    }
}

/// What a conclusion that was not hoped for says, in words that follow a colon.
fn told(conclusion: &Conclusion) -> String {
    match conclusion {
        Conclusion::Ended(_, Some(detail)) => clean(detail),
        Conclusion::Ended(end, None) => match end {
            End::Shutdown => "the guest powered itself off".into(),
            End::Reset => "the guest restarted".into(),
            End::TripleFault => "the guest triple-faulted".into(),
            End::Panic => "the guest's kernel panicked".into(),
            End::Stopped | End::BadConfiguration | End::BadSnapshot | End::Kvm | End::Host | End::Internal => {
                format!("the VMM ended with status {}", end.status())
            }
        },
        Conclusion::NotLaunched(error) => chain(error),
        Conclusion::Gone(end) => format!("the VMM was gone without a word ({end:?})"),
        Conclusion::Unwatched(error) => chain(error),
        Conclusion::Overdue => "the guest went on without an end".into(),
        Conclusion::Enough | Conclusion::Greeted(_) => "it went well".into(),
    }
}

/// KVM as the probe saw it, and whether a kernel is worth a trial.
fn tiny_guest(shown: &Shown) -> (Check, bool) {
    const NAME: &str = "tiny-guest";
    let Some(first) = shown.at(probe::RUNS) else {
        let detail = format!("a guest of a few instructions does not run: {}", told(&shown.conclusion));
        return (Check::missing(NAME, &detail, OTHER_HOST), false);
    };
    let started = milliseconds(first);
    let rate = match shown.at(probe::HAS_COUNTED).map(|at| at.saturating_sub(first)) {
        Some(time) if time > HARDWARE => {
            // Below 2³², so exact enough as thousands a second.
            let rate = u128::from(probe::COUNTED) / time.as_millis().max(1);
            format!(", which interprets it: {rate} thousand instructions a second")
        }
        Some(_) | None => String::new(),
    };
    let stop = if shown.at(probe::HAS_COUNTED).is_none() {
        "in a loop"
    } else if shown.at(probe::HAS_EXCHANGED).is_none() {
        "at cmpxchg16b"
    } else if shown.at(probe::HAS_TRAPPED).is_none() {
        "at int3, or on its way back"
    } else if !matches!(shown.conclusion, Conclusion::Ended(End::Shutdown, _)) {
        "when it powered off"
    } else {
        let detail = format!("{} from the launch to a guest's first instruction{rate}", started);
        return match rate.is_empty() {
            true => (Check::ok(NAME, &detail), true),
            false => (Check::warning(NAME, &detail, OTHER_HOST), true),
        };
    };
    let detail = format!(
        "tiny guests run on this KVM{rate}, {started} after their launch, and stop {stop}, where no kernel gets by: {}",
        told(&shown.conclusion)
    );
    (Check::missing(NAME, &detail, OTHER_HOST), false)
}

fn guest_kernel(shown: &Shown) -> Check {
    const NAME: &str = "guest-kernel";
    match &shown.conclusion {
        Conclusion::Greeted(hello) if hello.version == agent::VERSION => Check::ok(
            NAME,
            &format!(
                "Linux {} and the agent {} were there {} after the launch",
                clean(&hello.kernel),
                clean(&hello.agent),
                milliseconds(shown.took)
            ),
        ),
        Conclusion::Greeted(hello) => Check::missing(
            NAME,
            &format!("the agent speaks version {} and this carrel version {}", hello.version, agent::VERSION),
            "install kernel, initramfs, carrel and carrel-vmm from one build: scripts/build",
        ),
        Conclusion::Overdue => Check::missing(
            NAME,
            &format!("the guest's kernel and agent were not there after {}", milliseconds(shown.took)),
            OTHER_HOST,
        ),
        other @ (Conclusion::Ended(..)
        | Conclusion::Enough
        | Conclusion::NotLaunched(_)
        | Conclusion::Gone(_)
        | Conclusion::Unwatched(_)) => Check::missing(
            NAME,
            &format!("the guest's kernel and agent don't come up: {}", told(other)),
            "build kernel and initramfs anew (scripts/build), or use a host whose KVM is kvm_intel or kvm_amd",
        ),
    }
}

fn milliseconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests;
