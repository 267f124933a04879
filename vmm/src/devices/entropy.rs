//! virtio-rng (virtio §5.4): the host's `getrandom` into the guest's buffers.

use std::io;

use super::buffers::Fault;
use super::ring::Ring;

/// Bytes given for one request at most: a driver asks for tens, and no request may keep the event thread.
const MAX_REQUEST: usize = 4096;
/// Requests served before other devices have their turn.
const BATCH: usize = 64;

/// The device has no configuration and no state of its own.
#[derive(Debug, Default)]
pub struct Entropy;

impl Entropy {
    /// Sizes of its queues.
    pub const QUEUE_SIZES: &[u16] = &[64];

    /// Serves the request queue. True when there is more to do.
    pub fn serve(&mut self, ring: &mut Ring) -> Result<bool, Fault> {
        for _ in 0..BATCH {
            let Some(buffers) = ring.pop()? else {
                ring.notify()?;
                return Ok(false);
            };
            let target = buffers.writable.part(0, MAX_REQUEST);
            let mut bytes = vec![0; target.len()];
            let written = match fill(&mut bytes) {
                Ok(()) => {
                    target.write(&bytes)?;
                    bytes.len()
                }
                Err(_) => 0,
            };
            ring.push(buffers.head, written)?;
        }
        ring.notify()?;
        Ok(ring.has_available())
    }
}

fn fill(bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        // SAFETY: `rest` is valid for writes of its length.
        let n = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(n) {
            Ok(n) => done += n,
            Err(_) => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
    Ok(())
}
