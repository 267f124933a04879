//! The guests that benchmarks boot, made here byte by byte so that nothing but the VMM differs between two sides.
//!
//! - [`tiny_kernel`]: a "kernel" of three instructions that writes [`READY`] to the serial port and waits for ever.
//! - [`ready_init`]: a Linux program for `/init` that does the same through its console.
//! - [`initramfs`]: a cpio archive (newc) around an `/init`.

/// What a guest writes to port 0x3f8 when it is there.
pub(crate) const READY: u8 = 0xa5;

/// Where the tiny kernel is loaded: 1 MiB, as Linux's own.
const KERNEL_BASE: u64 = 0x10_0000;
/// Where `/init`'s only segment is loaded.
const INIT_BASE: u64 = 0x40_0000;
const HEADERS: u64 = 64 + 56;

/// An ELF that both VMMs enter by the 64-bit Linux boot protocol.
pub(crate) fn tiny_kernel() -> Vec<u8> {
    let code = [
        &[0x66, 0xba, 0xf8, 0x03][..], // mov dx, 0x3f8
        &[0xb0, READY],                // mov al, READY
        &[0xee],                       // out dx, al
        &[0xf4],                       // hlt (interrupts are off: for ever)
        &[0xeb, 0xfd],                 // jmp to the hlt
    ]
    .concat();
    elf(&code, KERNEL_BASE)
}

/// The same with a note that gives its entry in 32-bit mode (Xen's PVH, `XEN_ELFNOTE_PHYS32_ENTRY`), the only one that QEMU enters an ELF by. The
/// instructions mean the same in both modes.
pub(crate) fn tiny_pvh_kernel() -> Vec<u8> {
    const NOTE_BYTES: u64 = 12 + 4 + 8;
    let mut image = tiny_kernel();
    let code = image.split_off(usize::try_from(HEADERS).unwrap_or(0));
    // A second program header and the note go between the first and the code.
    let headers = HEADERS + 56;
    let entry = KERNEL_BASE + headers + NOTE_BYTES;
    put(&mut image, 24, entry);
    put(&mut image, 56, 0x0040_0002); // e_phnum 2, e_shentsize 64, no sections
    image.truncate(64);
    let size = headers + NOTE_BYTES + u64::try_from(code.len()).unwrap_or(0);
    for (kind, flags, offset, at, length, align) in [
        (1_u32, 5_u32, 0, KERNEL_BASE, size, 0x1000_u64),
        (4, 4, headers, KERNEL_BASE + headers, NOTE_BYTES, 4),
    ] {
        image.extend(kind.to_le_bytes());
        image.extend(flags.to_le_bytes());
        for word in [offset, at, at, length, length, align] {
            image.extend(word.to_le_bytes());
        }
    }
    for word in [4_u32, 8, 18] {
        image.extend(word.to_le_bytes()); // length of the name, of the entry; XEN_ELFNOTE_PHYS32_ENTRY
    }
    image.extend(b"Xen\0");
    image.extend(entry.to_le_bytes());
    image.extend(code);
    image
}

