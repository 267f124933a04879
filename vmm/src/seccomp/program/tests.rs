//! The programs, run by an interpreter, say what the table says.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::super::{CALLS, RUN_EVENTS, RUN_VCPU, SET_UP, Who, call};
use super::*;

const PROCESS: u32 = 0x1234_5678;
const STAGES: [Stage; 3] = [Stage::SetUp, Stage::RunEvents, Stage::RunVcpu];
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const ENOSYS: u32 = 0x0005_0026; // SECCOMP_RET_ERRNO | 38

/// The kernel's struct seccomp_data without its instruction pointer, which no filter of ours looks at.
#[derive(Clone, Copy, Debug)]
struct Attempt {
    number: u32,
    architecture: u32,
    args: [u64; 6],
}

impl Attempt {
    fn of(number: u32, args: [u64; 6]) -> Self {
        Self { number, architecture: X86_64, args }
    }

    fn word(&self, offset: usize) -> u32 {
        let mut bytes = Vec::new();
        bytes.extend(self.number.to_le_bytes());
        bytes.extend(self.architecture.to_le_bytes());
        bytes.extend([0xee; 8]);
        bytes.extend(self.args.iter().flat_map(|arg| arg.to_le_bytes()));
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
    }
}

/// What a program said, and how it came to it.
struct Run {
    verdict: u32,
    steps: usize,
    looked_at_arguments: bool,
}

/// Classic BPF as far as our programs go; a jump out of the program or another instruction is a panic.
fn run(program: &[sock_filter], attempt: &Attempt) -> Run {
    let (mut at, mut accumulator, mut steps, mut looked_at_arguments) = (0, 0, 0, false);
    loop {
        let sock_filter { code, jt, jf, k } = program[at];
        steps += 1;
        at += 1;
        let branch = |holds| usize::from(if holds { jt } else { jf });
        match code {
            0x20 => {
                accumulator = attempt.word(k.try_into().unwrap());
                looked_at_arguments |= k >= 8;
            }
            0x15 => at += branch(accumulator == k),
            0x35 => at += branch(accumulator >= k),
            0x45 => at += branch(accumulator & k != 0),
            0x06 => return Run { verdict: k, steps, looked_at_arguments },
            other => panic!("instruction {other:#x}"),
        }
    }
}

fn program(stage: Stage) -> Vec<sock_filter> {
    match stage {
        Stage::SetUp => SET_UP.of_process(PROCESS).to_vec(),
        Stage::RunEvents => RUN_EVENTS.of_process(PROCESS).to_vec(),
        Stage::RunVcpu => RUN_VCPU.of_process(PROCESS).to_vec(),
    }
}

/// A table's meaning, line by line.
fn meaning(calls: &[Call], stage: Stage, attempt: &Attempt) -> u32 {
    let lower = |index: u8| attempt.args[usize::from(index)] & 0xffff_ffff;
    let allows = |call: &Call| {
        stage.has(call.who)
            && call.number == i64::from(attempt.number)
            && call.args.iter().all(|arg| match *arg {
                Arg::OneOf(index, values) => values.contains(&lower(index)),
                Arg::Without(index, bits) => lower(index) & bits == 0,
                Arg::OwnProcess(index) => lower(index) == u64::from(PROCESS),
            })
    };
    if attempt.architecture != X86_64 {
        KILL
    } else if stage == Stage::SetUp && i64::from(attempt.number) == libc::SYS_clone3 {
        ENOSYS
    } else if calls.iter().any(allows) {
        ALLOW
    } else {
        KILL
    }
}

/// Every value that a condition of the table compares with, its neighbours, and the same with something in the upper half.
fn interesting() -> Vec<u64> {
    let mut values: BTreeSet<u64> = [0, 1, 0x7fff_ffff, 0xffff_ffff].into();
    for arg in CALLS.iter().flat_map(|call| call.args) {
        match *arg {
            Arg::OneOf(_, of) => values.extend(of),
            Arg::Without(_, bits) => values.extend([bits, !bits & 0xffff_ffff, bits | 3]),
            Arg::OwnProcess(_) => values.extend([u64::from(PROCESS)]),
        }
    }
    let near: BTreeSet<u64> = values.iter().flat_map(|&v| [v.saturating_sub(1), v, v + 1]).collect();
    near.iter().flat_map(|&v| [v, v | 1 << 32, v | 0xffff_ffff << 32]).collect()
}

