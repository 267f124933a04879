use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;

use serde_json::json;

use super::*;
use crate::archive::InThisProcess;
use crate::document::{MOST_LAYERS, OCI_CONFIG, OCI_INDEX, OCI_LAYER};
use crate::testing::{Sample, acquire, blob_name, descriptor, options, sentence, store, write};

fn content(store: &Store, digest: &Digest) -> Vec<u8> {
    let mut bytes = Vec::new();
    store.blob(digest).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

/// Nothing of a refused image has a name, nothing is on its way, and no blob is half there.
fn nothing_stays(store: &Store) {
    assert!(store.images().unwrap().is_empty());
    assert_eq!(fs::read_dir(store.root().join("ingest")).unwrap().count(), 0);
    for stored in store.blobs.all().unwrap() {
        assert_eq!(Digest::of(&content(store, &stored.digest)), stored.digest);
    }
}

#[test]
fn a_layouts_image_is_there_with_all_of_its_blobs_and_survives_the_layout() {
    let (folder, store) = store();
    let big = vec![9; 3 << 20];
    let sample = Sample::new("amd64", &[b"lower", &big, b"lower"]);
    let layout = folder.path().join("layout");
    let name = sample.write(&layout);
    let image = acquire(&store, &name).unwrap();
    assert_eq!((&image.name, &image.digest), (&name, &sample.digest()));
    assert_eq!(image.config.cmd, ["sh"]);
    assert_eq!(image.layers.len(), 3);
    assert_eq!(image.layers[0], image.layers[2]);
    assert_eq!(image.layers[1].diff_id, Digest::of(&big));
    fs::remove_dir_all(&layout).unwrap();
    assert_eq!(content(&store, &image.layers[0].digest), b"lower");
    assert_eq!(content(&store, &image.layers[1].digest), big);
    let listed = store.images().unwrap();
    assert_eq!((listed.len(), &listed[0].digest), (1, &image.digest));
    assert!(image.size_bytes > 3 << 20 && image.size_bytes < (3 << 20) + 4096);
}

#[test]
fn what_is_there_is_not_copied_again_nor_changed_by_changing_the_layout() {
    let (folder, store) = store();
    let sample = Sample::new("amd64", &[b"layer"]);
    let layout = folder.path().join("layout");
    let name = sample.write(&layout);
    let first = acquire(&store, &name).unwrap();
    let path = store.blob_path(&first.layers[0].digest);
    let inode = fs::metadata(&path).unwrap().ino();
    // Same size, other bytes: the store has what the digest says.
    fs::write(layout.join(blob_name(&first.layers[0].digest)), b"LAYER").unwrap();
    let again = acquire(&store, &name).unwrap();
    assert_eq!(content(&store, &again.layers[0].digest), b"layer");
    assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
}

#[test]
fn wrong_digests_and_sizes_are_named() {
    let layer = vec![1; 5000];
    let damage = |change: &dyn Fn(&mut Vec<u8>)| {
        let (folder, store) = store();
        let mut files = Sample::layout(&[(&Sample::new("amd64", &[b"good", &layer]), "latest")]);
        change(files.get_mut(&blob_name(&Digest::of(&layer))).unwrap());
        let said = sentence(acquire(&store, &write(folder.path(), &files)));
        assert!(said.contains(Digest::of(&layer).digits()), "{said}");
        nothing_stays(&store);
        said
    };
    assert!(damage(&|bytes| bytes[2500] ^= 1).contains("digest"));
    assert!(damage(&|bytes| bytes.truncate(3000)).contains("size"));
    assert!(damage(&|bytes| bytes.push(0)).contains("size"));
    // A manifest and a configuration of the right size and wrong content.
    for kind in ["manifest", "config"] {
        let (folder, store) = store();
        let sample = Sample::new("amd64", &[b"good"]);
        let mut files = Sample::layout(&[(&sample, "latest")]);
        let marker = if kind == "manifest" { "schemaVersion" } else { "rootfs" };
        let is_it = |(name, bytes): &(&String, &mut Vec<u8>)| {
            name.starts_with("blobs/") && String::from_utf8_lossy(bytes).contains(marker)
        };
        let (_, bytes) = files.iter_mut().find(is_it).unwrap();
        let last = bytes.len() - 1;
        bytes[last] = b' ';
        assert!(sentence(acquire(&store, &write(folder.path(), &files))).contains("wrong digest"));
        nothing_stays(&store);
    }
}

#[test]
fn a_blob_that_is_no_file_is_refused_and_does_not_hang() {
    let (folder, store) = store();
    let name = Sample::new("amd64", &[b"layer"]).write(folder.path());
    let blob = folder.path().join(blob_name(&Digest::of(b"layer")));
    fs::remove_file(&blob).unwrap();
    assert!(sentence(acquire(&store, &name)).contains("lacks the blob"));
    let made = std::process::Command::new("mkfifo").arg(&blob).status().unwrap();
    assert!(made.success());
    assert!(sentence(acquire(&store, &name)).contains("not a regular file"));
}

#[test]
fn the_platforms_image_is_chosen_and_others_are_refused_by_name() {
    let (folder, store) = store();
    let (amd, arm) = (Sample::new("amd64", &[b"amd"]), Sample::new("arm64", &[b"arm"]));
    let mine = amd.digest();
    let both = Sample::index(vec![(arm, "arm64"), (amd, "amd64")]);
    let image = acquire(&store, &both.write(&folder.path().join("both"))).unwrap();
    assert_eq!(image.digest, mine);
    let name = both.write(&folder.path().join("both"));
    let other = PullOptions { platform: "linux/arm64".parse().unwrap(), ..options() };
    let image =
        store.acquire(&name.parse().unwrap(), &other, &InThisProcess, &crate::progress::Quiet).unwrap();
    assert_eq!(image.config.platform.architecture, "arm64");
    let foreign = Sample::index(vec![(Sample::new("arm64", &[]), "arm64")]);
    let said = sentence(acquire(&store, &foreign.write(&folder.path().join("foreign"))));
    assert!(said.contains("linux/amd64") && said.contains("linux/arm64"), "{said}");
    let said = sentence(acquire(&store, &Sample::new("riscv64", &[]).write(&folder.path().join("single"))));
    assert!(said.contains("linux/amd64") && said.contains("linux/riscv64"), "{said}");
}

#[test]
fn tags_choose_among_several_images_and_the_only_one_needs_none() {
    let (folder, store) = store();
    let (one, two) = (Sample::new("amd64", &[b"1"]), Sample::new("amd64", &[b"2"]));
    write(folder.path(), &Sample::layout(&[(&one, "one"), (&two, "two")]));
    let layout = format!("oci:{}", folder.path().display());
    assert_eq!(acquire(&store, &format!("{layout}:two")).unwrap().digest, two.digest());
    let said = sentence(acquire(&store, &layout));
    assert!(said.contains("\"one\"") && said.contains("\"two\""), "{said}");
    assert!(sentence(acquire(&store, &format!("{layout}:three"))).contains("\"three\""));
    let single = folder.path().join("single");
    one.write(&single);
    assert_eq!(acquire(&store, &format!("oci:{}", single.display())).unwrap().digest, one.digest());
}

#[test]
fn what_is_no_layout_is_refused_with_its_path() {
    let (folder, store) = store();
    assert!(sentence(acquire(&store, "oci:/no/such/layout")).contains("/no/such/layout"));
    let path = folder.path().join("layout");
    let name = Sample::new("amd64", &[b"1"]).write(&path);
    let index = fs::read_to_string(path.join("index.json")).unwrap();
    for wrong in [
        "",
        "{",
        "[]",
        "null",
        r#"{"schemaVersion":2}"#,
        r#"{"schemaVersion":2,"manifests":[]}"#,
        &"[".repeat(100_000),
        &index.replace("sha256:", "sha256:../../"),
    ] {
        fs::write(path.join("index.json"), wrong).unwrap();
        let said = sentence(acquire(&store, &name));
        assert!(said.contains(path.to_str().unwrap()), "{said}");
    }
    fs::write(path.join("index.json"), vec![b' '; (4 << 20) + 1]).unwrap();
    assert!(sentence(acquire(&store, &name)).contains("too large"));
    fs::remove_file(path.join("oci-layout")).unwrap();
    assert!(sentence(acquire(&store, &name)).contains("oci-layout"));
    nothing_stays(&store);
}

#[test]
fn bombs_of_indexes_and_of_layers_are_refused() {
    let (folder, store) = store();
    let mut nested = Sample::new("amd64", &[b"1"]);
    for _ in 0..200 {
        let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [nested.top] });
        nested.top = nested.add(OCI_INDEX, index.to_string().as_bytes());
    }
    let said = sentence(acquire(&store, &nested.write(&folder.path().join("nested"))));
    assert!(said.contains("index within indexes"), "{said}");
    let many: Vec<Vec<u8>> = (0..=MOST_LAYERS).map(|n| n.to_string().into_bytes()).collect();
    let many: Vec<&[u8]> = many.iter().map(Vec::as_slice).collect();
    let said = sentence(acquire(&store, &Sample::new("amd64", &many).write(&folder.path().join("many"))));
    assert!(said.contains("129 layers"), "{said}");
    let mut huge = Sample::new("amd64", &[]);
    let config = huge.add(OCI_CONFIG, br#"{"rootfs":{"type":"layers","diff_ids":[]}}"#);
    let mut lie = descriptor(OCI_LAYER, b"1");
    lie["size"] = (u64::MAX).into();
    huge.manifest(&config, &[lie]);
    let said = sentence(acquire(&store, &huge.write(&folder.path().join("huge"))));
    assert!(said.contains("layers"), "{said}");
    nothing_stays(&store);
}

