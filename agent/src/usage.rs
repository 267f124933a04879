//! What containers use, from cgroup v2 files and `/proc/net/dev`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use carrel_protocol::usage::{Cpu, GuestUsage, Io, Memory, Network, Processes};

use crate::container::cgroup::Cgroup;

/// How often memory is looked at for its integral while it changes.
const OFTEN: Duration = Duration::from_millis(200);
/// And while it does not: where hundreds of rooms only wait, their looking would be most of what the host does.
const SELDOM: Duration = Duration::from_secs(1);
/// Less than this part of it is no change.
const NO_CHANGE: u64 = 32;

/// How long from one look at memory to the next: [`OFTEN`], and twice as long after every one that found no change, up to [`SELDOM`].
#[derive(Debug)]
pub(crate) struct Pace(Duration);

impl Pace {
    /// Something has just begun.
    pub(crate) const fn often() -> Self {
        Self(OFTEN)
    }

    /// From a look to the next one.
    pub(crate) fn after(&mut self, change: bool) -> Duration {
        let gap = self.0;
        self.0 = if change { OFTEN } else { (gap * 2).min(SELDOM) };
        if change { OFTEN } else { gap }
    }
}

/// One container's meter.
#[derive(Debug)]
pub(crate) struct Meter {
    cgroup: Cgroup,
    /// The workload's first instruction, and its end.
    began: Option<Instant>,
    ended: Option<Instant>,
    /// Byte-microseconds so far, and when that was.
    integral: u128,
    sampled: Option<(Instant, u64)>,
    /// What had been used when this room came to be.
    inherited: GuestUsage,
}

impl Meter {
    pub(crate) fn new(cgroup: Cgroup) -> Self {
        Self {
            cgroup,
            began: None,
            ended: None,
            integral: 0,
            sampled: None,
            inherited: GuestUsage::default(),
        }
    }

    /// The workload begins.
    pub(crate) fn begin(&mut self, now: Instant) {
        self.began = Some(now);
        self.sample(now);
    }

    /// The workload ended; memory that it leaves in caches is no longer counted.
    pub(crate) fn end(&mut self, now: Instant) {
        self.sample(now);
        self.ended = Some(now);
    }

    /// Adds the time since the last sample at the mean of both samples (trapezium rule). Says whether there was a change worth looking for more.
    pub(crate) fn sample(&mut self, now: Instant) -> bool {
        if self.began.is_none() || self.ended.is_some() {
            return false;
        }
        let current = number(&self.cgroup.read("memory.current"));
        let last = self.sampled.replace((now, current));
        if let Some((then, before)) = last {
            let mean = u128::from(before).midpoint(u128::from(current));
            let area = mean.saturating_mul(now.saturating_duration_since(then).as_micros());
            self.integral = self.integral.saturating_add(area);
        }
        last.is_none_or(|(_, before)| current.abs_diff(before) > before / NO_CHANGE)
    }

    /// The room is a clone: what was used until now was the template's. Peaks stay, for they can't be divided.
    pub(crate) fn inherit(&mut self, now: Instant) {
        self.inherited = self.counted();
        self.integral = 0;
        self.sampled = None;
        self.began = self.began.map(|_| now);
        self.ended = self.ended.map(|_| now);
        self.sample(now);
    }

    /// Processes that the kernel killed in it for want of memory.
    pub(crate) fn out_of_memory_kills(&self) -> u64 {
        keyed(&self.cgroup.read("memory.events")).get("oom_kill").copied().unwrap_or_default()
    }

    /// Peak memory so far, bytes.
    pub(crate) fn memory_peak(&self) -> u64 {
        number(&self.cgroup.read("memory.peak"))
    }

    /// All of it.
    pub(crate) fn read(&mut self, now: Instant) -> GuestUsage {
        self.sample(now);
        let until = self.ended.unwrap_or(now);
        let wall = self.began.map(|began| until.saturating_duration_since(began)).unwrap_or_default();
        let mut usage = since(self.counted(), &self.inherited);
        usage.wall_us = whole(wall.as_micros());
        usage.memory.byte_seconds = whole(self.integral / 1_000_000);
        usage
    }

