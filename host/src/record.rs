//! A room's record, `state.json`: written by its owner at every transition, read by every command.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::outcome::Outcome;
use crate::stat::Stat;
use crate::usage::UsageReport;

/// Where a room is in its life. See [`crate::owner`] for the transitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The VMM is being started.
    Launching,
    /// The guest boots; its agent has not been heard yet.
    Handshaking,
    /// The payload is fetched and unpacked.
    Preparing,
    /// The guest of a template comes to rest.
    Freezing,
    /// It is being saved.
    Saving,
    /// The workload is being started, or connected with its streams in a clone of it.
    Starting,
    /// The workload of a template runs, until it says that it is ready.
    Initialising,
    /// The workload runs.
    Running,
    /// The workload ended; its output is still being read.
    Draining,
    /// The guest is shutting down, or is being ended.
    Ending,
    /// It is over.
    Ended,
}

impl Phase {
    /// The state as `carrel ps` shows it: `starting`, `freezing`, `running`, `ending` or `exited`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Launching | Self::Handshaking | Self::Preparing | Self::Starting | Self::Initialising => {
                "starting"
            }
            Self::Freezing | Self::Saving => "freezing",
            Self::Running => "running",
            Self::Draining | Self::Ending => "ending",
            Self::Ended => "exited",
        }
    }
}

/// What is known about a room beside its specification. Times are ms since the epoch, by the host's clock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Where it is.
    pub phase: Phase,
    /// When it was made.
    pub created_ms: u64,
    /// When its workload began.
    pub started_ms: Option<u64>,
    /// When it was over.
    pub ended_ms: Option<u64>,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// The last usage report.
    pub usage: Option<UsageReport>,
    /// What must be cleared away if the owner dies.
    pub remains: Remains,
}

/// What a room has outside of its directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remains {
    /// The VMM's cgroup.
    pub cgroup: Option<std::path::PathBuf>,
    /// The VMM's process.
    pub vmm: Option<ProcessMark>,
}

/// A process that can't be mistaken for a later one of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessMark {
    /// Its number.
    pub pid: u32,
    /// When it started, in clock ticks since boot (proc(5), `/proc/pid/stat`, field 22).
    pub started: u64,
}

impl ProcessMark {
    /// The mark of a process that exists.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let started = Stat::parse(&stat).and_then(|stat| stat.field(22)?.parse().ok());
        started
            .map(|started| Self { pid, started })
            .ok_or_else(|| io::Error::other("unknown form of /proc/pid/stat"))
    }

    /// Whether that process is still there.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).is_ok_and(|now| now == *self)
    }
}

impl Record {
    /// A room that was just made.
    pub fn new(created_ms: u64) -> Self {
        Self {
            phase: Phase::Launching,
            created_ms,
            started_ms: None,
            ended_ms: None,
            outcome: None,
            usage: None,
            remains: Remains::default(),
        }
    }

    /// Reads a record; `None` if there is none, or one that can't be understood: a half-written one can't be, since it is renamed into place.
    pub fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    /// Writes it whole or not at all. On a full disk it is written over the one before, which has a block already; nobody but readers
    /// looks at a record whose owner lives, and they look again.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let text = serde_json::to_vec(self)?;
        let fresh = path.with_extension("new");
        let written = File::create(&fresh)
            .and_then(|mut file| file.write_all(&text))
            .and_then(|()| fs::rename(&fresh, path));
        let Err(error) = written else { return Ok(()) };
        let _ = fs::remove_file(&fresh);
        if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            // Where there is none before, the disk is what is wrong.
            return write_over(path, &text).map_err(|_| error);
        }
        Err(error)
    }
}

/// Replaces a file's content in place.
fn write_over(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    file.write_all(text)?;
    file.set_len(u64::try_from(text.len()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start() {
        let me = ProcessMark::of(std::process::id()).unwrap();
        assert!(me.is_alive());
        assert!(!ProcessMark { started: me.started + 1, ..me }.is_alive());
        assert!(ProcessMark::of(u32::MAX).is_err());
    }

    #[test]
    fn a_record_comes_back_as_it_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        assert_eq!(Record::read(&path), None);
        let mut record = Record::new(7);
        record.outcome = Some(Outcome::Lost);
        record.write(&path).unwrap();
        assert_eq!(Record::read(&path), Some(record));
        fs::write(&path, "{").unwrap();
        assert_eq!(Record::read(&path), None);
    }

    #[test]
    fn a_record_written_over_a_longer_one_is_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        let longer =
            Record { outcome: Some(Outcome::OwnerFailed { message: "x".repeat(500) }), ..Record::new(7) };
        longer.write(&path).unwrap();
        let shorter = Record::new(8);
        write_over(&path, &serde_json::to_vec(&shorter).unwrap()).unwrap();
        assert_eq!(Record::read(&path), Some(shorter));
        assert!(write_over(&directory.path().join("none"), b"x").is_err(), "no new file is made");
    }
}
