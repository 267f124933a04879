//! The host's half of the vsock benchmark; the guest's is `guest/serve.rs`.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

/// Where the guest listens.
pub(crate) const PORT: u32 = 5000;
const MIB: u32 = 256;
const BYTES: u64 = (MIB as u64) << 20;
const ROUND_TRIPS: u32 = 500;
/// A transfer that stands still for this long has failed.
const STALL: Duration = Duration::from_secs(60);

/// MiB/s of 256 MiB sent, measured to the guest's word that it has read them all.
pub(crate) fn into_guest(mut stream: UnixStream) -> Result<f64> {
    let began = request(&mut stream, b'i', BYTES)?;
    let chunk = vec![0x5a; 256 << 10];
    let mut left = BYTES;
    while left > 0 {
        let now = chunk.len().min(usize::try_from(left)?);
        stream.write_all(chunk.get(..now).unwrap_or(&chunk))?;
        left -= u64::try_from(now)?;
    }
    let mut answer = [0; 8];
    stream.read_exact(&mut answer)?;
    ensure!(u64::from_le_bytes(answer) == BYTES, "the guest read another number of bytes");
    Ok(f64::from(MIB) / began.elapsed().as_secs_f64())
}

/// MiB/s of 256 MiB received.
pub(crate) fn out_of_guest(mut stream: UnixStream) -> Result<f64> {
    let began = request(&mut stream, b'o', BYTES)?;
    let mut chunk = vec![0; 256 << 10];
    let mut left = BYTES;
    while left > 0 {
        let read = stream.read(&mut chunk)?;
        ensure!(read > 0, "the guest sent less than was asked for");
        left = left.saturating_sub(u64::try_from(read)?);
    }
    Ok(f64::from(MIB) / began.elapsed().as_secs_f64())
}

/// µs that one byte takes there and back, the mean of 500 in a row.
pub(crate) fn round_trip(mut stream: UnixStream) -> Result<f64> {
    let began = request(&mut stream, b'p', ROUND_TRIPS.into())?;
    let mut byte = [7];
    for _ in 0..ROUND_TRIPS {
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
    }
    Ok(began.elapsed().as_secs_f64() * 1e6 / f64::from(ROUND_TRIPS))
}

fn request(stream: &mut UnixStream, kind: u8, count: u64) -> Result<Instant> {
    stream.set_read_timeout(Some(STALL))?;
    stream.set_write_timeout(Some(STALL))?;
    let began = Instant::now();
    let mut request = vec![kind];
    request.extend(count.to_le_bytes());
    stream.write_all(&request)?;
    Ok(began)
}
