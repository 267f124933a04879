//! Guest memory: where it lies and how it is mapped.
//!
//! ```text
//!  0            3.25 GiB        4 GiB
//!  | low memory | devices, APIC | high memory …
//! ```
//!
//! Up to 64 GiB, private, reserved only as it is touched: anonymous at a boot, of a memory file at a restore. A memory file holds the ranges one
//! after the other, without the hole.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use carrel_protocol::units::MemoryMib;
use carrel_protocol::vmm::End;
use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

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
    /// The memory file is not of this machine.
    #[error(
        "the snapshot's memory file has {bytes} bytes and its machine {expected}; it is damaged, or of another snapshot"
    )]
    Length {
        /// The file's.
        bytes: u64,
        /// The machine's.
        expected: u64,
    },
    /// The memory file can't be measured.
    #[error("the snapshot's memory file can't be measured")]
    Measure(#[source] io::Error),
}

impl MemoryError {
    /// Under which end of the process this falls.
    pub fn end(&self) -> End {
        match self {
            Self::Map { .. } | Self::Measure(_) => End::Host,
            Self::Length { .. } => End::BadSnapshot,
        }
    }
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

/// Reserves the addresses of guest memory that is yet to come. KVM may be told of them.
///
/// # Errors
///
/// They can't be had.
pub fn reserve(memory: MemoryMib) -> Result<GuestMemoryMmap, MemoryError> {
    let refused = |source| MemoryError::Map { mib: memory.get(), source };
    let regions = ranges(memory).into_iter().map(|(start, size)| {
        let mapping = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .map_err(|e| refused(Box::new(e)))?;
        GuestRegionMmap::new(mapping, start).ok_or_else(|| refused("its addresses overflow".into()))
    });
    GuestMemoryMmap::from_regions(regions.collect::<Result<_, _>>()?).map_err(|e| refused(Box::new(e)))
}

/// Maps a memory file into the place that was reserved for it, copy-on-write: every clone of a snapshot shares what none of them has written. Nobody has used
/// the memory yet.
///
/// # Errors
///
/// The file is not as long as the memory, or can't be mapped.
pub fn fill(reserved: &GuestMemoryMmap, file: OwnedFd) -> Result<(), MemoryError> {
    let mut file = File::from(file);
    let bytes = file.seek(SeekFrom::End(0)).map_err(MemoryError::Measure)?;
    let expected = reserved.iter().map(GuestMemoryRegion::len).sum();
    if bytes != expected {
        return Err(MemoryError::Length { bytes, expected });
    }
    let refused = |source: Box<dyn std::error::Error + Send + Sync>| MemoryError::Map {
        mib: u32::try_from(expected >> 20).unwrap_or(u32::MAX),
        source,
    };
    let mut offset: libc::off_t = 0;
    for region in reserved.iter() {
        let size = usize::try_from(region.len()).map_err(|e| refused(Box::new(e)))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: the range is this region's own mapping, whose place the file's takes; nobody holds a reference into it, and it stays
        // mapped, readable and writable for as long as the region lives.
        let mapped = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(region.as_ptr().cast(), size, access, flags, file.as_raw_fd(), offset)
        };
        if mapped == libc::MAP_FAILED {
            return Err(refused(Box::new(io::Error::last_os_error())));
        }
        // SAFETY: as above, and the advice does not change what it holds.
        unsafe { libc::madvise(mapped, size, libc::MADV_DONTDUMP) };
        offset += libc::off_t::try_from(size).map_err(|e| refused(Box::new(e)))?;
    }
    Ok(())
}

/// A page as snapshots know it, bytes.
pub const PAGE: usize = 4096;

/// Which pages devices have written, so that a differential snapshot has them: KVM's own log knows what vCPUs and KVM wrote. Without a machine that is
/// tracked it notes nothing and costs nothing.
#[derive(Clone, Debug, Default)]
pub struct Written(Option<Arc<Vec<Pages>>>);

