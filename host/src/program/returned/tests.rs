use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use carrel_protocol::returned::{Done, Missing};
use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits { bytes: 1 << 20, entries: 100 };

fn entry(path: &str, kind: Kind) -> Vec<u8> {
    FromRoom::from(Entry { root: 0, path: path.into(), kind, mode: 0o6777, mtime: 1_000_000_000 })
        .encode()
        .unwrap()
}

fn folder(path: &str) -> Vec<u8> {
    entry(path, Kind::Directory)
}

fn file(path: &str, text: &str) -> Vec<u8> {
    let bytes = u64::try_from(text.len()).unwrap();
    [entry(path, Kind::File { bytes }), text.as_bytes().to_vec()].concat()
}

fn link(path: &str, target: &str) -> Vec<u8> {
    entry(path, Kind::Link { target: target.into() })
}

fn done() -> Vec<u8> {
    FromRoom::from(Done { left_out: 1 }).encode().unwrap()
}

/// A bed with a folder that is nobody's business.
struct Bed {
    folder: tempfile::TempDir,
}

impl Bed {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("outside")).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn take(&self, said: &[Vec<u8>]) -> Result<Received, ReturnError> {
        let to = Destination { in_room: "/out".into(), on_host: self.path("back/out") };
        take(said.concat().as_slice(), &[to], LIMITS)
    }

    fn untouched(&self) {
        assert_eq!(fs::read_dir(self.path("outside")).unwrap().count(), 0);
        let names: Vec<_> =
            fs::read_dir(self.folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(names.iter().all(|name| name == "outside" || name == "back"), "{names:?}");
    }
}

#[test]
fn a_folder_comes_back_with_all_that_is_in_it() {
    let bed = Bed::new();
    let said =
        [folder(""), file("a", "one"), folder("sub"), file("sub/b", "two"), link("sub/l", "../a"), done()];
    let received = bed.take(&said).unwrap();
    assert_eq!((received.entries, received.bytes, received.left_out), (5, 6, 1));
    let back = bed.path("back/out");
    assert_eq!(fs::read_to_string(back.join("sub/l")).unwrap(), "one");
    assert_eq!(fs::read_to_string(back.join("sub/b")).unwrap(), "two");
    let metadata = fs::metadata(back.join("a")).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o755, "no set-user-ID, no write for others");
    assert_eq!(
        metadata.modified().unwrap().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs(),
        1_000_000_000
    );
    // Again, over what is there.
    bed.take(&[folder(""), file("a", "newer"), link("sub/l", "b"), done()]).unwrap();
    assert_eq!(fs::read_to_string(back.join("a")).unwrap(), "newer");
    assert_eq!(fs::read_to_string(back.join("sub/l")).unwrap(), "two");
    bed.untouched();
}

#[test]
fn a_file_comes_back_alone_and_what_was_not_there_is_named() {
    let bed = Bed::new();
    let missing = FromRoom::from(Missing { root: 0 }).encode().unwrap();
    assert_eq!(bed.take(&[missing.clone(), missing, done()]).unwrap().missing, ["/out"]);
    bed.take(&[file("", "report"), done()]).unwrap();
    assert_eq!(fs::read_to_string(bed.path("back/out")).unwrap(), "report");
}

#[test]
fn no_path_leads_out() {
    for path in ["../x", "/etc/x", "a/../../x", "..", ".", "a//b", "a/", "./a", "a\0b", &"x".repeat(300)] {
        let bed = Bed::new();
        let error = bed.take(&[folder(""), file(path, "x"), done()]).unwrap_err();
        assert!(matches!(error, ReturnError::Path(_)), "{path:?}: {error}");
        bed.untouched();
    }
    // Nor one below a folder that was never sent.
    let bed = Bed::new();
    assert!(matches!(bed.take(&[file("a", "x")]).unwrap_err(), ReturnError::Path(_)));
    assert!(bed.take(&[folder(""), file("sub/a", "x")]).is_err());
}

#[test]
fn no_link_is_a_way_out_whoever_made_it() {
    // The guest's own are left out, and what it sends through one that stays is refused.
    for target in ["/etc/passwd", "../outside", "sub/../../outside", ""] {
        let bed = Bed::new();
        let received = bed.take(&[folder(""), link("l", target), done()]).unwrap();
        assert_eq!(received.left_out, 2, "{target}");
        assert!(fs::symlink_metadata(bed.path("back/out/l")).is_err());
    }
    let bed = Bed::new();
    let error = bed.take(&[folder(""), folder("d"), link("l", "d"), file("l/x", "x"), done()]).unwrap_err();
    assert!(matches!(error, ReturnError::Write { .. }), "{error}");
    // One that lies there already leads somebody else's file nowhere.
    let bed = Bed::new();
    fs::create_dir_all(bed.path("back/out")).unwrap();
    symlink(bed.path("outside"), bed.path("back/out/sub")).unwrap();
    symlink(bed.path("outside/file"), bed.path("back/out/file")).unwrap();
    assert!(bed.take(&[folder(""), folder("sub"), done()]).is_err());
    bed.take(&[folder(""), file("file", "mine"), done()]).unwrap();
    assert_eq!(fs::read_to_string(bed.path("back/out/file")).unwrap(), "mine");
    bed.untouched();
}

#[test]
fn more_than_was_allowed_and_less_than_was_announced_are_errors() {
    let bed = Bed::new();
    let large = entry("", Kind::File { bytes: (1 << 20) + 1 });
    assert!(matches!(bed.take(&[large]).unwrap_err(), ReturnError::TooMuch(_)));
    let many: Vec<_> =
        std::iter::once(folder("")).chain((0..100).map(|n| file(&n.to_string(), ""))).collect();
    assert!(matches!(bed.take(&many).unwrap_err(), ReturnError::TooMuch(_)));
    let mut short = file("", "whole");
    short.pop();
    fs::write(bed.path("back/old"), "").unwrap();
    assert!(matches!(
        bed.take(&[folder(""), short[..short.len()].to_vec()]).unwrap_err(),
        ReturnError::Broken(_)
    ));
    let names =
        fs::read_dir(bed.path("back")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    assert!(names.into_iter().all(|name| !name.starts_with(".carrel")), "half a file stays");
    assert!(matches!(bed.take(&[folder("")]).unwrap_err(), ReturnError::Broken(_)), "no end");
}

#[test]
fn a_silent_room_is_given_up() {
    let bed = Bed::new();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let error = receive(ours, &[], LIMITS, Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, ReturnError::Broken(FrameError::Io(_))), "{error}");
    drop(bed);
}

proptest! {
    #[test]
    fn whatever_is_sent_stays_below(
        entries in prop::collection::vec(("[a-c./]{0,6}", 0_u8..3, "[a-c./]{0,6}"), 0..12),
        garbage in prop::collection::vec(any::<u8>(), 0..20),
    ) {
        let bed = Bed::new();
        let mut said = vec![folder("")];
        for (path, kind, target) in &entries {
            said.push(match kind { 0 => folder(path), 1 => file(path, target), _ => link(path, target) });
        }
        said.push(garbage);
        let _ = bed.take(&said);
        bed.untouched();
    }
}
