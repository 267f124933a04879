//! What containers use, from cgroup v2 files and `/proc/net/dev`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use carrel_protocol::usage::{Cpu, GuestUsage, Io, Memory, Network, Processes};

use crate::container::cgroup::Cgroup;

/// How often memory is looked at for its integral.
pub(crate) const SAMPLE: Duration = Duration::from_millis(200);

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
}

impl Meter {
    pub(crate) fn new(cgroup: Cgroup) -> Self {
        Self { cgroup, began: None, ended: None, integral: 0, sampled: None }
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

    /// Adds the time since the last sample at the mean of both samples (trapezium rule).
    pub(crate) fn sample(&mut self, now: Instant) {
        if self.began.is_none() || self.ended.is_some() {
            return;
        }
        let current = number(&self.cgroup.read("memory.current"));
        if let Some((then, before)) = self.sampled {
            let mean = u128::from(before).midpoint(u128::from(current));
            self.integral += mean * now.saturating_duration_since(then).as_micros();
        }
        self.sampled = Some((now, current));
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
        let cpu = self.cgroup.read("cpu.stat");
        let cpu = keyed(&cpu);
        let one = |name: &str| cpu.get(name).copied().unwrap_or_default();
        GuestUsage {
            wall_us: whole(wall.as_micros()),
            cpu: Cpu {
                user_us: one("user_usec"),
                system_us: one("system_usec"),
                throttled_us: one("throttled_usec"),
            },
            memory: Memory {
                current_bytes: number(&self.cgroup.read("memory.current")),
                peak_bytes: self.memory_peak(),
                byte_seconds: whole(self.integral / 1_000_000),
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

fn whole(value: u128) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or_default()
}

/// `name value` lines (cgroup-v2.rst, *flat keyed*).
fn keyed(text: &str) -> BTreeMap<&str, u64> {
    text.lines().filter_map(|line| line.split_once(' ')).map(|(name, value)| (name, number(value))).collect()
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
            sum.received_bytes += counters.next().unwrap_or_default();
            sum.sent_bytes += counters.nth(7).unwrap_or_default();
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
