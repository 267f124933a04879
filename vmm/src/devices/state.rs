//! What has to be saved of devices: plain data, without meaning of its own. Everything else comes from the configuration.

use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;

/// A transport and the device behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Status register.
    pub status: u32,
    /// DeviceFeaturesSel.
    pub device_features_select: u32,
    /// DriverFeaturesSel.
    pub driver_features_select: u32,
    /// Features that the driver accepted.
    pub driver_features: u64,
    /// QueueSel.
    pub queue_select: u32,
    /// ConfigGeneration.
    pub generation: u32,
    /// InterruptStatus.
    pub interrupt_status: u32,
    /// Queues, in order.
    pub queues: Vec<QueueRegisters>,
    /// The device's own.
    pub device: DeviceState,
}

/// A queue's registers and positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// Entries at most.
    pub max_size: u16,
    /// Entries.
    pub size: u16,
    /// QueueReady.
    pub ready: bool,
    /// VIRTIO_F_EVENT_IDX was accepted.
    pub event_idx: bool,
    /// Guest physical address.
    pub descriptors: u64,
    /// Guest physical address.
    pub available: u64,
    /// Guest physical address.
    pub used: u64,
    /// The next entry of the available ring that the device takes.
    pub next_available: u16,
    /// The next entry of the used ring that the device writes.
    pub next_used: u16,
}

impl From<QueueState> for QueueRegisters {
    fn from(state: QueueState) -> Self {
        Self {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            event_idx: state.event_idx_enabled,
            descriptors: state.desc_table,
            available: state.avail_ring,
            used: state.used_ring,
            next_available: state.next_avail,
            next_used: state.next_used,
        }
    }
}

impl From<QueueRegisters> for QueueState {
    fn from(saved: QueueRegisters) -> Self {
        Self {
            max_size: saved.max_size,
            size: saved.size,
            ready: saved.ready,
            event_idx_enabled: saved.event_idx,
            desc_table: saved.descriptors,
            avail_ring: saved.available,
            used_ring: saved.used,
            next_avail: saved.next_available,
            next_used: saved.next_used,
        }
    }
}

/// A device's own state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// Connections don't survive: the guest is told that they were reset.
    Vsock,
    /// Nothing: before a snapshot the overlay is completed, so that which of its blocks are held is no question afterwards.
    Block,
    /// Nothing.
    Entropy,
    /// The sizes that were asked for and reached, in pages of 4 KiB.
    Balloon {
        /// Asked for.
        target_pages: u32,
        /// Reached.
        actual_pages: u32,
    },
}
