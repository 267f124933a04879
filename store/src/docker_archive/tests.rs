use std::fs;
use std::io::{Read, Write};
use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::Compression;
use crate::testing::{acquire, sentence, store, tar};

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

type Files = BTreeMap<String, Vec<u8>>;

/// Adds an image whose layers are these (their plain content, and as they are stored), and returns its entry.
fn add(files: &mut Files, tag: &str, layers: &[(&[u8], &[u8])]) -> Value {
    let diff_ids: Vec<Digest> = layers.iter().map(|(plain, _)| Digest::of(plain)).collect();
    let config = json!({
        "os": "linux", "architecture": "amd64", "config": { "Cmd": [tag] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = config.to_string().into_bytes();
    let name = format!("{}.json", Digest::of(&config).digits());
    files.insert(name.clone(), config);
    let names: Vec<String> = layers
        .iter()
        .map(|(_, stored)| {
            let name = format!("{}/layer.tar", Digest::of(stored).digits());
            files.insert(name.clone(), stored.to_vec());
            name
        })
        .collect();
    json!({ "Config": name, "RepoTags": [tag], "Layers": names })
}

fn write(folder: &Path, mut files: Files, entries: &[Value]) -> String {
    files.insert("manifest.json".into(), json!(entries).to_string().into_bytes());
    let path = folder.join("archive.tar");
    fs::write(&path, tar(&files)).unwrap();
    format!("docker-archive:{}", path.display())
}

#[test]
fn plain_and_packed_layers_come_with_what_the_configuration_says() {
    let (folder, store) = store();
    let packed = gzip(b"second");
    let mut files = Files::new();
    let entry = add(&mut files, "a:1", &[(b"first", b"first"), (b"second", &packed)]);
    let name = write(folder.path(), files, &[entry]);
    let image = acquire(&store, &name).unwrap();
    assert_eq!(image.config.cmd, ["a:1"]);
    let kinds: Vec<Compression> = image.layers.iter().map(|layer| layer.compression).collect();
    assert_eq!(kinds, [Compression::None, Compression::Gzip]);
    assert_eq!(image.layers[0].digest, Digest::of(b"first"));
    assert_eq!(image.layers[1].diff_id, Digest::of(b"second"));
    let mut bytes = Vec::new();
    store.blob(&image.layers[1].digest).unwrap().read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, packed);
    assert_eq!(acquire(&store, &name).unwrap().digest, image.digest, "the same manifest every time");
}

#[test]
fn one_of_several_images_is_chosen_by_its_name_however_it_is_written() {
    let (folder, store) = store();
    let mut files = Files::new();
    let entries = [add(&mut files, "a:1", &[]), add(&mut files, "host:5000/b:2", &[])];
    let name = write(folder.path(), files, &entries);
    assert_eq!(acquire(&store, &format!("{name}:docker.io/library/a:1")).unwrap().config.cmd, ["a:1"]);
    assert_eq!(acquire(&store, &format!("{name}:host:5000/b:2")).unwrap().config.cmd, ["host:5000/b:2"]);
    let said = sentence(acquire(&store, &name));
    assert!(said.contains("a:1") && said.contains("host:5000/b:2"), "{said}");
    assert!(sentence(acquire(&store, &format!("{name}:c:3"))).contains("c:3"));
}

#[test]
fn a_layer_that_is_not_what_the_configuration_says_is_refused() {
    let (folder, store) = store();
    let mut files = Files::new();
    let entry = add(&mut files, "a:1", &[(b"honest", b"forged")]);
    let said = sentence(acquire(&store, &write(folder.path(), files, &[entry])));
    assert!(said.contains("digest") && said.contains(Digest::of(b"honest").digits()), "{said}");
    assert!(store.images().unwrap().is_empty());
}

#[test]
fn files_that_are_missing_and_documents_that_lie_are_named() {
    let (folder, store) = store();
    let refused =
        |files: Files, entries: &[Value]| sentence(acquire(&store, &write(folder.path(), files, entries)));
    let mut files = Files::new();
    let mut entry = add(&mut files, "a:1", &[(b"layer", b"layer")]);
    assert!(refused(files.clone(), &[]).contains("no image"));
    entry["Layers"][0] = "../../etc/passwd".into();
    assert!(refused(files.clone(), std::slice::from_ref(&entry)).contains("etc/passwd"));
    entry["Layers"] = json!(vec!["layer"; 129]);
    assert!(refused(files.clone(), std::slice::from_ref(&entry)).contains("129 layers"));
    entry["Layers"] = json!([]);
    assert!(refused(files.clone(), std::slice::from_ref(&entry)).contains("1 layers"));
    entry["Config"] = "nowhere.json".into();
    assert!(refused(files.clone(), &[entry]).contains("nowhere.json"));
    assert!(refused(files.clone(), &[json!("a string")]).contains("manifest.json"));
    let path = folder.path().join("none.tar");
    fs::write(&path, tar(&files)).unwrap();
    let said = sentence(acquire(&store, &format!("docker-archive:{}", path.display())));
    assert!(said.contains("no manifest.json"), "{said}");
    assert!(sentence(acquire(&store, "docker-archive:/no/such.tar")).contains("/no/such.tar"));
}

#[test]
fn a_layer_may_be_a_link_to_an_equal_one_as_docker_saved_them() {
    let (folder, store) = store();
    let mut files = Files::new();
    let mut entry = add(&mut files, "a:1", &[(b"same", b"same"), (b"same", b"same")]);
    entry["Layers"][1] = "second/layer.tar".into();
    files.insert("manifest.json".into(), json!([entry]).to_string().into_bytes());
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in &files {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        builder.append_data(&mut header, name, bytes.as_slice()).unwrap();
    }
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    let to = format!("../{}/layer.tar", Digest::of(b"same").digits());
    builder.append_link(&mut header, "second/layer.tar", to).unwrap();
    let path = folder.path().join("linked.tar");
    fs::write(&path, builder.into_inner().unwrap()).unwrap();
    let image = acquire(&store, &format!("docker-archive:{}", path.display())).unwrap();
    assert_eq!(image.layers.len(), 2);
    assert_eq!(image.layers[0].digest, image.layers[1].digest);
}