fn put(image: &mut [u8], at: usize, value: u64) {
    if let Some(place) = image.get_mut(at..at + 8) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

/// A static program: `write(1, READY, 1)`, then `pause(2)` for ever. Its standard output is the console, as the kernel leaves it to init.
pub(crate) fn ready_init() -> Vec<u8> {
    let code = [
        &[0xb8, 1, 0, 0, 0][..],          // mov eax, SYS_write
        &[0xbf, 1, 0, 0, 0],              // mov edi, 1
        &[0x48, 0x8d, 0x35, 16, 0, 0, 0], // lea rsi, [rip + 16]: the byte behind the code
        &[0xba, 1, 0, 0, 0],              // mov edx, 1
        &[0x0f, 0x05],                    // syscall
        &[0xb8, 34, 0, 0, 0],             // mov eax, SYS_pause
        &[0x0f, 0x05],                    // syscall
        &[0xeb, 0xf7],                    // jmp to the mov above
        &[READY],
    ]
    .concat();
    elf(&code, INIT_BASE)
}

/// What stands in a ticking guest's memory before a byte that is 0: in clones of it, 1. See [`crate::clone`].
pub(crate) const MARK: [u8; 16] = *b"\xf1carrel: a clone";

/// A kernel that writes [`READY`] again and again, some hundred instructions between two; as a clone, once more, and waits for ever.
pub(crate) fn ticking_kernel() -> Vec<u8> {
    let code = [
        &[0x66, 0xba, 0xf8, 0x03][..],    // mov dx, 0x3f8
        &[0xb0, READY],                   // mov al, READY
        &[0x0f, 0xb6, 0x0d, 35, 0, 0, 0], // movzx ecx, byte [rip + 35]: the last one
        &[0xee],                          // out dx, al
        &[0x85, 0xc9],                    // test ecx, ecx
        &[0x75, 11],                      // jnz to the hlt
        &[0xbb, 200, 0, 0, 0],            // mov ebx, 200
        &[0xff, 0xcb],                    // dec ebx
        &[0x75, 0xfc],                    // jnz to the dec
        &[0xeb, 0xe9],                    // jmp to the movzx
        &[0xf4],                          // hlt (interrupts are off: for ever)
        &[0xeb, 0xfd],                    // jmp to the hlt
        &MARK,
        &[0],
    ]
    .concat();
    elf(&code, KERNEL_BASE)
}

/// `/init` that writes [`READY`] every millisecond; as a clone, once more, and waits for ever.
pub(crate) fn ticking_init() -> Vec<u8> {
    let code = [
        &[0x0f, 0xb6, 0x1d, 88, 0, 0, 0][..], // movzx ebx, byte [rip + 88]: the last one
        &[0xb8, 1, 0, 0, 0],                  // mov eax, SYS_write
        &[0xbf, 1, 0, 0, 0],                  // mov edi, 1
        &[0x48, 0x8d, 0x35, 54, 0, 0, 0],     // lea rsi, [rip + 54]: READY
        &[0xba, 1, 0, 0, 0],                  // mov edx, 1
        &[0x0f, 0x05],                        // syscall
        &[0x85, 0xdb],                        // test ebx, ebx
        &[0x75, 18],                          // jnz to the last mov
        &[0x48, 0x8d, 0x3d, 20, 0, 0, 0],     // lea rdi, [rip + 20]: the timespec
        &[0x31, 0xf6],                        // xor esi, esi
        &[0xb8, 35, 0, 0, 0],                 // mov eax, SYS_nanosleep
        &[0x0f, 0x05],                        // syscall
        &[0xeb, 0xcb],                        // jmp to the movzx
        &[0xb8, 34, 0, 0, 0],                 // mov eax, SYS_pause
        &[0x0f, 0x05],                        // syscall
        &[0xeb, 0xf7],                        // jmp to the mov above
        &0_u64.to_le_bytes(),                 // 1 ms
        &1_000_000_u64.to_le_bytes(),
        &[READY],
        &MARK,
        &[0],
    ]
    .concat();
    elf(&code, INIT_BASE)
}

/// Where the bytes behind a ticking guest's [`MARK`] are in its memory, in all copies of it.
pub(crate) fn marks(memory: &[u8]) -> Vec<usize> {
    memchr::memmem::find_iter(memory, &MARK)
        .map(|at| at + MARK.len())
        .filter(|at| *at < memory.len())
        .collect()
}

/// A static ELF64 of one readable and executable segment whose entry is `code`'s first byte.
fn elf(code: &[u8], base: u64) -> Vec<u8> {
    let size = HEADERS + u64::try_from(code.len()).unwrap_or(0);
    let mut out = Vec::new();
    out.extend(b"\x7fELF\x02\x01\x01\x00\0\0\0\0\0\0\0\0");
    out.extend(2u16.to_le_bytes()); // ET_EXEC
    out.extend(62u16.to_le_bytes()); // EM_X86_64
    out.extend(1u32.to_le_bytes());
    out.extend((base + HEADERS).to_le_bytes()); // entry
    out.extend(64u64.to_le_bytes()); // program headers
    out.extend(0u64.to_le_bytes()); // section headers
    out.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        out.extend(half.to_le_bytes());
    }
    out.extend(1u32.to_le_bytes()); // PT_LOAD
    out.extend(5u32.to_le_bytes()); // R+X
    out.extend(0u64.to_le_bytes()); // file offset
    out.extend(base.to_le_bytes());
    out.extend(base.to_le_bytes());
    out.extend(size.to_le_bytes());
    out.extend(size.to_le_bytes());
    out.extend(0x1000u64.to_le_bytes());
    out.extend(code);
    out
}

