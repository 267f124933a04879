//! What a clone has touched, by its own page tables (Linux, *admin-guide/mm/pagemap.rst*).
//!
//! A page of the memory file that was written is a page of this process's own: present and of no file. That is exact. One that was read is present and the
//! file's; but the kernel maps neighbours with it (15, `fault_around_bytes`, or as many as lie in one piece of the page cache), so of these there are too many.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::{Run, WorkingSet};
use crate::memory::PAGE;

/// Bit 61: a page of a file, or of shared memory.
const OF_A_FILE: u64 = 1 << 61;
/// Bit 62: not in memory, and so written once.
const SWAPPED: u64 = 1 << 62;
/// Bit 63.
const PRESENT: u64 = 1 << 63;
/// Bytes of an entry.
const ENTRY: usize = 8;
/// Entries that are read at once.
const AT_ONCE: usize = 8192;

/// `/proc/self/pagemap`. Opened before there is no `/proc`; it tells of this process alone, and nobody unprivileged where in the host's memory its pages are.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// There is no `/proc`, or no such file in it.
    pub fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Self)
    }

    /// The pages of a clone's memory that are there by now; not more of them than a working set has, those that were written first.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn touched(&self, memory: &GuestMemoryMmap) -> io::Result<WorkingSet> {
        let pages = memory.iter().map(|region| region.len() / PAGE as u64).sum();
        let (mut written, mut read) = (Runs::default(), Runs::default());
        let mut page: u32 = 0;
        let mut bytes = vec![0; AT_ONCE * ENTRY];
        for region in memory.iter() {
            let mut at = u64::try_from(region.as_ptr().addr() / PAGE * ENTRY).map_err(io::Error::other)?;
            let mut left = usize::try_from(region.len()).map_err(io::Error::other)? / PAGE;
            while left > 0 {
                let now = left.min(AT_ONCE);
                let part = bytes.get_mut(..now * ENTRY).unwrap_or_default();
                self.0.read_exact_at(part, at)?;
                for entry in part.as_chunks::<ENTRY>().0 {
                    let entry = u64::from_le_bytes(*entry);
                    match (entry & (PRESENT | SWAPPED) != 0, entry & OF_A_FILE != 0) {
                        (true, false) => written.add(page),
                        (true, true) => read.add(page),
                        (false, _) => {}
                    }
                    page = page.saturating_add(1);
                }
                at += u64::try_from(now * ENTRY).map_err(io::Error::other)?;
                left -= now;
            }
        }
        let mut set = WorkingSet::new(pages);
        let mut room = set.most_pages();
        set.written = written.first(&mut room);
        set.read = read.first(&mut room);
        Ok(set)
    }
}

impl AsRawFd for Pagemap {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Pages in ascending order, as runs.
#[derive(Debug, Default)]
struct Runs(Vec<Run>);

impl Runs {
    fn add(&mut self, page: u32) {
        match self.0.last_mut() {
            Some(run) if run.first.checked_add(run.pages) == Some(page) => run.pages += 1,
            Some(_) | None => self.0.push(Run { first: page, pages: 1 }),
        }
    }

    /// As many pages as there is room for.
    fn first(self, room: &mut u64) -> Vec<Run> {
        let fit = |run: Run| {
            let pages = u32::try_from(*room).unwrap_or(u32::MAX).min(run.pages);
            *room -= u64::from(pages);
            (pages > 0).then_some(Run { pages, ..run })
        };
        self.0.into_iter().map_while(fit).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::OwnedFd;

    use carrel_protocol::units::MemoryMib;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory;

    const PAGES: u64 = (64 << 20) / 4096;

    /// A memory file with something in every page.
    fn memory_file() -> GuestMemoryMmap {
        let mut file = tempfile::tempfile().unwrap();
        (0..64).for_each(|_| file.write_all(&[7; 1 << 20]).unwrap());
        let reserved = memory::reserve(MemoryMib::try_from(64).unwrap()).unwrap();
        memory::fill(&reserved, OwnedFd::from(file)).unwrap();
        reserved
    }

    #[test]
    fn written_pages_are_told_from_those_that_were_read() {
        let memory = memory_file();
        let pagemap = Pagemap::open().unwrap();
        assert_eq!(pagemap.touched(&memory).unwrap(), WorkingSet::new(PAGES), "nothing yet");
        for page in [3u64, 4, 5, 4000] {
            memory.write_obj(1u8, GuestAddress(page * 4096 + 9)).unwrap();
        }
        let _: u8 = memory.read_obj(GuestAddress(1000 * 4096)).unwrap();
        let set = pagemap.touched(&memory).unwrap();
        assert_eq!(set.written(), [Run { first: 3, pages: 3 }, Run { first: 4000, pages: 1 }]);
        let has =
            |page: u32| set.read_only().iter().any(|run| (run.first..run.first + run.pages).contains(&page));
        assert!(has(1000) && !has(4) && !has(4000), "{:?}", set.read_only());
        // It and its neighbours: 16, or as many as the page cache has in one piece.
        assert!(!has(1000 - 512) && !has(1000 + 512), "{:?}", set.read_only());
        assert_eq!(WorkingSet::decode(&set.encode(), PAGES).unwrap(), set);
    }

    #[test]
    fn a_set_is_capped_and_keeps_what_was_written() {
        let memory = memory_file();
        for page in 0..PAGES {
            match page % 8 {
                0 => memory.write_obj(1u8, GuestAddress(page * 4096)).unwrap(),
                _ => drop(memory.read_obj::<u8>(GuestAddress(page * 4096)).unwrap()),
            }
        }
        let set = Pagemap::open().unwrap().touched(&memory).unwrap();
        assert_eq!((set.written().len(), set.pages()), (2048, 4096), "a quarter of 16,384");
        WorkingSet::decode(&set.encode(), PAGES).unwrap();
    }
}
