//! CPUID as the guest sees it: what KVM supports, cut down to an allow-list, with the topology of this machine.
//!
//! Kept are instructions that carry no state beyond XSAVE's and what a guest of KVM needs. Left out: virtualisation (VMX,
//! SVM), performance counters, debug store, monitor/mwait, thermal and power, SGX, resource control, and every leaf not named here. SDM volume
//! 2A, *CPUID*; APM volume 3, appendix E.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;

/// The CPUID table can't be had.
#[derive(Debug, Error)]
pub enum CpuidError {
    /// KVM refused.
    #[error("KVM does not tell what CPUID it supports")]
    Supported(#[source] kvm_ioctls::Error),
    /// The table could not be built.
    #[error("the CPUID table could not be built")]
    Table,
}

/// Bits of leaf 1 ECX that stay: SSE3, PCLMULQDQ, SSSE3, FMA, CX16, PCID, SSE4.1, SSE4.2, x2APIC, MOVBE, POPCNT, TSC deadline, AES, XSAVE,
/// (OSXSAVE is KVM's), AVX, F16C, RDRAND, hypervisor.
const LEAF_1_ECX: u32 = 1
    | 1 << 1
    | 1 << 9
    | 1 << 12
    | 1 << 13
    | 1 << 17
    | 1 << 19
    | 1 << 20
    | TSC_DEADLINE_X2APIC
    | 1 << 22
    | 1 << 23
    | 1 << 25
    | 1 << 26
    | 1 << 28
    | 1 << 29
    | 1 << 30
    | HYPERVISOR;
const TSC_DEADLINE_X2APIC: u32 = TSC_DEADLINE | 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: FPU … SSE2 and self-snoop; no serial number, DS, ACPI, TM, PBE. HTT says the topology.
const LEAF_1_EDX: u32 = 0x0fff_fbff & !(1 << 18 | 1 << 20 | 1 << 21 | 1 << 22);
const HTT: u32 = 1 << 28;
/// Subleaves of leaf 7 that are passed on.
const LEAF_7_SUBLEAVES: u32 = 2;
/// Leaf 7.0 EBX: FSGSBASE, TSC_ADJUST, BMI1, AVX2, FDP exceptions, SMEP, BMI2, ERMS, INVPCID, no FCS and FDS, AVX-512 F and DQ, RDSEED, ADX, SMAP, AVX-512
/// IFMA, CLFLUSHOPT, CLWB, AVX-512 PF, ER and CD, SHA, AVX-512 BW and VL. Neither SGX, RDT, processor trace, MPX nor transactions.
const LEAF_7_EBX: u32 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 5
    | 1 << 6
    | 1 << 7
    | 1 << 8
    | 1 << 9
    | 1 << 10
    | 1 << 13
    | 1 << 16
    | 1 << 17
    | 1 << 18
    | 1 << 19
    | 1 << 20
    | 1 << 21
    | 1 << 23
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 28
    | 1 << 29
    | 1 << 30
    | 1 << 31;
/// Leaf 7.0 ECX: AVX-512 VBMI, UMIP, PKU, VBMI2, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG, VPOPCNTDQ, LA57, RDPID.
const LEAF_7_ECX: u32 = 1 << 1
    | 1 << 2
    | 1 << 3
    | 1 << 6
    | 1 << 8
    | 1 << 9
    | 1 << 10
    | 1 << 11
    | 1 << 12
    | 1 << 14
    | 1 << 16
    | 1 << 22;
/// Leaf 7.0 EDX: AVX-512 4VNNIW/4FMAPS, FSRM, MD_CLEAR, SERIALIZE, IBRS/IBPB, STIBP, L1D flush, arch capabilities, SSBD.
const LEAF_7_EDX: u32 =
    1 << 2 | 1 << 3 | 1 << 4 | 1 << 8 | 1 << 10 | 1 << 14 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 31;
/// Leaf 7.1 EAX: AVX-VNNI, AVX-512 BF16, CMPCCXADD, fast short string operations, AVX-IFMA. Not what has registers of its own to be saved:
/// FRED, LAM, AMX.
const LEAF_7_1_EAX: u32 = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 23;
/// Leaf 7.1 EDX: AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16, PREFETCHI. Not AVX10 and APX, which have leaves of their own.
const LEAF_7_1_EDX: u32 = 1 << 4 | 1 << 5 | 1 << 10 | 1 << 14;
/// Leaf 7.2 EDX: the speculation controls PSFD, IPRED, RRSBA, DDPD, BHI, and MCDT_NO.
const LEAF_7_2_EDX: u32 = 0x3f;
/// ARAT: the local APIC's timer goes on in every idle state.
const LEAF_6_EAX: u32 = ARAT;
const ARAT: u32 = 1 << 2;
/// Leaf 0x8000_0001 ECX: LAHF, CMP legacy, CR8, LZCNT, SSE4A, misaligned SSE, prefetch, OSVW, XOP-era left out, topology extensions.
const LEAF_8001_ECX: u32 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 9 | TOPOEXT;
const TOPOEXT: u32 = 1 << 22;
/// Leaf 0x8000_0007 EDX: invariant TSC.
const LEAF_8007_EDX: u32 = 1 << 8;

/// Leaf 0x8000_0001 EDX: what repeats leaf 1, SYSCALL, NX, MMX extensions, FFXSR, pages of 1 GiB, RDTSCP, long mode. No 3DNow!.
const LEAF_8001_EDX: u32 = 0x0183_f3ff | 1 << 11 | 1 << 20 | 1 << 22 | 1 << 25 | 1 << 26 | 1 << 27 | 1 << 29;
/// Leaf 0x8000_0008 EBX: CLZERO, XSAVEERPTR, WBNOINVD, and the speculation controls IBPB, IBRS, STIBP and their preferences, SSBD, PSFD, BTC_NO, IBPB_RET.
const LEAF_8008_EBX: u32 =
    1 | 1 << 2 | 1 << 9 | 1 << 12 | 0x3f << 14 | 1 << 24 | 1 << 25 | 1 << 26 | 1 << 28 | 1 << 29 | 1 << 30;
/// Leaf 0x8000_0021 EAX: no nested data breakpoints, serialising LFENCE, VERW clears, null selectors clear the base, automatic IBRS, PREFETCHI, and what is
/// said of SRSO.
const LEAF_8021_EAX: u32 = 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 20 | 0xf << 27;
/// Leaf 0x8000_0021 ECX: TSA_SQ_NO, TSA_L1_NO.
const LEAF_8021_ECX: u32 = 1 << 1 | 1 << 2;
/// Leaf 0x4000_0001 EAX (KVM's own, *KVM-specific CPUID bits*): clocks, steal time, EOI, unhalt, TLB flush, IPIs, poll control, yield.
/// Not extended destinations: the I/O APIC has none. Not asynchronous page faults (bits 4, 10, 14): a guest parks its task until KVM says that the page is there, and one
/// that is saved in between never hears it; a clone, whose memory is a file, is where KVM would use them.
const LEAF_KVM_EAX: u32 = 1 | 1 << 1 | 1 << 3 | 7 << 5 | 1 << 9 | 7 << 11 | 1 << 24;

/// Builds the table of vCPU `index` of `vcpus`.
pub fn for_vcpu(supported: &CpuId, kvm: &Kvm, index: u8, vcpus: u8) -> Result<CpuId, CpuidError> {
    let has_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| is_allowed(entry.function))
        .map(|entry| masked(*entry, has_deadline))
        .collect();
    if !entries.iter().any(|e| e.function == 6) {
        entries.push(kvm_cpuid_entry2 { function: 6, eax: ARAT, ..Default::default() });
    }
    correct_xsave(&mut entries);
    for entry in &mut entries {
        place(entry, index, vcpus);
    }
    CpuId::from_entries(&entries).map_err(|_| CpuidError::Table)
}

