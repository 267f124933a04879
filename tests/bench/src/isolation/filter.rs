//! What a seccomp filter lets through: classic BPF (seccomp(2)), read from strace's log and run for each system call's number with everything
//! else unknown.
//!
//! An unknown value takes both ways at every jump, so what comes out is: may this call be made with *some* arguments?

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};

/// Numbers of x86-64's table up to Linux 6.12 (arch/x86/entry/syscalls/syscall_64.tbl).
pub(crate) const CALLS: [std::ops::RangeInclusive<u32>; 2] = [0..=335, 424..=462];
/// AUDIT_ARCH_X86_64.
const ARCH: u32 = 0xc000_003e;
/// SECCOMP_RET_ALLOW, SECCOMP_RET_LOG; the action is in the upper half.
const ALLOWS: [u32; 2] = [0x7fff_0000, 0x7ffc_0000];
const ACTION: u32 = 0xffff_0000;

/// One instruction (struct sock_filter).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Instruction {
    code: u32,
    jump_true: usize,
    jump_false: usize,
    k: u32,
}

/// A program.
pub(crate) type Filter = Vec<Instruction>;

/// The calls that all of these filters may let through; without any filter, all.
pub(crate) fn allowed(filters: &[Filter]) -> Result<BTreeSet<u32>> {
    let mut calls = BTreeSet::new();
    for call in CALLS.into_iter().flatten() {
        if filters
            .iter()
            .map(|filter| may_allow(filter, call))
            .collect::<Result<Vec<bool>>>()?
            .iter()
            .all(|&may| may)
        {
            calls.insert(call);
        }
    }
    Ok(calls)
}

/// Whether some way through the program ends in an action that allows.
fn may_allow(filter: &[Instruction], call: u32) -> Result<bool> {
    let mut seen = BTreeSet::new();
    // Where, and the accumulator if it is known. Jumps go forwards only, so this ends.
    let mut ways = vec![(0_usize, Some(0_u32))];
    while let Some((at, a)) = ways.pop() {
        if !seen.insert((at, a)) {
            continue;
        }
        let instruction = filter.get(at).context("the program ends without a word")?;
        let Instruction { code, jump_true, jump_false, k } = *instruction;
        let next = at + 1;
        match (code & 7, code) {
            // LD: the call's number and the architecture are known, its arguments are not.
            (0, 0x20) => ways.push((
                next,
                match k {
                    0 => Some(call),
                    4 => Some(ARCH),
                    _ => None,
                },
            )),
            (0, 0x00) => ways.push((next, Some(k))),
            (0, _) => ways.push((next, None)),
            // LDX, ST, STX: what they keep is only ever loaded as unknown.
            (1..=3, _) => ways.push((next, a)),
            // ALU with a constant, else unknown.
            (4, 0x54) => ways.push((next, a.map(|a| a & k))),
            (4, 0x44) => ways.push((next, a.map(|a| a | k))),
            (4, _) => ways.push((next, None)),
            (5, 0x05) => ways.push((next + usize::try_from(k)?, a)),
            (5, _) => {
                // The operand is k if the source bit is clear.
                let decided = a.filter(|_| code & 8 == 0).and_then(|a| match code & 0xf0 {
                    0x10 => Some(a == k),
                    0x20 => Some(a > k),
                    0x30 => Some(a >= k),
                    0x40 => Some(a & k != 0),
                    _ => None,
                });
                if decided != Some(false) {
                    ways.push((next + jump_true, a));
                }
                if decided != Some(true) {
                    ways.push((next + jump_false, a));
                }
            }
            (6, _) => {
                // Returning the accumulator, unknown, may be anything.
                let action = if code & 0x18 == 0x10 { a } else { Some(k) };
                if action.is_none_or(|action| ALLOWS.contains(&(action & ACTION))) {
                    return Ok(true);
                }
            }
            (7, 0x87) => ways.push((next, None)),
            (7, _) => ways.push((next, a)),
            _ => bail!("{code:#x} is no instruction of classic BPF"),
        }
    }
    Ok(false)
}

