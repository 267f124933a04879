//! What the host's kernel says of itself below `/proc` and `/sys`, in tests below another directory, and when it is asked.

use std::fs;
use std::path::PathBuf;

/// The root of what is read.
#[derive(Debug)]
pub(super) struct Readings {
    root: PathBuf,
    core_scheduling: CoreScheduling,
}

/// What the kernel answers to `PR_SCHED_CORE` (prctl(2), Documentation/admin-guide/hw-vuln/core-scheduling.rst).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CoreScheduling {
    /// Groups of threads can be kept from sharing a core with others.
    Offered,
    /// No two threads share a core.
    NoNeed,
    /// The kernel doesn't know the question.
    Missing,
}

impl CoreScheduling {
    fn ask() -> Self {
        let own = rustix::thread::gettid();
        match rustix::thread::core_scheduling_cookie(own, rustix::thread::CoreSchedulingScope::Thread) {
            Ok(_) => Self::Offered,
            Err(rustix::io::Errno::NODEV) => Self::NoNeed,
            Err(_) => Self::Missing,
        }
    }
}

impl Readings {
    /// Of this host.
    pub(super) fn of_this_host() -> Self {
        Self { root: "/".into(), core_scheduling: CoreScheduling::ask() }
    }

    /// Of a made-up one.
    #[cfg(test)]
    pub(super) fn below(root: &std::path::Path) -> Self {
        Self { root: root.to_owned(), core_scheduling: CoreScheduling::Offered }
    }

    /// … whose kernel answers so.
    #[cfg(test)]
    pub(super) fn with(self, core_scheduling: CoreScheduling) -> Self {
        Self { core_scheduling, ..self }
    }

    /// What the kernel offers of core scheduling.
    pub(super) fn core_scheduling(&self) -> CoreScheduling {
        self.core_scheduling
    }

    /// A file's text without the blanks around it; `None` if there is no such file.
    pub(super) fn text(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.root.join(path)).ok().map(|text| text.trim().to_owned())
    }

    /// Names and texts of the files in a directory, sorted.
    pub(super) fn texts(&self, directory: &str) -> Vec<(String, String)> {
        let entries = fs::read_dir(self.root.join(directory)).into_iter().flatten().flatten();
        let read = |entry: fs::DirEntry| {
            let name = entry.file_name().into_string().ok()?;
            Some((name, fs::read_to_string(entry.path()).ok()?.trim().to_owned()))
        };
        let mut all: Vec<_> = entries.filter_map(read).collect();
        all.sort();
        all
    }

    /// The first value of a key in `/proc/cpuinfo`.
    pub(super) fn cpu(&self, key: &str) -> Option<String> {
        let text = self.text("proc/cpuinfo")?;
        let mut fields = text.lines().filter_map(|line| line.split_once(':'));
        fields.find(|(name, _)| name.trim() == key).map(|(_, value)| value.trim().to_owned())
    }

    /// Whether the processor has a feature.
    pub(super) fn has_flag(&self, flag: &str) -> bool {
        self.cpu("flags").is_some_and(|flags| flags.split_ascii_whitespace().any(|word| word == flag))
    }
}