#[test]
fn an_image_that_can_not_fit_is_refused_before_a_byte_is_written() {
    let (folder, store) = store();
    let mut sample = Sample::new("amd64", &[]);
    let diff_ids = [Digest::of(b"1")];
    let config = json!({ "rootfs": { "type": "layers", "diff_ids": diff_ids } });
    let config = sample.add(OCI_CONFIG, config.to_string().as_bytes());
    let mut layer = descriptor(OCI_LAYER, b"1");
    layer["size"] = (1_u64 << 60).into();
    sample.manifest(&config, &[layer]);
    let said = sentence(acquire(&store, &sample.write(folder.path())));
    assert!(said.contains("no space"), "{said}");
    nothing_stays(&store);
}

#[test]
fn many_at_once_acquire_the_same_image() {
    let (folder, store) = store();
    let big = vec![5; 2 << 20];
    let name = Sample::new("amd64", &[b"a", &big, b"c"]).write(folder.path());
    thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| assert_eq!(acquire(&store, &name).unwrap().layers.len(), 3));
        }
    });
    assert_eq!(store.images().unwrap().len(), 1);
    assert_eq!(fs::read_dir(store.root().join("ingest")).unwrap().count(), 0);
}

#[test]
fn an_image_that_lost_a_blob_is_not_listed_and_is_made_whole_by_acquiring_it() {
    let (folder, store) = store();
    let name = Sample::new("amd64", &[b"layer"]).write(folder.path());
    let image = acquire(&store, &name).unwrap();
    fs::remove_file(store.blob_path(&image.layers[0].digest)).unwrap();
    assert!(store.images().unwrap().is_empty());
    acquire(&store, &name).unwrap();
    assert_eq!(store.images().unwrap().len(), 1);
}

