//! Archives and their confined reader, with the true program: what it is left with, and what hostile archives come to.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use carrel_host::archive::{ArchiveReader, Started};
use carrel_protocol::confinement::Part;
use carrel_store::archive::{InThisProcess, IndexError, Indexer};

const CARREL: &str = env!("CARGO_BIN_EXE_carrel");
const BLOCK: usize = 512;
/// The most entries of an archive (docs/store.md).
const MOST_ENTRIES: usize = 16_384;

fn reader(without: &[Part]) -> ArchiveReader {
    ArchiveReader::new(CARREL.into(), without.to_vec(), Duration::from_secs(60))
}

/// A header with these raw fields and a right checksum.
fn header(name: &str, kind: u8, size: u64) -> [u8; BLOCK] {
    let mut header = tar::Header::new_ustar();
    let raw = header.as_old_mut();
    raw.name[..name.len()].copy_from_slice(name.as_bytes());
    raw.linkflag = [kind];
    header.set_size(size);
    header.set_cksum();
    *header.as_bytes()
}

fn write(folder: &Path, blocks: &[&[u8]]) -> PathBuf {
    let path = folder.join("image.tar");
    fs::write(&path, blocks.concat()).unwrap();
    path
}

fn open(path: &Path) -> (File, u64) {
    let file = File::open(path).unwrap();
    let length = file.metadata().unwrap().len();
    (file, length)
}

/// `carrel` with a home of its own below the folder.
fn carrel(folder: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(CARREL);
    command.args(words).env("CARREL_HOME", folder.join("home")).env_remove("CARREL_LOG");
    command.output().unwrap()
}

/// A field of `/proc/PID/status`.
fn status(reader: &Started, field: &str) -> String {
    let all = fs::read_to_string(format!("/proc/{}/status", reader.pid())).unwrap();
    let line = all.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {field}")).trim().to_owned()
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn the_reader_is_confined_before_it_has_an_archive() {
    let started = reader(&[]).start().unwrap();
    assert_eq!((status(&started, "Seccomp"), status(&started, "NoNewPrivs")), ("2".into(), "1".into()));
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(&started, set), "0000000000000000", "{set}");
    }
    assert_eq!(status(&started, "Threads"), "1");
    assert_eq!(
        status(&started, "NSpid").split_whitespace().nth(1),
        Some("1"),
        "the first of its own PID namespace"
    );
    let limits = fs::read_to_string(format!("/proc/{}/limits", started.pid())).unwrap();
    for (name, limit) in [
        ("Max cpu time", "20 21"),
        ("Max address space", "268435456 268435456"),
        ("Max open files", "5 5"),
        ("Max processes", "0 0"),
        ("Max file size", "0 0"),
        ("Max core file size", "0 0"),
        ("Max locked memory", "0 0"),
    ] {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        let words: Vec<&str> = line.split_whitespace().take(2).collect();
        assert_eq!(words.join(" "), limit, "{name}");
    }
    // The kernel shows the rest of a process that isn't dumpable to root alone.
    if !is_root() {
        return;
    }
    for namespace in ["user", "mnt", "pid", "net", "ipc", "uts"] {
        let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{namespace}")).unwrap();
        assert_ne!(of(&started.pid().to_string()), of("self"), "{namespace}");
    }
    let user: u32 = status(&started, "Uid").split_whitespace().next().unwrap().parse().unwrap();
    assert!(user >= 0x7800_0000, "a user that is nobody's: {user}");
    assert_eq!(fs::read_dir(format!("/proc/{}/root", started.pid())).unwrap().count(), 0, "an empty root");
    let null = fs::metadata("/dev/null").unwrap().rdev();
    let mut open: Vec<(String, &str)> = fs::read_dir(format!("/proc/{}/fd", started.pid()))
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            // By what they are: a path in a root that was left says little.
            let what = fs::metadata(entry.path()).unwrap();
            let what = match what.file_type() {
                kind if kind.is_socket() => "socket",
                kind if kind.is_char_device() && what.rdev() == null => "null",
                _ => "something else",
            };
            (entry.file_name().into_string().unwrap(), what)
        })
        .collect();
    open.sort();
    let expected = [("0", "null"), ("1", "null"), ("2", "null"), ("3", "socket")];
    assert_eq!(open, expected.map(|(number, what)| (number.to_owned(), what)));
    assert_eq!(
        fs::read(format!("/proc/{}/environ", started.pid())).unwrap(),
        b"",
        "no word of our environment"
    );
}

#[test]
fn parts_are_left_out_only_when_told_so() {
    let started = reader(&[Part::Seccomp]).start().unwrap();
    assert_eq!((status(&started, "Seccomp"), status(&started, "NoNewPrivs")), ("0".into(), "1".into()));
    let started = reader(&[Part::Namespaces]).start().unwrap();
    assert_eq!(status(&started, "NSpid").split_whitespace().count(), 1 + own_depth());
    assert_eq!(
        (status(&started, "Seccomp"), status(&started, "CapEff")),
        ("2".into(), "0000000000000000".into())
    );
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), &[&header("a", b'0', 0), &[0; 2 * BLOCK]]);
    let (file, length) = open(&path);
    for without in [&[][..], &[Part::Capabilities], &Part::ALL] {
        assert_eq!(reader(without).index(&file, length).unwrap().count(), 1, "{without:?}");
    }
}

/// In how many PID namespaces below the outermost one this process is.
fn own_depth() -> usize {
    let all = fs::read_to_string("/proc/self/status").unwrap();
    all.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap().split_whitespace().count() - 1
}

