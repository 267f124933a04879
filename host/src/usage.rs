//! What a room used: what the guest claims beside what the host metered, never mixed into one number.
//!
//! `docs/usage.schema.json` is this form's schema; a test holds the two together.

use carrel_protocol::usage::GuestUsage;
use serde::{Deserialize, Serialize};

/// A report, periodically (`carrel stats`) and at the end (`carrel run --usage`). Fields are added, not renamed or removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageReport {
    /// The room's id.
    pub room: String,
    /// Its name.
    pub name: Option<String>,
    /// From the owner's start of the VMM to now, or to the VMM's end, µs.
    pub wall_us: u64,
    /// What the guest claims of its workload; `null` before its first report, or if it never made one.
    pub guest: Option<GuestUsage>,
    /// What the host metered of the whole room: the VMM with the guest in it.
    pub host: HostUsage,
}

/// The host's own meter. Counters only grow; sizes are bytes, times are µs; `null` where this host has no such meter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostUsage {
    /// Where the numbers come from.
    pub source: MeterSource,
    /// Processor time, the guest's included.
    pub cpu_user_us: u64,
    /// Processor time in the host's kernel.
    pub cpu_system_us: u64,
    /// Time that the room could have run but for its quota.
    pub cpu_throttled_us: Option<u64>,
    /// Proportional set size now or at the last sample, guest memory included (`/proc/PID/smaps_rollup`).
    pub pss_bytes: Option<u64>,
    /// The most of it in any sample.
    pub pss_peak_bytes: Option<u64>,
    /// `memory.current`: also page cache and kernel memory charged to the room.
    pub memory_current_bytes: Option<u64>,
    /// `memory.peak`.
    pub memory_peak_bytes: Option<u64>,
    /// Kernel memory, KVM's page tables among it (`kernel` in `memory.stat`).
    pub kernel_memory_bytes: Option<u64>,
    /// Guest memory that the guest gave back since the start (balloon and free page reporting, virtio §5.5), again and again counted; at the last sample.
    pub given_back_bytes: Option<u64>,
    /// From storage.
    pub read_bytes: Option<u64>,
    /// To storage.
    pub write_bytes: Option<u64>,
    /// Read operations; known of a cgroup only.
    pub read_operations: Option<u64>,
    /// Write operations; known of a cgroup only.
    pub write_operations: Option<u64>,
}

/// Where the host's numbers come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MeterSource {
    /// The VMM's cgroup v2.
    Cgroup,
    /// `/proc/PID` of the VMM, where there is no such cgroup.
    #[default]
    Process,
}

#[cfg(test)]
mod tests;
