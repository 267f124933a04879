//! An assembler of seccomp programs that the compiler runs: from the table of calls to an array of classic BPF (seccomp(2), kernel/seccomp.c).
//!
//! ```text
//!  architecture ≠ x86_64 ──▶ kill
//!  number ──▶ halve the sorted numbers, down to three ──▶ equal to none ──▶ kill
//!                    │ a call without conditions ──────────────────────▶ allow
//!                    ▼
//!              its lines of the table, one after the other
//!               first │ a condition fails ──▶ next line ──▶ … ──▶ kill
//!                     │ all hold ──────────────────────────────▶ allow
//! ```
//!
//! A number with a bit of another ABI in it (x32's bit 30) equals none of the table's. Halving matters where a filter is installed more than where
//! it decides: Linux then interprets it for every number there is, to find those that it allows whatever their arguments, and never runs it
//! for these again.
//!
//! Jumps of classic BPF go forwards, so programs are assembled from their ends: a jump's target is there before the jump.

use std::io;
use std::mem::offset_of;

use libc::{sock_filter, sock_fprog};

use super::{Arg, Call, NOT_THERE, Stage};

/// A jump skips 255 instructions at most, and the first ones jump to the last.
const CAPACITY: usize = 256;
/// Numbers that are compared one after the other, where halving would not shorten the way.
const LEAF: usize = 3;
/// AUDIT_ARCH_X86_64: EM_X86_64, 64 bits, little-endian.
const X86_64: u32 = 0xc000_003e;

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const IF_AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const IF_ANY_BIT: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
const NOTHING: sock_filter = sock_filter { code: 0, jt: 0, jf: 0, k: 0 };

/// A filter as the kernel takes it, but for the process's id.
#[derive(Clone, Copy)]
pub(super) struct Program<const LENGTH: usize> {
    instructions: [sock_filter; LENGTH],
    /// Where the process's id belongs, if anywhere.
    own_process: Option<usize>,
}

impl<const LENGTH: usize> Program<LENGTH> {
    /// seccomp(2) counts instructions in 16 bits.
    const COUNT: u16 = {
        let [low, high, ..] = LENGTH.to_le_bytes();
        assert!(LENGTH <= CAPACITY);
        u16::from_le_bytes([low, high])
    };

    /// The filter for a process of this id.
    pub(super) fn of_process(&self, id: u32) -> [sock_filter; LENGTH] {
        let mut instructions = self.instructions;
        if let Some(instruction) = self.own_process.and_then(|at| instructions.get_mut(at)) {
            instruction.k = id;
        }
        instructions
    }