    /// What the kernel counts.
    fn counted(&self) -> GuestUsage {
        let cpu = self.cgroup.read("cpu.stat");
        let cpu = keyed(&cpu);
        let one = |name: &str| cpu.get(name).copied().unwrap_or_default();
        GuestUsage {
            wall_us: 0,
            cpu: Cpu {
                user_us: one("user_usec"),
                system_us: one("system_usec"),
                throttled_us: one("throttled_usec"),
            },
            memory: Memory {
                current_bytes: number(&self.cgroup.read("memory.current")),
                peak_bytes: self.memory_peak(),
                byte_seconds: 0,
                oom_kills: self.out_of_memory_kills(),
            },
            io: io(&self.cgroup.read("io.stat")),
            network: network(&std::fs::read_to_string("/proc/net/dev").unwrap_or_default()),
            processes: Processes {
                current: number(&self.cgroup.read("pids.current")),
                peak: number(&self.cgroup.read("pids.peak")),
            },
        }
    }
}

/// Counters less what they were; what is no counter as it is.
fn since(now: GuestUsage, then: &GuestUsage) -> GuestUsage {
    let less = u64::saturating_sub;
    GuestUsage {
        wall_us: now.wall_us,
        cpu: Cpu {
            user_us: less(now.cpu.user_us, then.cpu.user_us),
            system_us: less(now.cpu.system_us, then.cpu.system_us),
            throttled_us: less(now.cpu.throttled_us, then.cpu.throttled_us),
        },
        memory: Memory { oom_kills: less(now.memory.oom_kills, then.memory.oom_kills), ..now.memory },
        io: Io {
            read_bytes: less(now.io.read_bytes, then.io.read_bytes),
            write_bytes: less(now.io.write_bytes, then.io.write_bytes),
            read_operations: less(now.io.read_operations, then.io.read_operations),
            write_operations: less(now.io.write_operations, then.io.write_operations),
        },
        network: Network {
            received_bytes: less(now.network.received_bytes, then.network.received_bytes),
            sent_bytes: less(now.network.sent_bytes, then.network.sent_bytes),
        },
        processes: now.processes,
    }
}

fn whole(value: u128) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or_default()
}

/// `name value` lines (cgroup-v2.rst, *flat keyed*).
fn keyed(text: &str) -> BTreeMap<&str, u64> {
    let pair = |line| -> Option<_> {
        let mut words = str::split_whitespace(line);
        Some((words.next()?, number(words.next()?)))
    };
    text.lines().filter_map(pair).collect()
}

/// `major:minor rbytes=… wbytes=… rios=… wios=… …` lines (*nested keyed*), all devices together.
fn io(text: &str) -> Io {
    let mut sum = Io::default();
    for (name, value) in text.split_whitespace().filter_map(|word| word.split_once('=')) {
        let field = match name {
            "rbytes" => &mut sum.read_bytes,
            "wbytes" => &mut sum.write_bytes,
            "rios" => &mut sum.read_operations,
            "wios" => &mut sum.write_operations,
            _ => continue,
        };
        *field = field.saturating_add(number(value));
    }
    sum
}

