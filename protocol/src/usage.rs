//! What a room used, as the guest claims it.
//!
//! The host adds what it metered itself; the two are never mixed into one number, because a guest can lie.

use serde::{Deserialize, Serialize};

/// Resource use of the workload since it started, from the guest's cgroup v2 files and `/proc/net/dev`.
/// Counters only grow; sizes are bytes, times are µs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestUsage {
    /// Since the workload's first instruction, by the guest's monotonic clock, µs.
    pub wall_us: u64,
    /// Processor time.
    pub cpu: Cpu,
    /// Memory.
    pub memory: Memory,
    /// Block device traffic of the room's disks.
    pub io: Io,
    /// Network traffic, loopback not counted.
    pub network: Network,
    /// Processes.
    pub processes: Processes,
}

/// `cpu.stat`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// `user_usec`.
    pub user_us: u64,
    /// `system_usec`.
    pub system_us: u64,
    /// `throttled_usec`: time that the workload could have run but for its quota.
    pub throttled_us: u64,
}

/// `memory.current`, `memory.peak`, `memory.events`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Now, bytes.
    pub current_bytes: u64,
    /// The most there ever was, bytes.
    pub peak_bytes: u64,
    /// Integral of `current_bytes` over time, byte-seconds.
    pub byte_seconds: u64,
    /// Processes that the kernel killed for want of memory.
    pub oom_kills: u64,
}

/// `io.stat`, all devices together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Io {
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Read operations.
    pub read_operations: u64,
    /// Write operations.
    pub write_operations: u64,
}

/// Interface counters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Bytes received.
    pub received_bytes: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
}

/// `pids.current`, `pids.peak`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Processes {
    /// Tasks (processes and threads) now.
    pub current: u64,
    /// The most there ever were.
    pub peak: u64,
}
