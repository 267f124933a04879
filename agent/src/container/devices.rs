//! Devices of a container: the nodes of its `/dev`, and the program at the containers' cgroup that lets nothing else be
//! opened, whatever nodes an image brings or a workload makes (`BPF_PROG_TYPE_CGROUP_DEVICE`, bpf(2)). The room's disk is a
//! device that the agent alone may touch.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::fs::{CWD, FileType, Gid, Mode, Uid, makedev, mknodat};

/// Name, major and minor number of each node: all are character devices that anybody may use.
const NODES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
/// `/dev/ptmx`.
const PTMX: (u32, u32) = (5, 2);
/// Pseudo-terminals (devices.txt: 136–143 char).
const TERMINALS: std::ops::RangeInclusive<u32> = 136..=143;
/// Links that programs expect.
const LINKS: [(&str, &str); 6] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("pts/ptmx", "/dev/ptmx"),
    ("/proc/kcore", "/dev/core"),
];

/// Fills a fresh `/dev`.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn fill() -> io::Result<()> {
    for (name, major, minor) in NODES {
        let path = format!("/dev/{name}");
        let mode = Mode::from_raw_mode(0o666);
        mknodat(CWD, &path, FileType::CharacterDevice, mode, makedev(major, minor))?;
        // The umask had its say.
        rustix::fs::chmod(&path, mode)?;
        rustix::fs::chown(&path, Some(Uid::ROOT), Some(Gid::ROOT))?;
    }
    for (target, link) in LINKS {
        std::os::unix::fs::symlink(target, link)?;
    }
    Ok(())
}

/// One BPF instruction (include/uapi/linux/bpf.h, `struct bpf_insn`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high half.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: destination | source << 4, offset, immediate }
}

// Codes: class, operation and mode put together (Documentation/bpf/standardization/instruction-set.rst).
const LOAD_WORD: u8 = 0x61;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const MOVE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const JUMP_IF_EQUAL: u8 = 0x15;
const JUMP_UNLESS_EQUAL: u8 = 0x55;
const JUMP_IF_LESS: u8 = 0xa5;
const JUMP_IF_GREATER: u8 = 0x25;
const EXIT: u8 = 0x95;

const MAKE_ONLY: i32 = 1;
const CHARACTER: i32 = 2;

/// Returns 1 for what is allowed: making any node; opening the nodes of [`NODES`], [`PTMX`] and [`TERMINALS`].
fn program() -> Vec<Instruction> {
    let number = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    // r1 is the context: access << 16 | type, major, minor. r2 type, r3 access, r4 major, r5 minor.
    let mut program = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(MOVE_REGISTER, 3, 2, 0, 0),
        instruction(SHIFT_RIGHT, 3, 0, 0, 16),
        instruction(AND, 2, 0, 0, 0xffff),
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
        instruction(MOVE, 0, 0, 0, 1),
        instruction(JUMP_UNLESS_EQUAL, 3, 0, 1, MAKE_ONLY),
        instruction(EXIT, 0, 0, 0, 0),
        instruction(MOVE, 0, 0, 0, 0),
        instruction(JUMP_IF_EQUAL, 2, 0, 1, CHARACTER),
        instruction(EXIT, 0, 0, 0, 0),
    ];
    let nodes = NODES.iter().map(|&(_, major, minor)| (major, minor)).chain([PTMX]);
    for (major, minor) in nodes {
        program.extend([
            instruction(JUMP_UNLESS_EQUAL, 4, 0, 3, number(major)),
            instruction(JUMP_UNLESS_EQUAL, 5, 0, 2, number(minor)),
            instruction(MOVE, 0, 0, 0, 1),
            instruction(EXIT, 0, 0, 0, 0),
        ]);
    }
    program.extend([
        instruction(JUMP_IF_LESS, 4, 0, 2, number(*TERMINALS.start())),
        instruction(JUMP_IF_GREATER, 4, 0, 1, number(*TERMINALS.end())),
        instruction(MOVE, 0, 0, 0, 1),
        instruction(EXIT, 0, 0, 0, 0),
    ]);
    program
}

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;

/// The beginning of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
struct Load {
    kind: u32,
    instructions: u32,
    program: u64,
    license: u64,
}

