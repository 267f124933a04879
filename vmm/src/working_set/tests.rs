use proptest::prelude::*;

use super::*;

const PAGES: u64 = 1000;

fn run(first: u32, pages: u32) -> Run {
    Run { first, pages }
}

fn set() -> WorkingSet {
    WorkingSet {
        memory_pages: PAGES,
        written: vec![run(0, 1), run(7, 100)],
        read: vec![run(5, 1), run(998, 2)],
    }
}

#[test]
fn the_form_is_pinned() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/working-set-v1");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, set().encode()).unwrap();
    }
    let golden = std::fs::read(&path).unwrap();
    assert_eq!(golden, set().encode(), "the form changed: raise the version and write the golden file anew");
    assert_eq!(WorkingSet::decode(&golden, PAGES).unwrap(), set());
}

#[test]
fn every_flipped_bit_and_every_cut_is_found() {
    let whole = set().encode();
    for bit in 0..whole.len() * 8 {
        let mut flipped = whole.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(WorkingSet::decode(&flipped, PAGES).is_err(), "bit {bit}");
    }
    for length in 0..whole.len() {
        assert!(WorkingSet::decode(&whole[..length], PAGES).is_err(), "{length} bytes");
    }
    assert!(WorkingSet::decode(&[&whole[..], &[0]].concat(), PAGES).is_err());
}

#[test]
fn what_is_wrong_is_said() {
    let whole = set().encode();
    assert!(matches!(
        WorkingSet::decode(&whole, PAGES + 1),
        Err(WorkingSetError::Memory { found: PAGES, here: 1001 })
    ));
    let mut later = whole.clone();
    later[8] = 2;
    assert!(matches!(WorkingSet::decode(&later, PAGES), Err(WorkingSetError::Version { found: 2 })));
    assert!(matches!(WorkingSet::decode(&[1; 40], PAGES), Err(WorkingSetError::Magic)));
    // Said to be longer than there are runs.
    let mut body = whole[HEADER_BYTES..].to_vec();
    body[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(WorkingSet::decode(&sealed(&body), PAGES), Err(WorkingSetError::Length)));
}

#[test]
fn pages_out_of_order_beyond_the_memory_or_too_many_are_refused() {
    let refused = |written: &[Run], read: &[Run]| {
        let set = WorkingSet { memory_pages: PAGES, written: written.into(), read: read.into() };
        let refused = WorkingSet::decode(&set.encode(), PAGES);
        assert!(matches!(refused, Err(WorkingSetError::Runs)), "{written:?} {read:?}: {refused:?}");
    };
    refused(&[run(5, 1), run(4, 1)], &[]);
    refused(&[run(5, 2), run(6, 1)], &[]);
    refused(&[run(5, 2), run(7, 1)], &[]);
    refused(&[run(5, 0)], &[]);
    refused(&[], &[run(999, 2)]);
    refused(&[], &[run(u32::MAX, u32::MAX)]);
    refused(&[run(0, 200)], &[run(300, 51)]);
    let most = WorkingSet { memory_pages: PAGES, written: vec![run(0, 200)], read: vec![run(300, 50)] };
    assert_eq!(WorkingSet::decode(&most.encode(), PAGES).unwrap(), most);
}

#[test]
fn a_file_is_read_from_its_beginning_and_no_further_than_the_cap() {
    let file = tempfile::tempfile().unwrap();
    set().write(&file).unwrap();
    (&file).seek(SeekFrom::End(0)).unwrap();
    assert_eq!(WorkingSet::read(&file, PAGES).unwrap(), set());
    file.set_len(MOST_BYTES + 1).unwrap();
    assert!(matches!(WorkingSet::read(&file, PAGES), Err(WorkingSetError::Length)));
}

proptest! {
    /// Whatever stands behind a right header: what is accepted lies within the memory and its cap.
    #[test]
    fn any_body_is_a_set_within_its_bounds_or_an_error(
        counts in any::<[u8; 2]>(),
        runs in prop::collection::vec((0u32..1100, 0u32..60), 0..40),
    ) {
        let written = usize::from(counts[0]) % (runs.len() + 1);
        let (written, read) = runs.split_at(written);
        let set = WorkingSet {
            memory_pages: PAGES,
            written: written.iter().map(|(first, pages)| run(*first, *pages)).collect(),
            read: read.iter().map(|(first, pages)| run(*first, *pages)).collect(),
        };
        if let Ok(accepted) = WorkingSet::decode(&set.encode(), PAGES) {
            prop_assert!(accepted.pages() <= PAGES / 4);
            for runs in [accepted.written(), accepted.read_only()] {
                let mut end = 0;
                for run in runs {
                    prop_assert!(run.pages > 0 && (end == 0 || run.first > end));
                    end = run.first + run.pages;
                    prop_assert!(u64::from(end) <= PAGES);
                }
            }
            prop_assert_eq!(accepted, set);
        }
    }

    #[test]
    fn any_bytes_are_a_set_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(WorkingSet::decode(&bytes, PAGES).is_err());
        prop_assert!(WorkingSet::decode(&sealed(&bytes), PAGES).is_err() || bytes.len() >= 16);
    }
}
