//! virtio-blk (virtio §5.2): a raw disk made of a base that is only read and an overlay that takes the writes.
//!
//! ```text
//!   read:   block in overlay? ──yes──▶ overlay
//!                └──no──▶ base, or zeros beyond its end
//!   write:  overlay; a block that is only partly written is first copied up from the base
//! ```
//!
//! A bitmap says which 4 KiB blocks the overlay holds. Before a snapshot the overlay is completed ([`Block::complete`]): then it is the base of every clone, whose
//! own overlay begins empty. Data goes between file and guest memory without a copy of ours (`preadv`, `pwritev`). Requests are carried out at once, on the
//! event thread: a room has a page cache beneath it, and a slow disk slows its own room alone.

mod file;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use carrel_protocol::vmm::{BlockConfig, Cache, DeviceStopReason};
use thiserror::Error;
use virtio_bindings::bindings::virtio_blk as wire;

use super::bucket::Bucket;
use super::buffers::{Buffers, Fault, Ranges};
use super::ring::Ring;

const SECTOR: u64 = 512;
/// The unit of the bitmap.
const BLOCK: u64 = 4096;
const BLOCK_BYTES: usize = 4096;
/// The bitmap of a larger disk would cost the host more than 64 MiB.
pub const MAX_DISK_BYTES: u64 = 2 << 40;
const HEADER: usize = 16;
const ID_BYTES: usize = 20;
const SEGMENT: usize = 16;
/// Segments of one discard or zeroing at most, and sectors in each: what the configuration space promises.
const MAX_SEGMENTS: u32 = 16;
const MAX_SEGMENT_SECTORS: u32 = 1 << 17;
/// The same for zeroing, which has to be written out where the host's file system knows no holes.
const MAX_ZEROED_SEGMENTS: u32 = 1;
const MAX_ZEROED_SECTORS: u32 = 1 << 15;
const QUEUE_SIZE: u16 = 128;
/// Data segments of one request: what fits into a queue beside header and status; and bytes in each. Without the second a guest could name
/// the same pages again and again, and keep the event thread with one request for 4 GiB.
const MAX_DATA_SEGMENTS: u32 = 126;
const MAX_SEGMENT_BYTES: u32 = 128 << 10;
/// Bytes of one request at most, 15.75 MiB: what the two promise.
const MAX_REQUEST_BYTES: usize = 126 * (128 << 10);
/// A turn ends with so many requests, or with so many bytes.
const BATCH: usize = 32;
const BATCH_BYTES: usize = 4 << 20;

const CONFIG_BYTES: usize = 60;

/// A disk can't be made.
#[derive(Debug, Error)]
pub enum BlockError {
    /// The size.
    #[error(
        "disk {id:?} has {bytes} bytes; a disk has a multiple of 4,096 up to 2 TiB, and at least one block"
    )]
    Size {
        /// The disk.
        id: String,
        /// What was asked for.
        bytes: u64,
    },
    /// The id.
    #[error("disk id {id:?} is not 1 to 20 bytes of printable ASCII")]
    Id {
        /// What was given.
        id: String,
    },
    /// Neither a base nor an overlay.
    #[error("disk {id:?} has neither a base nor an overlay")]
    Nothing {
        /// The disk.
        id: String,
    },
    /// A file can't be looked at.
    #[error("the base of disk {id:?} can't be measured")]
    Measure {
        /// The disk.
        id: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Counters since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Bytes read by the guest.
    pub read_bytes: u64,
    /// Bytes written by the guest.
    pub written_bytes: u64,
    /// Read requests.
    pub reads: u64,
    /// Write requests.
    pub writes: u64,
    /// Requests that failed at the host.
    pub errors: u64,
}

