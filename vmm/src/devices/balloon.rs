//! virtio-balloon (virtio §5.5): memory that the guest does not need goes back to the host.
//!
//! Queues: 0 inflate, 1 deflate, 2 free-page reporting where it is offered (drivers number just the queues that are). Given pages are dropped by
//! MADV_DONTNEED; a guest that touches one again finds zeros in it, or in a clone what its template had there. Neither is promised (§5.5.6).

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::buffers::{Buffers, Fault};
use super::ring::Ring;
use super::state::DeviceState;

/// VIRTIO_BALLOON_F_MUST_TELL_HOST is not offered: a page is usable the moment that the guest takes it back.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;
const PAGE: u64 = 4096;
const PAGES_PER_MIB: u32 = 256;
/// Chains served in one turn: each may ask for as many madvise calls as it names pages or ranges.
const BATCH: usize = 8;
/// Page numbers taken from one chain at most; Linux sends 256.
const MAX_PAGES: usize = 1024;

/// See the module's page.
#[derive(Debug)]
pub struct Balloon {
    target_pages: u32,
    actual_pages: u32,
    reporting: bool,
    /// Bytes given back since the start.
    pub reclaimed_bytes: u64,
}

impl Balloon {
    /// A balloon of this size at the start.
    pub fn new(size_mib: u32, reporting: bool) -> Self {
        let target_pages = size_mib.saturating_mul(PAGES_PER_MIB);
        Self { target_pages, actual_pages: 0, reporting, reclaimed_bytes: 0 }
    }

    /// Offered features.
    pub fn features(&self) -> u64 {
        F_DEFLATE_ON_OOM | if self.reporting { F_REPORTING } else { 0 }
    }

    /// Sizes of its queues.
    pub fn queue_sizes(&self) -> &'static [u16] {
        if self.reporting { &[256, 256, 32] } else { &[256, 256] }
    }

    /// Configuration space: `num_pages`, `actual`.
    pub fn config(&self) -> [u8; 8] {
        let mut config = [0; 8];
        let (target, actual) = config.split_at_mut(4);
        target.copy_from_slice(&self.target_pages.to_le_bytes());
        actual.copy_from_slice(&self.actual_pages.to_le_bytes());
        config
    }

    /// The driver writes `actual`.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
            self.actual_pages = u32::from_le_bytes(bytes);
        }
    }

    /// Asks the guest for another size; its driver hears of it by a configuration interrupt.
    pub fn set_target(&mut self, size_mib: u32) {
        self.target_pages = size_mib.saturating_mul(PAGES_PER_MIB);
    }

    /// What it holds, by the driver's word, bytes.
    pub fn held_bytes(&self) -> u64 {
        u64::from(self.actual_pages) * PAGE
    }

    /// State to be saved.
    pub fn state(&self) -> DeviceState {
        DeviceState::Balloon { target_pages: self.target_pages, actual_pages: self.actual_pages }
    }

    /// Takes over saved sizes. What was given back is given back no more: a clone's memory begins as its template's.
    pub fn restore(&mut self, target_pages: u32, actual_pages: u32) {
        (self.target_pages, self.actual_pages) = (target_pages, actual_pages);
    }

    /// A reset driver has taken all its pages back.
    pub fn reset(&mut self) {
        self.actual_pages = 0;
    }

    /// Serves one queue. True when there is more to do.
    pub fn serve(&mut self, queue: usize, ring: &mut Ring) -> Result<bool, Fault> {
        for _ in 0..BATCH {
            let Some(buffers) = ring.pop()? else {
                ring.notify()?;
                return Ok(false);
            };
            match queue {
                0 => self.inflate(&buffers, ring)?,
                2 => self.take_reported(&buffers)?,
                // Deflated pages are the guest's again as they are.
                _ => {}
            }
            ring.push(buffers.head, 0)?;
        }
        ring.notify()?;
        Ok(ring.has_available())
    }

    fn inflate(&mut self, buffers: &Buffers, ring: &Ring) -> Result<(), Fault> {
        let count = buffers.readable.len() / 4;
        if count > MAX_PAGES {
            return Err(Fault);
        }
        let mut bytes = vec![0; count * 4];
        buffers.readable.read(&mut bytes)?;
        let mut pages: Vec<u32> =
            bytes.as_chunks::<4>().0.iter().map(|page| u32::from_le_bytes(*page)).collect();
        // Linux sends them in descending order; runs make fewer calls.
        pages.sort_unstable();
        pages.dedup();
        for run in pages.chunk_by(|a, b| b.checked_sub(*a) == Some(1)) {
            let Some(first) = run.first() else { continue };
            let length = run.len().saturating_mul(4096);
            self.drop_range(ring, GuestAddress(u64::from(*first) * PAGE), length)?;
        }
        Ok(())
    }

    fn drop_range(&mut self, ring: &Ring, start: GuestAddress, length: usize) -> Result<(), Fault> {
        for slice in ring.memory().get_slices(start, length) {
            let slice = slice.map_err(|_| Fault)?;
            self.give_back(slice.ptr_guard_mut().as_ptr(), slice.len());
        }
        Ok(())
    }

    /// Reported pages are whole and aligned (§5.5.6.7); a driver whose are not gets nothing dropped.
    fn take_reported(&mut self, buffers: &Buffers) -> Result<(), Fault> {
        for range in buffers.writable.parts() {
            let start = range.iov_base as u64;
            if !start.is_multiple_of(PAGE) || !range.iov_len.is_multiple_of(4096) {
                return Err(Fault);
            }
            self.give_back(range.iov_base.cast(), range.iov_len);
        }
        Ok(())
    }

    fn give_back(&mut self, start: *mut u8, length: usize) {
        // SAFETY: the range lies in guest memory, which is private: it reads as zeros or as the template's file afterwards, and only the guest, who gave it
        // away, and devices that it names these pages to look at it.
        if unsafe { libc::madvise(start.cast(), length, libc::MADV_DONTNEED) } == 0 {
            self.reclaimed_bytes += u64::try_from(length).unwrap_or(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_its_driver_says_that_it_holds_is_told_until_the_driver_starts_anew() {
        let mut balloon = Balloon::new(0, true);
        balloon.set_target(3);
        assert_eq!(balloon.config(), [0, 3, 0, 0, 0, 0, 0, 0], "768 pages");
        balloon.write_config(4, &768_u32.to_le_bytes());
        assert_eq!(balloon.held_bytes(), 3 << 20);
        // A part of a number is none, nor is the target the driver's.
        balloon.write_config(4, &[1]);
        balloon.write_config(0, &[9; 4]);
        assert_eq!((balloon.held_bytes(), balloon.config()[..4].to_vec()), (3 << 20, vec![0, 3, 0, 0]));
        balloon.write_config(4, &[0xff; 4]);
        assert_eq!(balloon.held_bytes(), u64::from(u32::MAX) * PAGE, "whatever it says");
        balloon.reset();
        assert_eq!((balloon.held_bytes(), balloon.reclaimed_bytes), (0, 0));
    }
}