/// A range's mapping and a bit for each of its pages.
#[derive(Debug)]
struct Pages {
    start: usize,
    length: usize,
    bits: Vec<AtomicU64>,
}

impl Written {
    /// Notes what is written to this memory.
    pub fn tracked(memory: &GuestMemoryMmap) -> Self {
        let pages = |region: &GuestRegionMmap| {
            let length = usize::try_from(region.len()).unwrap_or(0);
            let bits = (0..(length / PAGE).div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
            Pages { start: region.as_ptr().addr(), length, bits }
        };
        Self(Some(Arc::new(memory.iter().map(pages).collect())))
    }

    /// Whether anything is noted.
    pub fn is_tracked(&self) -> bool {
        self.0.is_some()
    }

    /// A device writes to these bytes of the mapping.
    pub fn mark(&self, start: *const u8, length: usize) {
        let Some(all) = &self.0 else { return };
        for pages in all.iter() {
            let Some(from) = start.addr().checked_sub(pages.start).filter(|from| *from < pages.length) else {
                continue;
            };
            let to = from.saturating_add(length).min(pages.length);
            for page in from / PAGE..to.div_ceil(PAGE) {
                if let Some(word) = pages.bits.get(page / 64) {
                    word.fetch_or(1 << (page % 64), Ordering::Relaxed);
                }
            }
        }
    }

    /// What was marked since the last time, 64 pages a word, for each range.
    pub fn take(&self) -> Vec<Vec<u64>> {
        let of = |pages: &Pages| pages.bits.iter().map(|word| word.swap(0, Ordering::Relaxed)).collect();
        self.0.as_ref().map(|all| all.iter().map(of).collect()).unwrap_or_default()
    }
}

/// Which pages of a range are saved.
#[derive(Clone, Copy, Debug)]
pub enum Selection<'a> {
    /// All that are not zeros, into a file that is a hole.
    NotZero,
    /// Those with a bit, 64 pages a word.
    These(&'a [u64]),
}

/// Writes a range's pages to their places in the memory file and returns how many bytes that were. Nobody may write to the memory meanwhile.
///
/// # Errors
///
/// The file's.
pub fn save(region: &GuestRegionMmap, file: &File, offset: u64, selection: Selection<'_>) -> io::Result<u64> {
    let length = usize::try_from(region.len()).map_err(io::Error::other)?;
    // SAFETY: the mapping is readable and lives as long as the region; vCPUs are outside of the guest and devices are served by this very thread, so that
    // nobody writes to it.
    let bytes = unsafe { std::slice::from_raw_parts(region.as_ptr().cast_const(), length) };
    let selected = |index: usize, page: &[u8]| match selection {
        Selection::NotZero => !is_zero(page),
        Selection::These(words) => words.get(index / 64).is_some_and(|word| word >> (index % 64) & 1 == 1),
    };
    let mut written = 0;
    let mut run: Option<(usize, usize)> = None;
    let mut flush = |run: Option<(usize, usize)>| -> io::Result<()> {
        let Some(part) = run.and_then(|(start, end)| Some((start, bytes.get(start..end)?))) else {
            return Ok(());
        };
        written += u64::try_from(part.1.len()).unwrap_or(0);
        file.write_all_at(part.1, offset + u64::try_from(part.0).unwrap_or(0))
    };
    for (index, page) in bytes.chunks(PAGE).enumerate() {
        let start = index * PAGE;
        match (selected(index, page), run) {
            (true, Some((first, end))) if end == start && end - first < RUN => {
                run = Some((first, start + page.len()))
            }
            (true, before) => {
                flush(before)?;
                run = Some((start, start + page.len()));
            }
            (false, _) => {}
        }
    }
    flush(run)?;
    Ok(written)
}

/// Bytes written by one call at most.
const RUN: usize = 1 << 20;

fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<64>();
    words.iter().all(|word| *word == [0; 64]) && rest.iter().all(|byte| *byte == 0)
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
