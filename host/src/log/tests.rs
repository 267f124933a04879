use super::reader::{Entries, show};
use super::*;

fn shown(directory: &Path, options: LogOptions) -> (String, String) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    show(directory, options, &|| true, &mut out, &mut err).unwrap();
    (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
}

#[test]
fn streams_stay_apart_and_bytes_untouched() {
    let directory = tempfile::tempdir().unwrap();
    let log = LogWriter::open(directory.path()).unwrap();
    log.write(StreamKind::Stdout, b"be");
    log.write(StreamKind::Stderr, b"oops\n");
    log.write(StreamKind::Stdout, b"gun\nno end");
    let expected = ("begun\nno end".to_owned(), "oops\n".to_owned());
    assert_eq!(shown(directory.path(), LogOptions::default()), expected);
}

#[test]
fn the_last_lines_are_those_that_ended_last() {
    let directory = tempfile::tempdir().unwrap();
    let log = LogWriter::open(directory.path()).unwrap();
    log.write(StreamKind::Stdout, b"1\n2\n3\n");
    log.write(StreamKind::Stderr, b"4\n");
    log.write(StreamKind::Stdout, b"5");
    let tail = |n| shown(directory.path(), LogOptions { tail: Some(n), ..Default::default() });
    assert_eq!(tail(2), ("5".into(), "4\n".into()));
    assert_eq!(tail(3), ("3\n5".into(), "4\n".into()));
    assert_eq!(tail(0), (String::new(), String::new()));
}

#[test]
fn each_line_has_its_time() {
    let directory = tempfile::tempdir().unwrap();
    let log = LogWriter::open(directory.path()).unwrap();
    log.write(StreamKind::Stdout, b"a\nb");
    log.write(StreamKind::Stdout, b"c\n");
    let (out, _) = shown(directory.path(), LogOptions { timestamps: true, ..Default::default() });
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines.len(), 2, "{out}");
    for (line, text) in lines.iter().zip(["a", "bc"]) {
        let (time, rest) = line.split_once(' ').unwrap();
        assert!(time.starts_with("20") && time.ends_with('Z'), "{line}");
        assert_eq!(rest, text);
    }
}

#[test]
fn a_flood_costs_two_files_and_the_newest_survives() {
    let directory = tempfile::tempdir().unwrap();
    let log = LogWriter::with_limit(directory.path(), 4096).unwrap();
    for n in 0..10_000 {
        log.write(StreamKind::Stdout, format!("{n}\n").as_bytes());
    }
    let sizes: Vec<u64> = fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .collect();
    assert_eq!(sizes.len(), 2);
    assert!(sizes.iter().all(|size| *size <= 4096), "{sizes:?}");
    let (out, _) = shown(directory.path(), LogOptions::default());
    let numbers: Vec<u32> = out.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(numbers.last(), Some(&9999));
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "no gap between the two files");
}

#[test]
fn a_reader_follows_over_a_rotation() {
    let directory = tempfile::tempdir().unwrap();
    let log = LogWriter::with_limit(directory.path(), 100).unwrap();
    let mut entries = Entries::new(directory.path());
    for n in 0..50_u32 {
        log.write(StreamKind::Stdout, n.to_string().as_bytes());
        let entry = entries.next().unwrap().expect("it was written");
        assert_eq!(entry.bytes, n.to_string().as_bytes());
        assert_eq!(entries.next().unwrap(), None);
    }
}

#[test]
fn a_garbled_log_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("log"), [0xff; 64]).unwrap();
    let mut sink = Vec::new();
    let mut other = Vec::new();
    let error = show(directory.path(), LogOptions::default(), &|| true, &mut sink, &mut other).unwrap_err();
    assert!(matches!(error, LogError::Read(_)), "{error}");
}

#[test]
fn a_log_goes_on_when_there_is_space_again() {
    let directory = tempfile::tempdir().unwrap();
    let log = LogWriter::with_limit(directory.path(), 64).unwrap();
    log.write(StreamKind::Stdout, &[b'a'; 40]);
    // Renamed away, and then there was no space for the next file.
    std::fs::rename(directory.path().join("log"), directory.path().join("log.old")).unwrap();
    log.write(StreamKind::Stdout, b"later\n");
    let (out, _) = shown(directory.path(), LogOptions::default());
    assert!(out.ends_with("later\n"), "{out:?}");
}
