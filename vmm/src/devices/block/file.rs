//! The files beneath a disk: whole reads and writes between them and guest memory, and holes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::super::buffers::Ranges;

/// A file's or block device's length.
pub(super) fn length(file: &File) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let mut file = file;
    file.seek(SeekFrom::End(0))
}

/// Reads until the ranges are full; what the file doesn't have reads as zeros.
pub(super) fn read_all(file: &File, into: &Ranges, at: u64) -> io::Result<()> {
    let mut done = 0;
    while done < into.len() {
        let rest = into.part(done, usize::MAX);
        let position = position(at, done)?;
        let n = rest.with(|parts, count| {
            // SAFETY: the parts are ranges of guest memory, mapped and writable as long as the device lives.
            unsafe { libc::preadv(file.as_raw_fd(), parts, count, position) }
        })?;
        if n == 0 {
            rest.zero();
            break;
        }
        done += n;
    }
    Ok(())
}

/// Makes a range of `to` what it is in `from`, which reads as zeros beyond its length: what was there before is dropped first, then what is not zeros
/// is copied, so that holes stay holes.
pub(super) fn copy_over(from: &File, length: u64, to: &File, range: &Range<u64>) -> io::Result<()> {
    if !punch(to, range)? {
        write_zeros(to, range)?;
    }
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = range.start;
    while at < range.end.min(length) {
        let here = usize::try_from(range.end.min(length) - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
        let part = buffer.get_mut(..here).unwrap_or_default();
        from.read_exact_at(part, at)?;
        for (n, block) in part.chunks(4096).enumerate() {
            if block.iter().any(|byte| *byte != 0) {
                to.write_all_at(block, at + u64::try_from(n * 4096).unwrap_or(0))?;
            }
        }
        at += u64::try_from(here).unwrap_or(u64::MAX);
    }
    Ok(())
}

/// A multiple of a block.
const COPY_BYTES: usize = 256 << 10;

pub(super) fn write_all(file: &File, from: &Ranges, at: u64) -> io::Result<()> {
    let mut done = 0;
    while done < from.len() {
        let rest = from.part(done, usize::MAX);
        let position = position(at, done)?;
        let n = rest.with(|parts, count| {
            // SAFETY: the parts are ranges of guest memory, mapped as long as the device lives.
            unsafe { libc::pwritev(file.as_raw_fd(), parts, count, position) }
        })?;
        if n == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        done += n;
    }
    Ok(())
}

fn position(at: u64, done: usize) -> io::Result<i64> {
    u64::try_from(done)
        .ok()
        .and_then(|done| at.checked_add(done))
        .and_then(|at| i64::try_from(at).ok())
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// fallocate(2): a hole reads as zeros. False where the file system knows no holes: nothing was done.
pub(super) fn punch(file: &File, range: &Range<u64>) -> io::Result<bool> {
    let (start, length) = (range.start.cast_signed(), (range.end - range.start).cast_signed());
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: no pointers are passed.
    if unsafe { libc::fallocate(file.as_raw_fd(), mode, start, length) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(false),
        e => Err(e),
    }
}

/// Zeros, written out.
pub(super) fn write_zeros(file: &File, range: &Range<u64>) -> io::Result<()> {
    let zeros = [0; 64 << 10];
    let mut at = range.start;
    while at < range.end {
        let left = usize::try_from(range.end - at).unwrap_or(usize::MAX);
        let now = zeros.get(..left.min(zeros.len())).unwrap_or_default();
        file.write_all_at(now, at)?;
        at += u64::try_from(now.len()).unwrap_or(0);
    }
    Ok(())
}