/// The beginning of `union bpf_attr` for `BPF_PROG_ATTACH`.
#[repr(C)]
struct Attach {
    cgroup: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

/// Confines a cgroup and all below it to the devices that containers have.
///
/// # Errors
///
/// bpf(2)'s: the kernel lacks `CONFIG_CGROUP_BPF`.
pub(crate) fn confine(cgroup: BorrowedFd<'_>) -> io::Result<()> {
    let program = program();
    let license = c"Apache-2.0";
    let load = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        instructions: u32::try_from(program.len()).map_err(io::Error::other)?,
        program: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
    };
    let loaded = bpf(BPF_PROG_LOAD, &load)?;
    // SAFETY: BPF_PROG_LOAD has just made this descriptor.
    let loaded = unsafe { OwnedFd::from_raw_fd(loaded) };
    let attach = Attach {
        cgroup: cgroup.as_raw_fd().unsigned_abs(),
        program: loaded.as_raw_fd().unsigned_abs(),
        kind: BPF_CGROUP_DEVICE,
        flags: 0,
    };
    // The cgroup keeps the program.
    bpf(BPF_PROG_ATTACH, &attach).map(drop)
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: the attributes are the first fields of bpf_attr, as many bytes as said; what they point to outlives the call.
    let done =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { RawFd::try_from(done).map_err(io::Error::other) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel would.
    fn allows(access: u32, kind: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0_i64; 11];
        let program = program();
        let mut at = 0_usize;
        loop {
            let now = program[at];
            let (to, from) = (usize::from(now.registers & 15), usize::from(now.registers >> 4));
            let immediate = i64::from(now.immediate);
            let mut jump = false;
            match now.code {
                LOAD_WORD => registers[to] = i64::from(context[usize::try_from(now.offset).unwrap() / 4]),
                MOVE => registers[to] = immediate,
                MOVE_REGISTER => registers[to] = registers[from],
                AND => registers[to] &= immediate,
                SHIFT_RIGHT => registers[to] >>= immediate,
                JUMP_IF_EQUAL => jump = registers[to] == immediate,
                JUMP_UNLESS_EQUAL => jump = registers[to] != immediate,
                JUMP_IF_LESS => jump = registers[to] < immediate,
                JUMP_IF_GREATER => jump = registers[to] > immediate,
                EXIT => return registers[0] == 1,
                other => panic!("unknown code {other:#x}"),
            }
            at += 1 + if jump { usize::try_from(now.offset).unwrap() } else { 0 };
        }
    }

    const READ_WRITE: u32 = 6;

    #[test]
    fn of_all_numbers_the_listed_ones_and_no_others_can_be_opened() {
        let listed = |major, minor| {
            (major, minor) == PTMX
                || TERMINALS.contains(&major)
                || NODES.iter().any(|&(_, one, other)| (one, other) == (major, minor))
        };
        for kind in [1, 2] {
            for major in (0..300).chain([511, 4095, u32::MAX]) {
                for minor in (0..16).chain([255, 256, 1 << 20, u32::MAX]) {
                    let expected = kind == 2 && listed(major, minor);
                    for access in [2, 4, 6, 3, 7] {
                        assert_eq!(
                            allows(access, kind, major, minor),
                            expected,
                            "{kind} {major}:{minor} {access}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn the_usual_devices_can_be_opened() {
        for (name, major, minor) in NODES {
            assert!(allows(READ_WRITE, 2, major, minor), "{name}");
        }
        assert!(allows(READ_WRITE, 2, 5, 2) && allows(READ_WRITE, 2, 136, 0) && allows(2, 2, 143, 255));
    }

    #[test]
    fn disks_memory_and_consoles_can_be_made_but_not_opened() {
        for (kind, major, minor) in [
            (1, 254, 0),
            (1, 1, 3),
            (2, 1, 1),
            (2, 1, 2),
            (2, 5, 1),
            (2, 10, 200),
            (2, 4, 64),
            (2, 135, 0),
            (2, 144, 0),
        ] {
            assert!(!allows(2, kind, major, minor), "{kind} {major}:{minor}");
            assert!(!allows(READ_WRITE | 1, kind, major, minor), "{kind} {major}:{minor}");
            assert!(allows(1, kind, major, minor), "{kind} {major}:{minor}");
        }
    }
}
