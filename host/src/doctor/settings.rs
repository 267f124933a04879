//! Settings of the host that no guest needs in order to run, but that make rooms slow or let them look at each other.
//!
//! Each is a warning at most: who owns the host may have reasons. docs/hardware.md says what is behind each.

use super::Check;
use super::readings::{CoreScheduling, Readings};

/// All of them, in the order of the page.
pub(super) fn examine(readings: &Readings) -> Vec<Check> {
    vec![
        smt(readings),
        core_scheduling(readings),
        mitigations(readings),
        ksm(readings),
        swap(readings),
        huge_pages(readings),
        overcommit(readings),
        clock(readings),
        memory(readings),
    ]
}

fn smt(readings: &Readings) -> Check {
    const NAME: &str = "smt";
    match readings.text("sys/devices/system/cpu/smt/active").as_deref() {
        Some("1") => Check::warning(
            NAME,
            "two rooms may run on the two threads of one core at once, and time each other there",
            "echo off > /sys/devices/system/cpu/smt/control, or `nosmt` on the kernel's command line",
        ),
        Some(_) => Check::ok(NAME, "no two rooms share a core at one time"),
        None => Check::warning(
            NAME,
            "this kernel does not tell whether threads share a core",
            "see that SMT is off in the firmware",
        ),
    }
}

/// Whether SMT could be had without its danger. That carrel asks for it is not said: it doesn't.
fn core_scheduling(readings: &Readings) -> Check {
    const NAME: &str = "core-scheduling";
    let threads = readings.text("sys/devices/system/cpu/smt/active").is_some_and(|active| active == "1");
    match readings.core_scheduling() {
        CoreScheduling::Offered => Check::ok(
            NAME,
            "the kernel can keep rooms from sharing a core at one time; carrel does not ask it to yet",
        ),
        CoreScheduling::Missing if threads => Check::warning(
            NAME,
            "cores have two threads, and this kernel can't keep two rooms from sharing one at one time",
            "turn SMT off, or boot Linux 5.14 or newer with CONFIG_SCHED_CORE",
        ),
        CoreScheduling::NoNeed | CoreScheduling::Missing => {
            Check::ok(NAME, "no two threads share a core, so there is nothing to schedule apart")
        }
    }
}

/// The kernel's own judgement (Documentation/admin-guide/hw-vuln): a room's guest is what these mitigations are for.
fn mitigations(readings: &Readings) -> Check {
    const NAME: &str = "mitigations";
    let all = readings.texts("sys/devices/system/cpu/vulnerabilities");
    let microcode = readings.cpu("microcode").unwrap_or_else(|| "unknown".into());
    let open: Vec<String> = all
        .iter()
        .filter(|(_, state)| state.starts_with("Vulnerable") || state.contains("no microcode"))
        .map(|(name, state)| format!("{name} ({state})"))
        .collect();
    if all.is_empty() {
        return Check::warning(
            NAME,
            "this kernel does not tell how vulnerable its processor is",
            "boot Linux 4.15 or newer",
        );
    }
    if open.is_empty() {
        return Check::ok(
            NAME,
            &format!("none of {} known weaknesses is open; microcode {microcode}", all.len()),
        );
    }
    let line = readings.text("proc/cmdline").unwrap_or_default();
    let mend = if line.split_ascii_whitespace().any(|word| word == "mitigations=off") {
        "take `mitigations=off` off the kernel's command line"
    } else if readings.has_flag("hypervisor") {
        "the processor's microcode is the hypervisor's: update that host"
    } else if readings.cpu("vendor_id").as_deref() == Some("AuthenticAMD") {
        "apt install amd64-microcode, then reboot; or a newer kernel"
    } else {
        "apt install intel-microcode, then reboot; or a newer kernel"
    };
    Check::warning(NAME, &format!("open: {}; microcode {microcode}", open.join(", ")), mend)
}

fn ksm(readings: &Readings) -> Check {
    const NAME: &str = "ksm";
    match readings.text("sys/kernel/mm/ksm/run").as_deref() {
        Some("1") => Check::warning(
            NAME,
            "the kernel merges equal pages: by the time of a write one room can tell what another has in memory",
            "echo 2 > /sys/kernel/mm/ksm/run",
        ),
        Some(_) | None => Check::ok(NAME, "no pages are merged across rooms"),
    }
}

fn swap(readings: &Readings) -> Check {
    const NAME: &str = "swap";
    let areas = readings.text("proc/swaps").unwrap_or_default().lines().skip(1).count();
    match areas {
        0 => Check::ok(NAME, "there is no swap: what a guest has in memory stays there"),
        _ => Check::warning(
            NAME,
            "there is swap; rooms are kept out of it (memory.swap.max is 0) only where the kernel accounts for it",
            "swapoff -a, or swap on an encrypted device alone",
        ),
    }
}