/// The filters that each thread installed, in order, from a log of `strace -f -v -X raw -e trace=seccomp,prctl -o`.
pub(crate) fn installed(log: &str) -> Result<BTreeMap<u32, Vec<Filter>>> {
    let mut threads: BTreeMap<u32, Vec<Filter>> = BTreeMap::new();
    for line in log.lines() {
        let Some((_, program)) = line.split_once("filter=[") else { continue };
        // A refused one is not there. (What was unfinished when it was written is taken to have succeeded.)
        if line.contains(") = -1 ") {
            continue;
        }
        let thread = line
            .split_whitespace()
            .next()
            .and_then(|pid| pid.parse().ok())
            .context("a line without thread")?;
        threads.entry(thread).or_default().push(parse(program)?);
    }
    Ok(threads)
}

/// `BPF_STMT(code, k), BPF_JUMP(code, k, jt, jf), …]`, codes written as `0x5|0|0x10`.
fn parse(program: &str) -> Result<Filter> {
    let (program, _) = program.split_once(']').context("strace shortened the program")?;
    let mut filter = Vec::new();
    for word in program.split("BPF_").skip(1) {
        let (_, arguments) = word.split_once('(').context("an instruction without arguments")?;
        let (arguments, _) = arguments.split_once(')').context("an instruction without end")?;
        let mut numbers = arguments.split(',').map(|argument| {
            argument.split('|').try_fold(0, |sum, part| Ok::<u32, anyhow::Error>(sum | number(part.trim())?))
        });
        let mut number = || numbers.next().unwrap_or(Ok(0));
        let (code, k, jump_true, jump_false) = (number()?, number()?, number()?, number()?);
        filter.push(Instruction {
            code,
            k,
            jump_true: usize::try_from(jump_true)?,
            jump_false: usize::try_from(jump_false)?,
        });
    }
    Ok(filter)
}

fn number(text: &str) -> Result<u32> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.with_context(|| format!("'{text}' is no number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// read(2) only with descriptor 3, write(2) always, all else kills.
    const LOG: &str = "7  seccomp(0x1, 0, {len=9, filter=[BPF_STMT(0|0|0x20, 0x4), BPF_JUMP(0x5|0|0x10, 0xc000003e, 0, 0x5), BPF_STMT(0|0|0x20, 0), BPF_JUMP(0x5|0|0x10, 0x1, 0x4, 0), BPF_JUMP(0x5|0|0x10, 0, 0, 0x2), BPF_STMT(0|0|0x20, 0x10), BPF_JUMP(0x5|0|0x10, 0x3, 0x1, 0), BPF_STMT(0x6|0, 0x80000000), BPF_STMT(0x6|0, 0x7fff0000)]}) = 0\n\
        7  seccomp(0x1, 0x1, NULL) = -1 EFAULT (Bad address)\n\
        9  prctl(0x16, 0x2, {len=1, filter=[BPF_STMT(0x6|0, 0x7fff0000)]}) = -1 EACCES (Permission denied)\n";

    #[test]
    fn a_call_that_some_argument_allows_counts_and_others_do_not() {
        let threads = installed(LOG).unwrap();
        assert_eq!(threads.keys().copied().collect::<Vec<_>>(), [7], "what was refused is not installed");
        assert_eq!(allowed(&threads[&7]).unwrap().into_iter().collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn two_filters_allow_what_both_do() {
        let mut filters = installed(LOG).unwrap().remove(&7).unwrap();
        let only_read = "BPF_STMT(0|0|0x20, 0), BPF_JUMP(0x5|0|0x10, 0, 0, 0x1), BPF_STMT(0x6|0, 0x7fff0000), BPF_STMT(0x6|0, 0x50001)]";
        filters.push(parse(only_read).unwrap());
        assert_eq!(allowed(&filters).unwrap().into_iter().collect::<Vec<_>>(), [0]);
    }

    #[test]
    fn without_a_filter_all_calls_are_allowed() {
        assert_eq!(allowed(&[]).unwrap().len(), 375);
    }

    #[test]
    fn a_program_that_runs_off_its_end_is_an_error() {
        assert!(allowed(&[parse("BPF_STMT(0|0|0x20, 0)]").unwrap()]).is_err());
        assert!(parse("BPF_STMT(0|0|0x20, 0), ...").is_err());
    }
}
