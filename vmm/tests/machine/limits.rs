//! The largest and smallest machines, started.

use std::fs;

use super::guest::Guest;
use super::run::{Vmm, has_kvm};

const GIB: u64 = 1 << 30;
/// Memory below 4 GiB ends here at the latest; the rest of it lies above 4 GiB.
const HOLE: u64 = 0xd000_0000;
/// The zero page (Documentation/arch/x86/zero-page.rst): how many entries the memory map has, and the map.
const E820_ENTRIES: u32 = 0x7000 + 0x1e8;
const E820_TABLE: u32 = 0x7000 + 0x2d0;
const E820_ENTRY: usize = 20;

#[test]
fn every_number_of_vcpus_starts_that_many_threads() {
    if !has_kvm() {
        return;
    }
    for vcpus in [1, 2, 16] {
        let mut vmm = Vmm::start_with(&Guest::new().say(b'!').wait(), |vm| vm["vcpus"] = vcpus.into(), &[]);
        vmm.hear(b'!');
        let threads: Vec<String> = fs::read_dir(format!("/proc/{}/task", vmm.confined()))
            .unwrap()
            .map(|task| fs::read_to_string(task.unwrap().path().join("comm")).unwrap().trim().to_owned())
            // Not KVM's own (nx_huge_pages).
            .filter(|name| !name.starts_with("kvm-"))
            .collect();
        for index in 0..vcpus {
            assert!(threads.contains(&format!("vcpu{index}")), "{threads:?}");
        }
        assert_eq!(threads.len(), vcpus + 1, "{threads:?}");
    }
}

/// Ranges that the guest may use as memory, as it is told them, and as it finds them where they begin and end.
#[test]
fn the_guest_is_told_of_all_its_memory_and_finds_it() {
    if !has_kvm() {
        return;
    }
    for mib in [64u64, 3328, 3329, 5 << 10, 20 << 10, 64 << 10] {
        let bytes = mib << 20;
        let (low, high) = (bytes.min(HOLE), bytes.saturating_sub(HOLE));
        let mut guest = Guest::new().tell(E820_ENTRIES, 1).tell(E820_TABLE, 4 * 20);
        // The last byte of each range, and the first above 4 GiB.
        let mut edges = vec![low - 1];
        if high > 0 {
            edges.extend([4 * GIB, 4 * GIB + high - 1]);
        }
        for edge in &edges {
            if *edge >= GIB {
                guest = guest.map_gib(edge / GIB);
            }
            guest = guest.echo_at(*edge, b'e');
        }
        let guest = guest.power_off().wait();
        let over = Vmm::start_with(&guest, |vm| vm["memory_mib"] = mib.into(), &[]).over();
        assert_eq!(over.code(), 0, "{mib} MiB: {over:?}");
        let (count, rest) = over.said.split_first().unwrap();
        let (map, echoes) = rest.split_at(4 * E820_ENTRY);
        assert_eq!(echoes, vec![b'e'; edges.len()], "{mib} MiB");
        let usable: Vec<(u64, u64)> = map
            .chunks(E820_ENTRY)
            .take(usize::from(*count))
            .filter(|entry| entry[16..] == 1u32.to_le_bytes())
            .map(|entry| {
                let at = |from: usize| u64::from_le_bytes(entry[from..from + 8].try_into().unwrap());
                (at(0), at(8))
            })
            .collect();
        let mut expected = vec![(0, 0x9_fc00), (0x10_0000, low - 0x10_0000)];
        if high > 0 {
            expected.push((4 * GIB, high));
        }
        assert_eq!(usable, expected, "{mib} MiB");
    }
}

/// What is touched is taken from the host, and no more.
#[test]
fn untouched_memory_costs_nothing() {
    if !has_kvm() {
        return;
    }
    let mut vmm = Vmm::start_with(&Guest::new().say(b'!').wait(), |vm| vm["memory_mib"] = 65_536.into(), &[]);
    vmm.hear(b'!');
    let status = fs::read_to_string(format!("/proc/{}/status", vmm.confined())).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 32 << 10, "{kib} KiB");
}

/// A large kernel is copied by a thread of its own, under the same filter.
#[test]
fn a_large_kernel_and_an_initramfs_are_loaded() {
    if !has_kvm() {
        return;
    }
    // The initramfs ends with low memory, page-aligned.
    let at = (64 << 20) - 4096;
    let guest = Guest::new().tell(at, 3).power_off().wait();
    let start = |guest: &Guest| {
        Vmm::start_with(
            guest,
            |vm| {
                let image = vm["kernel"]["image"].as_str().unwrap().to_owned();
                fs::OpenOptions::new().write(true).open(&image).unwrap().set_len(8 << 20).unwrap();
                let initramfs = format!("{image}.cpio");
                fs::write(&initramfs, "070701").unwrap();
                vm["initramfs"] = initramfs.into();
            },
            &[],
        )
    };
    let over = start(&guest).over();
    assert_eq!((over.code(), over.said.as_slice()), (0, &b"070"[..]), "{over:?}");
}