fn huge_pages(readings: &Readings) -> Check {
    const NAME: &str = "huge-pages";
    match readings.text("sys/kernel/mm/transparent_hugepage/enabled") {
        Some(modes) if modes.contains("[never]") => Check::warning(
            NAME,
            "transparent huge pages are off: a guest's memory costs a fault for every 4 KiB that it touches first",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        Some(modes) => Check::ok(NAME, &format!("transparent huge pages: {modes}")),
        None => Check::warning(
            NAME,
            "this kernel has no transparent huge pages",
            "boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE",
        ),
    }
}

fn overcommit(readings: &Readings) -> Check {
    const NAME: &str = "overcommit";
    match readings.text("proc/sys/vm/overcommit_memory").as_deref() {
        Some("2") => Check::warning(
            NAME,
            "memory is promised just as far as there is some: a room needs all of its memory from its start",
            "sysctl -w vm.overcommit_memory=0",
        ),
        Some(_) | None => Check::ok(NAME, "guest memory is taken as it is touched"),
    }
}

fn clock(readings: &Readings) -> Check {
    const NAME: &str = "clock";
    match readings.text("sys/devices/system/clocksource/clocksource0/current_clocksource").as_deref() {
        Some("tsc") | None => Check::ok(NAME, "the host's clock is the TSC, and so is the guests'"),
        Some(other) => Check::warning(
            NAME,
            &format!("the host's clock is {other}, not the TSC: guests then read the time by a system call"),
            "see why the kernel gave up the TSC: dmesg | grep -i tsc",
        ),
    }
}

fn memory(readings: &Readings) -> Check {
    const NAME: &str = "memory";
    const LITTLE_KIB: u64 = 512 << 10;
    let text = readings.text("proc/meminfo").unwrap_or_default();
    let available = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    match available.and_then(|value| value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()) {
        Some(kib) if kib < LITTLE_KIB => Check::warning(
            NAME,
            &format!("{} MiB of memory are available: not enough for many rooms", kib >> 10),
            "end something else, or give rooms less (--memory)",
        ),
        Some(kib) => Check::ok(NAME, &format!("{} MiB of memory are available", kib >> 10)),
        None => Check::warning(NAME, "this kernel does not tell how much memory is available", "mount /proc"),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::Status;
    use super::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    fn of(root: &Path, name: &str) -> Check {
        examine(&Readings::below(root)).into_iter().find(|check| check.name == name).unwrap()
    }

    const GOOD: &[(&str, &str)] = &[
        ("sys/devices/system/cpu/smt/active", "0\n"),
        ("sys/devices/system/cpu/vulnerabilities/meltdown", "Not affected\n"),
        ("sys/devices/system/cpu/vulnerabilities/spectre_v2", "Mitigation: Retpolines; STIBP: disabled\n"),
        ("sys/kernel/mm/ksm/run", "0\n"),
        ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
        ("sys/devices/system/clocksource/clocksource0/current_clocksource", "tsc\n"),
        ("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n"),
        ("proc/sys/vm/overcommit_memory", "0\n"),
        ("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:   22000000 kB\n"),
        ("proc/cpuinfo", "vendor_id\t: GenuineIntel\nmicrocode\t: 0x21\nflags\t\t: fpu vmx\n"),
    ];

    #[test]
    fn a_host_in_good_order_gets_no_warning() {
        let root = host(GOOD);
        for check in examine(&Readings::below(root.path())) {
            assert_eq!(check.status, Status::Ok, "{check:?}");
        }
    }

    #[test]
    fn each_bad_setting_is_found_and_has_a_mend() {
        for (name, path, text) in [
            ("smt", "sys/devices/system/cpu/smt/active", "1\n"),
            (
                "mitigations",
                "sys/devices/system/cpu/vulnerabilities/mds",
                "Vulnerable: Clear CPU buffers attempted, no microcode\n",
            ),
            ("ksm", "sys/kernel/mm/ksm/run", "1\n"),
            ("swap", "proc/swaps", "Filename\tType\n/dev/sda2 partition 1 0 -2\n"),
            ("huge-pages", "sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n"),
            ("overcommit", "proc/sys/vm/overcommit_memory", "2\n"),
            ("clock", "sys/devices/system/clocksource/clocksource0/current_clocksource", "hpet\n"),
            ("memory", "proc/meminfo", "MemAvailable: 100000 kB\n"),
        ] {
            let root = host(&[GOOD, &[(path, text)]].concat());
            let found = of(root.path(), name);
            assert_eq!(found.status, Status::Warning, "{found:?}");
            assert!(found.mend.is_some_and(|mend| !mend.is_empty()), "{name}");
            let others = examine(&Readings::below(root.path()));
            assert_eq!(others.iter().filter(|check| check.status != Status::Ok).count(), 1, "{name}");
        }
    }

    #[test]
    fn core_scheduling_is_missed_only_where_cores_have_threads() {
        let threads = ("sys/devices/system/cpu/smt/active", "1\n");
        let (with, without) = (host(&[GOOD, &[threads]].concat()), host(GOOD));
        for (root, answer, status) in [
            (&with, CoreScheduling::Missing, Status::Warning),
            (&with, CoreScheduling::Offered, Status::Ok),
            (&without, CoreScheduling::Missing, Status::Ok),
            (&without, CoreScheduling::NoNeed, Status::Ok),
        ] {
            let check = core_scheduling(&Readings::below(root.path()).with(answer));
            assert_eq!(check.status, status, "{answer:?}: {check:?}");
        }
    }

    #[test]
    fn the_mend_of_an_open_weakness_is_its_owners() {
        let open = ("sys/devices/system/cpu/vulnerabilities/mds", "Vulnerable\n");
        let mend = |files: &[(&str, &str)]| {
            of(host(&[GOOD, &[open], files].concat()).path(), "mitigations").mend.unwrap()
        };
        assert!(mend(&[]).contains("intel-microcode"));
        assert!(mend(&[("proc/cpuinfo", "vendor_id : AuthenticAMD\n")]).contains("amd64-microcode"));
        assert!(mend(&[("proc/cpuinfo", "flags : fpu hypervisor\n")]).contains("hypervisor"));
        assert!(mend(&[("proc/cmdline", "quiet mitigations=off\n")]).contains("mitigations=off"));
    }
}
