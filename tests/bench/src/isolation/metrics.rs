//! What is measured: one table, a row a metric. A metric is added by adding its row, and to its group's measurement the samples.

use serde::Serialize;

use super::subjects::Subject;

/// What one measurement gives at once: a start, a burst, a row of rooms, or one room's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Group {
    /// A VMM's start to the first instruction of its guest.
    Instruction,
    /// A start to the first output of `true`.
    True,
    /// A start to the first output of `python3 -c 'print(1)'`.
    Python,
    /// The same with modules imported before, where that can be done ahead.
    Imports,
    /// As many starts of `true` at once as the level says.
    Burst,
    /// As many idle rooms beside each other as the level says.
    Density,
    /// What a room's own work measures.
    Inside,
    /// Between host and guest.
    Vsock,
    /// What stands between a workload and the host's kernel.
    Surface,
}

/// Which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    /// Times, sizes.
    Lower,
    /// Rates.
    Higher,
}

/// A row of the table.
#[derive(Debug, Serialize)]
pub(crate) struct Metric {
    /// Its name in options and results.
    pub(crate) name: &'static str,
    /// What it is called in tables and plots.
    pub(crate) title: &'static str,
    /// Its unit.
    pub(crate) unit: &'static str,
    /// Which way is better.
    pub(crate) better: Better,
    /// How it is measured, in a sentence.
    pub(crate) how: &'static str,
    /// What it is measured with.
    #[serde(skip)]
    pub(crate) group: Group,
    /// Whom it has a meaning for.
    #[serde(skip)]
    pub(crate) subjects: &'static [Subject],
}

use Better::{Higher, Lower};
use Group::{Burst, Density, Imports, Inside, Instruction, Python, Surface, True, Vsock};
use Subject::{Carrel, Firecracker, QemuMicrovm};

/// Everyone.
const ALL: &[Subject] = Subject::ALL;
/// Who has a room of its own for each start: all but the warm room. (The resident's clock knows of no rooms at once.)
const STARTED: &[Subject] = match ALL {
    [rest @ .., Subject::CarrelResident, Subject::CarrelWarm] => rest,
    _ => &[],
};
/// Who runs a program as it is (a process, a container), and who goes on where one was ready.
const IMPORTED: &[Subject] = &[
    Subject::Plain,
    Subject::Bubblewrap,
    Subject::Runc,
    Subject::Crun,
    Subject::CarrelClone,
    Subject::CarrelPool,
    Subject::CarrelResident,
];
/// Whose idle rooms can be weighed each by itself. (A pool owns no detached room; its attached ones are clones like the others.)
const WEIGHED: &[Subject] = match STARTED {
    [rest @ .., Subject::CarrelPool] => rest,
    _ => &[],
};
/// Whom a room's inside can differ for: a restored guest runs as a booted one of the same VMM does.
const DISTINCT: &[Subject] =
    &[Subject::Plain, Subject::Bubblewrap, Subject::Runc, Subject::Crun, QemuMicrovm, Firecracker, Carrel];
/// Who has a guest.
const VMMS: &[Subject] = &[QemuMicrovm, Firecracker, Carrel];
/// Whose vsock ends in a Unix socket outside. (QEMU's is the host kernel's own.)
const UNIX_VSOCK: &[Subject] = &[Firecracker, Carrel];

