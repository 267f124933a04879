//! `/init` of the vsock benchmark: listens on [`PORT`] and does what each connection's first nine bytes ask for.
//!
//! `i` and a count: read that many bytes, then answer with the count. `o` and a count: send that many bytes. `p` and a
//! count: echo single bytes that many times. Counts are u64, little-endian.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, listen, socket};

const PORT: u32 = 5000;
const READY: u8 = 0xa5;

fn main() -> io::Result<()> {
    let listener = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::empty(), None)?;
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
    match kind {
        b'i' => {
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
        b'o' => io::copy(&mut io::repeat(0x5a).take(count), stream).map(drop),
        b'p' => {
            let mut byte = [0];
            for _ in 0..count {
                stream.read_exact(&mut byte)?;
                stream.write_all(&byte)?;
            }
            Ok(())
        }
        other => Err(io::Error::other(format!("unknown request {other}"))),
    }
}