    /// Puts the calling thread under the filter for a process of this id.
    pub(super) fn install(&self, id: u32) -> io::Result<()> {
        let mut instructions = self.of_process(id);
        let program = sock_fprog { len: Self::COUNT, filter: instructions.as_mut_ptr() };
        // SAFETY: the program and its instructions are valid for the call, which copies them.
        let result =
            unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Assembles a stage's filter.
pub(super) const fn assemble(calls: &[Call], stage: Stage) -> Assembly {
    let mut to = Assembly { instructions: [NOTHING; CAPACITY], length: 0, own_process: None };
    let kill = to.put(RETURN, libc::SECCOMP_RET_KILL_PROCESS);
    let allow = to.put(RETURN, libc::SECCOMP_RET_ALLOW);

    let mut numbers = Numbers { sorted: [(0, Label(0)); CAPACITY], count: 0 };
    if matches!(stage, Stage::SetUp) {
        let enosys = to.put(RETURN, libc::SECCOMP_RET_ERRNO | low_half(libc::ENOSYS.unsigned_abs() as u64));
        numbers.insert(NOT_THERE, enosys);
    }
    // Backwards, so each call is assembled where its last line is met, with the lines before.
    let mut at = calls.len();
    while at > 0 {
        at -= 1;
        let number = calls[at].number;
        if stage.has(calls[at].who) && !numbers.have(number) {
            let (calls, _) = calls.split_at(at + 1);
            numbers.insert(number, to.put_lines(&Lines { calls, stage, number }, allow, kill));
        }
    }

    to.put_search(&numbers, 0, numbers.count, kill);
    let search = to.load(offset_of!(libc::seccomp_data, nr));
    to.put_if(IF_EQUAL, X86_64, search, kill);
    to.load(offset_of!(libc::seccomp_data, arch));
    to
}

/// A place in a program: how many instructions there are from it to the end.
#[derive(Clone, Copy)]
struct Label(usize);

/// A program in the making, at the end of the array.
pub(super) struct Assembly {
    instructions: [sock_filter; CAPACITY],
    length: usize,
    own_process: Option<Label>,
}

impl Assembly {
    /// In instructions.
    pub(super) const fn len(&self) -> usize {
        self.length
    }

    /// The program, whose length is known by now.
    pub(super) const fn finish<const LENGTH: usize>(&self) -> Program<LENGTH> {
        assert!(LENGTH == self.length);
        let mut instructions = [NOTHING; LENGTH];
        let mut at = 0;
        while at < LENGTH {
            instructions[at] = self.instructions[CAPACITY - LENGTH + at];
            at += 1;
        }
        let own_process = match self.own_process {
            Some(label) => Some(LENGTH - label.0),
            None => None,
        };
        Program { instructions, own_process }
    }

    const fn here(&self) -> Label {
        Label(self.length)
    }

    const fn prepend(&mut self, instruction: sock_filter) -> Label {
        assert!(
            self.length < CAPACITY,
            "the table is too long for jumps of one byte: give calls returns of their own"
        );
        self.length += 1;
        self.instructions[CAPACITY - self.length] = instruction;
        self.here()
    }

    const fn put(&mut self, code: u32, k: u32) -> Label {
        self.prepend(sock_filter { code: opcode(code), jt: 0, jf: 0, k })
    }

    const fn put_if(&mut self, code: u32, k: u32, then: Label, otherwise: Label) -> Label {
        let (jt, jf) = (one_byte(self.length - then.0), one_byte(self.length - otherwise.0));
        self.prepend(sock_filter { code: opcode(code), jt, jf, k })
    }

    /// Loads a word of `seccomp_data`.
    const fn load(&mut self, offset: usize) -> Label {
        self.put(LOAD, low_half(offset as u64))
    }

    /// The numbers from `first` to before `end`.
    const fn put_search(&mut self, numbers: &Numbers, first: usize, end: usize, kill: Label) -> Label {
        if first == end {
            return self.put(RETURN, libc::SECCOMP_RET_KILL_PROCESS);
        }
        if end - first <= LEAF {
            let mut at = end;
            let mut next = kill;
            while at > first {
                at -= 1;
                let (number, target) = numbers.sorted[at];
                next = self.put_if(IF_EQUAL, number, target, next);
            }
            return next;
        }
        let middle = first + (end - first) / 2;
        let upper = self.put_search(numbers, middle, end, kill);
        let lower = self.put_search(numbers, first, middle, kill);
        self.put_if(IF_AT_LEAST, numbers.sorted[middle].0, upper, lower)
    }

    /// The conditions of one call: a line after the other, until all of one line's hold.
    const fn put_lines(&mut self, lines: &Lines<'_>, allow: Label, kill: Label) -> Label {
        let mut start = kill;
        let mut at = lines.calls.len();
        while at > 0 {
            at -= 1;
            if lines.counts(at) {
                let args = lines.calls[at].args;
                if args.is_empty() {
                    return allow;
                }
                start = self.put_conditions(args, lines.loaded_before(at), allow, start);
            }
        }
        start
    }

    /// The conditions of one line. `loaded` is the argument that is in the accumulator already.
    const fn put_conditions(&mut self, args: &[Arg], loaded: Option<u8>, allow: Label, fail: Label) -> Label {
        let mut holds = allow;
        let mut at = args.len();
        while at > 0 {
            at -= 1;
            let index = index(args[at]);
            holds = self.put_condition(args[at], holds, fail);
            let before = if at == 0 { loaded } else { Some(self::index(args[at - 1])) };
            if !matches!(before, Some(before) if before == index) {
                // x86_64 is little-endian: an argument begins with its lower half.
                holds = self.load(offset_of!(libc::seccomp_data, args) + size_of::<u64>() * index as usize);
            }
        }
        holds
    }

    const fn put_condition(&mut self, arg: Arg, holds: Label, fail: Label) -> Label {
        match arg {
            Arg::OneOf(_, values) => {
                let mut next = fail;
                let mut at = values.len();
                while at > 0 {
                    at -= 1;
                    next = self.put_if(IF_EQUAL, low_half(values[at]), holds, next);
                }
                next
            }
            Arg::Without(_, bits) => self.put_if(IF_ANY_BIT, low_half(bits), fail, holds),
            Arg::OwnProcess(_) => {
                assert!(self.own_process.is_none(), "a program has one place for the process's id");
                let label = self.put_if(IF_EQUAL, 0, holds, fail);
                self.own_process = Some(label);
                label
            }
        }
    }
}

/// Numbers in ascending order, and where each is decided.
struct Numbers {
    sorted: [(u32, Label); CAPACITY],
    count: usize,
}

impl Numbers {
    const fn have(&self, number: i64) -> bool {
        let number = low_half(number.cast_unsigned());
        let mut at = 0;
        while at < self.count {
            if self.sorted[at].0 == number {
                return true;
            }
            at += 1;
        }
        false
    }

    const fn insert(&mut self, number: i64, target: Label) {
        assert!(!self.have(number));
        let number = low_half(number.cast_unsigned());
        let mut at = self.count;
        while at > 0 && self.sorted[at - 1].0 > number {
            self.sorted[at] = self.sorted[at - 1];
            at -= 1;
        }
        self.sorted[at] = (number, target);
        self.count += 1;
    }
}

/// The lines of one call in a stage: the table up to the last of them.
struct Lines<'a> {
    calls: &'a [Call],
    stage: Stage,
    number: i64,
}

impl Lines<'_> {
    const fn are_at(&self, at: usize) -> bool {
        self.stage.has(self.calls[at].who) && self.calls[at].number == self.number
    }

