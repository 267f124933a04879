//! Sending a file to the guest: sendfile(2) from its descriptor into the stream, on a thread of its own.

use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::events::Teller;

/// Bytes that one call is asked for.
const AT_ONCE: usize = 1 << 20;

/// Sends exactly `size` bytes from the file's beginning, or what there is of them, and half-closes the stream. What the guest makes of a
/// file that is shorter than announced, it says itself.
pub(crate) fn send(teller: &Teller, file: File, size: u64, stream: UnixStream) -> io::Result<()> {
    teller.spawn("blob", move |_| match copy(&file, size, &stream) {
        Ok(sent) => tracing::debug!(sent, size, "a blob was sent"),
        Err(error) => tracing::debug!(%error, size, "the guest did not take a blob"),
    })
}

fn copy(file: &File, size: u64, stream: &UnixStream) -> io::Result<u64> {
    let mut offset = 0;
    while offset < size {
        let part = usize::try_from(size - offset).unwrap_or(AT_ONCE).min(AT_ONCE);
        match rustix::fs::sendfile(stream, file, Some(&mut offset), part) {
            Ok(0) => break,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(offset)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn all_bytes_and_no_more_arrive_whatever_the_files_position() {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        file.write_all(&content).unwrap();
        let (mut guest, ours) = UnixStream::pair().unwrap();
        let (teller, _events) = super::super::events::Events::new().unwrap();
        send(&teller, file, 2_999_999, ours).unwrap();
        let mut got = Vec::new();
        guest.read_to_end(&mut got).unwrap();
        assert!(got == content[..2_999_999], "{} bytes", got.len());
    }

    #[test]
    fn a_file_that_is_shorter_than_announced_ends_the_stream() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"short").unwrap();
        let (mut guest, ours) = UnixStream::pair().unwrap();
        assert_eq!(copy(&file, 100, &ours).unwrap(), 5);
        let mut got = Vec::new();
        guest.read_to_end(&mut got).unwrap();
        assert_eq!(got, b"short");
    }
}
