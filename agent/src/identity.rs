//! What the host says who this room is: entropy, clock, hostname. At boot, and again in each clone before anything else runs there.
//!
//! The order is the point. Entropy comes first, so that nothing is drawn from a generator that other clones have too; then the clock,
//! the real-time one alone: the monotonic one goes on from where the snapshot left it.

use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;

use carrel_protocol::agent::{ExitStatus, Identity};
use rustix::fs::{Mode, OFlags};
use rustix::rand::GetRandomFlags;
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};
use rustix::time::{ClockId, Timespec};
use thiserror::Error;

use crate::container::root;
use crate::fork::{self, Separate};

/// Why a room can't become what it was told to be.
#[derive(Debug, Error)]
pub(crate) enum IdentityError {
    /// clock_settime(2).
    #[error("the guest's clock can't be set")]
    Clock(#[source] io::Error),
    /// random(4).
    #[error("the guest's random generator can't be seeded")]
    Entropy(#[source] io::Error),
    /// What it gave before is what it gives now.
    #[error("the guest's random generator was seeded and goes on as before; its kernel can't be cloned")]
    Repeats,
    /// sethostname(2).
    #[error("the guest's hostname can't be set")]
    Hostname(#[source] io::Error),
    /// The same of a container, or its files.
    #[error("container {id} can't get the hostname of its clone")]
    Container {
        /// Which.
        id: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// `_IOW('R', 3, int[2])`.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `_IO('R', 7)`.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
/// Bytes of entropy, and of a program's share of it.
pub(crate) const SEED: usize = 64;
/// Bytes that are drawn to see whether seeding took. That two draws are the same by chance won't happen.
const SAMPLE: usize = 32;

/// A running container that is to have another hostname.
#[derive(Debug)]
pub(crate) struct Renaming {
    /// A pidfd of its init.
    pub(crate) init: OwnedFd,
    pub(crate) rootfs: PathBuf,
    pub(crate) from: String,
    pub(crate) to: String,
}

/// What in the guest's kernel makes a room itself.
pub(crate) trait Guest: fmt::Debug {
    /// Adds bytes to the entropy pool, credited in full.
    fn credit(&self, entropy: &[u8; SEED]) -> io::Result<()>;
    /// Has the generator take its key from the pool anew.
    fn reseed(&self) -> io::Result<()>;
    /// Draws from the generator, without waiting for it to be seeded.
    fn random(&self, into: &mut [u8]) -> io::Result<()>;
    /// CLOCK_REALTIME, ns since the epoch; 0 before it.
    fn realtime_ns(&self) -> u64;
    /// Sets it.
    fn set_realtime(&self, nanoseconds: u64) -> io::Result<()>;
    /// Sets the agent's own.
    fn set_hostname(&self, name: &str) -> io::Result<()>;
    /// Sets a container's.
    fn rename(&self, container: Renaming) -> Pin<Box<dyn Future<Output = io::Result<()>>>>;
}

/// Takes the identity on: entropy, then the clock, then the hostname. Returns the real-time clock less the host's, before it was set, ns.
///
/// # Errors
///
/// See [`IdentityError`].
pub(crate) fn adopt(guest: &dyn Guest, identity: &Identity) -> Result<i64, IdentityError> {
    let before = sample(guest).ok();
    guest.credit(&identity.entropy.0).map_err(IdentityError::Entropy)?;
    guest.reseed().map_err(IdentityError::Entropy)?;
    // A generator that was never seeded gives none before, and must now.
    if before == Some(sample(guest).map_err(IdentityError::Entropy)?) {
        return Err(IdentityError::Repeats);
    }
    let behind = i128::from(guest.realtime_ns()) - i128::from(identity.realtime_ns);
    guest.set_realtime(identity.realtime_ns).map_err(IdentityError::Clock)?;
    guest.set_hostname(&identity.hostname).map_err(IdentityError::Hostname)?;
    Ok(i64::try_from(behind).unwrap_or(if behind < 0 { i64::MIN } else { i64::MAX }))
}

fn sample(guest: &dyn Guest) -> io::Result<[u8; SAMPLE]> {
    let mut drawn = [0; SAMPLE];
    guest.random(&mut drawn)?;
    Ok(drawn)
}

/// The kernel that this runs on.
#[derive(Debug)]
pub(crate) struct Kernel;

/// `struct rand_pool_info` with its bytes.
#[repr(C)]
struct Seed {
    entropy_bits: i32,
    bytes: i32,
    pool: [u8; SEED],
}

impl Guest for Kernel {
    fn credit(&self, entropy: &[u8; SEED]) -> io::Result<()> {
        let random = random_device()?;
        let seed = Seed { entropy_bits: 8 * 64, bytes: 64, pool: *entropy };
        // SAFETY: RNDADDENTROPY reads the two numbers and then as many bytes as the second says.
        let added = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const seed) };
        if added == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn reseed(&self) -> io::Result<()> {
        let random = random_device()?;
        // SAFETY: RNDRESEEDCRNG takes no argument.
        let reseeded = unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) };
        if reseeded == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn random(&self, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            let drawn = rustix::rand::getrandom(&mut *into, GetRandomFlags::NONBLOCK)?;
            into = into.get_mut(drawn..).unwrap_or_default();
        }
        Ok(())
    }

    fn realtime_ns(&self) -> u64 {
        let now = rustix::time::clock_gettime(ClockId::Realtime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
        seconds.saturating_mul(SECOND).saturating_add(u64::try_from(now.tv_nsec).unwrap_or_default())
    }

    fn set_realtime(&self, nanoseconds: u64) -> io::Result<()> {
        Ok(rustix::time::clock_settime(ClockId::Realtime, since_epoch(nanoseconds))?)
    }

    fn set_hostname(&self, name: &str) -> io::Result<()> {
        Ok(rustix::system::sethostname(name.as_bytes())?)
    }

    /// From within: a child joins the container's UTS namespace.
    fn rename(&self, container: Renaming) -> Pin<Box<dyn Future<Output = io::Result<()>>>> {
        Box::pin(async move {
            let Renaming { init, rootfs, from, to } = container;
            let child = fork::fork(Separate::default(), || {
                fork::close_all_but(&[init.as_fd()]);
                let joined = move_into_thread_name_spaces(
                    init.as_fd(),
                    ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME,
                );
                let renamed = match joined {
                    // It has just ended, and its namespace with it.
                    Err(rustix::io::Errno::SRCH) => Ok(()),
                    other => other.map_err(io::Error::from).and_then(|()| root::rename(&rootfs, &from, &to)),
                };
                // An errno fits a status.
                renamed.map_or_else(
                    |error| error.raw_os_error().and_then(|n| u8::try_from(n).ok()).unwrap_or(255),
                    |()| 0,
                )
            })?;
            match child.wait().await? {
                ExitStatus::Code(0) => Ok(()),
                ExitStatus::Code(errno) => Err(io::Error::from_raw_os_error(errno.into())),
                ExitStatus::Signal(signal) => Err(io::Error::other(format!("killed by signal {signal}"))),
            }
        })
    }
}

fn random_device() -> rustix::io::Result<OwnedFd> {
    rustix::fs::open("/dev/urandom", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
}

const SECOND: u64 = 1_000_000_000;

fn since_epoch(nanoseconds: u64) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(nanoseconds / SECOND).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(nanoseconds % SECOND).unwrap_or_default(),
    }
}

#[cfg(test)]
pub(crate) mod tests;
