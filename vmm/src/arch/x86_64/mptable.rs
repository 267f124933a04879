//! The MP table (Intel MultiProcessor Specification 1.4, chapter 4): how a kernel without ACPI learns of its processors
//! and its interrupt controller.
//!
//! One bus (ISA), one I/O APIC, every bus interrupt n on pin n, LINT1 for NMI.

use carrel_protocol::units::VcpuCount;
use vm_memory::{Address, Bytes, GuestMemoryError, GuestMemoryMmap};

use super::ioapic::ADDRESS as IO_APIC;
use super::{LOCAL_APIC, MP_TABLE};

const APIC_VERSION: u8 = 0x14;
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC_ENTRY: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
const VECTORED: u8 = 0;
const NMI: u8 = 1;

/// Writes the floating pointer and, right behind it, the table.
pub fn write(memory: &GuestMemoryMmap, vcpus: VcpuCount, pins: u8) -> Result<(), GuestMemoryError> {
    let table = table(vcpus, pins);
    let table_at = u32::try_from(MP_TABLE.raw_value()).unwrap_or(0) + 16;
    let mut pointer = Vec::from(b"_MP_");
    pointer.extend(table_at.to_le_bytes());
    pointer.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    close(&mut pointer, 10);
    memory.write_slice(&pointer, MP_TABLE)?;
    memory.write_slice(&table, MP_TABLE.unchecked_add(16))
}

fn table(vcpus: VcpuCount, pins: u8) -> Vec<u8> {
    let io_apic_id = vcpus.get();
    let mut entries: Vec<u8> = Vec::new();
    let mut count: u16 = 0;
    let mut entry = |bytes: &[u8]| {
        entries.extend(bytes);
        count += 1;
    };
    for id in 0..vcpus.get() {
        // Enabled; the first is the bootstrap processor. Signature and features: CPUID tells the real ones.
        let flags = if id == 0 { 3 } else { 1 };
        let mut processor = vec![PROCESSOR, id, APIC_VERSION, flags];
        processor.extend(0x600u32.to_le_bytes());
        processor.extend(0x201u32.to_le_bytes());
        processor.extend([0; 8]);
        entry(&processor);
    }
    entry(&[&[BUS, 0][..], b"ISA   "].concat());
    entry(&[&[IO_APIC_ENTRY, io_apic_id, APIC_VERSION, 1][..], &IO_APIC.to_le_bytes()].concat());
    for pin in 0..pins {
        entry(&[IO_INTERRUPT, VECTORED, 0, 0, 0, pin, io_apic_id, pin]);
    }
    entry(&[LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, 0xff, 1]);

    let length = u16::try_from(44 + entries.len()).unwrap_or(u16::MAX);
    let mut table = Vec::from(b"PCMP");
    table.extend(length.to_le_bytes());
    table.extend([4, 0]);
    table.extend(b"CARREL  MICROVM     ");
    table.extend([0; 6]); // no OEM table
    table.extend(count.to_le_bytes());
    table.extend(LOCAL_APIC.to_le_bytes());
    table.extend([0; 4]); // no extension
    table.extend(entries);
    close(&mut table, 7);
    table
}

/// Sets the byte at `at` so that all bytes add up to zero.
fn close(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
    if let Some(byte) = bytes.get_mut(at) {
        *byte = byte.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn the_largest_table_fits_and_both_checksums_close() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        for n in [1, 2, 16] {
            let vcpus = VcpuCount::try_from(n).unwrap();
            write(&memory, vcpus, 24).unwrap();
            let table = table(vcpus, 24);
            assert!(16 + table.len() <= 1024, "{} bytes", table.len());
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            let mut pointer = [0; 16];
            memory.read_slice(&mut pointer, MP_TABLE).unwrap();
            for bytes in [&pointer[..], &table[..]] {
                assert_eq!(bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
            }
            let entries = u16::from_le_bytes([table[34], table[35]]);
            assert_eq!(u64::from(entries), n + 1 + 1 + 24 + 1);
        }
    }
}
