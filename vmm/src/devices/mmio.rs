//! The virtio-mmio transport (virtio §4.2, version 2): a device's registers, as vCPU threads see them, and its queues, as the event thread
//! serves them.
//!
//! ```text
//!             ACKNOWLEDGE, DRIVER, FEATURES_OK      DRIVER_OK
//!  Reset ──────────────────▶ Negotiating ─────────────────────▶ Running ── driver breaks a rule ──▶ NeedsReset
//!    ▲                            │                                │                                    │
//!    └──────────── status = 0 ────┴────────────────────────────────┴────────────────────────────────────┘
//! ```
//!
//! Queue registers can be written while negotiating only. With DRIVER_OK each queue is checked and becomes a [`Ring`]; from then on
//! nothing that the driver writes moves it. One lock holds registers, rings and device, so a reset is over when the
//! write that asked for it returns; the interrupt's status is outside, so that an interrupt never waits for a disk.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::Device;
use super::buffers::Fault;
use super::ring::{Interrupt, Ring};
use super::state::{QueueRegisters, TransportState};
use crate::event::Epoll;
use crate::memory::Written;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"crrl");
const CONFIG: u64 = 0x100;
/// The register by which a driver notifies; KVM takes its writes and signals the queue's eventfd.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Turns of one queue before other devices, the owner and signals have theirs. What a turn may take is each device's to bound.
const TURNS: usize = 4;

/// A device behind its registers.
#[derive(Debug)]
pub struct Transport {
    inner: Mutex<Inner>,
    interrupt: Arc<Interrupt>,
    /// One a queue, signalled by KVM when the driver notifies, or by ourselves when there is more to do.
    pub notifications: Vec<EventFd>,
}

#[derive(Debug)]
struct Inner {
    device: Device,
    memory: GuestMemoryMmap,
    written: Written,
    interrupt: Arc<Interrupt>,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    /// What the driver configures; taken over into `rings` by DRIVER_OK.
    queues: Vec<Queue>,
    /// All queues while running, else none.
    rings: Vec<Ring>,
    generation: u32,
}

/// Saved state that no transport of this device could have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Misfit;

/// What serving came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// All that could be done.
    Done,
    /// The driver broke a rule just now; the device needs a reset.
    Broken,
}

impl Transport {
    /// Puts a device behind registers.
    pub fn new(device: Device, memory: GuestMemoryMmap, written: Written) -> std::io::Result<Self> {
        let interrupt = Arc::new(Interrupt::new()?);
        let notifications = device
            .queue_sizes()
            .iter()
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<Result<_, _>>()?;
        let queues = fresh_queues(&device);
        let inner = Inner {
            device,
            memory,
            written,
            interrupt: interrupt.clone(),
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues,
            rings: Vec::new(),
            generation: 0,
        };
        Ok(Self { inner: Mutex::new(inner), interrupt, notifications })
    }

    /// The irqfd.
    pub fn interrupt(&self) -> &EventFd {
        self.interrupt.event()
    }