fn numbers() -> impl Iterator<Item = u32> {
    let ends = [0x7fff_ffff, 0x8000_0000, u32::MAX];
    (0..1024).flat_map(|number| [number, number | 0x4000_0000, number | 0x8000_0000]).chain(ends)
}

fn check(stage: Stage, program: &[sock_filter], attempt: &Attempt) {
    assert_eq!(run(program, attempt).verdict, meaning(CALLS, stage, attempt), "{stage:?}, {attempt:x?}");
}

#[test]
fn every_number_means_what_the_table_says() {
    for stage in STAGES {
        let program = program(stage);
        for number in numbers() {
            check(stage, &program, &Attempt::of(number, [0; 6]));
            check(stage, &program, &Attempt::of(number, [u64::MAX; 6]));
        }
    }
}

#[test]
fn every_condition_means_what_the_table_says() {
    let values = interesting();
    for stage in STAGES {
        let program = program(stage);
        for call in CALLS {
            let number = u32::try_from(call.number).unwrap();
            for (index, &value) in (0..6).flat_map(|index| values.iter().map(move |value| (index, value))) {
                let mut args = [0; 6];
                args[index] = value;
                check(stage, &program, &Attempt::of(number, args));
                // With the process's own id, where the others are reached behind it.
                args[0] = if index == 0 { value } else { u64::from(PROCESS) };
                check(stage, &program, &Attempt::of(number, args));
            }
        }
    }
}

#[test]
fn each_stage_allows_each_of_its_lines() {
    for stage in STAGES {
        let program = program(stage);
        for call in CALLS.iter().filter(|call| stage.has(call.who)) {
            let mut args = [0; 6];
            for arg in call.args {
                match *arg {
                    Arg::OneOf(index, values) => args[usize::from(index)] = values[values.len() - 1],
                    Arg::Without(index, bits) => args[usize::from(index)] = !bits,
                    Arg::OwnProcess(index) => args[usize::from(index)] = u64::from(PROCESS),
                }
            }
            let attempt = Attempt::of(call.number.try_into().unwrap(), args);
            assert_eq!(run(&program, &attempt).verdict, ALLOW, "{stage:?}: {}", call.why);
        }
    }
}

#[test]
fn another_architecture_is_killed_whatever_it_calls() {
    for stage in STAGES {
        let program = program(stage);
        for architecture in [0x4000_0003, 0, 62, 0xc000_00b7, u32::MAX] {
            for number in numbers() {
                let run = run(&program, &Attempt { number, architecture, args: [0; 6] });
                assert_eq!(run.verdict, KILL, "{stage:?}, {number:#x} of {architecture:#x}");
            }
        }
    }
}

/// Linux notes at installation which numbers are allowed whatever their arguments, and runs no filter for them. It can tell if nothing
/// but the number is looked at.
#[test]
fn a_call_without_conditions_is_decided_by_its_number_in_a_few_steps() {
    for stage in STAGES {
        let program = program(stage);
        for number in numbers() {
            let decided = run(&program, &Attempt::of(number, [0; 6]));
            let conditional =
                CALLS.iter().any(|call| call.number == i64::from(number) && !call.args.is_empty());
            assert!(!decided.looked_at_arguments || conditional, "{stage:?}: {number}");
            assert!(conditional || decided.steps <= 13, "{stage:?}: {number} takes {}", decided.steps);
        }
    }
}

/// What each entry into the guest passes: its thread's filter and the set-up's.
#[test]
fn entering_the_guest_takes_few_steps() {
    let kvm_run = Attempt::of(libc::SYS_ioctl.try_into().unwrap(), [0, 0xae80, 0, 0, 0, 0]);
    for stage in [Stage::SetUp, Stage::RunVcpu] {
        let entry = run(&program(stage), &kvm_run);
        assert_eq!(entry.verdict, ALLOW);
        assert!(entry.steps <= 14, "{stage:?}: {}", entry.steps);
    }
}

