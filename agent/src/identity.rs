//! What the host says who this room is: clock, entropy, hostname.

use std::io;
use std::os::fd::AsRawFd;

use carrel_protocol::agent::Identity;
use rustix::fs::{Mode, OFlags};
use rustix::time::Timespec;
use thiserror::Error;

/// Why a room can't become what it was told to be.
#[derive(Debug, Error)]
pub(crate) enum IdentityError {
    /// clock_settime(2).
    #[error("the guest's clock can't be set")]
    Clock(#[source] io::Error),
    /// random(4).
    #[error("the guest's random generator can't be seeded")]
    Entropy(#[source] io::Error),
    /// sethostname(2).
    #[error("the guest's hostname can't be set")]
    Hostname(#[source] io::Error),
}

/// `_IOW('R', 3, int[2])`.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `_IO('R', 7)`.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
const SEED: usize = 64;

/// `struct rand_pool_info` with its bytes.
#[repr(C)]
struct Seed {
    entropy_bits: i32,
    bytes: i32,
    pool: [u8; SEED],
}

/// Sets the real-time clock, credits the entropy and reseeds, sets the hostname.
///
/// # Errors
///
/// See [`IdentityError`].
pub(crate) fn adopt(identity: &Identity) -> Result<(), IdentityError> {
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, since_epoch(identity.realtime_ns))
        .map_err(|error| IdentityError::Clock(error.into()))?;
    reseed(&identity.entropy.0).map_err(IdentityError::Entropy)?;
    rustix::system::sethostname(identity.hostname.as_bytes())
        .map_err(|error| IdentityError::Hostname(error.into()))
}

fn since_epoch(nanoseconds: u64) -> Timespec {
    const SECOND: u64 = 1_000_000_000;
    Timespec {
        tv_sec: i64::try_from(nanoseconds / SECOND).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(nanoseconds % SECOND).unwrap_or_default(),
    }
}

fn reseed(entropy: &[u8; SEED]) -> io::Result<()> {
    let random = rustix::fs::open("/dev/urandom", OFlags::WRONLY, Mode::empty())?;
    let seed = Seed { entropy_bits: 8 * 64, bytes: 64, pool: *entropy };
    // SAFETY: RNDADDENTROPY reads the two numbers and then as many bytes as the second says.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const seed) };
    if added != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: RNDRESEEDCRNG takes no argument.
    let reseeded = unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) };
    if reseeded == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use rustix::ioctl::opcode;

    use super::*;

    #[test]
    fn every_time_of_the_host_is_a_time() {
        for (nanoseconds, seconds, rest) in [
            (0, 0, 0),
            (999_999_999, 0, 999_999_999),
            (1_700_000_000_123_456_789, 1_700_000_000, 123_456_789),
            (u64::MAX, 18_446_744_073, 709_551_615),
        ] {
            assert_eq!(since_epoch(nanoseconds), Timespec { tv_sec: seconds, tv_nsec: rest });
        }
    }

    #[test]
    fn requests_of_the_random_device_are_as_its_header_makes_them() {
        // include/uapi/linux/random.h; `rand_pool_info` is two numbers, then the bytes.
        assert_eq!(RNDADDENTROPY, u64::from(opcode::write::<[i32; 2]>(b'R', 3)));
        assert_eq!(RNDRESEEDCRNG, u64::from(opcode::none(b'R', 7)));
        assert_eq!((size_of::<Seed>(), std::mem::offset_of!(Seed, pool)), (8 + SEED, 8));
    }
}
