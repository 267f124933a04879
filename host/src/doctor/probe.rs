//! A guest of a few instructions, made here byte by byte: it says a mark on its serial port before each thing that some hosts' KVM can't do.
//!
//! ```text
//!   '1' ─▶ count down ─▶ '2' ─▶ cmpxchg16b ─▶ '3' ─▶ int3, iretq ─▶ '4' ─▶ power off
//! ```
//!
//! kvm-pvm, for one, interprets ring-0 code of a kernel that doesn't know it, at about a million instructions a second, and stops for
//! good at `cmpxchg16b` and at `int3`. Linux needs both before it has printed a word.

/// The guest runs.
pub(super) const RUNS: u8 = b'1';
/// It has executed [`COUNTED`] instructions more.
pub(super) const HAS_COUNTED: u8 = b'2';
/// It has executed `cmpxchg16b`.
pub(super) const HAS_EXCHANGED: u8 = b'3';
/// It has taken an exception and come back.
pub(super) const HAS_TRAPPED: u8 = b'4';

/// Instructions between [`RUNS`] and [`HAS_COUNTED`]: a fraction of a millisecond on hardware, half a second where they are interpreted.
pub(super) const COUNTED: u32 = 500_000;

/// Where the segment is loaded: 1 MiB, as Linux's own.
const BASE: u64 = 0x10_0000;
/// ELF header, program header, and padding that aligns the code.
const CODE: u64 = 128;
/// Behind the code, aligned as `cmpxchg16b` asks for: its operand, four gates, and the table's register.
const OPERAND: u64 = 0x40;
const GATES: u64 = 0x50;
const GATES_REGISTER: u64 = 0x90;
const HANDLER: u64 = 0x3e;
/// The boot GDT's code segment, and a present interrupt gate (SDM volume 3, chapter 6.14.1).
const CODE_SELECTOR: u16 = 0x08;
const INTERRUPT_GATE: u16 = 0x8e00;

/// The probe as an ELF that is entered by the 64-bit Linux boot protocol.
pub(super) fn kernel() -> Vec<u8> {
    let count = (COUNTED / 2).to_le_bytes();
    let code = [
        &[0x66, 0xba, 0xf8, 0x03][..],                   // 00 mov dx, 0x3f8
        &[0xb0, RUNS, 0xee],                             // 04 out dx, RUNS
        &[0xb9, count[0], count[1], count[2], count[3]], // 07 mov ecx, COUNTED / 2
        &[0xff, 0xc9],                                   // 0c dec ecx
        &[0x75, 0xfc],                                   // 0e jnz 0c
        &[0xb0, HAS_COUNTED, 0xee],                      // 10 out dx, HAS_COUNTED
        // 13 lea rsi, [rip + …]
        &[0x48, 0x8d, 0x35],
        &relative(OPERAND, 0x1a),
        &[0xf0, 0x48, 0x0f, 0xc7, 0x0e], // 1a lock cmpxchg16b [rsi]; it differs, so rdx is lost
        &[0x66, 0xba, 0xf8, 0x03],       // 1f mov dx, 0x3f8
        &[0xb0, HAS_EXCHANGED, 0xee],    // 23 out dx, HAS_EXCHANGED
        // 26 lidt [rip + …]
        &[0x0f, 0x01, 0x1d],
        &relative(GATES_REGISTER, 0x2d),
        &[0xcc],                              // 2d int3
        &[0xb0, HAS_TRAPPED, 0xee],           // 2e out dx, HAS_TRAPPED
        &[0x66, 0xba, 0x04, 0x06],            // 31 mov dx, 0x604
        &[0x66, 0xb8, 0x00, 0x20],            // 35 mov ax, 0x2000
        &[0x66, 0xef],                        // 39 out dx, ax: power off
        &[0xf4],                              // 3b hlt
        &[0xeb, 0xfd],                        // 3c jmp 3b
        &[0x48, 0xcf],                        // 3e iretq: HANDLER
        &[0; 16],                             // 40 OPERAND
        &[0; 48],                             // 50 GATES 0 to 2
        &gate(BASE + CODE + HANDLER),         // 80 gate 3, int3's
        &63u16.to_le_bytes(),                 // 90 GATES_REGISTER: limit
        &(BASE + CODE + GATES).to_le_bytes(), // 92 and base
    ]
    .concat();
    elf(&code)
}

/// The distance to `to` from the end of an instruction.
fn relative(to: u64, end: u64) -> [u8; 4] {
    u32::try_from(to - end).unwrap_or(0).to_le_bytes()
}

fn gate(handler: u64) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h] = handler.to_le_bytes();
    let ([s, t], [u, v]) = (CODE_SELECTOR.to_le_bytes(), INTERRUPT_GATE.to_le_bytes());
    [a, b, s, t, u, v, c, d, e, f, g, h, 0, 0, 0, 0]
}

/// A static ELF64 of one segment whose entry is the code's first byte.
fn elf(code: &[u8]) -> Vec<u8> {
    let size = CODE + u64::try_from(code.len()).unwrap_or(0);
    let mut out = Vec::new();
    out.extend(b"\x7fELF\x02\x01\x01\x00\0\0\0\0\0\0\0\0");
    out.extend(2u16.to_le_bytes()); // ET_EXEC
    out.extend(62u16.to_le_bytes()); // EM_X86_64
    out.extend(1u32.to_le_bytes());
    out.extend((BASE + CODE).to_le_bytes()); // entry
    out.extend(64u64.to_le_bytes()); // program headers' offset
    out.extend(0u64.to_le_bytes()); // no section headers
    out.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        out.extend(half.to_le_bytes());
    }
    out.extend(1u32.to_le_bytes()); // PT_LOAD
    out.extend(7u32.to_le_bytes()); // R+W+X
    for word in [0, BASE, BASE, size, size, 0x1000] {
        out.extend(word.to_le_bytes()); // offset, addresses, sizes, alignment
    }
    out.resize(usize::try_from(CODE).unwrap_or(0), 0);
    out.extend(code);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(kernel: &[u8], offset: u64, length: usize) -> &[u8] {
        let from = usize::try_from(CODE + offset).unwrap();
        &kernel[from..from + length]
    }

    #[test]
    fn what_the_code_points_to_is_where_it_should_be() {
        let kernel = kernel();
        assert_eq!((BASE + CODE + OPERAND) % 16, 0, "cmpxchg16b faults on any other address");
        assert_eq!(at(&kernel, HANDLER, 2), [0x48, 0xcf], "iretq");
        let relative = |offset| u64::from(u32::from_le_bytes(at(&kernel, offset, 4).try_into().unwrap()));
        assert_eq!(0x1a + relative(0x16), OPERAND);
        assert_eq!(0x2d + relative(0x29), GATES_REGISTER);
        assert_eq!(at(&kernel, GATES_REGISTER + 2, 8), (BASE + CODE + GATES).to_le_bytes());
        assert_eq!(at(&kernel, GATES + 3 * 16, 2), [0xbe, 0x00], "the low half of 0x1000be");
        assert_eq!(
            at(&kernel, GATES_REGISTER, 10).len() + usize::try_from(CODE + GATES_REGISTER).unwrap(),
            kernel.len()
        );
    }

    #[test]
    fn the_entry_is_the_first_instruction() {
        let kernel = kernel();
        assert_eq!(u64::from_le_bytes(kernel[24..32].try_into().unwrap()), BASE + CODE);
        assert_eq!(at(&kernel, 0, 4), [0x66, 0xba, 0xf8, 0x03]);
    }
}