    /// Whether there is such a line, and none before that allows all that it does: the set-up has the lines of both kinds of threads.
    const fn counts(&self, at: usize) -> bool {
        if !self.are_at(at) {
            return false;
        }
        let mut earlier = 0;
        while earlier < at {
            if self.are_at(earlier) && all_within(self.calls[at].args, self.calls[earlier].args) {
                return false;
            }
            earlier += 1;
        }
        true
    }

    /// The argument that is loaded when a line is tried: whatever condition of the line before has failed, if it looks at one argument alone.
    const fn loaded_before(&self, at: usize) -> Option<u8> {
        let mut earlier = at;
        while earlier > 0 {
            earlier -= 1;
            if self.counts(earlier) {
                return match self.calls[earlier].args {
                    [only] => Some(index(*only)),
                    _ => None,
                };
            }
        }
        None
    }
}

/// Which argument.
const fn index(arg: Arg) -> u8 {
    let (Arg::OneOf(index, _) | Arg::Without(index, _) | Arg::OwnProcess(index)) = arg;
    assert!(index < 6);
    index
}

/// Whether conditions, one by one, allow no more than others do.
const fn all_within(narrow: &[Arg], wide: &[Arg]) -> bool {
    if narrow.len() != wide.len() {
        return false;
    }
    let mut at = 0;
    while at < narrow.len() {
        let within = match (narrow[at], wide[at]) {
            (Arg::OneOf(_, values), Arg::OneOf(_, of)) => are_among(values, of),
            (Arg::Without(_, bits), Arg::Without(_, fewer)) => bits & fewer == fewer,
            (Arg::OwnProcess(_), Arg::OwnProcess(_)) => true,
            (Arg::OneOf(..) | Arg::Without(..) | Arg::OwnProcess(_), _) => false,
        };
        if !within || index(narrow[at]) != index(wide[at]) {
            return false;
        }
        at += 1;
    }
    true
}

const fn are_among(values: &[u64], of: &[u64]) -> bool {
    let mut at = 0;
    while at < values.len() {
        let mut other = 0;
        while other < of.len() && of[other] != values[at] {
            other += 1;
        }
        if other == of.len() {
            return false;
        }
        at += 1;
    }
    true
}

/// Of a number that has nothing in the upper half.
const fn low_half(number: u64) -> u32 {
    let [a, b, c, d, upper @ ..] = number.to_le_bytes();
    assert!(matches!(upper, [0, 0, 0, 0]), "the table has numbers of 32 bits");
    u32::from_le_bytes([a, b, c, d])
}

const fn opcode(code: u32) -> u16 {
    let [low, high, ..] = code.to_le_bytes();
    u16::from_le_bytes([low, high])
}

const fn one_byte(skipped: usize) -> u8 {
    assert!(
        skipped < CAPACITY,
        "the table is too long for jumps of one byte: give calls returns of their own"
    );
    let [low, ..] = skipped.to_le_bytes();
    low
}

#[cfg(test)]
mod tests;
