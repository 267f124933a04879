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

#[cfg(test)]
mod tests {
    use super::*;

    /// Docker's, as every container shows it in `/proc/self/status`.
    const DOCKERS: u64 = 0xa804_25fb;

    /// A set of the calling thread: capabilities are a thread's, so the tests' own stay as they are.
    fn of_this_thread(name: &str) -> u64 {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
    }

    #[test]
    fn the_default_is_dockers() {
        assert_eq!(DEFAULT.bits(), DOCKERS);
    }

    #[test]
    fn root_keeps_the_default_and_can_never_get_more() {
        std::thread::spawn(|| {
            bound().unwrap();
            keep(true).unwrap();
            assert_eq!((of_this_thread("CapBnd"), of_this_thread("CapEff")), (DOCKERS, DOCKERS));
            assert_eq!((of_this_thread("CapPrm"), of_this_thread("CapInh")), (DOCKERS, 0));
            assert_eq!(of_this_thread("CapAmb"), 0);
            // Twice is once.
            bound().unwrap();
            keep(true).unwrap();
        })
        .join()
        .unwrap();
    }

    #[test]
    fn others_keep_none() {
        std::thread::spawn(|| {
            bound().unwrap();
            keep(false).unwrap();
            for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
                assert_eq!(of_this_thread(set), 0, "{set}");
            }
            assert_eq!(of_this_thread("CapBnd"), DOCKERS);
            assert!(keep(true).is_err(), "what is gone stays gone");
        })
        .join()
        .unwrap();
    }
}