/// A newc archive (Documentation/driver-api/early-userspace/buffer-format.rst) with `/dev`, `/dev/console` and `/init`.
pub(crate) fn initramfs(init: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    entry(&mut out, "dev", 0o040_755, (0, 0), &[]);
    entry(&mut out, "dev/console", 0o020_600, (5, 1), &[]);
    entry(&mut out, "init", 0o100_755, (0, 0), init);
    entry(&mut out, "TRAILER!!!", 0, (0, 0), &[]);
    out
}

fn entry(out: &mut Vec<u8>, name: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
    let length = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    out.extend(b"070701");
    let fields = [
        length(out.len()), // inode: unique is enough
        mode,
        0,
        0,
        1,
        0,
        length(content.len()),
        0,
        0,
        major,
        minor,
        length(name.len() + 1),
        0,
    ];
    for field in fields {
        out.extend(format!("{field:08x}").bytes());
    }
    out.extend(name.bytes());
    out.push(0);
    pad(out);
    out.extend(content);
    pad(out);
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_archive_is_one_that_cpio_reads() {
        let mut cpio = Command::new("cpio")
            .args(["-t", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("cpio is installed");
        cpio.stdin.take().unwrap().write_all(&initramfs(&ready_init())).unwrap();
        let listed = cpio.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&listed.stdout), "dev\ndev/console\ninit\n");
    }

    #[test]
    fn the_ticking_init_ticks_on_and_as_a_clone_once() {
        use std::io::Read;
        use std::os::fd::AsFd;
        use std::os::unix::fs::PermissionsExt;

        use nix::poll::{PollFd, PollFlags, poll};
        let folder = tempfile::tempdir().unwrap();
        let run = |program: &[u8], name: &str, expected: usize| {
            let path = folder.path().join(name);
            std::fs::write(&path, program).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            let mut child = Command::new(&path).stdout(Stdio::piped()).spawn().unwrap();
            let mut ticks = vec![0; expected];
            let mut output = child.stdout.take().unwrap();
            output.read_exact(&mut ticks).unwrap();
            let more = poll(&mut [PollFd::new(output.as_fd(), PollFlags::POLLIN)], 500_u16).unwrap();
            child.kill().unwrap();
            child.wait().unwrap();
            assert!(ticks.iter().all(|&tick| tick == READY));
            more > 0
        };
        let mut init = ticking_init();
        assert!(run(&init, "first", 100), "it goes on");
        let [mark] = marks(&init)[..] else { panic!("one mark") };
        init[mark] = 1;
        assert!(!run(&init, "clone", 1), "once and no more");
    }

    #[test]
    fn a_kernels_mark_is_the_byte_that_it_looks_at() {
        let kernel = ticking_kernel();
        let code = usize::try_from(HEADERS).unwrap();
        // The movzx ends at 13; the byte's place is 35 from there.
        assert_eq!(marks(&kernel), [code + 13 + 35]);
        assert_eq!(kernel[code + 13 + 35], 0);
        assert_eq!(kernel.len(), code + 13 + 35 + 1);
    }

    #[test]
    fn the_pvh_kernels_note_and_header_name_the_same_first_instruction() {
        let kernel = tiny_pvh_kernel();
        let word = |at: usize| u64::from_le_bytes(kernel[at..at + 8].try_into().unwrap());
        let entry = word(24);
        let note = usize::try_from(word(64 + 56 + 8)).unwrap();
        assert_eq!(&kernel[note..note + 16], b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0");
        assert_eq!(word(note + 16), entry);
        let offset = usize::try_from(entry - KERNEL_BASE).unwrap();
        assert_eq!(kernel[offset..], tiny_kernel()[usize::try_from(HEADERS).unwrap()..]);
        assert_eq!(u16::from_le_bytes(kernel[56..58].try_into().unwrap()), 2, "program headers");
    }

    #[test]
    fn the_kernel_enters_at_its_first_instruction() {
        let kernel = tiny_kernel();
        let entry = u64::from_le_bytes(kernel[24..32].try_into().unwrap());
        let offset = usize::try_from(entry - KERNEL_BASE).unwrap();
        assert_eq!(&kernel[offset..offset + 4], &[0x66, 0xba, 0xf8, 0x03]);
    }
}