#[test]
fn the_confined_reader_finds_what_a_reader_here_finds() {
    let folder = tempfile::tempdir().unwrap();
    // As many entries and as long names as there may be: 16,384 of 254 bytes.
    let mut bytes = Vec::with_capacity((MOST_ENTRIES + 2) * BLOCK);
    for n in 0..MOST_ENTRIES {
        let mut header = tar::Header::new_ustar();
        header.set_path(format!("{}/{n:0>98}", "p".repeat(155))).unwrap();
        header.set_size(0);
        header.set_cksum();
        bytes.extend(header.as_bytes());
    }
    let path = write(folder.path(), &[&bytes, &[0; 2 * BLOCK]]);
    let (file, length) = open(&path);
    let begun = Instant::now();
    let found = reader(&[]).index(&file, length).unwrap();
    println!("{MOST_ENTRIES} entries in {:?}", begun.elapsed());
    assert_eq!(found.count(), MOST_ENTRIES);
    assert_eq!(found, InThisProcess.index(&file, length).unwrap());
}

#[test]
fn a_reader_goes_with_the_thread_that_started_it() {
    let started = std::thread::spawn(|| reader(&[]).start().unwrap()).join().unwrap();
    let (file, length) = open(Path::new("/dev/null"));
    let Err(IndexError::Failed(error)) = started.read(&file, length) else { panic!("it answered") };
    assert!(error.to_string().contains("was killed"), "{error}");
}

#[test]
fn nobody_starts_a_reader_by_hand() {
    let folder = tempfile::tempdir().unwrap();
    for words in [
        &["read-archive"][..],
        &["read-archive", "--unconfined=nothing"],
        &["read-archive", "a.tar"],
        &["read-ahead"],
        &["read-ahead", "a"],
    ] {
        let output = carrel(folder.path(), words);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{words:?}");
    }
}

/// One sentence, status 1, and nothing left.
fn refused(folder: &Path, path: &Path, word: &str) {
    for kind in ["oci-archive", "docker-archive"] {
        let image = format!("{kind}:{}", path.display());
        let output = carrel(folder, &["pull", &image]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.starts_with("carrel: ") && said.contains(word), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(output.stdout.is_empty());
        let store = folder.join("home/store");
        for empty in ["ingest", "images", "blobs/sha256"] {
            let left = fs::read_dir(store.join(empty)).map_or(0, Iterator::count);
            assert_eq!(left, 0, "{empty} after {said}");
        }
    }
}

#[test]
fn hostile_archives_come_to_one_sentence_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let (end, content) = ([0; 2 * BLOCK], [7; BLOCK]);
    let mut corrupted = header("b", b'0', 0);
    corrupted[0] ^= 1;
    let mut largest = header("b", b'0', 0);
    largest[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    let mut fixed = tar::Header::new_old();
    fixed.as_mut_bytes().copy_from_slice(&largest);
    fixed.set_cksum();
    let largest = *fixed.as_bytes();
    let first = header("a", b'0', 512);
    let cases: &[(&[&[u8]], &str)] = &[
        (&[&first, &content, &corrupted, &end], "the header at byte 1024 has a wrong checksum"),
        (&[&first, &content, &largest, &end], "is truncated"),
        (&[&first, &content, &header("b", b'0', 1 << 32), &end], "is truncated"),
        (&[&first, &content[..100]], "is truncated"),
        (&[&first, &content], "is truncated"),
        (&[&first, &content, &first[..100]], "is truncated"),
        (&[&header("../../a", b'0', 0), &end], "leads out of the archive"),
        (&[&header("/etc/passwd", b'0', 0), &end], "absolute name"),
        (&[&header("dev\x1b[2J", b'3', 0), &end], "the entry \"dev[2J\" of a kind"),
        (&[&first, &content, &first, &content, &end], "is there twice"),
        (&[&[0x1f, 0x8b], &content], "gunzip"),
        (&[b"not a tar"], "is no tar archive"),
        (&[], "is no tar archive"),
    ];
    for (blocks, word) in cases {
        refused(folder, &write(folder, blocks), word);
    }
}

/// A million of headers: those that are read, and as many bytes as the others would take, as a hole.
#[test]
fn a_flood_of_entries_is_refused_without_being_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("flood.tar");
    let file = File::create(&path).unwrap();
    file.set_len(1_000_000 * BLOCK as u64).unwrap();
    let headers: Vec<u8> = (0..=MOST_ENTRIES).flat_map(|n| header(&n.to_string(), b'0', 0)).collect();
    file.write_all_at(&headers, 0).unwrap();
    refused(folder.path(), &path, "more than 16384 entries");
    // The same of headers that are no entries.
    let extension = [header("x", b'x', 0), header("g", b'g', 0)].concat();
    let headers = extension.repeat((1 << 16) + 1);
    file.write_all_at(&headers, 0).unwrap();
    refused(folder.path(), &path, "more than 16384 entries");
}

#[test]
fn an_image_in_an_archive_is_pulled_through_the_reader() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let config = br#"{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]}}"#;
    let manifest = br#"[{"Config":"config.json","RepoTags":["a:1"],"Layers":[]}]"#;
    let mut tar = tar::Builder::new(File::create(folder.join("image.tar")).unwrap());
    for (name, bytes) in [("config.json", &config[..]), ("manifest.json", &manifest[..])] {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        tar.append_data(&mut header, name, bytes).unwrap();
    }
    tar.finish().unwrap();
    let image = format!("docker-archive:{}", folder.join("image.tar").display());
    let output = carrel(folder, &["pull", "--platform", "linux/amd64", "--quiet", &image]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(output.stdout.starts_with(b"sha256:"));
}
