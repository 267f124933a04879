//! One virtqueue of a running device, and the interrupt through which its driver hears of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::buffers::{Buffers, Fault};
use crate::memory::Written;

/// Interrupt status bits (virtio §4.2.2).
const USED_BUFFER: u32 = 1;
const CONFIG_CHANGED: u32 = 2;

/// A device's interrupt: an irqfd and the status that its driver reads and acknowledges.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    event: EventFd,
}

impl Interrupt {
    /// A quiet one.
    pub fn new() -> std::io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self { status: AtomicU32::new(0), event })
    }

    /// What KVM listens to.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// InterruptStatus.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// InterruptACK.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// The configuration changed.
    pub fn config_changed(&self) {
        self.raise(CONFIG_CHANGED);
    }

    /// Takes over a saved status, and interrupts if there is one: the driver that has acknowledged it looks once too often, the one that has not must hear.
    pub fn restore(&self, status: u32) {
        if status != 0 {
            self.raise(status & (USED_BUFFER | CONFIG_CHANGED));
        }
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::AcqRel);
        // Full means that one is pending already.
        let _ = self.event.write(1);
    }
}

/// A queue whose addresses the driver has set and the transport has checked.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    memory: GuestMemoryMmap,
    written: Written,
    interrupt: Arc<Interrupt>,
    pushed: bool,
}

impl Ring {
    /// Takes over a configured queue.
    pub fn new(queue: Queue, memory: GuestMemoryMmap, written: Written, interrupt: Arc<Interrupt>) -> Self {
        Self { queue, memory, written, interrupt, pushed: false }
    }

    /// Notes as written what the device writes without a chain: the used ring and, behind it, the wish for notifications. Once a snapshot is enough, for it
    /// is always written.
    pub fn mark_used_ring(&self) {
        let length = 6 + 8 * usize::from(self.queue.size());
        if self.queue.ready() {
            for part in self.memory.get_slices(GuestAddress(self.queue.used_ring()), length).flatten() {
                self.written.mark(part.ptr_guard().as_ptr(), part.len());
            }
        }
    }

    /// The next chain that the driver made available. A driver whose index claims more chains than the queue has room for breaks a rule
    /// (virtio §2.7.13.3): taken for an empty queue it would be one that has always something available and never gives it.
    pub fn pop(&mut self) -> Result<Option<Buffers>, Fault> {
        if !self.queue.ready() {
            return Ok(None);
        }
        match self.queue.iter(&self.memory).map_err(|_| Fault)?.next() {
            Some(chain) => {
                let buffers = Buffers::parse(chain, &self.memory)?;
                // Whatever becomes of them: too many pages in a differential snapshot cost little, one too few is a corrupt guest.
                for part in buffers.writable.parts() {
                    self.written.mark(part.iov_base.cast_const().cast(), part.iov_len);
                }
                Ok(Some(buffers))
            }
            None => Ok(None),
        }
    }

    /// Puts back the chains that were popped last, as if they had not been.
    pub fn unpop(&mut self, chains: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(chains));
    }

    /// Whether the driver has made anything available.
    pub fn has_available(&self) -> bool {
        self.queue.ready()
            && self
                .queue
                .avail_idx(&self.memory, Ordering::Acquire)
                .is_ok_and(|idx| idx.0 != self.queue.next_avail())
    }

    /// Gives a chain back with so many bytes written.
    pub fn push(&mut self, head: u16, written: usize) -> Result<(), Fault> {
        self.pushed = true;
        let written = u32::try_from(written).map_err(|_| Fault)?;
        self.queue.add_used(&self.memory, head, written).map_err(|_| Fault)
    }

    /// Interrupts the driver if something was given back since the last time and the driver wants to know.
    pub fn notify(&mut self) -> Result<(), Fault> {
        if std::mem::take(&mut self.pushed)
            && self.queue.needs_notification(&self.memory).map_err(|_| Fault)?
        {
            self.interrupt.raise(USED_BUFFER);
        }
        Ok(())
    }

    /// Asks for notifications again. True when something came in meanwhile, so that no notification will come for it.
    pub fn listen(&mut self) -> Result<bool, Fault> {
        if !self.queue.ready() {
            return Ok(false);
        }
        self.queue.enable_notification(&self.memory).map_err(|_| Fault)
    }

    /// The queue's registers and indices.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// The memory that the queue lies in.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::driver::{Driver, Part, memory};
    use super::*;

    #[test]
    fn an_index_that_claims_more_than_the_queue_holds_is_a_fault_and_no_empty_queue() {
        let memory = memory();
        let (mut driver, mut ring) = Driver::new(&memory, 0, 16);
        driver.add(&[Part::Writable(64)]);
        assert!(ring.pop().unwrap().is_some() && ring.pop().unwrap().is_none());
        for claimed in [1 + 17u16, 1 + 0x8000, 0] {
            memory.write_obj(claimed, GuestAddress(0x8002)).unwrap();
            assert!(matches!(ring.pop(), Err(Fault)), "{claimed}");
        }
        memory.write_obj(1u16 + 16, GuestAddress(0x8002)).unwrap();
        assert!(ring.pop().unwrap().is_some(), "as many as it holds are allowed");
    }

    #[test]
    fn an_endless_table_of_nothing_is_a_fault() {
        for (entries, is_fault) in [(256u32, false), (257, true), (65_535, true)] {
            let memory = memory();
            let (mut driver, mut ring) = Driver::new(&memory, 0, 16);
            const TABLE: u64 = 0x20_0000;
            for index in 0..entries {
                let at = TABLE + 16 * u64::from(index);
                memory.write_obj(0x8000u64, GuestAddress(at)).unwrap();
                memory.write_obj(0u32, GuestAddress(at + 8)).unwrap();
                let next = if index + 1 < entries { 1u16 } else { 0 };
                memory.write_obj(next, GuestAddress(at + 12)).unwrap();
                memory.write_obj(u16::try_from(index + 1).unwrap(), GuestAddress(at + 14)).unwrap();
            }
            const INDIRECT: u16 = 4;
            driver.add(&[Part::Raw(TABLE, 16 * entries, INDIRECT)]);
            assert_eq!(ring.pop().is_err(), is_fault, "{entries}");
        }
    }

    #[test]
    fn a_queue_that_the_driver_left_alone_is_at_rest() {
        let memory = memory();
        memory.write_slice(&[0xff; 4096], GuestAddress(0)).unwrap();
        let mut ring = Ring::new(
            Queue::new(16).unwrap(),
            memory,
            Written::default(),
            Arc::new(Interrupt::new().unwrap()),
        );
        assert!(ring.pop().unwrap().is_none());
        assert!(!ring.has_available() && !ring.listen().unwrap());
    }
}
