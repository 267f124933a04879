//! The one root file system that all subjects share: a managed runtime's files (for python3) and the bench's own program.
//!
//! Containers see it mounted, guests as a disk: the same bytes. carrel takes OCI images: the runtime's own layout for Python, and for the rest a
//! layout of one layer with the program in it.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Where the program is in every root.
pub(crate) const WORK: &str = "/bench/work";
/// The disk: far more than the runtime needs. Sparse.
const DISK_MIB: u32 = 512;

/// Writes the root's disk, ext4, at `to`: the runtime layout's layers, the program, and mount points. Wants root, tar and mke2fs.
pub(crate) fn make_root(runtime: &Path, program: &Path, to: &Path) -> Result<()> {
    let work = tempfile::Builder::new()
        .prefix(".carrel-bench-root.")
        .tempdir_in(to.parent().context("no file name")?)?;
    let tree = work.path().join("tree");
    fs::create_dir(&tree)?;
    for layer in layers(runtime)? {
        run(Command::new("tar").arg("-xf").arg(&layer).arg("-C").arg(&tree))?;
    }
    for folder in ["bench", "scratch", "dev", "proc", "sys", "tmp"] {
        fs::create_dir_all(tree.join(folder))?;
    }
    fs::copy(program, tree.join("bench/work"))?;
    for (name, number) in [("console", ["5", "1"]), ("null", ["1", "3"])] {
        run(Command::new("mknod")
            .args(["-m", "666"])
            .arg(tree.join("dev").join(name))
            .arg("c")
            .args(number))?;
    }
    let disk = work.path().join("disk");
    File::create(&disk)?.set_len(u64::from(DISK_MIB) << 20)?;
    run(Command::new("mke2fs")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .args(["-q", "-F", "-t", "ext4", "-m", "0", "-O", "^has_journal", "-d"])
        .arg(&tree)
        .arg(&disk))?;
    fs::rename(&disk, to).with_context(|| format!("{} can't be written", to.display()))
}

/// The blobs of an OCI layout's first image's layers.
fn layers(layout: &Path) -> Result<Vec<PathBuf>> {
    let blob = |descriptor: &Value| -> Result<PathBuf> {
        let digest = descriptor["digest"].as_str().unwrap_or_default();
        let hex = digest.strip_prefix("sha256:").filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
        Ok(layout.join("blobs/sha256").join(hex.with_context(|| format!("'{digest}' is no SHA-256 digest"))?))
    };
    let read = |path: &Path| -> Result<Value> {
        let text =
            fs::read(path).with_context(|| format!("{} is no OCI layout of a runtime", layout.display()))?;
        Ok(serde_json::from_slice(&text)?)
    };
    let index = read(&layout.join("index.json"))?;
    let manifest = read(&blob(&index["manifests"][0])?)?;
    manifest["layers"].as_array().context("a manifest without layers")?.iter().map(blob).collect()
}

/// Writes an OCI layout of one layer: the program at [`WORK`] and a directory `/scratch`.
pub(crate) fn make_layout(program: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.join("blobs/sha256"))?;
    let mut layer = tar::Builder::new(Vec::new());
    for folder in ["bench/", "scratch/"] {
        let mut header = header(0o755, 0);
        header.set_entry_type(tar::EntryType::Directory);
        layer.append_data(&mut header, folder, std::io::empty())?;
    }
    let bytes = fs::read(program).with_context(|| format!("{} can't be read", program.display()))?;
    let mut header = header(0o755, u64::try_from(bytes.len())?);
    layer.append_data(&mut header, WORK.trim_start_matches('/'), &bytes[..])?;
    let layer = layer.into_inner()?;
    let diff_id = format!("sha256:{}", hex(&layer));
    let layer = blob(to, &layer, "application/vnd.oci.image.layer.v1.tar")?;
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": { "Cmd": [WORK, "true"] },
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
    });
    let config = blob(to, &serde_json::to_vec(&config)?, "application/vnd.oci.image.config.v1+json")?;
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer] });
    let mut manifest = blob(to, &serde_json::to_vec(&manifest)?, kind)?;
    manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": "latest" });
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    fs::write(to.join("index.json"), serde_json::to_vec(&index)?)?;
    fs::write(to.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(())
}

fn header(mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header
}

/// Puts a blob into a layout and returns its descriptor.
fn blob(layout: &Path, bytes: &[u8], kind: &str) -> Result<Value> {
    let digest = hex(bytes);
    File::create(layout.join("blobs/sha256").join(&digest))?.write_all(bytes)?;
    Ok(json!({ "mediaType": kind, "digest": format!("sha256:{digest}"), "size": bytes.len() }))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Runs a command to its end; what it says becomes the error.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("{:?} can't be started", command.get_program()))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Copies a file whose holes stay holes.
pub(crate) fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    ensure!(from.is_file(), "{} is not there", from.display());
    run(Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(from).arg(to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layouts_layer_holds_the_program_and_its_digests_are_true() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("program");
        fs::write(&program, b"a program").unwrap();
        let layout = folder.path().join("layout");
        make_layout(&program, &layout).unwrap();
        let layers = layers(&layout).unwrap();
        assert_eq!(layers.len(), 1);
        let bytes = fs::read(&layers[0]).unwrap();
        assert_eq!(layers[0].file_name().unwrap().to_str().unwrap(), hex(&bytes));
        let mut archive = tar::Archive::new(&bytes[..]);
        let names: Vec<String> =
            archive.entries().unwrap().map(|e| e.unwrap().path().unwrap().display().to_string()).collect();
        assert_eq!(names, ["bench/", "scratch/", "bench/work"]);
        for blob in fs::read_dir(layout.join("blobs/sha256")).unwrap() {
            let blob = blob.unwrap();
            assert_eq!(blob.file_name().to_str().unwrap(), hex(&fs::read(blob.path()).unwrap()));
        }
    }

    #[test]
    fn a_digest_that_would_leave_the_layout_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let index = json!({ "manifests": [{ "digest": "sha256:../../index.json" }] });
        fs::write(folder.path().join("index.json"), index.to_string()).unwrap();
        assert!(layers(folder.path()).unwrap_err().to_string().contains("no SHA-256"));
    }
}