/// The table.
#[rustfmt::skip]
pub(crate) const METRICS: &[Metric] = &[
    row("first-instruction", "start to first guest instruction", "ms", Lower, Instruction, VMMS,
        "from just before the VMM's fork to the byte that a guest of three instructions writes to its serial port; carrel's is carrel-vmm by itself, confined"),
    row("start-true", "start to first output of true", "ms", Lower, True, ALL,
        "from just before fork, or for a resident snapshot or pool from the request, to one byte written by a static program in the room"),
    row("start-python", "start to first output of python3", "ms", Lower, Python, ALL,
        "the same with `python3 -c 'print(1)'`, from the one root file system that all share; carrel unpacks it from an OCI image at each cold start, and once for a template"),
    row("start-imports", "start to first output of python3 that has imports", "ms", Lower, Imports, IMPORTED,
        "the same with asyncio, decimal, json, logging and socket imported before the output; carrel goes on from a template made where they were (`run --initialised`)"),
    row("burst", "start in a burst, to first output", "ms", Lower, Burst, STARTED,
        "starts from as many threads at once as the level says, each measured by itself to one byte written by a static program that then stays, so that no room ends in the others' time; samples of all waves together"),
    row("starts-per-second", "starts per second in bursts", "1/s", Higher, Burst, STARTED,
        "a wave's starts over the time from its beginning to its last first output; a sample is a wave"),
    row("density-pss", "PSS per idle room", "KiB", Lower, Density, WEIGHED,
        "proportional set size of all of a room's processes on the host, guest memory included, while as many idle rooms as the level says are there; a sample is a room"),
    row("density-kernel", "kernel memory per idle room", "KiB", Lower, Density, WEIGHED,
        "`kernel` of memory.stat of the room's cgroups; a sample is a room"),
    row("density-host", "host memory per idle room", "KiB", Lower, Density, WEIGHED,
        "what MemAvailable lost since there was no room, over the rooms: also what no process or cgroup is charged for; one sample"),
    row("density-start", "start beside idle rooms", "ms", Lower, Density, WEIGHED,
        "a start to the first output of `true`, as in start-true, while as many idle rooms as the level says are there"),
    row("cpu", "integer loop inside", "M/s", Higher, Inside, DISTINCT,
        "rounds of a dependent shift, exclusive or and multiply, by the room's monotonic clock"),
    row("memory", "memory copied inside", "MiB/s", Higher, Inside, DISTINCT,
        "8 MiB copied to another 8 MiB, again and again"),
    row("syscalls", "system calls inside", "k/s", Higher, Inside, DISTINCT,
        "getppid(2) in a loop"),
    row("forks", "fork and exec inside", "1/s", Higher, Inside, DISTINCT,
        "a static program that writes one byte, started and waited for in a loop"),
    row("disk-write", "disk write inside", "MiB/s", Higher, Inside, DISTINCT,
        "24 MiB in writes of 1 MiB, then fdatasync; the room's scratch disk or directory, all on the same host file system"),
    row("disk-read", "disk read inside", "MiB/s", Higher, Inside, DISTINCT,
        "the same back with O_DIRECT: past the room's page cache, not past the host's"),
    row("disk-latency", "disk write latency inside", "µs", Lower, Inside, DISTINCT,
        "4 KiB written and made durable with fdatasync, the mean of as many as go into 0.4 s"),
    row("vsock-in", "vsock into the guest", "MiB/s", Higher, Vsock, UNIX_VSOCK,
        "256 MiB, to the guest's word that it has read them; carrel's is carrel-vmm by itself, since workloads are denied vsock"),
    row("vsock-out", "vsock out of the guest", "MiB/s", Higher, Vsock, UNIX_VSOCK,
        "256 MiB"),
    row("vsock-round-trip", "vsock round trip", "µs", Lower, Vsock, UNIX_VSOCK,
        "one byte there and back, the mean of 500"),
    row("syscalls-allowed", "host system calls allowed", "", Lower, Surface, DISTINCT,
        "of the 375 numbers of x86-64's table up to Linux 6.12: how many some thread of the workload (of the VMM, for guests) may make with some arguments, by its seccomp filters, read with strace as they were installed"),
    row("code-mapped", "VMM code mapped", "KiB", Lower, Surface, VMMS,
        "executable mappings of the process that runs the guest"),
    row("code-lines", "lines of source", "", Lower, Surface, DISTINCT,
        "lines of Rust, C and Go below --sources/SUBJECT (carrel: vmm and protocol of its own tree) that are neither blank nor comment, without tests and vendored code"),
];

const fn row(
    name: &'static str,
    title: &'static str,
    unit: &'static str,
    better: Better,
    group: Group,
    subjects: &'static [Subject],
    how: &'static str,
) -> Metric {
    Metric { name, title, unit, better, how, group, subjects }
}

/// The row of a name. Measurements name rows by constants: one that is not there is caught by a test of theirs.
pub(crate) fn named(name: &str) -> Option<&'static Metric> {
    METRICS.iter().find(|metric| metric.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_list_leaves_out_what_it_says() {
        for list in [STARTED, WEIGHED] {
            assert!(list.contains(&Carrel) && !list.contains(&Subject::CarrelWarm), "{list:?}");
            assert!(!list.contains(&Subject::CarrelResident), "{list:?}");
        }
        assert!(STARTED.contains(&Subject::CarrelPool) && !WEIGHED.contains(&Subject::CarrelPool));
    }

    #[test]
    fn names_are_unique_and_fit_for_files() {
        for (i, metric) in METRICS.iter().enumerate() {
            assert!(METRICS[..i].iter().all(|other| other.name != metric.name), "{}", metric.name);
            assert!(metric.name.bytes().all(|b| b.is_ascii_lowercase() || b == b'-'), "{}", metric.name);
            assert!(!metric.subjects.is_empty() && !metric.how.is_empty());
        }
    }
}
