//! Puts the kernel and the initramfs into guest memory.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::HIGH_MEMORY;
use crate::memory::GAP_START;

/// bzImage's 64-bit entry lies this far into the loaded image (Documentation/arch/x86/boot.rst, *64-bit boot protocol*).
const BZIMAGE_ENTRY: u64 = 0x200;
const PAGE: u64 = 4096;

/// The kernel or initramfs can't be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// Reading the file failed.
    #[error("the {what} can't be read")]
    Read {
        /// Which file.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Neither ELF nor bzImage.
    #[error("the kernel is neither an x86_64 ELF (vmlinux) nor a bzImage")]
    UnknownFormat,
    /// The loader refused it.
    #[error("the kernel can't be loaded; it is damaged or does not fit into the guest's memory")]
    Kernel(#[source] linux_loader::loader::Error),
    /// No room for the kernel with all that it clears or unpacks before it knows of any memory map.
    #[error("the kernel needs {} MiB of memory for itself alone; give the guest more", needs.div_ceil(1 << 20))]
    TooLarge {
        /// Up to this address, bytes.
        needs: u64,
    },
    /// No room for the initramfs.
    #[error(
        "an initramfs of {size} bytes does not fit above the kernel into the guest's memory; give it more"
    )]
    NoRoom {
        /// The initramfs's size.
        size: u64,
    },
    /// A copy into guest memory failed.
    #[error("the initramfs can't be copied into the guest's memory")]
    Copy(#[source] vm_memory::GuestMemoryError),
}

/// A kernel in memory.
#[derive(Debug)]
pub struct LoadedKernel {
    /// First instruction.
    pub entry: GuestAddress,
    /// First byte behind it, and behind what it clears or unpacks itself to.
    pub end: u64,
    /// What a bzImage says about itself.
    pub setup_header: Option<setup_header>,
    /// The kernel is entered as PVH: 32-bit, paging off.
    pub pvh: bool,
}

/// Loads an ELF or a bzImage, if low memory has room for it.
pub fn kernel(memory: &GuestMemoryMmap, image: &mut File) -> Result<LoadedKernel, LoadError> {
    let loaded = load(memory, image)?;
    if loaded.end > low_end(memory) {
        return Err(LoadError::TooLarge { needs: loaded.end });
    }
    Ok(loaded)
}

/// Where low memory ends.
fn low_end(memory: &GuestMemoryMmap) -> u64 {
    (memory.last_addr().0 + 1).min(GAP_START)
}

/// Where a bzImage unpacks itself to, up to which address (boot.rst, `init_size`; since version 2.10).
fn unpacked_end(loaded_at: u64, header: &setup_header) -> u64 {
    let start = loaded_at.max(header.pref_address);
    if header.version < 0x20a { 0 } else { start.saturating_add(header.init_size.into()) }
}

/// The 64-bit Linux entry is preferred: PVH begins in 32-bit mode and takes longer; it
/// is for kernels that have no other.
fn load(memory: &GuestMemoryMmap, image: &mut File) -> Result<LoadedKernel, LoadError> {
    let mut magic = [0; 4];
    let read = |source| LoadError::Read { what: "kernel", source };
    image.read_exact(&mut magic).map_err(read)?;
    image.seek(SeekFrom::Start(0)).map_err(read)?;
    let high = Some(GuestAddress(HIGH_MEMORY));
    if magic == *b"\x7fELF" {
        let loaded: KernelLoaderResult = Elf::load(memory, None, image, high).map_err(LoadError::Kernel)?;
        // An ELF that is entered where its PVH note says, and nowhere else, has no 64-bit entry.
        let (entry, pvh) = match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(entry) if entry == loaded.kernel_load => (entry, true),
            PvhBootCapability::PvhEntryPresent(_)
            | PvhBootCapability::PvhEntryNotPresent
            | PvhBootCapability::PvhEntryIgnored => (loaded.kernel_load, false),
        };
        return Ok(LoadedKernel { entry, end: loaded.kernel_end, setup_header: None, pvh });
    }
    let loaded = match BzImage::load(memory, None, image, high) {
        Ok(loaded) => loaded,
        Err(linux_loader::loader::Error::Bzimage(linux_loader::loader::bzimage::Error::InvalidBzImage)) => {
            return Err(LoadError::UnknownFormat);
        }
        Err(e) => return Err(LoadError::Kernel(e)),
    };
    let entry = GuestAddress(loaded.kernel_load.0 + BZIMAGE_ENTRY);
    let unpacked =
        loaded.setup_header.as_ref().map_or(0, |header| unpacked_end(loaded.kernel_load.0, header));
    let end = loaded.kernel_end.max(unpacked);
    Ok(LoadedKernel { entry, end, setup_header: loaded.setup_header, pvh: false })
}

