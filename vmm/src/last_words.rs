//! What a kernel said before it panicked, out of its memory: rooms have no console, so nobody heard it.
//!
//! ```text
//!  … │ id │ text, '\n's inside │ pad │ id │ Kernel panic - not syncing: … │ pad │ id │ CPU: 0 PID: 1 … │ …      the log's text ring
//! ```
//!
//! Linux keeps its log in static memory near the kernel's beginning, each record's text behind an eight-byte number and aligned to
//! eight bytes (kernel/printk/printk_ringbuffer.c, `struct prb_data_block`). All of it is the guest's own: a guest may say what it likes here.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// How a panic's record begins; it is told from the format string in the kernel's image by what follows.
const BEGINS: &[u8] = b"Kernel panic - not syncing: ";
/// Records' alignment, bytes.
const ALIGNMENT: usize = 8;
/// Where it is looked for: a kernel begins at 16 MiB, and its static memory ends well below.
const LOOKED_AT: u64 = 96 << 20;
const CHUNK: usize = 1 << 20;
/// Kept of what came before the panic, and of what came after: the way to it, and its stack. Bytes.
const BEFORE: usize = 1536;
const AFTER: usize = 2048;
/// Shorter runs of text are numbers that look like text.
const SHORTEST: usize = 4;

/// The last lines of the kernel's log around its panic: printable ASCII, lines that end with a newline, 3.5 KiB at most. `None` where there is no such record.
pub fn last_words(memory: &GuestMemoryMmap) -> Option<String> {
    let mut chunk = vec![0; CHUNK];
    for start in (0..LOOKED_AT).step_by(CHUNK) {
        let Ok(length) = memory.read(&mut chunk, GuestAddress(start)) else { break };
        let records = chunk.get(..length)?.chunks_exact(ALIGNMENT);
        let found = records.enumerate().filter(|(_, eight)| BEGINS.starts_with(eight));
        for (n, _) in found {
            let at = start + u64::try_from(n * ALIGNMENT).ok()?;
            if is_panic(memory, at) {
                return Some(around(memory, at));
            }
        }
    }
    None
}

/// A record, and no format string.
fn is_panic(memory: &GuestMemoryMmap, at: u64) -> bool {
    let mut record = [0; BEGINS.len() + 1];
    memory.read_slice(&mut record, GuestAddress(at)).is_ok()
        && record.split_last().is_some_and(|(next, begins)| begins == BEGINS && *next != b'%')
}

fn around(memory: &GuestMemoryMmap, at: u64) -> String {
    let before = BEFORE.min(usize::try_from(at).unwrap_or(0));
    let mut bytes = vec![0; before + AFTER];
    let start = GuestAddress(at - u64::try_from(before).unwrap_or(0));
    let length = memory.read(&mut bytes, start).unwrap_or(0);
    bytes.truncate(length);
    let mut text = String::new();
    for line in bytes.split(|byte| !matches!(byte, b' '..=b'~')) {
        if line.len() >= SHORTEST {
            text.push_str(&String::from_utf8_lossy(line));
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 40 << 20;

    fn memory(size: usize) -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap()
    }

    fn put(memory: &GuestMemoryMmap, at: u64, text: &str) {
        memory.write_slice(&[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], GuestAddress(at - 8)).unwrap();
        memory.write_slice(text.as_bytes(), GuestAddress(at)).unwrap();
    }

    #[test]
    fn a_panic_is_told_with_what_was_said_around_it() {
        let memory = memory(64 << 20);
        put(&memory, 20 << 20, "Kernel panic - not syncing: %s\n");
        put(&memory, AT - 80, "init: something broke at \x1b[31mline 7\ninit: and more");
        put(&memory, AT, "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000006");
        put(&memory, AT + 80, "CPU: 0 PID: 1 Comm: init");
        let expected = "init: something broke at \n[31mline 7\ninit: and more\n\
                        Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000006\nCPU: 0 PID: 1 Comm: init\n";
        assert_eq!(last_words(&memory).as_deref(), Some(expected));
    }

    #[test]
    fn what_a_guest_may_say_is_bounded() {
        let memory = memory(64 << 20);
        memory.write_slice(&vec![b'"'; 1 << 20], GuestAddress(AT)).unwrap();
        memory.write_slice(BEGINS, GuestAddress(AT + 4096)).unwrap();
        let said = last_words(&memory).unwrap();
        assert!(said.len() <= BEFORE + AFTER + 1, "{}", said.len());
    }

    #[test]
    fn at_the_edges_of_memory_there_is_less_to_read_and_nothing_breaks() {
        let memory = memory(1 << 20);
        assert_eq!(last_words(&memory), None);
        for at in [8, (1 << 20) - 32] {
            memory.write_slice(BEGINS, GuestAddress(at)).unwrap();
            assert!(last_words(&memory).unwrap().starts_with("Kernel panic"));
            memory.write_slice(&[0; BEGINS.len()], GuestAddress(at)).unwrap();
        }
        memory.write_slice(BEGINS, GuestAddress((1 << 20) - 24)).unwrap_err();
        assert_eq!(last_words(&memory), None, "cut off by the memory's end");
    }
}
