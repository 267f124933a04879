//! A driver as tests need one: it lays descriptors, right or wrong, into guest memory.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::ring::{Interrupt, Ring};
use crate::memory::Written;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const MEMORY: usize = 16 << 20;
/// Where buffers are laid; queues lie below, 64 KiB each.
const BUFFERS: u64 = 1 << 20;
/// Buffers of one queue.
const REGION: u64 = 4 << 20;

/// A descriptor as the driver wants it.
pub(crate) enum Part<'a> {
    /// The device reads these bytes.
    Readable(&'a [u8]),
    /// The device may write so many.
    Writable(u32),
    /// Address, length, flags: whatever.
    Raw(u64, u32, u16),
}

/// The driver's side of one queue.
pub(crate) struct Driver {
    pub(crate) memory: GuestMemoryMmap,
    base: u64,
    size: u16,
    next_descriptor: u16,
    available: u16,
    seen: u16,
    first_buffer: u64,
    next_buffer: u64,
    /// First writable buffer of each chain, by head.
    writable: Vec<(u16, u64)>,
}

/// Memory for a few queues and their buffers.
pub(crate) fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

impl Driver {
    /// The driver of queue number `index`, and the device's ring of it.
    pub(crate) fn new(memory: &GuestMemoryMmap, index: u64, size: u16) -> (Self, Ring) {
        let base = index << 16;
        let mut queue = Queue::new(size).unwrap();
        queue.set_size(size);
        let low = |n: u64| Some(u32::try_from(n).unwrap());
        queue.set_desc_table_address(low(base), Some(0));
        queue.set_avail_ring_address(low(base + 0x8000), Some(0));
        queue.set_used_ring_address(low(base + 0xa000), Some(0));
        queue.set_ready(true);
        assert!(queue.is_valid(memory));
        let interrupt = Arc::new(Interrupt::new().unwrap());
        let driver = Self {
            memory: memory.clone(),
            base,
            size,
            next_descriptor: 0,
            available: 0,
            seen: 0,
            first_buffer: BUFFERS + index * REGION,
            next_buffer: BUFFERS + index * REGION,
            writable: Vec::new(),
        };
        (driver, Ring::new(queue, memory.clone(), Written::default(), interrupt))
    }

    /// Makes a chain available and returns its head.
    pub(crate) fn add(&mut self, parts: &[Part<'_>]) -> u16 {
        let head = self.next_descriptor % self.size;
        for (i, part) in parts.iter().enumerate() {
            let more = if i + 1 < parts.len() { NEXT } else { 0 };
            let (address, length, flags) = match part {
                Part::Readable(bytes) => {
                    let address = self.buffer(bytes.len());
                    self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
                    (address, u32::try_from(bytes.len()).unwrap(), more)
                }
                Part::Writable(length) => {
                    let address = self.buffer(usize::try_from(*length).unwrap());
                    if self.writable.last().is_none_or(|(last, _)| *last != head) {
                        self.writable.push((head, address));
                    }
                    (address, *length, WRITE | more)
                }
                Part::Raw(address, length, flags) => (*address, *length, *flags | more),
            };
            let index = self.next_descriptor % self.size;
            let next = (index + 1) % self.size;
            self.descriptor(index, address, length, flags, next);
            self.next_descriptor = self.next_descriptor.wrapping_add(1);
        }
        self.offer(head);
        head
    }

    /// Writes a descriptor as it is told.
    pub(crate) fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = self.base + 16 * u64::from(index);
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes a head available, whatever is there.
    pub(crate) fn offer(&mut self, head: u16) {
        let available = self.base + 0x8000;
        let slot = available + 4 + 2 * u64::from(self.available % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.write_obj(self.available, GuestAddress(available + 2)).unwrap();
    }

    /// Chains that the device has.
    pub(crate) fn outstanding(&self) -> usize {
        usize::from(self.available.wrapping_sub(self.seen))
    }

    /// Takes back what came, whatever it holds.
    pub(crate) fn skip_used(&mut self) {
        self.seen = self.memory.read_obj(GuestAddress(self.base + 0xa002)).unwrap();
    }

    /// Room for a buffer; old ones are used again after a while.
    fn buffer(&mut self, length: usize) -> u64 {
        if self.next_buffer + u64::try_from(length).unwrap() > self.first_buffer + REGION {
            self.next_buffer = self.first_buffer;
        }
        let address = self.next_buffer;
        self.next_buffer += u64::try_from(length).unwrap().next_multiple_of(16);
        address
    }

    /// Chains that came back: head, and bytes written at the start of its first writable buffer.
    pub(crate) fn used(&mut self) -> Vec<(u16, Vec<u8>)> {
        let used = self.base + 0xa000;
        let now: u16 = self.memory.read_obj(GuestAddress(used + 2)).unwrap();
        let mut back = Vec::new();
        while self.seen != now {
            let slot = used + 4 + 8 * u64::from(self.seen % self.size);
            let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
            let length: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
            let head = u16::try_from(head).unwrap();
            let mut bytes = vec![0; usize::try_from(length).unwrap()];
            if let Some(at) = self.writable.iter().position(|(of, _)| *of == head) {
                let (_, address) = self.writable.remove(at);
                self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            }
            back.push((head, bytes));
            self.seen = self.seen.wrapping_add(1);
        }
        back
    }
}
