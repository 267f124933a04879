//! The host's own meter of a room: its VMM's cgroup, or `/proc` where there is none.

use std::fs;

use crate::cgroup::Cgroup;
use crate::stat::Stat;
use crate::usage::{HostUsage, MeterSource};

/// What was metered so far. Sampled now and then, and once more between the VMM's end and its burial: a zombie still has its times,
/// and a cgroup its counters.
#[derive(Debug)]
pub(crate) struct Meter {
    pid: u32,
    cgroup: Option<Cgroup>,
    usage: HostUsage,
}

impl Meter {
    pub(crate) fn new(pid: u32, cgroup: Option<Cgroup>) -> Self {
        let source = if cgroup.is_some() { MeterSource::Cgroup } else { MeterSource::Process };
        Self { pid, cgroup, usage: HostUsage { source, ..HostUsage::default() } }
    }

    /// The last sample.
    pub(crate) fn usage(&self) -> &HostUsage {
        &self.usage
    }

    /// What the VMM says that its guest gave back.
    pub(crate) fn given_back(&mut self, bytes: u64) {
        self.usage.given_back_bytes = Some(bytes);
    }

    /// Reads the counters.
    pub(crate) fn sample(&mut self) {
        match &self.cgroup {
            Some(cgroup) => from_cgroup(cgroup, &mut self.usage),
            None => from_process(self.pid, &mut self.usage),
        }
    }

    /// Reads what only a process that lives can tell: its proportional set size, by a walk over its page tables, so not to be done at every turn;
    /// and, without a cgroup, what it read and wrote.
    pub(crate) fn sample_living(&mut self) {
        if self.cgroup.is_none() {
            io_of_process(self.pid, &mut self.usage);
        }
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid)).unwrap_or_default();
        if let Some(pss) = kib(&rollup, "Pss:") {
            self.usage.pss_bytes = Some(pss);
            self.usage.pss_peak_bytes = self.usage.pss_peak_bytes.max(Some(pss));
        }
    }
}

fn from_cgroup(cgroup: &Cgroup, usage: &mut HostUsage) {
    let keep = |new: Option<u64>, old: u64| new.unwrap_or(old);
    usage.cpu_user_us = keep(cgroup.keyed("cpu.stat", "user_usec"), usage.cpu_user_us);
    usage.cpu_system_us = keep(cgroup.keyed("cpu.stat", "system_usec"), usage.cpu_system_us);
    usage.cpu_throttled_us = cgroup.keyed("cpu.stat", "throttled_usec").or(usage.cpu_throttled_us);
    usage.memory_current_bytes = cgroup.number("memory.current").or(usage.memory_current_bytes);
    usage.memory_peak_bytes = cgroup.number("memory.peak").or(usage.memory_peak_bytes);
    usage.kernel_memory_bytes = usage.kernel_memory_bytes.max(cgroup.keyed("memory.stat", "kernel"));
    for (field, value) in [
        ("rbytes", &mut usage.read_bytes),
        ("wbytes", &mut usage.write_bytes),
        ("rios", &mut usage.read_operations),
        ("wios", &mut usage.write_operations),
    ] {
        *value = cgroup.io(field).or(*value);
    }
}

fn from_process(pid: u32, usage: &mut HostUsage) {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    if let Some((user, system)) = cpu_ticks(&stat) {
        let us = 1_000_000 / rustix::param::clock_ticks_per_second().max(1);
        usage.cpu_user_us = user * us;
        usage.cpu_system_us = system * us;
    }
    // Where a zombie's can't be read (it is another user's), the last sample stands.
    io_of_process(pid, usage);
}

/// `/proc/pid/io` (proc(5)) counts bytes, and system calls, but no operations of the disk.
fn io_of_process(pid: u32, usage: &mut HostUsage) {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let number = |key: &str| io.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok());
    usage.read_bytes = number("read_bytes:").or(usage.read_bytes);
    usage.write_bytes = number("write_bytes:").or(usage.write_bytes);
}

/// `utime` and `stime`, fields 14 and 15 of `/proc/pid/stat` (proc(5)), which count the guest's time too.
fn cpu_ticks(stat: &str) -> Option<(u64, u64)> {
    let stat = Stat::parse(stat)?;
    Some((stat.field(14)?.parse().ok()?, stat.field(15)?.parse().ok()?))
}

/// A line such as `Pss:   1234 kB`, in bytes.
fn kib(text: &str, key: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "42 (a) b) (c) S 1 2 3 4 5 6 7 8 9 10 111 222 13 14";
        assert_eq!(cpu_ticks(stat), Some((111, 222)));
        assert_eq!(cpu_ticks(""), None);
    }

    #[test]
    fn this_process_can_be_metered() {
        let mut meter = Meter::new(std::process::id(), None);
        meter.sample();
        meter.sample_living();
        let usage = meter.usage();
        assert_eq!(usage.source, MeterSource::Process);
        assert!(usage.pss_peak_bytes.is_some_and(|pss| pss > 100 << 10), "{usage:?}");
    }

    #[test]
    fn what_a_process_read_and_wrote_is_known_after_its_end() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut meter = Meter::new(child.id(), None);
        meter.sample_living();
        let alive = meter.usage().clone();
        drop(child.stdin.take());
        wait_for_zombie(child.id());
        meter.sample();
        child.wait().unwrap();
        let usage = meter.usage();
        assert!(alive.write_bytes.is_some() && alive.read_bytes.is_some(), "{alive:?}");
        // Not the same: its programs' pages may have come from the disk in between.
        assert!(
            usage.read_bytes >= alive.read_bytes && usage.write_bytes >= alive.write_bytes,
            "{alive:?} {usage:?}"
        );
        assert_eq!(usage.write_operations, None, "the kernel doesn't say without a cgroup");
    }

    fn wait_for_zombie(pid: u32) {
        let stat = format!("/proc/{pid}/stat");
        while !fs::read_to_string(&stat).unwrap().contains(") Z ") {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    #[test]
    fn sizes_are_read_in_kib() {
        assert_eq!(kib("Rss: 1 kB\nPss:     3 kB\nPss_Dirty: 9 kB\n", "Pss:"), Some(3 << 10));
        assert_eq!(kib("Pss: many kB\n", "Pss:"), None);
    }
}
