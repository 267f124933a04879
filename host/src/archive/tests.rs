//! Readers that fail: a shell in the reader's place. The true one is tried with the `carrel` program, in `cli/tests/archives.rs`.

use carrel_protocol::Message;
use carrel_store::archive::{Entry, Kind};

use super::api::{Done, Entries, Ready};
use super::*;

/// A reader that is a shell without namespaces, where it may end itself by a signal.
fn shell(script: &str, deadline: Duration) -> ArchiveReader {
    ArchiveReader {
        program: fs::canonicalize("/bin/sh").unwrap(),
        arguments: ["sh", "-c", script].map(str::to_owned).into(),
        without: vec![Part::Namespaces],
        deadline,
    }
}

/// What makes a shell say this.
fn saying(message: impl Into<FromReader>) -> String {
    let bytes = message.into().encode().unwrap();
    let escaped: String = bytes.iter().map(|byte| format!("\\{byte:03o}")).collect();
    format!("printf '{escaped}' >&3; ")
}

fn ready() -> String {
    saying(Ready {})
}

fn index(script: &str) -> Result<Index, ReaderError> {
    let archive = tempfile::tempfile().unwrap();
    shell(script, Duration::from_secs(20)).index(&archive, 100).map_err(|error| match error {
        IndexError::Failed(error) => *error.downcast().unwrap(),
        IndexError::Refused(refusal) => panic!("{refusal:?}"),
    })
}

fn file(name: &str, offset: u64, length: u64) -> Entry {
    Entry { name: name.into(), kind: Kind::File { offset, length } }
}

#[test]
fn what_a_reader_tells_comes_together() {
    let said = [
        saying(Entries(vec![file("a", 0, 10), file("b", 10, 90)])),
        saying(Entries(vec![Entry { name: "c".into(), kind: Kind::Link { to: "a".into() } }])),
        saying(Done {}),
    ];
    let index = index(&(ready() + &said.concat())).unwrap();
    let names: Vec<String> = index.into_entries().map(|entry| entry.name).collect();
    assert_eq!(names, ["a", "b", "c"]);
}

#[test]
fn a_reader_that_dies_is_told_by_how_it_died() {
    for (script, word) in [
        ("kill -KILL $$", "was killed"),
        ("kill -SYS $$", "a system call that it may not make"),
        ("kill -XCPU $$", "CPU time"),
        ("kill -SEGV $$", "crashed"),
        ("exit 1", "without an answer"),
        ("exit 0", "without an answer"),
    ] {
        for script in [script.to_owned(), ready() + script] {
            let error = index(&script).unwrap_err();
            assert!(matches!(error, ReaderError::Ended(_)) && error.to_string().contains(word), "{error}");
        }
    }
}

#[test]
fn a_reader_that_answers_garbage_is_not_believed() {
    let garbage = [
        "printf garbage >&3; ",
        "printf '\\377\\377\\377\\377\\3\\0\\0\\0' >&3; ",
        "printf '\\1\\0\\0\\0\\3\\0\\0\\0x' >&3; ",
    ];
    for script in garbage {
        for script in [script.to_owned(), ready() + script] {
            assert!(matches!(index(&script), Err(ReaderError::Garbled(_))), "{script}");
        }
    }
}

#[test]
fn a_reader_that_lies_or_speaks_out_of_turn_is_not_believed() {
    let entries = |all: &[Entry]| ready() + &saying(Entries(all.to_vec())) + &saying(Done {});
    for script in [
        saying(Done {}),
        ready() + &ready(),
        entries(&[]),
        entries(&[file("../../etc/passwd", 0, 1)]),
        entries(&[file("/etc/passwd", 0, 1)]),
        entries(&[file("beyond", 90, 11)]),
        entries(&[file("beyond", u64::MAX, u64::MAX)]),
        entries(&[file("twice", 0, 1), file("twice", 1, 1)]),
    ] {
        assert!(matches!(index(&script), Err(ReaderError::Nonsense)), "{script}");
    }
}

#[test]
fn a_reader_that_hangs_is_given_up_in_time_and_ended() {
    let archive = tempfile::tempfile().unwrap();
    let reader = shell("exec sleep 1000", Duration::from_millis(200));
    let begun = Instant::now();
    assert!(matches!(reader.start(), Err(ReaderError::Hung(_))));
    assert!(begun.elapsed() < Duration::from_secs(100));

    // One that closes its connection and lives on hangs too.
    for script in ["exec sleep 1000", "exec 3>&-; exec sleep 1000"] {
        let started = shell(&(ready() + script), Duration::from_secs(2)).start().unwrap();
        let process = format!("/proc/{}", started.pid());
        assert!(fs::exists(&process).unwrap());
        let Err(IndexError::Failed(error)) = started.read(&archive, 0) else { panic!("it answered") };
        assert!(error.to_string().contains("2 s"), "{error}");
        assert!(!fs::exists(&process).unwrap());
    }
}

#[test]
fn a_part_that_the_host_can_not_give_is_named() {
    let missing = api::Unconfined { part: "an empty root: Operation not permitted".into() };
    let error = index(&saying(missing)).unwrap_err().to_string();
    assert!(error.contains("an empty root") && error.contains("--unconfined"), "{error}");
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let reader = ArchiveReader::new("/no/such/program".into(), Vec::new(), Duration::from_secs(1));
    assert!(reader.start().unwrap_err().to_string().contains("/no/such/program"));
}
