//! OCI layouts made byte by byte, so that they can lie. Honest images come from `tests/fixtures/build`.

use std::fs;
use std::io::Write;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};

/// `application/vnd.oci.image.layer.v1.tar`, and with `+gzip` or `+zstd` its compressed forms.
pub const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// The digest of some bytes.
pub fn digest(bytes: &[u8]) -> String {
    let hexadecimal: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hexadecimal}")
}

/// A tar, entry by entry. Names are written as they are given: `..`, absolute, whatever.
#[derive(Default)]
pub struct Tar(Vec<u8>);

impl Tar {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// One with Debian's static busybox as `bin/busybox` and `bin/sh`, so that the image can run something.
    pub fn with_shell() -> Self {
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find_map(|path| fs::read(path).ok());
        let busybox = busybox.expect("the package busybox-static is installed");
        let tar = Self::new().directory("bin").file_with_mode("bin/busybox", &busybox, 0o755);
        ["sh", "cat", "ls", "echo"]
            .into_iter()
            .fold(tar, |tar, name| tar.hard_link(&format!("bin/{name}"), "bin/busybox"))
    }

    /// Adds a directory.
    #[must_use]
    pub fn directory(self, name: &str) -> Self {
        self.entry(EntryType::Directory, name, "", b"", 0o755)
    }

    /// Adds a file.
    #[must_use]
    pub fn file(self, name: &str, content: &[u8]) -> Self {
        self.file_with_mode(name, content, 0o644)
    }

    /// Adds a file with this mode.
    #[must_use]
    pub fn file_with_mode(self, name: &str, content: &[u8], mode: u32) -> Self {
        self.entry(EntryType::Regular, name, "", content, mode)
    }

    /// Adds a symbolic link.
    #[must_use]
    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, name, target, b"", 0o777)
    }

    /// Adds a hard link.
    #[must_use]
    pub fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Link, name, target, b"", 0o755)
    }

    /// Adds a file whose header claims this size, and no content.
    #[must_use]
    pub fn claim(mut self, name: &str, size: u64) -> Self {
        let mut header = header(EntryType::Regular, name, "", 0o644);
        header.set_size(size);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self
    }

    fn entry(mut self, kind: EntryType, name: &str, link: &str, content: &[u8], mode: u32) -> Self {
        let mut header = header(kind, name, link, mode);
        header.set_size(content.len().try_into().unwrap());
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        let padded = self.0.len().next_multiple_of(512);
        self.0.resize(padded, 0);
        self
    }

    /// The whole tar.
    pub fn bytes(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 1024]);
        self.0
    }
}

fn header(kind: EntryType, name: &str, link: &str, mode: u32) -> Header {
    let mut header = Header::new_ustar();
    let old = header.as_old_mut();
    old.name[..name.len()].copy_from_slice(name.as_bytes());
    old.linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

/// A layer: its bytes and what the manifest and the configuration claim about them.
pub struct Layer {
    /// The blob.
    pub bytes: Vec<u8>,
    /// `mediaType`.
    pub media_type: String,
    /// `digest`; also the blob's file name.
    pub digest: String,
    /// `size`.
    pub size: u64,
    /// `rootfs.diff_ids` in the configuration.
    pub diff_id: String,
}

impl Layer {
    /// An honest, uncompressed layer.
    pub fn plain(tar: Tar) -> Self {
        let bytes = tar.bytes();
        let digest = digest(&bytes);
        Self { media_type: LAYER.into(), size: bytes.len() as u64, diff_id: digest.clone(), digest, bytes }
    }

    /// An honest layer, compressed.
    pub fn gzip(tar: &[u8]) -> Self {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(tar).unwrap();
        let bytes = encoder.finish().unwrap();
        Self {
            media_type: format!("{LAYER}+gzip"),
            size: bytes.len() as u64,
            diff_id: digest(tar),
            digest: digest(&bytes),
            bytes,
        }
    }
}

/// An image with one manifest.
pub struct Image {
    /// Lowest first.
    pub layers: Vec<Layer>,
    /// The configuration's `config`.
    pub config: Value,
    /// `architecture`.
    pub architecture: String,
    /// Indexes wrapped around the manifest.
    pub nesting: usize,
}

impl Image {
    /// An honest amd64 image of these layers, whose command is a shell's.
    pub fn new(layers: Vec<Layer>) -> Self {
        let config = json!({ "Env": ["PATH=/bin"], "Cmd": ["sh"] });
        Self { layers, config, architecture: "amd64".into(), nesting: 0 }
    }

    /// Writes the layout and returns how `carrel run` names it.
    pub fn write(&self, folder: &Path) -> String {
        fs::create_dir_all(folder.join("blobs/sha256")).unwrap();
        fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        for layer in &self.layers {
            put(folder, &layer.digest, &layer.bytes);
        }
        let config = json!({
            "architecture": self.architecture,
            "os": "linux",
            "config": self.config,
            "rootfs": {
                "type": "layers",
                "diff_ids": self.layers.iter().map(|layer| layer.diff_id.as_str()).collect::<Vec<_>>(),
            },
        });
        let config = blob(folder, CONFIG, &config);
        let layers: Vec<Value> = self
            .layers
            .iter()
            .map(|layer| json!({ "mediaType": layer.media_type, "digest": layer.digest, "size": layer.size }))
            .collect();
        let manifest =
            json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers });
        let mut top = blob(folder, MANIFEST, &manifest);
        for _ in 0..self.nesting {
            let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [top] });
            top = blob(folder, INDEX, &index);
        }
        top["annotations"] = json!({ "org.opencontainers.image.ref.name": "latest" });
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [top] });
        fs::write(folder.join("index.json"), index.to_string()).unwrap();
        format!("oci:{}:latest", folder.display())
    }
}

/// Writes a document and returns its descriptor.
fn blob(folder: &Path, media_type: &str, document: &Value) -> Value {
    let bytes = document.to_string().into_bytes();
    let digest = digest(&bytes);
    put(folder, &digest, &bytes);
    json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
}

fn put(folder: &Path, digest: &str, bytes: &[u8]) {
    let name = digest.strip_prefix("sha256:").expect("a SHA-256 digest");
    fs::write(folder.join("blobs/sha256").join(name), bytes).unwrap();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_honest_image_satisfies_skopeo() {
        let dir = tempfile::tempdir().unwrap();
        let image =
            Image::new(vec![Layer::plain(Tar::new().file("a", b"1")), Layer::gzip(&Tar::new().bytes())]);
        let name = image.write(dir.path());
        let Ok(output) = std::process::Command::new("skopeo").args(["inspect", &name]).output() else {
            return; // Not installed: the whole-system tests will say so.
        };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
