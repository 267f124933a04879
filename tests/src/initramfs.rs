//! An initramfs of a test's own: a guest whose first process is the test's program, not carrel's agent.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::Carrel;

/// An archive (cpio(5), new ASCII format) that holds nothing, or this program as `/init` and what such programs count on: one whose
/// standard descriptors are closed opens `/dev/null` for them, or, where there is none, aborts before its `main`.
pub(crate) fn archive(init: Option<&[u8]>) -> Vec<u8> {
    let mut all = Vec::new();
    if let Some(program) = init {
        entry(&mut all, "dev", 0o040_755, (0, 0), &[]);
        entry(&mut all, "dev/null", 0o020_666, (1, 3), &[]);
        entry(&mut all, "init", 0o100_755, (0, 0), program);
    }
    entry(&mut all, "TRAILER!!!", 0, (0, 0), &[]);
    all
}

fn entry(all: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
    let (inode, links, size, name_bytes) = (all.len(), 1, content.len(), name.len() + 1);
    let (major, minor) = device;
    // Inode, mode, owner, group, links, time, size, the archive's own device (two), this device (two), length of the name, checksum.
    let header = format!(
        "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{links:08x}{0:08x}{size:08x}{0:08x}{0:08x}{major:08x}{minor:08x}{name_bytes:08x}{0:08x}",
        0
    );
    all.extend(header.bytes().chain(name.bytes()).chain([0]));
    all.resize(all.len().next_multiple_of(4), 0);
    all.extend(content);
    all.resize(all.len().next_multiple_of(4), 0);
}

/// A copy of the assets in which the initramfs is such an archive.
pub fn assets_with(carrel: &Carrel, init: Option<&Path>) -> PathBuf {
    assets(carrel, |_| archive(init.map(|program| fs::read(program).unwrap()).as_deref()))
}

/// A copy of the assets in which the initramfs has this program as `/init`, and carrel's agent as `/real`.
pub fn assets_with_agent_and(carrel: &Carrel, init: &Path) -> PathBuf {
    assets(carrel, |real| {
        // The kernel unpacks one archive after the other.
        [beside(real), archive(Some(&fs::read(init).unwrap()))].concat()
    })
}

/// The archive with its `/init` under another name.
fn beside(mut archive: Vec<u8>) -> Vec<u8> {
    const HEADER: usize = 110;
    let is_init = |bytes: &[u8]| bytes.starts_with(b"070701") && bytes.ends_with(b"init\0");
    let at = archive.windows(HEADER + 5).position(is_init).expect("the initramfs has an /init");
    archive[at + HEADER..][..4].copy_from_slice(b"real");
    archive
}

fn assets(carrel: &Carrel, initramfs: impl Fn(Vec<u8>) -> Vec<u8>) -> PathBuf {
    let configuration: Value = carrel.json(&["--print-config"]);
    let real = PathBuf::from(configuration["assets"].as_str().expect("--print-config names the assets"));
    let copy = carrel.scratch().join("assets");
    fs::create_dir(&copy).unwrap();
    for entry in fs::read_dir(&real).unwrap().flatten() {
        let to = copy.join(entry.file_name());
        if entry.file_name().to_string_lossy().contains("initramfs") {
            fs::write(to, initramfs(fs::read(entry.path()).unwrap())).unwrap();
        } else {
            std::os::unix::fs::symlink(entry.path(), to).unwrap();
        }
    }
    copy
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn cpio_reads_the_archive() {
        let folder = tempfile::tempdir().unwrap();
        let mut cpio = Command::new("cpio");
        // Devices are root's to make, and this only reads.
        cpio.args(["-i", "--quiet", "init", "dev"]).current_dir(&folder).stdin(Stdio::piped());
        let mut cpio = cpio.spawn().expect("cpio is there: apt-get install cpio");
        cpio.stdin.take().unwrap().write_all(&archive(Some(b"program"))).unwrap();
        assert!(cpio.wait().unwrap().success());
        assert_eq!(fs::read(folder.path().join("init")).unwrap(), b"program");
    }

    #[test]
    fn another_init_leaves_the_first_ones_content() {
        let (before, after) = (archive(Some(b"program")), beside(archive(Some(b"program"))));
        let differ: Vec<u8> = after.iter().zip(&before).filter(|(a, b)| a != b).map(|(a, _)| *a).collect();
        assert_eq!((differ, after.len()), (b"real".to_vec(), before.len()));
    }
}
