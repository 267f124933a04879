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

    /// Each link below leads into what came back, or nowhere.
    fn no_link_leads_out(&self, folder: &Path) {
        let inside = fs::canonicalize(self.path("back/out")).unwrap_or_default();
        for entry in fs::read_dir(folder).into_iter().flatten().map(Result::unwrap) {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                self.no_link_leads_out(&entry.path());
            } else if kind.is_symlink()
                && let Ok(leads) = fs::canonicalize(entry.path())
            {
                assert!(leads.starts_with(&inside), "{:?} leads to {leads:?}", entry.path());
            }
        }
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
fn a_link_through_another_does_not_lead_out() {
    let bed = Bed::new();
    let deep = ["", "a", "a/b", "a/b/c"].map(folder);
    // By its letters it stays; by what `s` is it leads above.
    let planted = [link("a/b/c/s", "../../.."), link("t", "a/b/c/s/../victim"), done()];
    let received = bed.take(&[&deep[..], &planted].concat()).unwrap();
    assert_eq!(received.left_out, 2, "the second one");
    assert!(fs::symlink_metadata(bed.path("back/out/t")).is_err());
    assert_eq!(
        fs::canonicalize(bed.path("back/out/a/b/c/s")).unwrap(),
        fs::canonicalize(bed.path("back/out")).unwrap()
    );
    bed.untouched();
    // Nor through one of the user's own, on another's back.
    symlink(bed.path("outside"), bed.path("back/out/own")).unwrap();
    let said = [folder(""), link("t", "own/file"), link("u", "own"), link("v", "a/b/c/s/own/file"), done()];
    assert_eq!(bed.take(&said).unwrap().left_out, 4);
}

#[test]
fn what_came_back_is_no_way_to_another_destination() {
    let bed = Bed::new();
    fs::write(bed.path("outside/file"), "original").unwrap();
    let to =
        |in_room: &str, on_host: &str| Destination { in_room: in_room.into(), on_host: bed.path(on_host) };
    let to = [to("/out", "back/out"), to("/t", "back/out/t")];
    // It is in the first one's folder already when the second one's content comes.
    let second = FromRoom::from(Entry {
        root: 1,
        path: String::new(),
        kind: Kind::File { bytes: 5 },
        mode: 0o600,
        mtime: 0,
    });
    let said =
        [folder(""), file("f", "mine"), link("t", "f"), second.encode().unwrap(), b"pwned".to_vec(), done()];
    take(said.concat().as_slice(), &to, LIMITS).unwrap();
    assert_eq!(fs::read_to_string(bed.path("back/out/f")).unwrap(), "mine");
    assert_eq!(fs::read_to_string(bed.path("back/out/t")).unwrap(), "pwned");
    assert!(!fs::symlink_metadata(bed.path("back/out/t")).unwrap().is_symlink());
    assert_eq!(fs::read_to_string(bed.path("outside/file")).unwrap(), "original");
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

/// Often a path that may be, some levels deep.
const NAME: &str = "(a|b|c|[.][.]|[.]|)(/(a|b|c|[.][.])){0,4}";

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn whatever_is_sent_stays_below(
        entries in prop::collection::vec((NAME, 0_u8..3, NAME), 0..16),
        garbage in prop::collection::vec(any::<u8>(), 0..20),
    ) {
        let bed = Bed::new();
        let mut said = vec![folder("")];
        for (path, kind, target) in &entries {
            said.push(match kind { 0 => folder(path), 1 => file(path, target), _ => link(path, target) });
        }
        said.push(garbage);
        let _ = bed.take(&said);
        bed.no_link_leads_out(&bed.path("back/out"));
        bed.untouched();
    }
}
