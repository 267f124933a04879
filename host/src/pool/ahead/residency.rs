//! Whether a page of a file is in the page cache: mincore(2) on a mapping that nobody reads or writes. (A read with `RWF_NOWAIT` is no answer: it begins to read ahead, and on a quick disk that
//! is done before it returns.)
//!
//! Like the birth of processes in `launch`, this is unsafe code: a mapping's address is a number that nobody else has.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

/// What is asked about, bytes: one page.
const PAGE: usize = 4096;

/// Whether the page at this offset, a multiple of 4096 before the file's end, can be read without its disk. For a file that is not one's own, and that one may not write, the kernel says yes.
pub(super) fn is_resident(file: &File, offset: u64) -> io::Result<bool> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: a new mapping at an address that the kernel chooses, on a descriptor that outlives the call; without access, so nothing can be read through it.
    let page = unsafe {
        libc::mmap(ptr::null_mut(), PAGE, libc::PROT_NONE, libc::MAP_SHARED, file.as_raw_fd(), offset)
    };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let mut state = 0_u8;
    // SAFETY: the mapping is one page long, so one byte is written, into `state`.
    let asked = unsafe { libc::mincore(page, PAGE, &raw mut state) };
    let answer = if asked == 0 { Ok(state & 1 == 1) } else { Err(io::Error::last_os_error()) };
    // SAFETY: the mapping was made above and nobody else knows its address.
    unsafe { libc::munmap(page, PAGE) };
    answer
}
