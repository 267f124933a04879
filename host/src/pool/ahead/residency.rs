//! Whether pages of a file are in the page cache: mincore(2) on a mapping that nobody reads or writes. (A read with `RWF_NOWAIT` is no answer: it begins to read ahead, and on a quick disk
//! that is done before it returns.)
//!
//! Like the birth of processes in `launch`, this is unsafe code: a mapping's address is a number that nobody else has.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

/// What is asked about, bytes: one page.
const PAGE: usize = 4096;

/// A file, mapped without access.
pub(super) struct Residency {
    start: *mut c_void,
    length: usize,
}

impl Residency {
    /// Of a file of so many bytes, at least one.
    pub(super) fn of(file: &File, length: u64) -> io::Result<Self> {
        let length = usize::try_from(length).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address that the kernel chooses, of a descriptor that outlives the call; nothing can be read or written through it.
        let start = unsafe {
            libc::mmap(ptr::null_mut(), length, libc::PROT_NONE, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start, length })
    }

    /// Whether the page of this offset can be read without its disk. Of a file that is not one's own, and that one may not write, the kernel says yes. Beyond the end nothing is there.
    pub(super) fn has(&self, offset: u64) -> io::Result<bool> {
        let Some(at) = usize::try_from(offset).ok().filter(|at| *at < self.length) else { return Ok(false) };
        let mut state = 0_u8;
        // SAFETY: the page begins within the mapping, which is this value's own, and is all of one; one byte is written for it, into `state`.
        let asked =
            unsafe { libc::mincore(self.start.wrapping_byte_add(at / PAGE * PAGE), PAGE, &raw mut state) };
        if asked == 0 { Ok(state & 1 == 1) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Residency {
    fn drop(&mut self) {
        // SAFETY: the mapping was made for this value, and nobody else has its address.
        unsafe { libc::munmap(self.start, self.length) };
    }
}