/// XSAVE components that the table offers, as in XCR0; `None` without XSAVE.
pub fn extended_state(cpuid: &CpuId) -> Option<u64> {
    let leaf = cpuid.as_slice().iter().find(|e| (e.function, e.index) == (0xd, 0))?;
    Some(u64::from(leaf.edx) << 32 | u64::from(leaf.eax)).filter(|components| components & 1 == 1)
}

/// What KVM supports; asked once a machine.
pub fn supported(kvm: &Kvm) -> Result<CpuId, CpuidError> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(CpuidError::Supported)
}

fn is_allowed(leaf: u32) -> bool {
    matches!(
        leaf,
        0 | 1 | 2 | 4 | 6 | 7 | 0xb | 0xd | 0x15 | 0x16 | 0x1f
            | 0x4000_0000..=0x4000_0001
            | 0x8000_0000..=0x8000_0008
            | 0x8000_001d
            | 0x8000_001e
            | 0x8000_0021
    )
}

fn masked(mut entry: kvm_cpuid_entry2, has_deadline: bool) -> kvm_cpuid_entry2 {
    match (entry.function, entry.index) {
        (1, _) => {
            entry.ecx &= LEAF_1_ECX;
            entry.ecx |= HYPERVISOR;
            if has_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            entry.edx &= LEAF_1_EDX;
        }
        (6, _) => {
            entry.eax = entry.eax & LEAF_6_EAX | ARAT;
            (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0);
        }
        (7, 0) => {
            entry.ebx &= LEAF_7_EBX;
            entry.ecx &= LEAF_7_ECX;
            entry.edx &= LEAF_7_EDX;
            entry.eax = entry.eax.min(LEAF_7_SUBLEAVES);
        }
        (7, 1) => {
            (entry.eax, entry.ebx, entry.ecx) = (entry.eax & LEAF_7_1_EAX, 0, 0);
            entry.edx &= LEAF_7_1_EDX;
        }
        (7, 2) => {
            (entry.eax, entry.ebx, entry.ecx) = (0, 0, 0);
            entry.edx &= LEAF_7_2_EDX;
        }
        (7, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        (0x4000_0001, _) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (entry.eax & LEAF_KVM_EAX, 0, 0, 0);
        }
        (0x8000_0001, _) => {
            entry.ecx &= LEAF_8001_ECX;
            entry.edx &= LEAF_8001_EDX;
        }
        (0x8000_0008, _) => {
            (entry.ebx, entry.ecx, entry.edx) = (entry.ebx & LEAF_8008_EBX, 0, 0);
        }
        (0x8000_0021, _) => {
            (entry.eax, entry.ecx) = (entry.eax & LEAF_8021_EAX, entry.ecx & LEAF_8021_ECX);
            (entry.ebx, entry.edx) = (0, 0);
        }
        (0x8000_0007, _) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, entry.edx & LEAF_8007_EDX)
        }
        _ => {}
    }
    entry
}