/// `name: received-bytes 7 more sent-bytes …` lines after two of heading (proc_net(5)), loopback left out.
fn network(text: &str) -> Network {
    let mut sum = Network::default();
    for (name, counters) in text.lines().skip(2).filter_map(|line| line.split_once(':')) {
        if name.trim() != "lo" {
            let mut counters = counters.split_whitespace().map(number);
            let add =
                |sum: &mut u64, count: Option<u64>| *sum = sum.saturating_add(count.unwrap_or_default());
            add(&mut sum.received_bytes, counters.next());
            add(&mut sum.sent_bytes, counters.nth(7));
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_keyed_files_are_read() {
        let stat = keyed("usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 0\nodd\n");
        assert_eq!((stat["user_usec"], stat["system_usec"]), (20, 10));
    }

    /// A meter of a cgroup that is a folder.
    fn metered(files: &[(&str, &str)]) -> (tempfile::TempDir, Meter) {
        let folder = tempfile::TempDir::new().unwrap();
        for (name, content) in files {
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        let cgroup = Cgroup::at(folder.path());
        (folder, Meter::new(cgroup))
    }

    fn after(start: Instant, milliseconds: u64) -> Instant {
        start + Duration::from_millis(milliseconds)
    }

    #[test]
    fn memory_is_integrated_from_the_beginning_to_the_end_by_trapezia() {
        let (folder, mut meter) = metered(&[("memory.current", "1000000\n")]);
        let start = Instant::now();
        meter.sample(start);
        meter.begin(after(start, 5_000));
        std::fs::write(folder.path().join("memory.current"), "3000000\n").unwrap();
        meter.sample(after(start, 6_000));
        // A clock that goes back adds nothing.
        meter.sample(after(start, 5_500));
        std::fs::write(folder.path().join("memory.current"), "0\n").unwrap();
        meter.end(after(start, 7_500));
        std::fs::write(folder.path().join("memory.current"), "9000000\n").unwrap();
        meter.sample(after(start, 60_000));
        let usage = meter.read(after(start, 90_000));
        // 1 s at 2 MB on average, then 2 s at 1.5 MB.
        assert_eq!((usage.memory.byte_seconds, usage.wall_us), (5_000_000, 2_500_000));
        assert_eq!(usage.memory.current_bytes, 9_000_000);
    }

    #[test]
    fn memory_that_stays_is_looked_at_ever_more_seldom_until_it_changes() {
        let (folder, mut meter) = metered(&[("memory.current", "3200000\n")]);
        let mut now = Instant::now();
        let mut pace = Pace::often();
        let mut next = |meter: &mut Meter| {
            let gap = pace.after(meter.sample(now));
            now += gap;
            gap.as_millis()
        };
        assert_eq!(next(&mut meter), 200, "nothing has begun");
        meter.begin(Instant::now());
        let gaps: Vec<_> = (0..6).map(|_| next(&mut meter)).collect();
        assert_eq!(gaps, [400, 800, 1000, 1000, 1000, 1000]);
        let write = |bytes: &str| std::fs::write(folder.path().join("memory.current"), bytes).unwrap();
        write("3300000");
        assert_eq!(next(&mut meter), 1000, "a thirty-second is no change");
        write("3600000");
        assert_eq!((next(&mut meter), next(&mut meter), next(&mut meter)), (200, 200, 400));
        write("1000000");
        assert_eq!(next(&mut meter), 200);
        meter.end(Instant::now());
        assert_eq!((next(&mut meter), next(&mut meter)), (200, 400), "it is over");
    }

    #[test]
    fn everything_is_read_from_its_own_file() {
        let (_folder, mut meter) = metered(&[
            ("cpu.stat", "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_throttled 1\nthrottled_usec 5\n"),
            ("memory.current", "4096\n"),
            ("memory.peak", "8192\n"),
            ("memory.events", "low 0\nhigh 0\nmax 3\noom 2\noom_kill 1\noom_group_kill 0\n"),
            ("io.stat", "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n"),
            ("pids.current", "2\n"),
            ("pids.peak", "9\n"),
        ]);
        let usage = meter.read(Instant::now());
        assert_eq!(usage.cpu, Cpu { user_us: 20, system_us: 10, throttled_us: 5 });
        let memory = Memory { current_bytes: 4096, peak_bytes: 8192, byte_seconds: 0, oom_kills: 1 };
        assert_eq!(usage.memory, memory);
        assert_eq!(usage.io, Io { read_bytes: 1, write_bytes: 2, read_operations: 3, write_operations: 4 });
        assert_eq!(usage.processes, Processes { current: 2, peak: 9 });
        assert_eq!((usage.wall_us, meter.out_of_memory_kills(), meter.memory_peak()), (0, 1, 8192));
    }

    #[test]
    fn a_clone_is_not_billed_for_its_template() {
        let (folder, mut meter) = metered(&[
            ("cpu.stat", "user_usec 20\nsystem_usec 10\nthrottled_usec 5\n"),
            ("memory.current", "1000000\n"),
            ("memory.peak", "8192\n"),
            ("memory.events", "oom_kill 2\n"),
            ("io.stat", "254:0 rbytes=1 wbytes=2 rios=3 wios=4\n"),
        ]);
        let start = Instant::now();
        meter.begin(start);
        meter.inherit(after(start, 9_000));
        let write = |name: &str, content: &str| std::fs::write(folder.path().join(name), content).unwrap();
        write("cpu.stat", "user_usec 27\nsystem_usec 10\nthrottled_usec 6\n");
        write("memory.events", "oom_kill 3\n");
        write("io.stat", "254:0 rbytes=11 wbytes=2 rios=4 wios=4\n");
        let usage = meter.read(after(start, 11_000));
        assert_eq!(usage.cpu, Cpu { user_us: 7, system_us: 0, throttled_us: 1 });
        assert_eq!(usage.io, Io { read_bytes: 10, write_bytes: 0, read_operations: 1, write_operations: 0 });
        // Two seconds at 1 MB.
        assert_eq!((usage.wall_us, usage.memory.byte_seconds), (2_000_000, 2_000_000));
        assert_eq!((usage.memory.peak_bytes, usage.memory.oom_kills), (8192, 1));
        // A clone of the clone begins again; one whose workload was over uses nothing.
        meter.end(after(start, 12_000));
        meter.inherit(after(start, 20_000));
        let usage = meter.read(after(start, 25_000));
        assert_eq!((usage.wall_us, usage.cpu.user_us, usage.memory.byte_seconds), (0, 0, 0));
    }

    #[test]
    fn files_that_are_missing_strange_or_longer_than_today_are_no_trouble() {
        let nothing = metered(&[]).1.read(Instant::now());
        assert_eq!((nothing.cpu, nothing.memory), (Cpu::default(), Memory::default()));
        let (_folder, mut meter) = metered(&[
            (
                "cpu.stat",
                "\nuser_usec\nuser_usec 7 and more\nsystem_usec -1\nthrottled_usec 99999999999999999999\n",
            ),
            ("memory.current", "max\n"),
            ("memory.peak", ""),
            ("memory.events", "oom_kill  2\n\u{fffd} x\n"),
            ("io.stat", "254:0 rbytes=18446744073709551615\n254:1 rbytes=1 wbytes= =5 rios=x\n"),
            ("pids.current", "\u{0}1"),
        ]);
        let usage = meter.read(Instant::now());
        assert_eq!(usage.cpu, Cpu { user_us: 7, system_us: 0, throttled_us: 0 });
        assert_eq!((usage.memory.current_bytes, usage.memory.oom_kills), (0, 2));
        assert_eq!((usage.io.read_bytes, usage.io.write_bytes, usage.processes.current), (u64::MAX, 0, 0));
    }

    #[test]
    fn counters_of_a_network_never_overflow() {
        let all = u64::MAX;
        let dev =
            format!("\n\n  a: {all} 1 0 0 0 0 0 0 {all} 1\n  b: {all} 1 0 0 0 0 0 0 {all} 1\n  c: 1\n  d\n");
        assert_eq!(network(&dev), Network { received_bytes: all, sent_bytes: all });
    }

    #[test]
    fn devices_are_added_up_and_what_is_unknown_left_out() {
        let stat = "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n7:1 rbytes=4 wbytes=0 rios=1 wios=0\n8:0\n";
        let expected = Io { read_bytes: 4100, write_bytes: 8192, read_operations: 2, write_operations: 2 };
        assert_eq!(io(stat), expected);
        assert_eq!(io(""), Io::default());
    }

    #[test]
    fn loopback_is_no_network() {
        let dev = "Inter-|   Receive                                                |  Transmit\n face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    lo: 1000 10 0 0 0 0 0 0 1000 10 0 0 0 0 0 0\n  eth0: 5 1 0 0 0 0 0 0 7 1 0 0 0 0 0 0\n  eth1:50 1 0 0 0 0 0 0 70 1 0 0 0 0 0 0\n";
        assert_eq!(network(dev), Network { received_bytes: 55, sent_bytes: 77 });
        assert_eq!(network(""), Network::default());
    }
}
