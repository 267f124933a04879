//! Guests of a few instructions, made here byte by byte: they run on every `/dev/kvm`, also on one that can't run a kernel.
//!
//! They are entered by the 64-bit Linux boot protocol: long mode, the first GiB mapped to itself, RSI at the zero page.

/// Where the segment is loaded: 1 MiB, as Linux's own.
const BASE: u64 = 0x10_0000;
/// ELF header, program header, and padding that aligns the code.
const CODE: u64 = 128;

/// Machine code, appended to step by step.
#[derive(Clone, Default)]
pub(crate) struct Guest(Vec<u8>);

impl Guest {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    fn code(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// Writes a byte to the serial port.
    pub(crate) fn say(self, mark: u8) -> Self {
        self.out(0x3f8, mark)
    }

    /// Writes a byte to a port.
    pub(crate) fn out(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.code(&[0x66, 0xba, low, high, 0xb0, value, 0xee]) // mov dx, port; mov al, value; out dx, al
    }

    /// 0x2000 to port 0x604.
    pub(crate) fn power_off(self) -> Self {
        self.code(&[0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x20, 0x66, 0xef])
    }

    /// mov word [address], value
    pub(crate) fn write_u16(self, address: u32, value: u16) -> Self {
        let code = [&[0x66, 0xc7, 0x04, 0x25][..], &address.to_le_bytes(), &value.to_le_bytes()].concat();
        self.code(&code)
    }

    /// An exception without a table of handlers: a triple fault.
    pub(crate) fn fault(self) -> Self {
        // sub rsp, 16; mov qword [rsp], 0; mov qword [rsp + 8], 0; lidt [rsp]; ud2
        self.code(&[0x48, 0x83, 0xec, 0x10])
            .code(&[0x48, 0xc7, 0x04, 0x24, 0, 0, 0, 0])
            .code(&[0x48, 0xc7, 0x44, 0x24, 0x08, 0, 0, 0, 0])
            .code(&[0x0f, 0x01, 0x1c, 0x24, 0x0f, 0x0b])
    }

    /// Waits for ever: interrupts are off.
    pub(crate) fn wait(self) -> Self {
        self.code(&[0xf4, 0xeb, 0xfd]) // hlt; jmp to it
    }

    /// Runs for ever.
    pub(crate) fn spin(self) -> Self {
        self.code(&[0xeb, 0xfe])
    }

    /// Jumps to where neither memory nor a device is.
    pub(crate) fn execute_nothing(self) -> Self {
        self.map_gib(3).code(&[0x48, 0xb8]).code(&0xd800_0000u64.to_le_bytes()).code(&[0xff, 0xe0])
    }

    /// Maps a GiB of physical memory to itself, by 2 MiB, through a page directory at 8 MiB, `gib` below 512.
    pub(crate) fn map_gib(self, gib: u64) -> Self {
        const DIRECTORY: u64 = 0x80_0000;
        const POINTERS: u64 = 0xa000;
        let first = (gib << 30) | 0x83; // present, writable, 2 MiB
        self.code(&[0x48, 0xbf]) // mov rdi, DIRECTORY
            .code(&DIRECTORY.to_le_bytes())
            .code(&[0x48, 0xb8]) // mov rax, first
            .code(&first.to_le_bytes())
            .code(&[0xb9, 0, 2, 0, 0]) // mov ecx, 512
            .code(&[0x48, 0x89, 0x07]) // next: mov [rdi], rax
            .code(&[0x48, 0x83, 0xc7, 0x08]) // add rdi, 8
            .code(&[0x48, 0x05, 0, 0, 0x20, 0]) // add rax, 2 MiB
            .code(&[0xff, 0xc9, 0x75, 0xef]) // dec ecx; jnz next
            .code(&[0x48, 0xb8]) // mov rax, DIRECTORY, present and writable
            .code(&(DIRECTORY | 3).to_le_bytes())
            .code(&[0x48, 0xbf]) // mov rdi, the GiB's pointer
            .code(&(POINTERS + 8 * gib).to_le_bytes())
            .code(&[0x48, 0x89, 0x07]) // mov [rdi], rax
            .code(&[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8]) // mov rax, cr3; mov cr3, rax
    }

    /// Writes a byte to an address above 4 GiB that is mapped, and says what it reads there.
    pub(crate) fn echo_at(self, address: u64, mark: u8) -> Self {
        self.code(&[0x48, 0xbf]) // mov rdi, address
            .code(&address.to_le_bytes())
            .code(&[0xc6, 0x07, mark]) // mov byte [rdi], mark
            .code(&[0x30, 0xc0, 0x8a, 0x07]) // xor al, al; mov al, [rdi]
            .code(&[0x66, 0xba, 0xf8, 0x03, 0xee]) // mov dx, 0x3f8; out dx, al
    }

    /// Says so many bytes from an address in the first GiB.
    pub(crate) fn tell(self, address: u32, length: u32) -> Self {
        self.code(&[0xbe]) // mov esi, address
            .code(&address.to_le_bytes())
            .code(&[0xb9]) // mov ecx, length
            .code(&length.to_le_bytes())
            .code(&[0x66, 0xba, 0xf8, 0x03]) // mov dx, 0x3f8
            .code(&[0x8a, 0x06, 0xee]) // next: mov al, [rsi]; out dx, al
            .code(&[0x48, 0xff, 0xc6]) // inc rsi
            .code(&[0xff, 0xc9, 0x75, 0xf6]) // dec ecx; jnz next
    }

    /// Says 0, 1, 2, … for ever, each after so many turns of an empty loop: the next number is in memory, at an address in the first GiB.
    pub(crate) fn count(self, address: u32, turns: u32) -> Self {
        self.code(&[0x66, 0xba, 0xf8, 0x03, 0xbf]) // mov dx, 0x3f8; mov edi, address
            .code(&address.to_le_bytes())
            .code(&[0xb9]) // next: mov ecx, turns
            .code(&turns.to_le_bytes())
            .code(&[0xff, 0xc9, 0x75, 0xfc]) // dec ecx; jnz to it
            .code(&[0x8a, 0x07, 0xfe, 0x07, 0xee]) // mov al, [rdi]; inc byte [rdi]; out dx, al
            .code(&[0xeb, 0xf0]) // jmp next
    }

    /// The whole as an ELF whose entry is its first instruction.
    pub(crate) fn elf(&self) -> Vec<u8> {
        let size = CODE + u64::try_from(self.0.len()).unwrap();
        let mut out = Vec::from(*b"\x7fELF\x02\x01\x01\x00\0\0\0\0\0\0\0\0");
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
        out.resize(usize::try_from(CODE).unwrap(), 0);
        out.extend(&self.0);
        out
    }
}