    /// A driver reads a register or configuration space. Registers are 4 bytes wide; what else is asked for reads as zeros.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.lock().device.read_config(offset, data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.register(offset).to_le_bytes();
        }
    }

    fn register(&self, offset: u64) -> u32 {
        if offset == 0x60 {
            return self.interrupt.status();
        }
        let inner = self.lock();
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => inner.device.id(),
            0x0c => VENDOR,
            0x10 => half(inner.features(), inner.device_features_select),
            0x34 => inner.selected().map_or(0, |queue| queue.max_size().into()),
            0x44 => inner.selected().is_some_and(QueueT::ready).into(),
            0x70 => inner.status,
            // No shared memory: a length of all ones (§4.2.2).
            0xb0..=0xbc => u32::MAX,
            0xfc => inner.generation,
            _ => 0,
        }
    }

    /// A driver writes a register or configuration space.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.lock().device.write_config(offset, data);
            return;
        }
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(bytes);
        match offset {
            // Only where KVM has no ioeventfd for it.
            QUEUE_NOTIFY => self.notify(value),
            0x64 => self.interrupt.acknowledge(value),
            0x70 if self.lock().set_status(value) => self.serve_all_soon(),
            _ => self.lock().write_register(offset, value),
        }
    }

    /// Lets the event thread look at this queue, as if the driver had notified.
    pub fn notify(&self, queue: u32) {
        let event = usize::try_from(queue).ok().and_then(|queue| self.notifications.get(queue));
        if let Some(event) = event {
            // Full means that it is signalled already.
            let _ = event.write(1);
        }
    }

    /// Lets the event thread look at every queue, whatever the driver notified.
    pub fn serve_all_soon(&self) {
        for event in &self.notifications {
            let _ = event.write(1);
        }
    }

    /// Serves a queue after a notification. Event thread only.
    pub fn serve(&self, queue: usize, epoll: &Epoll) -> Served {
        if let Some(event) = self.notifications.get(queue) {
            // Nothing to read: somebody served it already.
            let _ = event.read();
        }
        let mut inner = self.lock();
        if inner.rings.is_empty() {
            return Served::Done;
        }
        match inner.serve(queue, epoll) {
            Ok(more) => {
                if more && let Some(event) = self.notifications.get(queue) {
                    let _ = event.write(1);
                }
                Served::Done
            }
            Err(Fault) => inner.need_reset(),
        }
    }

    /// Gives the device a turn outside its queues: `act` gets it with its rings, if they are there. Event thread only.
    pub fn with<R>(
        &self,
        act: impl FnOnce(&mut Device, &mut [Ring]) -> Result<R, Fault>,
    ) -> Result<R, Served> {
        let mut inner = self.lock();
        let Inner { device, rings, .. } = &mut *inner;
        act(device, rings).map_err(|Fault| inner.need_reset())
    }

    /// Tells the driver that the configuration changed.
    pub fn config_changed(&self) {
        let mut inner = self.lock();
        inner.generation = inner.generation.wrapping_add(1);
        if !inner.rings.is_empty() {
            self.interrupt.config_changed();
        }
    }

    /// What a driver has made of the transport and its device, to be saved.
    pub fn state(&self) -> TransportState {
        let inner = self.lock();
        let queue = |queue: &Queue| QueueRegisters::from(queue.state());
        let queues = match inner.rings.is_empty() {
            true => inner.queues.iter().map(queue).collect(),
            false => inner.rings.iter().map(|ring| queue(ring.queue())).collect(),
        };
        TransportState {
            status: inner.status,
            device_features_select: inner.device_features_select,
            driver_features_select: inner.driver_features_select,
            driver_features: inner.driver_features,
            queue_select: inner.queue_select,
            generation: inner.generation,
            interrupt_status: self.interrupt.status(),
            queues,
            device: inner.device.state(),
        }
    }

    /// Goes on as a saved transport: its driver is in the midst of its work, so what a driver may configure is checked as if it had just done so.
    ///
    /// # Errors
    ///
    /// No transport of this device could be in that state.
    pub fn restore(&self, saved: &TransportState) -> Result<(), Misfit> {
        let mut inner = self.lock();
        let runs =
            saved.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 && saved.status & VIRTIO_CONFIG_S_NEEDS_RESET == 0;
        let fitting = inner.queues.len() == saved.queues.len()
            && saved
                .queues
                .iter()
                .zip(&inner.queues)
                .all(|(saved, fresh)| saved.max_size == fresh.max_size());
        // After a fault there are no rings, and the queues are gone until the reset.
        let after_fault = saved.queues.is_empty() && !runs;
        if !(fitting || after_fault) || !inner.device.restore(&saved.device) {
            return Err(Misfit);
        }
        let queue = |saved: &QueueRegisters| Queue::try_from(QueueState::from(*saved)).map_err(|_| Misfit);
        inner.queues = saved.queues.iter().map(queue).collect::<Result<_, _>>()?;
        inner.status = saved.status;
        inner.device_features_select = saved.device_features_select;
        inner.driver_features_select = saved.driver_features_select;
        inner.driver_features = saved.driver_features;
        inner.queue_select = saved.queue_select;
        inner.generation = saved.generation;
        if runs {
            if !inner.features_agree() {
                return Err(Misfit);
            }
            inner.start().map_err(|Fault| Misfit)?;
        }
        self.interrupt.restore(saved.interrupt_status);
        Ok(())
    }

    /// Marks what running queues write outside of chains.
    pub fn mark_used_rings(&self) {
        self.lock().rings.iter().for_each(Ring::mark_used_ring);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // No code panics while it holds this; a poisoned lock's content is still right.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn fresh_queues(device: &Device) -> Vec<Queue> {
    device.queue_sizes().iter().filter_map(|size| Queue::new(*size).ok()).collect()
}

fn half(features: u64, select: u32) -> u32 {
    let bytes = features.to_le_bytes();
    let (low, high) = bytes.split_at(4);
    let chosen = match select {
        0 => low,
        1 => high,
        _ => return 0,
    };
    chosen.try_into().map_or(0, u32::from_le_bytes)
}

