//! Capabilities of workloads: Docker's default set.

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets};

/// Docker's default set. MKNOD is safe because the cgroup's device program lets nothing be opened that the container's own
/// `/dev` doesn't have ([`super::devices`]).
pub(crate) const DEFAULT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::AUDIT_WRITE)
    .union(CapabilitySet::SETFCAP);

/// Takes all but [`DEFAULT`] from what this process and whatever it executes can ever have.
///
/// # Errors
///
/// prctl(2)'s.
pub(crate) fn bound() -> io::Result<()> {
    for number in 0..64 {
        let one = CapabilitySet::from_bits_retain(1 << number);
        if DEFAULT.contains(one) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(one) {
            // Beyond the last that this kernel knows.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Root keeps [`DEFAULT`]; others have none, the change of user took them.
///
/// # Errors
///
/// capset(2)'s.
pub(crate) fn keep(root: bool) -> io::Result<()> {
    let own = if root { DEFAULT } else { CapabilitySet::empty() };
    let sets = CapabilitySets { effective: own, permitted: own, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets)?;
    rustix::thread::clear_ambient_capability_set()?;
    Ok(())
}
