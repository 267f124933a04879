//! File systems of a test's own, that can be full.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::wait_for;

/// A file system that is unmounted in the end.
#[derive(Debug)]
pub struct Mounted(PathBuf);

impl Mounted {
    /// One in memory, of such a size (tmpfs(5)).
    pub fn tmpfs(at: &Path, size: &str) -> Self {
        fs::create_dir_all(at).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(at)
            .status()
            .expect("mount runs");
        assert!(mounted.success(), "a tmpfs can be mounted: these tests run as root");
        Self(at.to_owned())
    }

    /// Where.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Fills it but for so many bytes, with a file that is returned.
    pub fn fill_but(&self, free: u64) -> PathBuf {
        let path = self.0.join("fill");
        let file = fs::File::create(&path).unwrap();
        let left = || rustix::fs::statvfs(&self.0).map(|found| found.f_bavail * found.f_frsize).unwrap();
        let bytes = left().checked_sub(free).expect("it has more than that left");
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes.max(1)).unwrap();
        assert!(left() <= free, "{} bytes are left, and {free} were to be", left());
        path
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // What runs there ends by itself, or is the culprit: the failure is to be seen at once.
            let _ = Command::new("umount").arg("-l").arg(&self.0).status();
            return;
        }
        wait_for("the file system to be unused", || {
            Command::new("umount").arg(&self.0).status().is_ok_and(|status| status.success()).then_some(())
        });
    }
}
