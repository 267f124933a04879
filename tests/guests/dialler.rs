//! `/init` of a guest that dials its host a hundred thousand times from its kernel, where no filter of the agent's holds it back, and then
//! restarts. If its kernel refuses one, or anything else goes wrong, it ends and its kernel panics: so how the guest ends tells whether the
//! host was dialled so often.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};

const DIALS: u32 = 100_000;
/// Open at one time: more than the device takes.
const KEPT: usize = 4096;
/// The host's address (VMADDR_CID_HOST).
const HOST: u32 = 2;
/// Streams' ports begin here, so no dial reaches the agent's control port.
const FIRST_PORT: u32 = 10_000;

fn main() -> nix::Result<()> {
    let limit = u64::try_from(KEPT + 100).unwrap_or(u64::MAX);
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, limit, limit)?;
    let mut kept: VecDeque<OwnedFd> = VecDeque::with_capacity(KEPT);
    for dial in 0..DIALS {
        if kept.len() == KEPT {
            kept.pop_front();
        }
        let dialling = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_NONBLOCK, None)?;
        match connect(dialling.as_raw_fd(), &VsockAddr::new(HOST, FIRST_PORT + dial)) {
            Ok(()) | Err(Errno::EINPROGRESS) => kept.push_back(dialling),
            Err(refused) => return Err(refused),
        }
    }
    reboot(RebootMode::RB_AUTOBOOT).map(|never| match never {})
}
