//! The boot protocol: what a kernel finds in memory at its first instruction.
//!
//! 64-bit Linux entry: Documentation/arch/x86/boot.rst, *64-bit boot protocol*, and zero-page.rst. PVH: Xen's
//! docs/misc/pvh.pandoc and include/xen/interface/hvm/start_info.h.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use thiserror::Error;
use vm_memory::{Address, ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::load::LoadedKernel;
use super::{BASE_MEMORY_END, COMMAND_LINE, COMMAND_LINE_MAX, HIGH_MEMORY, MP_TABLE, ZERO_PAGE};
use crate::memory::{GAP_END, GAP_START};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448; // "HdrS"
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;
const PVH_MAGIC: u32 = 0x336e_c578;
/// Behind the start info, within the zero page's own page.
const PVH_MODULES: GuestAddress = GuestAddress(0x7040);
const PVH_MEMORY_MAP: GuestAddress = GuestAddress(0x7100);

/// The boot information can't be written.
#[derive(Debug, Error)]
pub enum BootError {
    /// The command line is too long.
    #[error(
        "the kernel command line has {length} bytes with the devices' own part; {COMMAND_LINE_MAX} are possible"
    )]
    CommandLine {
        /// Its length.
        length: usize,
    },
    /// The command line has a byte that would end it.
    #[error("the kernel command line contains a zero byte or a line break")]
    CommandLineByte,
    /// Guest memory refused.
    #[error("the boot information does not fit into the guest's memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Writes the command line and the zero page, or PVH's start info in its place.
pub fn write(
    memory: &GuestMemoryMmap,
    kernel: &LoadedKernel,
    command_line: &str,
    initramfs: Option<(GuestAddress, u64)>,
) -> Result<(), BootError> {
    if command_line.len() > COMMAND_LINE_MAX {
        return Err(BootError::CommandLine { length: command_line.len() });
    }
    if command_line.bytes().any(|b| b == 0 || b == b'\n') {
        return Err(BootError::CommandLineByte);
    }
    memory.write_slice(command_line.as_bytes(), COMMAND_LINE)?;
    memory.write_obj(0u8, COMMAND_LINE.unchecked_add(command_line.len() as u64))?;
    if kernel.pvh {
        write_start_info(memory, initramfs)
    } else {
        write_zero_page(memory, kernel, command_line.len(), initramfs)
    }
}

/// Start, size and type of each range of physical memory.
fn memory_map(memory: &GuestMemoryMmap) -> Vec<(u64, u64, u32)> {
    let end = memory.last_addr().raw_value() + 1;
    let mut map = vec![
        (0, MP_TABLE.raw_value(), E820_RAM),
        (MP_TABLE.raw_value(), BASE_MEMORY_END - MP_TABLE.raw_value(), E820_RESERVED),
        (HIGH_MEMORY, end.min(GAP_START) - HIGH_MEMORY, E820_RAM),
    ];
    if end > GAP_END {
        map.push((GAP_END, end - GAP_END, E820_RAM));
    }
    map
}

#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct ZeroPage(boot_params);
// SAFETY: boot_params is a packed C structure of integers, for which any bytes are valid.
unsafe impl ByteValued for ZeroPage {}

fn write_zero_page(
    memory: &GuestMemoryMmap,
    kernel: &LoadedKernel,
    command_line_length: usize,
    initramfs: Option<(GuestAddress, u64)>,
) -> Result<(), BootError> {
    // Every address and length here is below 4 GiB by construction.
    let low = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    let mut page = ZeroPage::default();
    let params = &mut page.0;
    if let Some(header) = kernel.setup_header {
        params.hdr = header;
    } else {
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.header = HEADER_MAGIC;
        params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = low(COMMAND_LINE.raw_value());
    params.hdr.cmdline_size = low(command_line_length as u64);
    if let Some((address, size)) = initramfs {
        params.hdr.ramdisk_image = low(address.raw_value());
        params.hdr.ramdisk_size = low(size);
    }
    let map = memory_map(memory);
    params.e820_entries = u8::try_from(map.len()).unwrap_or(0);
    for (entry, &(addr, size, kind)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr, size, r#type: kind };
    }
    Ok(memory.write_obj(page, ZERO_PAGE)?)
}

#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct StartInfo(hvm_start_info);
// SAFETY: a C structure of integers without padding, for which any bytes are valid.
unsafe impl ByteValued for StartInfo {}
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Module(hvm_modlist_entry);
// SAFETY: as above.
unsafe impl ByteValued for Module {}
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct MapEntry(hvm_memmap_table_entry);
// SAFETY: as above.
unsafe impl ByteValued for MapEntry {}

fn write_start_info(
    memory: &GuestMemoryMmap,
    initramfs: Option<(GuestAddress, u64)>,
) -> Result<(), BootError> {
    let mut info = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        cmdline_paddr: COMMAND_LINE.raw_value(),
        memmap_paddr: PVH_MEMORY_MAP.raw_value(),
        ..Default::default()
    };
    if let Some((address, size)) = initramfs {
        let module = hvm_modlist_entry { paddr: address.raw_value(), size, ..Default::default() };
        memory.write_obj(Module(module), PVH_MODULES)?;
        info.nr_modules = 1;
        info.modlist_paddr = PVH_MODULES.raw_value();
    }
    for (i, (addr, size, kind)) in (0u64..).zip(memory_map(memory)) {
        let entry = hvm_memmap_table_entry { addr, size, type_: kind, reserved: 0 };
        let at = PVH_MEMORY_MAP.unchecked_add(i * size_of::<hvm_memmap_table_entry>() as u64);
        memory.write_obj(MapEntry(entry), at)?;
        info.memmap_entries += 1;
    }
    Ok(memory.write_obj(StartInfo(info), ZERO_PAGE)?)
}
