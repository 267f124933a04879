//! A vCPU at its first instruction.
//!
//! The bootstrap processor starts in 64-bit mode with paging on (or, for PVH, in 32-bit protected mode); the others wait for
//! the kernel's INIT and SIPI, as KVM leaves them.

use kvm_bindings::{Msrs, kvm_dtable, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_xcrs};
use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vm_memory::{Address, Bytes, GuestMemoryMmap};

use super::load::LoadedKernel;
use super::{BOOT_STACK, GDT, PD, PDPT, PML4, ZERO_PAGE};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const PRESENT_WRITABLE: u64 = 0b11;
const HUGE: u64 = 1 << 7;

const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back.
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;

/// A vCPU can't be set up.
#[derive(Debug, Error)]
pub enum RegisterError {
    /// KVM refused.
    #[error("KVM refused to set a vCPU's {what}")]
    Kvm {
        /// Which registers.
        what: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Guest memory refused.
    #[error("the boot tables do not fit into the guest's memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// The MSR list could not be built.
    #[error("the list of boot MSRs could not be built")]
    MsrList,
}

/// GDT entries: null, 64-bit (or 32-bit) code, data, TSS.
fn descriptors(long: bool) -> [u64; 4] {
    let code = if long { 0x00af_9b00_0000_ffff } else { 0x00cf_9b00_0000_ffff };
    [0, code, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff]
}

/// Writes what the bootstrap processor's registers point to: GDT and page tables for the first GiB.
pub fn write_tables(memory: &GuestMemoryMmap, long: bool) -> Result<(), RegisterError> {
    for (i, descriptor) in (0u64..).zip(descriptors(long)) {
        memory.write_obj(descriptor, GDT.unchecked_add(i * 8))?;
    }
    memory.write_obj(PDPT.raw_value() | PRESENT_WRITABLE, PML4)?;
    memory.write_obj(PD.raw_value() | PRESENT_WRITABLE, PDPT)?;
    for i in 0..512u64 {
        memory.write_obj((i << 21) | PRESENT_WRITABLE | HUGE, PD.unchecked_add(i * 8))?;
    }
    Ok(())
}

/// Sets registers of vCPU `index`; those that enter the kernel on the first alone.
pub fn set_up(vcpu: &VcpuFd, index: u8, kernel: &LoadedKernel) -> Result<(), RegisterError> {
    let kvm = |what| move |source| RegisterError::Kvm { what, source };
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let msrs = Msrs::from_entries(&[
        entry(MSR_IA32_TSC, 0),
        entry(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_ON_WRITE_BACK),
    ])
    .map_err(|_| RegisterError::MsrList)?;
    vcpu.set_msrs(&msrs).map_err(kvm("MSRs"))?;

    // FCW and MXCSR as after FNINIT and a reset (SDM volume 1, chapters 8.1.5 and 10.2.3).
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(kvm("floating-point state"))?;

    if index == 0 {
        enter(vcpu, kernel)?;
    }
    Ok(())
}

/// Enables every XSAVE component from the start, where a reset leaves just the first. KVM computes the size in leaf 0xD from the XCR0 that it
/// knows of, and a processor that doesn't intercept the guest's XSETBV (an emulated one) leaves it behind: the guest's kernel then finds the leaf
/// inconsistent and gives up AVX. Every kernel sets XCR0 anew before it uses any of it.
pub fn enable_extended_state(vcpu: &VcpuFd, components: u64) -> Result<(), RegisterError> {
    let mut registers = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    registers.xcrs[0].value = components;
    vcpu.set_xcrs(&registers).map_err(|source| RegisterError::Kvm { what: "XCR0", source })
}

fn enter(vcpu: &VcpuFd, kernel: &LoadedKernel) -> Result<(), RegisterError> {
    let kvm = |what| move |source| RegisterError::Kvm { what, source };
    let long = !kernel.pvh;
    let mut sregs = vcpu.get_sregs().map_err(kvm("system registers"))?;
    let [_, code, data, tss] = [0u8, 1, 2, 3].map(|index| segment(index, long));
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = tss;
    sregs.gdt = kvm_dtable { base: GDT.raw_value(), limit: 4 * 8 - 1, ..Default::default() };
    sregs.cr0 = CR0_PE | CR0_ET;
    if long {
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = PML4.raw_value();
        sregs.cr4 |= CR4_PAE;
        sregs.efer |= EFER_LME | EFER_LMA;
    }
    vcpu.set_sregs(&sregs).map_err(kvm("system registers"))?;
    let regs = kvm_regs {
        rflags: 2,
        rip: kernel.entry.raw_value(),
        rsp: BOOT_STACK,
        rbp: BOOT_STACK,
        // Linux finds the zero page by RSI, PVH its start info by EBX; they share a place.
        rsi: ZERO_PAGE.raw_value(),
        rbx: ZERO_PAGE.raw_value(),
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(kvm("registers"))
}

/// The hidden part of a segment register that a load of GDT entry `index` would leave.
fn segment(index: u8, long: bool) -> kvm_segment {
    let (kind, l, db, g) = match index {
        1 if long => (11, 1, 0, 1),
        1 => (11, 0, 1, 1),
        2 => (3, 0, 1, 1),
        _ => (11, 0, 0, 0),
    };
    kvm_segment {
        base: 0,
        limit: if index == 3 { 0x67 } else { u32::MAX },
        selector: u16::from(index) * 8,
        type_: kind,
        present: 1,
        dpl: 0,
        db,
        s: u8::from(index != 3),
        l,
        g,
        ..Default::default()
    }
}