#[test]
fn numbers_are_searched_in_ascending_order_and_once() {
    let mut numbers = Numbers { sorted: [(0, Label(0)); CAPACITY], count: 0 };
    for number in [9, 3, 200, 0, 17] {
        numbers.insert(number, Label(usize::try_from(number).unwrap()));
    }
    let sorted: Vec<_> = numbers.sorted[..numbers.count].iter().map(|(n, label)| (*n, label.0)).collect();
    assert_eq!(sorted, [(0, 0), (3, 3), (9, 9), (17, 17), (200, 200)]);
    for stage in STAGES {
        let equal = |i: &sock_filter| i.code == 0x15;
        let searched: Vec<u32> = program(stage)[3..]
            .iter()
            .take_while(|i| i.code != 0x20)
            .filter(|i| equal(i))
            .map(|i| i.k)
            .collect();
        assert!(searched.is_sorted_by(|a, b| a < b), "{stage:?}: {searched:?}");
        let mut calls: BTreeSet<i64> = super::super::allowed(stage).map(|(number, _)| number).collect();
        if stage == Stage::SetUp {
            calls.insert(libc::SYS_clone3);
        }
        assert!(searched.iter().map(|&n| i64::from(n)).eq(calls), "{stage:?}");
    }
}

#[test]
fn a_line_that_another_covers_takes_no_instructions() {
    for stage in STAGES {
        let own = program(stage).iter().filter(|i| i.code == 0x15 && i.k == PROCESS).count();
        assert_eq!(own, 1, "{stage:?} compares with the process's id once");
    }
    let entries = program(Stage::SetUp).iter().filter(|i| i.k == 0xae80).count();
    assert_eq!(entries, 1, "KVM_RUN is in two lines of the set-up");
}

/// The numbers that docs/vmm.md gives; growth by half asks for a look.
#[test]
fn programs_are_short() {
    let lengths = STAGES.map(|stage| program(stage).len());
    println!("instructions: {lengths:?}");
    assert!(lengths.iter().zip([180, 100, 63]).all(|(length, most)| *length <= most), "{lengths:?}");
}

/// Lines such as the real table has none of: several conditions in several lines, on the same argument, some free.
fn table() -> impl Strategy<Value = Vec<Call>> {
    let values = || prop::collection::vec(0u64..6, 1..4).prop_map(|values| &*values.leak());
    let arg = prop_oneof![
        (0u8..3, values()).prop_map(|(index, values)| Arg::OneOf(index, values)),
        (0u8..3, 1u64..6).prop_map(|(index, bits)| Arg::Without(index, bits)),
    ];
    let who = prop::sample::select(vec![Who::SetUp, Who::Events, Who::Vcpu, Who::Both]);
    let line = (0i64..10, who, prop::collection::vec(arg, 0..4));
    let line = line.prop_map(|(number, who, args)| call(number, who, args.leak(), "made up"));
    prop::collection::vec(line, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]
    #[test]
    fn any_call_means_what_the_table_says(
        number in prop_oneof![0u32..512, any::<u32>()],
        known in prop::option::of(0..CALLS.len()),
        args in prop::array::uniform6(prop_oneof![
            any::<u64>(),
            prop::sample::select(interesting()),
            Just(u64::from(PROCESS)),
        ]),
        architecture in prop_oneof![9 => Just(X86_64), 1 => any::<u32>()],
    ) {
        let number = known.map_or(number, |at| u32::try_from(CALLS[at].number).unwrap());
        for stage in STAGES {
            check(stage, &program(stage), &Attempt { number, architecture, args });
        }
    }

    #[test]
    fn any_table_is_assembled_to_its_meaning(
        calls in table(),
        attempts in prop::collection::vec((0u32..12, prop::array::uniform6(0u64..7)), 64),
    ) {
        for stage in STAGES {
            let assembly = assemble(&calls, stage);
            let program = &assembly.instructions[CAPACITY - assembly.len()..];
            for (number, args) in &attempts {
                let attempt = Attempt::of(*number, *args);
                let (says, means) = (run(program, &attempt).verdict, meaning(&calls, stage, &attempt));
                prop_assert_eq!(says, means, "{:?}, {:x?}", stage, attempt);
            }
        }
    }
}