impl Inner {
    fn features(&self) -> u64 {
        self.device.features()
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    fn has(&self, bit: u32) -> bool {
        self.status & bit != 0
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x14 => self.device_features_select = value,
            0x24 => self.driver_features_select = value,
            0x30 => self.queue_select = value,
            0x20 if !self.has(VIRTIO_CONFIG_S_FEATURES_OK) => {
                let value = u64::from(value);
                match self.driver_features_select {
                    0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
                    1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
                    _ => {}
                }
            }
            0x38..=0xa4 if self.has(VIRTIO_CONFIG_S_FEATURES_OK) && !self.has(VIRTIO_CONFIG_S_DRIVER_OK) => {
                self.write_queue_register(offset, value);
            }
            _ => {}
        }
    }

    fn write_queue_register(&mut self, offset: u64, value: u32) {
        let Some(queue) =
            usize::try_from(self.queue_select).ok().and_then(|index| self.queues.get_mut(index))
        else {
            return;
        };
        match offset {
            // A size that is no power of two, or too large, leaves the queue as it was.
            0x38 => queue.set_size(u16::try_from(value).unwrap_or(0)),
            0x44 => queue.set_ready(value == 1),
            0x80 => queue.set_desc_table_address(Some(value), None),
            0x84 => queue.set_desc_table_address(None, Some(value)),
            0x90 => queue.set_avail_ring_address(Some(value), None),
            0x94 => queue.set_avail_ring_address(None, Some(value)),
            0xa0 => queue.set_used_ring_address(Some(value), None),
            0xa4 => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    /// Returns true when the device begins to run: queues may have been filled before anybody listened.
    fn set_status(&mut self, value: u32) -> bool {
        if value == 0 {
            self.reset();
            return false;
        }
        let new = value & !self.status;
        // Bits are only ever added but by a reset (§2.1.2), and NEEDS_RESET is ours.
        let mut accepted = new & !VIRTIO_CONFIG_S_NEEDS_RESET;
        if new & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.features_agree() {
            accepted &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        let runs = new & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        if runs && !self.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            accepted &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.status |= accepted;
        if accepted & VIRTIO_CONFIG_S_DRIVER_OK == 0 {
            return false;
        }
        match self.start() {
            Ok(()) => true,
            Err(Fault) => {
                self.need_reset();
                false
            }
        }
    }

    fn features_agree(&self) -> bool {
        self.driver_features & !self.features() == 0 && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn start(&mut self) -> Result<(), Fault> {
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        // A driver may leave queues alone that it doesn't use, but not have half-made ones.
        if !self.queues.iter().all(|queue| !queue.ready() || queue.is_valid(&self.memory)) {
            return Err(Fault);
        }
        if !self.queues.iter().any(QueueT::ready) || !lies_in_memory(&self.queues, &self.memory) {
            return Err(Fault);
        }
        self.rings = self
            .queues
            .drain(..)
            .map(|mut queue| {
                queue.set_event_idx(event_idx);
                Ring::new(queue, self.memory.clone(), self.written.clone(), self.interrupt.clone())
            })
            .collect();
        Ok(())
    }

    fn serve(&mut self, queue: usize, epoll: &Epoll) -> Result<bool, Fault> {
        for _ in 0..TURNS {
            if self.device.serve(queue, &mut self.rings, epoll)? {
                continue;
            }
            let Some(ring) = self.rings.get_mut(queue) else { return Ok(false) };
            if self.device.is_waiting(queue) || !ring.listen()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn need_reset(&mut self) -> Served {
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        self.rings.clear();
        self.device.reset();
        self.interrupt.config_changed();
        Served::Broken
    }

    fn reset(&mut self) {
        self.status = 0;
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        self.rings.clear();
        self.queues = fresh_queues(&self.device);
        self.device.reset();
        self.interrupt.acknowledge(u32::MAX);
    }
}

/// Whether each ready queue lies wholly in guest memory. `Queue::is_valid` has looked at where each part begins and ends; this asks that the
/// parts the device writes are not behind a hole.
fn lies_in_memory(queues: &[Queue], memory: &GuestMemoryMmap) -> bool {
    queues.iter().filter(|queue| queue.ready()).all(|queue| {
        let entries = usize::from(queue.size());
        let parts = [
            (queue.desc_table(), 16 * entries),
            (queue.avail_ring(), 6 + 2 * entries),
            (queue.used_ring(), 6 + 8 * entries),
        ];
        parts.iter().all(|(start, length)| memory.check_range(vm_memory::GuestAddress(*start), *length))
    })
}

#[cfg(test)]
mod tests;
