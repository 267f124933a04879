//! Images for tests, made byte by byte so that they can lie.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::archive::InThisProcess;
use crate::digest::Digest;
use crate::document::{OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST};
use crate::progress::Quiet;
use crate::{Image, Patience, PullOptions, Store, StoreError};

/// Documents and blobs that belong together, wherever they are put.
pub(crate) struct Sample {
    pub(crate) blobs: BTreeMap<Digest, Vec<u8>>,
    /// The descriptor of what a tag names.
    pub(crate) top: Value,
}

/// A descriptor of these bytes.
pub(crate) fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": Digest::of(bytes), "size": bytes.len() })
}

impl Sample {
    /// An honest image of these layers for `linux/ARCHITECTURE`.
    pub(crate) fn new(architecture: &str, layers: &[&[u8]]) -> Self {
        let mut sample = Self { blobs: BTreeMap::new(), top: Value::Null };
        let descriptors: Vec<Value> = layers.iter().map(|layer| sample.add(OCI_LAYER, layer)).collect();
        let diff_ids: Vec<Digest> = layers.iter().map(|layer| Digest::of(layer)).collect();
        let config = json!({
            "os": "linux", "architecture": architecture, "config": { "Cmd": ["sh"] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = sample.add(OCI_CONFIG, config.to_string().as_bytes());
        sample.manifest(&config, &descriptors);
        sample
    }

    /// Makes a manifest of these descriptors the top document.
    pub(crate) fn manifest(&mut self, config: &Value, layers: &[Value]) {
        let manifest =
            json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers });
        self.top = self.add(OCI_MANIFEST, manifest.to_string().as_bytes());
    }

    /// Adds a blob.
    pub(crate) fn add(&mut self, media_type: &str, bytes: &[u8]) -> Value {
        self.blobs.insert(Digest::of(bytes), bytes.to_vec());
        descriptor(media_type, bytes)
    }

    /// Makes an index of these samples, each with its platform, the top document.
    pub(crate) fn index(samples: Vec<(Self, &str)>) -> Self {
        let mut all = Self { blobs: BTreeMap::new(), top: Value::Null };
        let mut manifests = Vec::new();
        for (sample, architecture) in samples {
            let mut entry = sample.top;
            entry["platform"] = json!({ "os": "linux", "architecture": architecture });
            manifests.push(entry);
            all.blobs.extend(sample.blobs);
        }
        let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests });
        all.top = all.add(OCI_INDEX, index.to_string().as_bytes());
        all
    }

    /// The digest of the top document.
    pub(crate) fn digest(&self) -> Digest {
        self.top["digest"].as_str().unwrap().parse().unwrap()
    }

    /// The files of a layout in which each sample has its tag.
    pub(crate) fn layout(samples: &[(&Self, &str)]) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        files.insert("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec());
        let mut manifests = Vec::new();
        for (sample, tag) in samples {
            let mut entry = sample.top.clone();
            entry["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
            manifests.push(entry);
            for (digest, bytes) in &sample.blobs {
                files.insert(blob_name(digest), bytes.clone());
            }
        }
        let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests });
        files.insert("index.json".to_owned(), index.to_string().into_bytes());
        files
    }

    /// Writes a layout with this image, tagged `latest`, and returns its name.
    pub(crate) fn write(&self, folder: &Path) -> String {
        write(folder, &Self::layout(&[(self, "latest")]))
    }
}

/// A blob's name in a layout.
pub(crate) fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().name(), digest.digits())
}

/// Writes files below a folder and returns its name as a layout.
pub(crate) fn write(folder: &Path, files: &BTreeMap<String, Vec<u8>>) -> String {
    for (name, bytes) in files {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    format!("oci:{}:latest", folder.display())
}

/// The same files as a tar.
pub(crate) fn tar(files: &BTreeMap<String, Vec<u8>>) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, bytes.as_slice()).unwrap();
    }
    let mut bytes = tar.into_inner().unwrap();
    bytes.flush().unwrap();
    bytes
}

/// A store in a folder of its own.
pub(crate) fn store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store")).unwrap();
    (folder, store)
}

/// Options for `linux/amd64`, wherever the tests run, without anybody's credentials and with little patience.
pub(crate) fn options() -> PullOptions {
    let patience = Patience {
        connect: Duration::from_secs(10),
        stall: Duration::from_secs(10),
        retries: 3,
        pause: Duration::from_millis(10),
    };
    PullOptions {
        platform: "linux/amd64".parse().unwrap(),
        docker_config: None,
        patience,
        ..PullOptions::default()
    }
}

/// Acquires by name.
pub(crate) fn acquire(store: &Store, name: &str) -> Result<Image, StoreError> {
    store.acquire(&name.parse().unwrap(), &options(), &InThisProcess, &Quiet)
}

/// The sentence of a failure and those of its causes.
pub(crate) fn sentence<T>(result: Result<T, StoreError>) -> String {
    let Err(error) = result else { panic!("it succeeded") };
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        text = format!("{text} {error}");
        cause = error.source();
    }
    text
}