#[test]
fn images_are_removed_by_name_and_by_digest() {
    let (folder, store) = store();
    let (one, two) = (Sample::new("amd64", &[b"1"]), Sample::new("amd64", &[b"2"]));
    let names = ["a", "b"].map(|tag| {
        let path = folder.path().join(tag);
        one.write(&path)
    });
    let third = two.write(&folder.path().join("c"));
    for name in names.iter().chain([&third]) {
        acquire(&store, name).unwrap();
    }
    assert_eq!(store.remove(&third).unwrap(), std::slice::from_ref(&third));
    assert!(sentence(store.remove(&third)).contains(&third));
    assert!(sentence(store.remove("1234")).contains("1234"));
    assert!(sentence(store.remove("sha256:")).contains("sha256:"));
    let digits = one.digest().digits()[..12].to_owned();
    assert_eq!(store.remove(&digits).unwrap().len(), 2);
    assert!(store.images().unwrap().is_empty());
}

#[test]
fn a_file_is_stored_under_its_digest_from_its_beginning() {
    let (folder, store) = store();
    let path = folder.path().join("zip");
    fs::write(&path, b"a zip").unwrap();
    let mut file = fs::File::open(&path).unwrap();
    file.read_exact(&mut [0; 3]).unwrap();
    let (digest, size) = store.add_file(&mut file).unwrap();
    assert_eq!((digest.clone(), size), (Digest::of(b"a zip"), 5));
    assert_eq!(store.add_file(&mut file).unwrap(), (digest.clone(), 5));
    assert_eq!(content(&store, &digest), b"a zip");
    let mut endless = fs::File::open("/dev/zero").unwrap();
    assert!(sentence(store.add_file(&mut endless)).contains("regular file"));
}
