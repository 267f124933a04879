//! Whole images with bytes changed: what the store hands on is what its digest says, or nothing.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::json;

use crate::Store;
use crate::digest::Digest;
use crate::testing::{Sample, acquire, store, tar, write};

/// A change of one place: bytes written over what is there, put in before it, or taken out.
#[derive(Clone, Debug)]
enum Change {
    Over(Index, Vec<u8>),
    In(Index, Vec<u8>),
    Out(Index, usize),
}

fn change() -> impl Strategy<Value = Change> {
    let bytes = || {
        let words = prop::sample::select(vec!["null", "[]", "-1", "99999999999999999999", "../.."]);
        prop_oneof![prop::collection::vec(any::<u8>(), 1..4), words.prop_map(|word| word.as_bytes().to_vec())]
    };
    prop_oneof![
        3 => (any::<Index>(), bytes()).prop_map(|(at, bytes)| Change::Over(at, bytes)),
        1 => (any::<Index>(), bytes()).prop_map(|(at, bytes)| Change::In(at, bytes)),
        1 => (any::<Index>(), 1usize..600).prop_map(|(at, length)| Change::Out(at, length)),
    ]
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let at = |index: &Index, bytes: &[u8]| index.index(bytes.len().max(1)).min(bytes.len());
        match self {
            Self::Over(place, new) => {
                let from = at(place, bytes);
                let to = (from + new.len()).min(bytes.len());
                bytes.splice(from..to, new.iter().copied());
            }
            Self::In(place, new) => {
                let from = at(place, bytes);
                bytes.splice(from..from, new.iter().copied());
            }
            Self::Out(place, length) => {
                let from = at(place, bytes);
                bytes.drain(from..(from + length).min(bytes.len()));
            }
        }
    }
}

fn sample() -> Sample {
    Sample::new("amd64", &[b"the first layer", b"the second layer"])
}

/// Acquires, and reads again all that was handed on.
fn holds_what_it_says(store: &Store, name: &str) -> Result<(), TestCaseError> {
    let Ok(image) = acquire(store, name) else { return Ok(()) };
    let digests = image.layers.iter().map(|layer| &layer.digest).chain([&image.digest, &image.config_digest]);
    for digest in digests {
        let mut bytes = Vec::new();
        store.blob(digest).unwrap().read_to_end(&mut bytes).unwrap();
        prop_assert_eq!(&Digest::of(&bytes), digest);
    }
    for layer in &image.layers {
        prop_assert_eq!(fs::metadata(store.blob_path(&layer.digest)).unwrap().len(), layer.size);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_layout_with_a_file_changed_is_an_image_or_refused(file in any::<Index>(), changes in prop::collection::vec(change(), 1..3)) {
        let (folder, store) = store();
        let mut files = Sample::layout(&[(&sample(), "latest")]);
        let name = files.keys().nth(file.index(files.len())).unwrap().clone();
        let bytes = files.get_mut(&name).unwrap();
        changes.iter().for_each(|change| change.apply(bytes));
        holds_what_it_says(&store, &write(&folder.path().join("image"), &files))?;
    }

    #[test]
    fn an_archive_with_bytes_changed_is_an_image_or_refused(oci in any::<bool>(), changes in prop::collection::vec(change(), 1..4)) {
        let (folder, store) = store();
        let (kind, files) = if oci { ("oci-archive", Sample::layout(&[(&sample(), "latest")])) } else { ("docker-archive", docker()) };
        let mut bytes = tar(&files);
        changes.iter().for_each(|change| change.apply(&mut bytes));
        let path = folder.path().join("image.tar");
        fs::write(&path, bytes).unwrap();
        holds_what_it_says(&store, &format!("{kind}:{}", path.display()))?;
    }
}

/// The files of a docker-archive with two layers.
fn docker() -> BTreeMap<String, Vec<u8>> {
    let layers = [&b"the first layer"[..], b"the second layer"];
    let diff_ids = layers.map(Digest::of);
    let config = json!({ "os": "linux", "architecture": "amd64", "rootfs": { "type": "layers", "diff_ids": diff_ids } });
    let entry = json!([{ "Config": "config.json", "RepoTags": ["a:1"], "Layers": ["0.tar", "1.tar"] }]);
    let named = [("config.json", config.to_string()), ("manifest.json", entry.to_string())];
    let mut files: BTreeMap<String, Vec<u8>> =
        named.into_iter().map(|(name, text)| (name.to_owned(), text.into_bytes())).collect();
    files.extend(layers.iter().enumerate().map(|(n, layer)| (format!("{n}.tar"), layer.to_vec())));
    files
}

#[test]
fn unchanged_they_are_images() {
    let (folder, store) = store();
    acquire(&store, &sample().write(&folder.path().join("image"))).unwrap();
    for (kind, files) in
        [("oci-archive", Sample::layout(&[(&sample(), "latest")])), ("docker-archive", docker())]
    {
        let path = folder.path().join(kind);
        fs::write(&path, tar(&files)).unwrap();
        assert_eq!(acquire(&store, &format!("{kind}:{}", path.display())).unwrap().layers.len(), 2);
    }
}