/// Makes leaf 0xD agree with itself: its sizes are those of the components that it names. A hypervisor below that lacks XSAVEC
/// leaves sizes of another set, and the guest's kernel complains.
fn correct_xsave(entries: &mut [kvm_cpuid_entry2]) {
    let component = |entries: &[kvm_cpuid_entry2], i: u32| {
        entries.iter().find(|e| e.function == 0xd && e.index == i).map(|e| (e.eax, e.ebx))
    };
    let Some(low) = entries.iter().find(|e| e.function == 0xd && e.index == 0).map(|e| e.eax) else { return };
    // The legacy area and the header are always there (SDM volume 1, chapter 13.4).
    let size = (2..32)
        .filter(|i| low & 1 << i != 0)
        .filter_map(|i| component(entries, i))
        .fold(512 + 64, |size: u32, (bytes, offset)| size.max(offset.saturating_add(bytes)));
    for entry in entries.iter_mut().filter(|e| e.function == 0xd && e.index == 0) {
        entry.ecx = size;
        entry.ebx = size;
    }
}

/// Writes who this vCPU is: one package, `vcpus` cores of one thread each.
fn place(entry: &mut kvm_cpuid_entry2, index: u8, vcpus: u8) {
    let id = u32::from(index);
    let count = u32::from(vcpus);
    // Bits of an APIC id that number cores.
    let width = count.next_power_of_two().trailing_zeros();
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0xffff | (1 << width) << 16 | id << 24;
            entry.edx = if vcpus > 1 { entry.edx | HTT } else { entry.edx & !HTT };
        }
        4 if entry.eax & 0x1f != 0 => {
            // Levels 1 and 2 are a core's own, the last level is everybody's.
            let sharing = if entry.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << width) - 1) << 26;
        }
        0xb | 0x1f => {
            let (shift, logical, kind) = match entry.index {
                0 => (0, 1, 1),
                1 => (width, count, 2),
                _ => (0, 0, 0),
            };
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (shift, logical, kind << 8 | entry.index, id);
        }
        0x8000_0008 => entry.ecx = width << 12 | (count - 1),
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
        }
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (id, id, 0, 0),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    #[test]
    fn virtualisation_and_counters_are_hidden() {
        assert!(!is_allowed(0xa) && !is_allowed(0x8000_000a) && !is_allowed(0x12) && !is_allowed(5));
        assert_eq!(masked(leaf(1, 0), false).ecx & (1 << 5), 0, "VMX");
        assert_eq!(masked(leaf(0x8000_0001, 0), false).ecx & (1 << 2), 0, "SVM");
    }

    #[test]
    fn leaf_7_offers_nothing_that_has_a_state_which_nobody_saves() {
        let with = |index| masked(leaf(7, index), false);
        assert_eq!(with(0).eax, 2, "subleaves");
        assert_eq!(with(1).eax & (1 << 17 | 1 << 21 | 1 << 26), 0, "FRED, AMX-FP16, LAM");
        assert_eq!(with(1).edx & (1 << 19 | 1 << 21), 0, "AVX10, APX");
        assert_eq!((with(1).ebx, with(1).ecx, with(2).eax, with(2).edx), (0, 0, 0, 0x3f));
        assert_eq!((with(3).eax, with(3).edx), (0, 0));
    }

    #[test]
    fn bits_that_have_no_name_yet_reach_no_guest() {
        let with = |function, index| masked(leaf(function, index), false);
        assert_eq!(with(7, 0).ebx & (1 << 4 | 1 << 11 | 1 << 22), 0, "transactions");
        assert_eq!(with(0x8000_0001, 0).edx & (3 << 30 | 1 << 10 | 1 << 18), 0, "3DNow!");
        assert_eq!(with(0x8000_0008, 0).ebx & (1 << 8 | 1 << 31), 0);
        assert_eq!((with(0x8000_0021, 0).eax & 1 << 9, with(0x8000_0021, 0).edx), (0, 0));
        let kvm = with(0x4000_0001, 0);
        assert_eq!((kvm.eax & 1 << 15, kvm.edx), (0, 0), "extended destinations");
    }

    #[test]
    fn the_deadline_timer_is_offered_whenever_kvm_has_it() {
        let bare = kvm_cpuid_entry2 { function: 1, ..Default::default() };
        assert_eq!(masked(bare, true).ecx & TSC_DEADLINE, TSC_DEADLINE);
        assert_eq!(masked(bare, false).ecx & TSC_DEADLINE, 0);
    }

    #[test]
    fn xsave_sizes_are_those_of_the_components_named() {
        let with =
            |index, eax, ebx| kvm_cpuid_entry2 { function: 0xd, index, eax, ebx, ..Default::default() };
        let mut entries = [with(0, 0b111, 576), with(2, 256, 576), with(5, 64, 1088)];
        correct_xsave(&mut entries);
        assert_eq!((entries[0].ebx, entries[0].ecx), (832, 832), "component 5 is not named");
    }

    #[test]
    fn every_vcpu_has_an_id_of_its_own() {
        let mut entry = leaf(0xb, 1);
        place(&mut entry, 5, 6);
        assert_eq!((entry.eax, entry.ebx, entry.ecx, entry.edx), (3, 6, 0x201, 5));
        let mut entry = leaf(1, 0);
        place(&mut entry, 5, 6);
        assert_eq!(entry.ebx >> 24, 5);
    }
}
