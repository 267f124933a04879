//! Having a working set before the guest asks: in this process's page tables, then in KVM's.
//!
//! ```text
//!  written ─▶ MADV_POPULATE_WRITE: a copy of its own ──┐
//!  read ────▶ MADV_POPULATE_READ: the file's page ─────┴▶ KVM_PRE_FAULT_MEMORY: an entry in the guest's second-level tables
//! ```
//!
//! None of it is needed: what fails, or is unknown to the host's kernel, is left to the guest's own faults.

use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use super::{Run, WorkingSet};
use crate::memory::PAGE;
use crate::timeline::Timeline;

/// Linux 5.14.
pub const MADV_POPULATE_READ: i32 = 22;
/// Linux 5.14.
pub const MADV_POPULATE_WRITE: i32 = 23;
/// KVM API, *8. Capabilities*; Linux 6.11.
const CAP_PRE_FAULT_MEMORY: libc::c_ulong = 236;
/// KVM_PRE_FAULT_MEMORY: `_IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)`.
const PRE_FAULT_MEMORY: libc::c_ulong = 0xc040_aed5;

/// `struct kvm_pre_fault_memory` (KVM API 4.143). KVM takes off its front what it has done.
#[derive(Debug, Default)]
#[repr(C)]
pub struct PreFault {
    /// Guest physical address, bytes.
    gpa: u64,
    /// Bytes.
    size: u64,
    flags: u64,
    padding: [u64; 5],
}

const _: () = assert!(size_of::<PreFault>() == 64);

/// Has all of a set ahead, through any vCPU: their second-level tables are one.
pub fn populate(
    set: &WorkingSet,
    memory: &GuestMemoryMmap,
    device: &Kvm,
    vcpu: &VcpuFd,
    timeline: &mut Timeline,
) {
    for (runs, advice) in [(set.written(), MADV_POPULATE_WRITE), (set.read_only(), MADV_POPULATE_READ)] {
        for place in runs.iter().flat_map(|run| places(run, memory)) {
            // SAFETY: the range lies within the guest's memory, which stays mapped, and to fault it in changes nothing that it holds.
            if unsafe { libc::madvise(place.host.cast(), place.bytes, advice) } < 0 {
                return;
            }
        }
    }
    timeline.mark("working set");
    if device.check_extension_raw(CAP_PRE_FAULT_MEMORY) <= 0 {
        return;
    }
    for place in set.written().iter().chain(set.read_only()).flat_map(|run| places(run, memory)) {
        if !pre_fault(vcpu, place.guest, place.bytes) {
            break;
        }
    }
    timeline.mark("working set in KVM");
}

// The linker's: where the program's first segment begins, and where its last one ends that the file has (ld(1), *PROVIDE*).
unsafe extern "C" {
    static __executable_start: u8;
    static edata: u8;
}

/// Maps this program's own code and data, which are in the page cache, as far as they are not mapped yet. Says whether all of it is.
pub fn map_program() -> bool {
    let from = (&raw const __executable_start).addr() & !(PAGE - 1);
    let to = (&raw const edata).addr().next_multiple_of(PAGE);
    let from = std::ptr::with_exposed_provenance_mut::<libc::c_void>(from);
    // SAFETY: to fault pages in changes nothing that they hold; a range that isn't mapped throughout is refused.
    unsafe { libc::madvise(from, to.saturating_sub(from.addr()), MADV_POPULATE_READ) == 0 }
}

/// Whether it was done.
fn pre_fault(vcpu: &VcpuFd, gpa: u64, bytes: usize) -> bool {
    let mut range = PreFault { gpa, size: u64::try_from(bytes).unwrap_or(0), ..PreFault::default() };
    while range.size > 0 {
        let left = range.size;
        // SAFETY: the request takes this structure, which is as large as the kernel's.
        let result = unsafe { ioctl_with_mut_ref(vcpu, PRE_FAULT_MEMORY, &mut range) };
        // It also stops where it might wait; one that makes no headway is given up.
        if result < 0 && range.size >= left {
            return false;
        }
    }
    true
}

/// A part of a run that lies in one range of memory.
struct Place {
    host: *mut u8,
    guest: u64,
    bytes: usize,
}

/// Where a run lies; in two parts if it spans the hole.
fn places(run: &Run, memory: &GuestMemoryMmap) -> Vec<Place> {
    let page = PAGE as u64;
    let (from, to) = (u64::from(run.first) * page, (u64::from(run.first) + u64::from(run.pages)) * page);
    let mut begin = 0;
    let mut places = Vec::with_capacity(1);
    for region in memory.iter() {
        let end = begin + region.len();
        let (first, last) = (from.max(begin), to.min(end));
        if first < last
            && let (Ok(offset), Ok(bytes)) = (usize::try_from(first - begin), usize::try_from(last - first))
        {
            let guest = region.start_addr().0 + (first - begin);
            places.push(Place { host: region.as_ptr().wrapping_add(offset), guest, bytes });
        }
        begin = end;
    }
    places
}

#[cfg(test)]
mod tests {
    use carrel_protocol::units::MemoryMib;

    use super::*;
    use crate::memory;

    #[test]
    fn the_program_itself_is_mapped() {
        assert!(map_program());
    }

    #[test]
    fn a_run_across_the_hole_has_two_places() {
        let memory = memory::reserve(MemoryMib::try_from(3330).unwrap()).unwrap();
        let low = u32::try_from(memory::GAP_START / 4096).unwrap();
        let places = places(&Run { first: low - 2, pages: 5 }, &memory);
        let of = |place: &Place| (place.guest, place.bytes);
        assert_eq!(
            places.iter().map(of).collect::<Vec<_>>(),
            [(memory::GAP_START - 8192, 8192), (memory::GAP_END, 12288)]
        );
        let (low, high) = (memory.iter().next().unwrap(), memory.iter().nth(1).unwrap());
        assert_eq!(places[0].host.addr(), low.as_ptr().addr() + usize::try_from(low.len()).unwrap() - 8192);
        assert_eq!(places[1].host, high.as_ptr());
        assert!(super::places(&Run { first: 3330 * 256, pages: 1 }, &memory).is_empty(), "beyond it");
    }
}
