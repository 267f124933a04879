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
    /// First byte behind it.
    pub end: u64,
    /// What a bzImage says about itself.
    pub setup_header: Option<setup_header>,
    /// The kernel is entered as PVH: 32-bit, paging off.
    pub pvh: bool,
}

/// Loads an ELF or a bzImage. The 64-bit Linux entry is preferred: PVH begins in 32-bit mode and takes longer; it
/// is for kernels that have no other.
pub fn kernel(memory: &GuestMemoryMmap, image: &mut File) -> Result<LoadedKernel, LoadError> {
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
    Ok(LoadedKernel { entry, end: loaded.kernel_end, setup_header: loaded.setup_header, pvh: false })
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
    let low_end = (memory.last_addr().0 + 1).min(GAP_START);
    let start = low_end.checked_sub(size).map(|start| start & !(PAGE - 1));
    let (Some(start), Ok(length)) = (start.filter(|&s| s >= kernel_end), usize::try_from(size)) else {
        return Err(LoadError::NoRoom { size });
    };
    memory.read_exact_volatile_from(GuestAddress(start), image, length).map_err(LoadError::Copy)?;
    Ok((GuestAddress(start), size))
}
