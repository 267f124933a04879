//! The guest's half of what is asked over vsock: one connection at a time, its first nine bytes say what.
//!
//! `i` and a count: read that many bytes, then answer with the count. `o` and a count: send that many bytes. `p` and a
//! count: echo single bytes that many times. `x` and 0: `true`; and 1: Python's `print(1)`, each with the connection as its output. Numbers are
//! u64, little-endian.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, listen, socket};

use crate::{READY, work};

const PORT: u32 = 5000;

/// Serves for ever.
pub(crate) fn listen_for_ever() -> io::Result<()> {
    let listener = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(listener.as_raw_fd(), &VsockAddr::new(u32::MAX, PORT))?;
    listen(&listener, Backlog::new(8)?)?;
    // The console is standard output; this byte says that the guest is ready.
    io::stdout().write_all(&[READY])?;
    io::stdout().flush()?;
    loop {
        // SAFETY: accept(2) returned this descriptor just now, and nobody else has it.
        let connection = unsafe { OwnedFd::from_raw_fd(accept(listener.as_raw_fd())?) };
        if let Err(e) = serve(&mut File::from(connection)) {
            eprintln!("bench guest: {e}");
        }
    }
}

fn serve(stream: &mut File) -> io::Result<()> {
    let mut request = [0; 9];
    stream.read_exact(&mut request)?;
    let [kind, count @ ..] = request;
    let count = u64::from_le_bytes(count);
    let mut buffer = vec![0; 256 << 10];
    match (kind, count) {
        (b'i', _) => {
            let mut left = count;
            while left > 0 {
                let read = stream.read(&mut buffer)?;
                if read == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                left = left.saturating_sub(u64::try_from(read).unwrap_or(u64::MAX));
            }
            stream.write_all(&count.to_le_bytes())
        }
        (b'o', _) => io::copy(&mut io::repeat(0x5a).take(count), stream).map(drop),
        (b'p', _) => {
            let mut byte = [0];
            for _ in 0..count {
                stream.read_exact(&mut byte)?;
                stream.write_all(&byte)?;
            }
            Ok(())
        }
        (b'x', 0) => stream.write_all(&[READY]),
        (b'x', 1) => work::python(stream.try_clone()?.into()),
        (other, _) => Err(io::Error::other(format!("unknown request {other} {count}"))),
    }
}
