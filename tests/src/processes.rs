//! carrel's processes on this machine: commands, owners, VMMs.
//!
//! A VMM's name (`comm`) says little: it is started from a descriptor, and the kernel then calls it by that descriptor's number. So a
//! process is carrel's if its program is, or the first word of its command line.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

const PROGRAMS: [&str; 3] = ["carrel", "carrel-vmm", "carrel-owner"];

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Its command line, words parted by spaces.
    pub line: String,
}

impl Process {
    /// Its folder in `/proc`.
    pub fn folder(&self) -> PathBuf {
        Path::new("/proc").join(self.pid.to_string())
    }

    /// A number from its `status`, such as `VmRSS` in KiB.
    pub fn status(&self, field: &str) -> Option<u64> {
        let status = fs::read_to_string(self.folder().join("status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse().ok()
    }

    /// How many descriptors it has open; 0 for one that has ended.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(self.folder().join("fd")).map_or(0, Iterator::count)
    }
}

/// All that run now. A zombie has no program and no command line any longer, and is its parent's business.
pub fn all() -> Vec<Process> {
    let numbers =
        fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter_map(look).collect()
}

fn look(pid: u32) -> Option<Process> {
    // It may end while it is looked at: whatever can't be read is not there.
    let folder = Path::new("/proc").join(pid.to_string());
    let line = fs::read(folder.join("cmdline")).ok().filter(|line| !line.is_empty())?;
    let first =
        line.split(|byte| *byte == 0).next().map(|word| String::from_utf8_lossy(word).into_owned())?;
    let program = fs::read_link(folder.join("exe")).unwrap_or_default();
    let name = fs::read_to_string(folder.join("comm")).unwrap_or_default();
    let line = String::from_utf8_lossy(&line).trim_end_matches('\0').replace('\0', " ");
    is_ours(&program, &first, name.trim_end()).then_some(Process { pid, line })
}

fn is_ours(program: &Path, first: &str, name: &str) -> bool {
    let program = program.file_name().and_then(OsStr::to_str).unwrap_or_default();
    // A program that was replaced while it ran is called so.
    let program = program.strip_suffix(" (deleted)").unwrap_or(program);
    let first = Path::new(first).file_name().and_then(OsStr::to_str).unwrap_or_default();
    [program, first, name].iter().any(|word| PROGRAMS.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vmm_that_is_called_by_a_number_is_ours_and_a_test_program_is_not() {
        assert!(is_ours(Path::new("/a/assets-1/carrel-vmm"), "carrel-vmm", "7"));
        assert!(is_ours(Path::new("/a/assets-1/carrel-vmm (deleted)"), "x", "7"));
        assert!(is_ours(Path::new(""), "/a/carrel", "4"));
        assert!(is_ours(Path::new(""), "", "carrel-owner"));
        assert!(!is_ours(
            Path::new("/t/deps/carrel_tests-0123"),
            "/t/deps/carrel_tests-0123",
            "carrel_tests-01"
        ));
        assert!(!is_ours(Path::new("/bin/sh"), "sh", "sh"));
    }

    #[test]
    fn what_has_ended_has_nothing() {
        let gone = Process { pid: u32::MAX, line: String::new() };
        assert_eq!((gone.status("VmRSS"), gone.descriptors()), (None, 0));
        let own = Process { pid: std::process::id(), line: String::new() };
        assert!(own.status("VmRSS").is_some_and(|kib| kib > 100));
        assert!(own.descriptors() >= 3);
    }
}
