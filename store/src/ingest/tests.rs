use std::os::unix::fs::FileExt;
use std::sync::Barrier;

use super::*;

fn blobs() -> (tempfile::TempDir, Blobs) {
    let folder = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(folder.path()).unwrap();
    (folder, blobs)
}

fn begin<'a>(blobs: &'a Blobs, content: &[u8], kind: Kind) -> Option<Ingest<'a>> {
    Ingest::named(blobs, &Digest::of(content), content.len() as u64, kind).unwrap()
}

fn on_the_way(blobs: &Blobs) -> usize {
    fs::read_dir(blobs.ingest()).unwrap().count()
}

#[test]
fn what_was_written_is_found_again_read_only_and_whole() {
    let (_folder, blobs) = blobs();
    let mut ingest = begin(&blobs, b"content", Kind::Copy).unwrap();
    ingest.write(b"con").unwrap();
    ingest.write(b"tent").unwrap();
    let (digest, size) = ingest.commit().unwrap();
    assert_eq!((digest.clone(), size), (Digest::of(b"content"), 7));
    let mut text = String::new();
    blobs.handle(&digest).unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "content");
    assert_eq!(fs::metadata(blobs.path(&digest)).unwrap().permissions().mode() & 0o777, 0o400);
    assert!(begin(&blobs, b"content", Kind::Download).is_none(), "it is there already");
    assert_eq!(on_the_way(&blobs), 0);
}

#[test]
fn wrong_bytes_too_few_and_too_many_never_become_a_blob() {
    let (_folder, blobs) = blobs();
    let mut wrong = begin(&blobs, b"content", Kind::Download).unwrap();
    wrong.write(b"CONTENT").unwrap();
    assert!(matches!(wrong.commit(), Err(BlobError::WrongDigest { .. })));
    let mut long = begin(&blobs, b"content", Kind::Copy).unwrap();
    assert!(matches!(long.write(b"content and more"), Err(BlobError::TooLong { .. })));
    drop(long);
    let mut short = begin(&blobs, b"content", Kind::Copy).unwrap();
    short.write(b"cont").unwrap();
    assert!(matches!(short.commit(), Err(BlobError::WrongSize { actual: 4, .. })));
    assert!(blobs.all().unwrap().is_empty());
    assert_eq!(on_the_way(&blobs), 0);
}

#[test]
fn a_size_that_lies_about_a_blob_that_is_there_is_noticed() {
    let (_folder, blobs) = blobs();
    let mut ingest = begin(&blobs, b"content", Kind::Copy).unwrap();
    ingest.write(b"content").unwrap();
    let (digest, _) = ingest.commit().unwrap();
    assert!(matches!(Ingest::named(&blobs, &digest, 8, Kind::Copy), Err(BlobError::WrongSize { .. })));
}

#[test]
fn an_interrupted_download_goes_on_where_it_stopped_and_a_copy_begins_again() {
    let (_folder, blobs) = blobs();
    let mut first = begin(&blobs, b"content", Kind::Download).unwrap();
    first.write(b"cont").unwrap();
    drop(first);
    let mut second = begin(&blobs, b"content", Kind::Download).unwrap();
    assert_eq!(second.written(), 4);
    second.write(b"ent").unwrap();
    second.commit().unwrap();

    let mut first = begin(&blobs, b"other", Kind::Copy).unwrap();
    first.write(b"oth").unwrap();
    // As a killed process leaves it.
    first.keep = true;
    drop(first);
    assert_eq!(on_the_way(&blobs), 1);
    assert_eq!(begin(&blobs, b"other", Kind::Copy).unwrap().written(), 0);
}

#[test]
fn a_leftover_that_is_longer_than_the_blob_is_thrown_away() {
    let (_folder, blobs) = blobs();
    let mut first = begin(&blobs, b"content", Kind::Download).unwrap();
    first.write(b"cont").unwrap();
    first.file.write_all_at(b"too much of it", 4).unwrap();
    drop(first);
    assert_eq!(begin(&blobs, b"content", Kind::Download).unwrap().written(), 0);
}

#[test]
fn of_many_who_want_the_same_blob_one_brings_it_and_the_others_find_it() {
    let (_folder, blobs) = blobs();
    let content = vec![7; 3 * CHUNK];
    let barrier = Barrier::new(8);
    let brought = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                barrier.wait();
                let Some(mut ingest) = begin(&blobs, &content, Kind::Copy) else { return };
                for piece in content.chunks(CHUNK) {
                    ingest.write(piece).unwrap();
                }
                ingest.commit().unwrap();
                brought.fetch_add(1, Ordering::Relaxed);
            });
        }
    });
    assert_eq!(brought.load(Ordering::Relaxed), 1);
    assert_eq!(blobs.all().unwrap().len(), 1);
    assert_eq!(on_the_way(&blobs), 0);
}

#[test]
fn what_dead_processes_left_is_swept_what_living_ones_hold_is_not() {
    let (_folder, blobs) = blobs();
    let held = begin(&blobs, b"held", Kind::Copy).unwrap();
    for name in ["new-1-0", "sha256-0.copy", "sha256-0.part"] {
        fs::write(blobs.ingest().join(name), b"dead").unwrap();
    }
    let now = SystemTime::now();
    assert_eq!(sweep(&blobs, now, false, true).unwrap(), 8);
    assert_eq!(on_the_way(&blobs), 4, "a dry run removes nothing");
    assert_eq!(sweep(&blobs, now, false, false).unwrap(), 8);
    assert_eq!(on_the_way(&blobs), 2, "the held one and the download stay");
    assert_eq!(sweep(&blobs, now + KEPT * 2, false, false).unwrap(), 4, "a download for a week only");
    fs::write(blobs.ingest().join("sha256-1.part"), b"dead").unwrap();
    assert_eq!(sweep(&blobs, now, true, false).unwrap(), 4);
    drop(held);
}

#[test]
fn content_without_a_name_is_called_by_its_digest() {
    let (_folder, blobs) = blobs();
    for _ in 0..2 {
        let mut ingest = Ingest::unnamed(&blobs).unwrap();
        ingest.write(b"zip").unwrap();
        assert_eq!(ingest.commit().unwrap(), (Digest::of(b"zip"), 3));
    }
    assert_eq!(blobs.all().unwrap().len(), 1);
    assert_eq!(on_the_way(&blobs), 0);
}

#[test]
fn what_can_not_fit_is_refused_before_it_is_begun() {
    let (_folder, blobs) = blobs();
    assert!(matches!(blobs.reserve(u64::MAX), Err(BlobError::NoSpace { .. })));
    blobs.reserve(1).unwrap();
}