/// Copies the initramfs to the end of low memory, page-aligned, and says where it is: address and size in bytes.
pub fn initramfs(
    memory: &GuestMemoryMmap,
    kernel_end: u64,
    image: &mut File,
) -> Result<(GuestAddress, u64), LoadError> {
    let read = |source| LoadError::Read { what: "initramfs", source };
    let size = image.seek(SeekFrom::End(0)).map_err(read)?;
    image.seek(SeekFrom::Start(0)).map_err(read)?;
    let start = low_end(memory).checked_sub(size).map(|start| start & !(PAGE - 1));
    let (Some(start), Ok(length)) = (start.filter(|&s| s >= kernel_end), usize::try_from(size)) else {
        return Err(LoadError::NoRoom { size });
    };
    memory.read_exact_volatile_from(GuestAddress(start), image, length).map_err(LoadError::Copy)?;
    Ok((GuestAddress(start), size))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap()
    }

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file
    }

    /// An ELF of one segment at 1 MiB (gABI, chapters 4 and 5).
    fn elf() -> Vec<u8> {
        let mut out = Vec::from(*b"\x7fELF\x02\x01\x01\x00\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0");
        for word in [0x10_0000u64, 64, 0] {
            out.extend(word.to_le_bytes()); // entry, program headers, no section headers
        }
        out.extend(0u32.to_le_bytes());
        for half in [64u16, 56, 1, 64, 0, 0] {
            out.extend(half.to_le_bytes());
        }
        out.extend([1, 0, 0, 0, 7, 0, 0, 0]);
        for word in [0u64, 0x10_0000, 0x10_0000, 256, 512, 4096] {
            out.extend(word.to_le_bytes());
        }
        out.resize(256, 0xf4);
        out
    }

    /// A bzImage with one setup sector (Documentation/arch/x86/boot.rst).
    fn bzimage() -> Vec<u8> {
        let mut out = vec![0; 4096];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[1]); // setup_sects
        put(0x1fe, &0xaa55u16.to_le_bytes());
        put(0x202, b"HdrS");
        put(0x206, &0x20fu16.to_le_bytes()); // version
        put(0x211, &[1]); // loaded high
        put(0x214, &0x10_0000u32.to_le_bytes()); // code32_start
        put(0x258, &0x80_0000u64.to_le_bytes()); // preferred address
        put(0x260, &0x40_0000u32.to_le_bytes()); // init_size
        out
    }

    #[test]
    fn both_formats_are_loaded_and_entered_where_they_say() {
        let loaded = kernel(&memory(), &mut file(&elf())).unwrap();
        assert_eq!((loaded.entry.0, loaded.end, loaded.pvh), (0x10_0000, 0x10_0200, false));
        let loaded = kernel(&memory(), &mut file(&bzimage())).unwrap();
        assert_eq!(loaded.entry.0, 0x10_0200);
        assert_eq!(loaded.end, 0xc0_0000, "where it unpacks itself to is no place for an initramfs");
        assert!(matches!(kernel(&memory(), &mut file(&[0; 4096])), Err(LoadError::UnknownFormat)));
        assert!(matches!(kernel(&memory(), &mut file(b"\x7f")), Err(LoadError::Read { .. })));
    }

    #[test]
    fn a_kernel_that_needs_more_memory_says_how_much() {
        let (mut large, mut unpacks) = (elf(), bzimage());
        large[64 + 40..64 + 48].copy_from_slice(&(40u64 << 20).to_le_bytes()); // p_memsz
        unpacks[0x260..0x264].copy_from_slice(&(33u32 << 20).to_le_bytes());
        for image in [large, unpacks] {
            let error = kernel(&memory(), &mut file(&image)).unwrap_err();
            assert!(error.to_string().contains("41 MiB"), "{error}");
        }
    }

    #[test]
    fn an_initramfs_ends_with_low_memory_and_stays_above_the_kernel() {
        let (at, size) = initramfs(&memory(), 0x20_0000, &mut file(&[7; 5000])).unwrap();
        assert_eq!((at.0, size), ((16 << 20) - 8192, 5000));
        let above = initramfs(&memory(), (16 << 20) - 4096, &mut file(&[7; 5000]));
        assert!(matches!(above, Err(LoadError::NoRoom { size: 5000 })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Whatever the file says of itself, it is loaded or refused: nothing panics, nothing is written outside of the guest's memory.
        #[test]
        fn no_kernel_breaks_the_loader(
            is_elf: bool,
            changes in prop::collection::vec((0usize..768, prop_oneof![any::<u8>(), Just(0), Just(0xff)]), 0..12),
            length in 0usize..4096,
        ) {
            let mut image = if is_elf { elf() } else { bzimage() };
            for (at, byte) in changes {
                let at = if is_elf { at % 128 } else { 0x1e0 + at % 0x90 };
                if let Some(place) = image.get_mut(at) {
                    *place = byte;
                }
            }
            image.truncate(image.len().max(length));
            if let Ok(loaded) = kernel(&memory(), &mut file(&image)) {
                prop_assert!(loaded.end <= 16 << 20, "{:#x}", loaded.end);
            }
        }
    }
}
