//! x86_64, Intel and AMD: what lies where in low memory, and what a machine has beside its vCPUs.
//!
//! ```text
//!  0x472     what the guest leaves here tells a panic from a restart
//!  0x500     GDT
//!  0x7000    boot_params ("zero page")
//!  0x8ff0    boot stack, downwards
//!  0x9000    page tables: PML4, PDPT, PD: the first GiB, identity-mapped
//!  0x20000   command line
//!  0x9fc00   MP table, in the last KiB of base memory, where Linux looks for it
//!  0x100000  kernel
//!  …         initramfs, as high as it fits below the hole
//! ```
//!
//! No ACPI, no PCI, no i8042, no PIT, no 8259: local APICs in KVM, an I/O APIC here, an MP table that describes them, virtio-mmio devices
//! named on the command line.

pub mod boot;
pub mod cpuid;
pub mod ioapic;
pub mod load;
pub mod mptable;
pub mod registers;
pub mod state;

use kvm_ioctls::{Cap, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub(crate) const RESTART_FLAG: GuestAddress = GuestAddress(0x472);
pub(crate) const GDT: GuestAddress = GuestAddress(0x500);
pub(crate) const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
pub(crate) const BOOT_STACK: u64 = 0x8ff0;
pub(crate) const PML4: GuestAddress = GuestAddress(0x9000);
pub(crate) const PDPT: GuestAddress = GuestAddress(0xa000);
pub(crate) const PD: GuestAddress = GuestAddress(0xb000);
pub(crate) const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Longest command line, its terminator not counted (`COMMAND_LINE_SIZE`, arch/x86/include/asm/setup.h).
pub const COMMAND_LINE_MAX: usize = 2047;
pub(crate) const MP_TABLE: GuestAddress = GuestAddress(0x9_fc00);
pub(crate) const BASE_MEMORY_END: u64 = 0xa_0000;
pub(crate) const HIGH_MEMORY: u64 = 0x10_0000;
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages for KVM's real-mode emulation on Intel; in the hole, away from devices.
const TSS: usize = 0xfffb_d000;

/// What lies at [`RESTART_FLAG`] until the guest's kernel writes its restart mode there.
const UNTOUCHED: u16 = 0xca11;
/// Linux's warm restart, which `reboot=t,panic_warm` leaves after a panic alone.
const WARM: u16 = 0x1234;

/// Why a vCPU shut down (triple fault), as the guest's memory tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShutdownCause {
    /// `reboot=t`: the kernel restarted on purpose.
    Restart,
    /// The kernel restarted because it panicked.
    Panic,
    /// Nobody meant it.
    Accident,
}

/// Prepares the flag that [`shutdown_cause`] reads.
pub fn arm_restart_flag(memory: &GuestMemoryMmap) -> Result<(), vm_memory::GuestMemoryError> {
    memory.write_obj(UNTOUCHED, RESTART_FLAG)
}

/// Reads what the guest's kernel left (arch/x86/kernel/reboot.c, `native_machine_emergency_restart`).
pub fn shutdown_cause(memory: &GuestMemoryMmap) -> ShutdownCause {
    match memory.read_obj::<u16>(RESTART_FLAG) {
        Ok(0) => ShutdownCause::Restart,
        Ok(WARM) => ShutdownCause::Panic,
        Ok(_) | Err(_) => ShutdownCause::Accident,
    }
}

/// Interrupt chips: local APICs in KVM. After the memory slots: changing slots while there are chips costs an SRCU
/// synchronisation each, which measured 5–10 ms.
pub fn create_interrupt_chips(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    if vm.check_extension(Cap::SetTssAddr) {
        vm.set_tss_address(TSS)?;
    }
    ioapic::split(vm)
}
