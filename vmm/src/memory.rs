//! Guest memory: where it lies and how it is mapped.
//!
//! ```text
//!  0            3.25 GiB        4 GiB
//!  | low memory | devices, APIC | high memory …
//! ```
//!
//! Up to 64 GiB, anonymous and private, reserved only as it is touched.

use carrel_protocol::units::MemoryMib;
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Where low memory ends at the latest and device addresses begin.
pub const GAP_START: u64 = 0xd000_0000;
/// Where high memory begins.
pub const GAP_END: u64 = 1 << 32;

/// Memory can't be had.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// mmap refused.
    #[error(
        "the host can't reserve {mib} MiB of address space for the guest; raise its limit on virtual memory (ulimit -v)"
    )]
    Map {
        /// What was asked for.
        mib: u32,
        /// What mmap said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The ranges that a memory of this size has, in ascending order.
pub fn ranges(memory: MemoryMib) -> Vec<(GuestAddress, usize)> {
    let bytes = memory.bytes();
    let low = bytes.min(GAP_START);
    let size = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    let mut ranges = vec![(GuestAddress(0), size(low))];
    if bytes > low {
        ranges.push((GuestAddress(GAP_END), size(bytes - low)));
    }
    ranges
}

/// Maps guest memory.
///
/// Huge pages are advice: without them a first touch of each 4 KiB costs a fault, which under emulation was half a second
/// of a boot; a kernel without them ignores the advice.
pub fn allocate(memory: MemoryMib, huge_pages: bool) -> Result<GuestMemoryMmap, MemoryError> {
    let mapped = GuestMemoryMmap::from_ranges(&ranges(memory))
        .map_err(|e| MemoryError::Map { mib: memory.get(), source: Box::new(e) })?;
    for region in mapped.iter() {
        let size = usize::try_from(region.len()).unwrap_or(usize::MAX);
        let advice = if huge_pages { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        for advice in [advice, libc::MADV_DONTDUMP] {
            // SAFETY: the range is this region's own mapping, and neither advice changes what it holds.
            unsafe { libc::madvise(region.as_ptr().cast(), size, advice) };
        }
    }
    Ok(mapped)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mib(n: u64) -> MemoryMib {
        MemoryMib::try_from(n).unwrap()
    }

    #[test]
    fn memory_below_the_hole_is_one_range() {
        assert_eq!(ranges(mib(64)), [(GuestAddress(0), 64 << 20)]);
        assert_eq!(ranges(mib(3328)), [(GuestAddress(0), 0xd000_0000)]);
    }

    #[test]
    fn memory_above_the_hole_continues_at_4_gib_and_loses_nothing() {
        for n in [3329, 4096, 8192, 65_536] {
            let ranges = ranges(mib(n));
            assert_eq!(ranges.len(), 2, "{n}");
            assert_eq!(ranges.iter().map(|(_, size)| size).sum::<usize>(), usize::try_from(n).unwrap() << 20);
            assert_eq!(ranges[1].0, GuestAddress(GAP_END));
        }
    }

    #[test]
    fn the_largest_memory_can_be_mapped_without_touching_it() {
        assert_eq!(allocate(MemoryMib::MAX, true).unwrap().num_regions(), 2);
    }
}
