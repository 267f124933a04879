//! A descriptor chain as ranges of guest memory, checked once, ready for `readv`, `sendmsg` and the like.
//!
//! The guest may write to these ranges at any time: what is read from them is copied out before it is judged, and never read
//! twice.

use std::io;
use std::ptr;

use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;
use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

/// Descriptors of one chain at most: as many as the longest queue has (virtio §2.7.5.3.1 forbids longer chains, in indirect tables too), and
/// room for those that lie across the hole below 4 GiB. Descriptors of no length count: a table may hold 65,535 of them.
pub(super) const MAX_PARTS: usize = 256;
/// Ranges that one system call takes at most (IOV_MAX). What is left over is a short read or write.
const MAX_IOVECS: usize = 1024;

/// The guest's driver broke the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

/// One direction's ranges, in order.
#[derive(Debug, Default)]
pub struct Ranges {
    parts: Vec<libc::iovec>,
    bytes: usize,
}

/// A whole chain.
#[derive(Debug)]
pub struct Buffers {
    /// The chain's head, by which it is given back.
    pub head: u16,
    /// What the device may read.
    pub readable: Ranges,
    /// What the device may write.
    pub writable: Ranges,
}

impl Buffers {
    /// Checks a chain: every range lies in guest memory, readable ones come first (virtio §2.7.4.2), and there are not too many.
    pub fn parse(chain: DescriptorChain<&GuestMemoryMmap>, memory: &GuestMemoryMmap) -> Result<Self, Fault> {
        let mut buffers =
            Self { head: chain.head_index(), readable: Ranges::default(), writable: Ranges::default() };
        for (index, descriptor) in chain.enumerate() {
            if index == MAX_PARTS {
                return Err(Fault);
            }
            let writable = u32::from(descriptor.flags()) & VRING_DESC_F_WRITE != 0;
            let length = usize::try_from(descriptor.len()).map_err(|_| Fault)?;
            let ranges = match (writable, buffers.writable.parts.is_empty()) {
                (true, _) => &mut buffers.writable,
                (false, true) => &mut buffers.readable,
                (false, false) => return Err(Fault),
            };
            for slice in memory.get_slices(descriptor.addr(), length) {
                let slice = slice.map_err(|_| Fault)?;
                ranges.add(slice.ptr_guard_mut().as_ptr(), slice.len())?;
            }
        }
        Ok(buffers)
    }
}

impl Ranges {
    fn add(&mut self, start: *mut u8, length: usize) -> Result<(), Fault> {
        if length == 0 {
            return Ok(());
        }
        self.bytes = self.bytes.checked_add(length).ok_or(Fault)?;
        self.parts.push(libc::iovec { iov_base: start.cast(), iov_len: length });
        Ok(())
    }

    /// Bytes of ours, for a system call that only reads them.
    pub(super) fn of_ours(bytes: &[u8]) -> Self {
        let part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        Self { parts: vec![part], bytes: bytes.len() }
    }

    /// Appends another list's ranges.
    pub fn append(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.parts.extend(other.parts);
    }

    /// Bytes in all ranges.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The ranges, for a system call that reads or writes guest memory.
    pub fn parts(&self) -> &[libc::iovec] {
        &self.parts
    }

    /// The ranges of `length` bytes from `offset`, or fewer where there are fewer.
    #[must_use]
    pub fn part(&self, offset: usize, length: usize) -> Self {
        let (mut skip, mut left) = (offset, length);
        let mut part = Self::default();
        for range in &self.parts {
            if skip >= range.iov_len {
                skip -= range.iov_len;
                continue;
            }
            let take = (range.iov_len - skip).min(left);
            if take == 0 {
                break;
            }
            part.parts.push(libc::iovec {
                iov_base: range.iov_base.cast::<u8>().wrapping_add(skip).cast(),
                iov_len: take,
            });
            part.bytes += take;
            (skip, left) = (0, left - take);
        }
        part
    }

    /// Copies the first bytes out of guest memory, all of them or none.
    pub fn read(&self, to: &mut [u8]) -> Result<(), Fault> {
        if to.len() > self.bytes {
            return Err(Fault);
        }
        let mut to = to;
        for range in &self.parts {
            let (now, later) = to.split_at_mut(range.iov_len.min(to.len()));
            // SAFETY: the range is mapped guest memory of at least this length, `now` is ours. The guest may write to it
            // meanwhile; every bytes are valid bytes, and nothing but them is taken from here.
            unsafe { ptr::copy_nonoverlapping(range.iov_base.cast::<u8>(), now.as_mut_ptr(), now.len()) };
            to = later;
        }
        Ok(())
    }

    /// Copies bytes into guest memory, all of them or none.
    pub fn write(&self, from: &[u8]) -> Result<(), Fault> {
        if from.len() > self.bytes {
            return Err(Fault);
        }
        let mut from = from;
        for range in &self.parts {
            let (now, later) = from.split_at(range.iov_len.min(from.len()));
            // SAFETY: the range is mapped guest memory of at least this length; the guest expects a device to write there.
            unsafe { ptr::copy_nonoverlapping(now.as_ptr(), range.iov_base.cast::<u8>(), now.len()) };
            from = later;
        }
        Ok(())
    }

    /// Fills all ranges with zeros.
    pub fn zero(&self) {
        for range in &self.parts {
            // SAFETY: as in `write`.
            unsafe { ptr::write_bytes(range.iov_base.cast::<u8>(), 0, range.iov_len) };
        }
    }

    /// Runs a vectored system call on the ranges, or on the first of very many; an empty list is no call.
    pub fn with(&self, call: impl Fn(*const libc::iovec, i32) -> isize) -> io::Result<usize> {
        if self.parts.is_empty() {
            return Ok(0);
        }
        let count = i32::try_from(self.parts.len().min(MAX_IOVECS)).unwrap_or(0);
        loop {
            match usize::try_from(call(self.parts.as_ptr(), count)) {
                Ok(n) => return Ok(n),
                Err(_) => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return Err(e),
                },
            }
        }
    }
}

// SAFETY: the pointers lead into guest memory, which outlives every device and may be used from any thread.
unsafe impl Send for Ranges {}