/// See the module's page.
#[derive(Debug)]
pub struct Block {
    id: String,
    bytes: u64,
    base: Option<(File, u64)>,
    overlay: Option<File>,
    cache: Cache,
    /// One bit a block, where there are both a base and an overlay.
    present: Vec<u64>,
    bucket: Option<Bucket>,
    /// Bytes moved in this turn.
    turn_bytes: usize,
    /// Counters.
    pub counters: Counters,
    /// A reason to tell the owner of, once each.
    trouble: Option<DeviceStopReason>,
    told: Vec<DeviceStopReason>,
}

impl Block {
    /// Makes a disk of open files.
    pub fn new(config: BlockConfig<OwnedFd>) -> Result<Self, BlockError> {
        let BlockConfig { id, base, overlay, size_bytes: bytes, cache, limit } = config;
        if id.is_empty() || id.len() > ID_BYTES || !id.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(BlockError::Id { id });
        }
        if bytes == 0 || bytes % BLOCK != 0 || bytes > MAX_DISK_BYTES {
            return Err(BlockError::Size { id, bytes });
        }
        if base.is_none() && overlay.is_none() {
            return Err(BlockError::Nothing { id });
        }
        let base = match base.map(File::from) {
            Some(file) => match file::length(&file) {
                Ok(length) => Some((file, length)),
                Err(source) => return Err(BlockError::Measure { id, source }),
            },
            None => None,
        };
        let words = match (&base, &overlay) {
            (Some(_), Some(_)) => usize::try_from(bytes.div_ceil(64 * BLOCK)).unwrap_or(0),
            _ => 0,
        };
        Ok(Self {
            id,
            bytes,
            base,
            overlay: overlay.map(File::from),
            cache,
            present: vec![0; words],
            bucket: limit.map(|limit| Bucket::new(limit, Instant::now())),
            turn_bytes: 0,
            counters: Counters::default(),
            trouble: None,
            told: Vec::new(),
        })
    }

    /// The disk's name towards its owner.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Offered features.
    pub fn features(&self) -> u64 {
        let always = 1 << wire::VIRTIO_BLK_F_SIZE_MAX
            | 1 << wire::VIRTIO_BLK_F_SEG_MAX
            | 1 << wire::VIRTIO_BLK_F_BLK_SIZE;
        let cache = match self.cache {
            Cache::Writeback => 1 << wire::VIRTIO_BLK_F_FLUSH,
            Cache::Unsafe => 0,
        };
        let kind = match self.overlay {
            Some(_) => 1 << wire::VIRTIO_BLK_F_DISCARD | 1 << wire::VIRTIO_BLK_F_WRITE_ZEROES,
            None => 1 << wire::VIRTIO_BLK_F_RO,
        };
        always | cache | kind
    }

    /// Sizes of its queues.
    pub const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE];

    /// Configuration space (§5.2.4): just the fields of the features that are offered.
    pub fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(place) = config.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        put(0, &(self.bytes / SECTOR).to_le_bytes());
        put(8, &MAX_SEGMENT_BYTES.to_le_bytes()); // size_max
        put(12, &MAX_DATA_SEGMENTS.to_le_bytes()); // seg_max
        put(20, &512u32.to_le_bytes()); // blk_size
        put(36, &MAX_SEGMENT_SECTORS.to_le_bytes()); // max_discard_sectors
        put(40, &MAX_SEGMENTS.to_le_bytes()); // max_discard_seg
        put(44, &8u32.to_le_bytes()); // discard_sector_alignment
        put(48, &MAX_ZEROED_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
        put(52, &MAX_ZEROED_SEGMENTS.to_le_bytes()); // max_write_zeroes_seg
        put(56, &[1]); // write_zeroes_may_unmap
        config
    }

    /// Copies into the overlay what it has not of the base, so that it holds the whole disk. For a snapshot: a fresh overlay over the old base, under a file
    /// system that is mounted, would corrupt it.
    ///
    /// # Errors
    ///
    /// The files'. What was copied stays; the disk is as it was.
    pub fn complete(&mut self) -> io::Result<()> {
        let (Some((base, length)), Some(overlay)) = (&self.base, &self.overlay) else { return Ok(()) };
        let mut at = 0;
        while at < self.bytes {
            let run = self.run(at, self.bytes);
            if !self.has(at / BLOCK) {
                file::copy_over(base, *length, overlay, &run)?;
            }
            at = run.end;
        }
        self.present.fill(u64::MAX);
        Ok(())
    }

    /// When a limit lets the next request through, if one holds it back now.
    pub fn resumes_at(&self) -> Option<Instant> {
        self.bucket.as_ref().and_then(Bucket::resumes_at)
    }

    /// A trouble at the host that its owner has not been told of.
    pub fn take_trouble(&mut self) -> Option<DeviceStopReason> {
        let reason = self.trouble.take().filter(|reason| !self.told.contains(reason))?;
        self.told.push(reason);
        Some(reason)
    }

    /// Serves the request queue. True when there is more to do at once.
    pub fn serve(&mut self, ring: &mut Ring) -> Result<bool, Fault> {
        self.turn_bytes = 0;
        for _ in 0..BATCH {
            if self.turn_bytes >= BATCH_BYTES {
                break;
            }
            if self.bucket.as_mut().is_some_and(|bucket| !bucket.is_open(Instant::now())) {
                ring.notify()?;
                return Ok(false);
            }
            let Some(buffers) = ring.pop()? else {
                ring.notify()?;
                return Ok(false);
            };
            let written = self.request(&buffers)?;
            ring.push(buffers.head, written)?;
        }
        ring.notify()?;
        Ok(ring.has_available())
    }

    /// Carries out one request and returns how many bytes it wrote into the guest's memory.
    fn request(&mut self, buffers: &Buffers) -> Result<usize, Fault> {
        let mut header = [0; HEADER];
        buffers.readable.read(&mut header)?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        let sector = u64::from_le_bytes(sector);
        let room = buffers.writable.len().checked_sub(1).ok_or(Fault)?;
        let into = buffers.writable.part(0, room);
        let from = buffers.readable.part(HEADER, usize::MAX);
        let outcome = match kind {
            wire::VIRTIO_BLK_T_IN => self.read(sector, &into).map(|()| into.len()),
            wire::VIRTIO_BLK_T_OUT => self.write(sector, &from).map(|()| 0),
            wire::VIRTIO_BLK_T_FLUSH => self.flush().map(|()| 0),
            wire::VIRTIO_BLK_T_GET_ID => self.tell_id(&into),
            wire::VIRTIO_BLK_T_DISCARD => {
                self.clear_segments(&from, MAX_SEGMENTS, MAX_SEGMENT_SECTORS, Clear::Discard).map(|()| 0)
            }
            wire::VIRTIO_BLK_T_WRITE_ZEROES => {
                self.clear_segments(&from, MAX_ZEROED_SEGMENTS, MAX_ZEROED_SECTORS, Clear::Zero).map(|()| 0)
            }
            _ => Err(Refusal::Unsupported),
        };
        let (status, written) = match outcome {
            Ok(written) => (wire::VIRTIO_BLK_S_OK, written),
            Err(Refusal::Unsupported) => (wire::VIRTIO_BLK_S_UNSUPP, 0),
            Err(Refusal::Wrong) => (wire::VIRTIO_BLK_S_IOERR, 0),
            Err(Refusal::Host(error)) => {
                self.counters.errors += 1;
                let full = matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG));
                self.trouble =
                    Some(if full { DeviceStopReason::HostDiskFull } else { DeviceStopReason::HostIo });
                (wire::VIRTIO_BLK_S_IOERR, 0)
            }
        };
        buffers.writable.part(room, 1).write(&[u8::try_from(status).unwrap_or(u8::MAX)])?;
        Ok(written + 1)
    }

    /// The byte range of a request's data, if the disk has it and the request is no larger than was promised.
    fn data_range(&self, sector: u64, length: usize) -> Result<Range<u64>, Refusal> {
        if length > MAX_REQUEST_BYTES {
            return Err(Refusal::Wrong);
        }
        self.range(sector, length)
    }

    /// The byte range of `length` bytes from a sector, if the disk has it.
    fn range(&self, sector: u64, length: usize) -> Result<Range<u64>, Refusal> {
        let length = u64::try_from(length).map_err(|_| Refusal::Wrong)?;
        let start = sector.checked_mul(SECTOR).ok_or(Refusal::Wrong)?;
        let end = start.checked_add(length).ok_or(Refusal::Wrong)?;
        if length % SECTOR == 0 && end <= self.bytes { Ok(start..end) } else { Err(Refusal::Wrong) }
    }

    fn spend(&mut self, bytes: usize) {
        self.turn_bytes = self.turn_bytes.saturating_add(bytes);
        if let Some(bucket) = &mut self.bucket {
            bucket.spend(u64::try_from(bytes).unwrap_or(u64::MAX));
        }
    }

    /// After this request the others have their turn: how long it takes is up to the host's file system.
    fn end_turn(&mut self) {
        self.turn_bytes = BATCH_BYTES;
    }

    fn read(&mut self, sector: u64, into: &Ranges) -> Result<(), Refusal> {
        let range = self.data_range(sector, into.len())?;
        self.spend(into.len());
        self.counters.reads += 1;
        let mut at = range.start;
        while at < range.end {
            let run = self.run(at, range.end);
            let part = into.part(offset(at - range.start), offset(run.end - at));
            match (self.source(at), &self.base) {
                (Some(file), _) => file::read_all(file, &part, at).map_err(Refusal::Host)?,
                (None, Some((base, length))) if at < *length => {
                    file::read_all(base, &part.part(0, offset(length - at)), at).map_err(Refusal::Host)?;
                    part.part(offset(length.saturating_sub(at)), usize::MAX).zero();
                }
                (None, _) => part.zero(),
            }
            at = run.end;
        }
        self.counters.read_bytes += range.end - range.start;
        Ok(())
    }

    /// The overlay, where it holds this byte.
    fn source(&self, at: u64) -> Option<&File> {
        self.overlay.as_ref().filter(|_| self.base.is_none() || self.has(at / BLOCK))
    }

    /// The longest range from `at` that one file holds.
    fn run(&self, at: u64, end: u64) -> Range<u64> {
        if self.present.is_empty() {
            return at..end;
        }
        let first = at / BLOCK;
        let here = self.has(first);
        let mut block = first + 1;
        while block * BLOCK < end && self.has(block) == here {
            block += 1;
        }
        at..(block * BLOCK).min(end)
    }

    fn has(&self, block: u64) -> bool {
        let word = usize::try_from(block / 64).ok().and_then(|word| self.present.get(word));
        word.is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    fn mark(&mut self, range: &Range<u64>) {
        if self.present.is_empty() {
            return;
        }
        for block in range.start / BLOCK..range.end.div_ceil(BLOCK) {
            let word = usize::try_from(block / 64).ok().and_then(|word| self.present.get_mut(word));
            if let Some(word) = word {
                *word |= 1 << (block % 64);
            }
        }
    }

    fn write(&mut self, sector: u64, from: &Ranges) -> Result<(), Refusal> {
        let range = self.data_range(sector, from.len())?;
        if self.overlay.is_none() {
            return Err(Refusal::Wrong);
        }
        self.spend(from.len());
        self.counters.writes += 1;
        self.copy_up_edges(&range)?;
        if let Some(overlay) = &self.overlay {
            file::write_all(overlay, from, range.start).map_err(Refusal::Host)?;
        }
        self.mark(&range);
        self.counters.written_bytes += range.end - range.start;
        Ok(())
    }

    /// Before a block is partly changed, the overlay must hold all of it.
    fn copy_up_edges(&mut self, range: &Range<u64>) -> Result<(), Refusal> {
        if self.present.is_empty() || range.is_empty() {
            return Ok(());
        }
        for edge in [range.start, range.end] {
            let start = edge - edge % BLOCK;
            if start == edge || self.has(start / BLOCK) {
                continue;
            }
            let mut block = [0; BLOCK_BYTES];
            if let Some((base, length)) = &self.base
                && let Some(holds) = length.checked_sub(start)
            {
                let (there, _) = block.split_at_mut(offset(holds).min(BLOCK_BYTES));
                base.read_exact_at(there, start).map_err(Refusal::Host)?;
            }
            if let Some(overlay) = &self.overlay {
                overlay.write_all_at(&block, start).map_err(Refusal::Host)?;
            }
            self.mark(&(start..start + BLOCK));
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Refusal> {
        // Costs the host as much as a write.
        self.spend(0);
        self.end_turn();
        match (&self.overlay, self.cache) {
            (Some(overlay), Cache::Writeback) => overlay.sync_data().map_err(Refusal::Host),
            (None, Cache::Writeback) => Ok(()),
            (_, Cache::Unsafe) => Err(Refusal::Unsupported),
        }
    }

    fn tell_id(&self, into: &Ranges) -> Result<usize, Refusal> {
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(self.id.bytes()) {
            *to = from;
        }
        into.write(&id).map_err(|Fault| Refusal::Wrong)?;
        Ok(ID_BYTES)
    }

    /// Discard and write-zeroes (§5.2.6): where the host's file system knows holes, both leave zeros and give the host its room back.
    fn clear_segments(
        &mut self,
        from: &Ranges,
        segments: u32,
        sectors_each: u32,
        how: Clear,
    ) -> Result<(), Refusal> {
        let count = from.len() / SEGMENT;
        if self.overlay.is_none() || count == 0 || u32::try_from(count).map_or(true, |n| n > segments) {
            return Err(Refusal::Wrong);
        }
        let mut bytes = vec![0; count * SEGMENT];
        from.read(&mut bytes).map_err(|Fault| Refusal::Wrong)?;
        for segment in bytes.as_chunks::<SEGMENT>().0 {
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *segment;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            // Bit 0 lets the device unmap; the others are reserved (§5.2.6.2).
            if u32::from_le_bytes(flags) & !1 != 0 {
                return Err(Refusal::Unsupported);
            }
            if sectors > sectors_each {
                return Err(Refusal::Wrong);
            }
            let length = usize::try_from(u64::from(sectors) * SECTOR).map_err(|_| Refusal::Wrong)?;
            self.clear(&self.range(sector, length)?, how)?;
        }
        Ok(())
    }

    fn clear(&mut self, range: &Range<u64>, how: Clear) -> Result<(), Refusal> {
        if range.is_empty() {
            return Ok(());
        }
        self.spend(0);
        self.end_turn();
        self.copy_up_edges(range)?;
        let Some(overlay) = &self.overlay else { return Err(Refusal::Wrong) };
        match (file::punch(overlay, range).map_err(Refusal::Host)?, how) {
            (true, _) => {}
            (false, Clear::Zero) => file::write_zeros(overlay, range).map_err(Refusal::Host)?,
            // What is read afterwards is the device's choice; what was there costs nobody anything.
            (false, Clear::Discard) => return Ok(()),
        }
        self.mark(range);
        Ok(())
    }
}

/// What a clearing promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Clear {
    /// Nothing but that the sectors hold nothing of worth.
    Discard,
    /// Zeros.
    Zero,
}

/// Why a request fails, the device going on.
#[derive(Debug)]
enum Refusal {
    /// Not offered.
    Unsupported,
    /// Outside the disk, or a write to a disk that can't be written.
    Wrong,
    /// The host's file failed.
    Host(io::Error),
}

/// Lengths of one request: bounded by what a queue can describe, so they fit.
fn offset(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;
