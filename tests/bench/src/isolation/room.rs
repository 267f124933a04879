//! One room: started, listened to until it has said what was expected, and gone without a trace when dropped.
//!
//! ```text
//!   Plan ──start──> clock runs ──> said what was expected ──> Started { took, said, room }
//!                       │ deadline, end without it, interrupt
//!                       └──────────> error that names it; the room is dropped
//!   drop: (waited for) ─> cgroup killed and removed ─> folder removed, with what its runtime recorded
//! ```

use std::fs;
use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::cgroups::RoomCgroup;
use super::snapshot::Restore;
use crate::guest_images::READY;

/// How long a room that has said what was expected may take to end by itself.
const GRACE: Duration = Duration::from_secs(20);
/// How often an interrupt is looked for.
const GLANCE: Duration = Duration::from_millis(200);

/// Until when something is waited for: a deadline, or an interrupt of the whole bench.
#[derive(Clone)]
pub(crate) struct Patience {
    until: Instant,
    of: Duration,
    interrupted: Arc<AtomicBool>,
}

impl Patience {
    /// From now on.
    pub(crate) fn new(of: Duration, interrupted: &Arc<AtomicBool>) -> Self {
        Self { until: Instant::now() + of, of, interrupted: Arc::clone(interrupted) }
    }

    /// The same where nothing interrupts.
    pub(crate) fn alone(of: Duration) -> Self {
        Self::new(of, &Arc::default())
    }

    /// An error once there is no point in waiting.
    pub(crate) fn check(&self) -> Result<()> {
        ensure!(!self.interrupted.load(Ordering::Relaxed), "interrupted");
        ensure!(Instant::now() < self.until, "nothing was heard for {} s", self.of.as_secs());
        Ok(())
    }

    /// Waits until `from` can be read.
    pub(crate) fn readable(&self, from: &impl AsFd) -> Result<()> {
        loop {
            self.check()?;
            let left = self.until.saturating_duration_since(Instant::now()).min(GLANCE);
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(from.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// What ends the wait for a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expect {
    /// The byte [`READY`].
    Ready,
    /// A line with nothing but `1`: what Python was asked to print.
    One,
    /// The end of output.
    End,
}

impl Expect {
    fn is_met(self, said: &[u8], ended: bool) -> bool {
        match self {
            Self::Ready => said.contains(&READY),
            Self::One => {
                let lines = said.split_inclusive(|&b| b == b'\n').filter(|line| line.ends_with(b"\n"));
                lines.map(<[u8]>::trim_ascii).any(|line| line == b"1")
            }
            Self::End => ended,
        }
    }
}

/// How a room that did what it should is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leave {
    /// It ends by itself, and is waited for.
    Alone,
    /// It is told to end (SIGTERM), and waited for.
    Asked,
    /// It is killed.
    Killed,
}

/// Whose clock a start is measured by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clock {
    /// Ours, from just before the fork.
    Fork,
    /// The marks of a `--timeline`, from where the resident owner had read the request; a start without one is a failure.
    Resident,
}

/// A room that can be started. All that needs no clock has been done.
pub(crate) struct Plan {
    /// What to execute.
    pub(crate) command: Command,
    /// The directory to enter by chroot(2) before.
    pub(crate) root: Option<PathBuf>,
    /// A snapshot to load into it, and to ask for the work.
    pub(crate) restore: Option<Restore>,
    /// How it is left.
    pub(crate) leave: Leave,
    /// What it is measured by.
    pub(crate) clock: Clock,
    /// Its files.
    pub(crate) folder: tempfile::TempDir,
    /// Its cgroup.
    pub(crate) cgroup: RoomCgroup,
}

/// A room that said what was expected.
pub(crate) struct Started {
    /// From the start of the clock.
    pub(crate) took: Duration,
    /// What it said up to then.
    pub(crate) said: Vec<u8>,
    /// The room, which still is there.
    pub(crate) room: Room,
}

/// A room, and all that belongs to it.
pub(crate) struct Room {
    child: Child,
    leave: Leave,
    cgroup: RoomCgroup,
    folder: tempfile::TempDir,
}

impl Plan {
    /// Starts it and waits for what is expected. The clock runs from just before the fork, or, for a resident API process, from just before the request.
    pub(crate) fn start(mut self, expect: Expect, patience: &Patience) -> Result<Started> {
        let errors = fs::File::create(self.folder.path().join("stderr"))?;
        self.command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors);
        // Ctrl-C is for the bench, which ends its rooms in order.
        self.command.process_group(0);
        let (procs, root) = (self.cgroup.procs()?, self.root);
        let enter = move || {
            nix::unistd::write(&procs, b"0")?;
            if let Some(root) = &root {
                nix::unistd::chroot(root)?;
                nix::unistd::chdir("/")?;
            }
            Ok(())
        };
        // SAFETY: between fork and exec there are but write(2), chroot(2) and chdir(2), with what was made before the fork; the paths are short, so nix
        // copies them to its stack and allocates nothing.
        unsafe { self.command.pre_exec(enter) };
        let mut began = Instant::now();
        let child = self
            .command
            .spawn()
            .with_context(|| format!("{:?} can't be started", self.command.get_program()))?;
        let mut room = Room { child, leave: Leave::Killed, cgroup: self.cgroup, folder: self.folder };
        let said = match &self.restore {
            None => {
                let output = room.child.stdout.take().context("the child's output is a pipe")?;
                room.hear(output, expect, patience)
            }
            Some(restore) => restore.run(room.folder.path(), expect, patience, &mut began),
        };
        let mut took = began.elapsed();
        let said = said.map_err(|error| error.context(room.last_words()))?;
        if self.clock == Clock::Resident {
            room.hear_again(Expect::End, patience)?;
            room.child.wait()?;
            took = between("request read", "first output", &fs::read(room.folder.path().join("stderr"))?)?;
        }
        room.leave = self.leave;
        Ok(Started { took, said, room })
    }
}

impl Room {
    /// Reads until what is expected was said.
    fn hear(
        &mut self,
        mut output: std::process::ChildStdout,
        expect: Expect,
        patience: &Patience,
    ) -> Result<Vec<u8>> {
        let said = read_until(&mut output, expect, patience)?;
        self.child.stdout = Some(output);
        Ok(said)
    }

    /// Reads on, for one who drives the room further.
    pub(crate) fn hear_again(&mut self, expect: Expect, patience: &Patience) -> Result<()> {
        let output = self.child.stdout.take().context("its output has been taken")?;
        self.hear(output, expect, patience).map(drop).map_err(|error| error.context(self.last_words()))
    }

    /// Its cgroup.
    pub(crate) fn cgroup(&self) -> &RoomCgroup {
        &self.cgroup
    }

    /// Its files.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What it wrote to its standard error, the end of it.
    fn last_words(&self) -> String {
        let text = fs::read(self.folder.path().join("stderr")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let words: String =
            text.trim().chars().rev().take(300).collect::<Vec<_>>().into_iter().rev().collect();
        if words.is_empty() { "it wrote no error".into() } else { format!("it wrote: {words}") }
    }
}

/// The time between two marks of a `--timeline`: lines of when, how long, and what was done then.
fn between(first: &str, last: &str, timeline: &[u8]) -> Result<Duration> {
    let timeline = String::from_utf8_lossy(timeline);
    let at = |mark: &str| {
        let line = timeline.lines().find(|line| line.trim_end().ends_with(mark));
        let ms = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
        ms.with_context(|| format!("its timeline has no '{mark}': {timeline}"))
    };
    let ms = at(last)? - at(first)?;
    ensure!(ms >= 0.0, "its timeline has '{last}' before '{first}': {timeline}");
    Ok(Duration::from_secs_f64(ms / 1e3))
}

/// Reads from a stream until what is expected was said.
pub(crate) fn read_until(
    from: &mut (impl Read + AsFd),
    expect: Expect,
    patience: &Patience,
) -> Result<Vec<u8>> {
    let (mut said, mut bytes) = (Vec::new(), [0; 4096]);
    loop {
        patience.readable(from)?;
        let read = match from.read(&mut bytes) {
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            other => other?,
        };
        said.extend(bytes.iter().take(read));
        if expect.is_met(&said, read == 0) {
            return Ok(said);
        }
        if read == 0 {
            bail!(
                "it ended before it had said what was expected, but said: {:?}",
                String::from_utf8_lossy(&said)
            );
        }
        ensure!(said.len() < 1 << 20, "it says too much");
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if self.leave == Leave::Asked {
            let pid = i32::try_from(self.child.id()).map(nix::unistd::Pid::from_raw);
            // One that has ended by itself doesn't mind: it has not been waited for yet, so the number is its own.
            let _ = pid.map(|pid| nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM));
        }
        if self.leave != Leave::Killed {
            let mut output = self.child.stdout.take();
            let until = Instant::now() + GRACE;
            while Instant::now() < until && matches!(self.child.try_wait(), Ok(None)) {
                // Read on, lest it waits for us; the poll is the pause between two looks.
                drain(output.as_mut());
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Takes what there is, or waits a moment for some.
fn drain(output: Option<&mut std::process::ChildStdout>) {
    const MOMENT: Duration = Duration::from_millis(5);
    let Some(output) = output else {
        std::thread::sleep(MOMENT);
        return;
    };
    let ready = poll(&mut [PollFd::new(output.as_fd(), PollFlags::POLLIN)], 5_u8);
    let read = if matches!(ready, Ok(1..)) { output.read(&mut [0; 4096]).unwrap_or(0) } else { 0 };
    if read == 0 {
        std::thread::sleep(MOMENT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patience(of: Duration) -> Patience {
        Patience::new(of, &Arc::new(AtomicBool::new(false)))
    }

    fn said_by(script: &str, expect: Expect, of: Duration) -> Result<Vec<u8>> {
        let mut child = Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        let said = read_until(child.stdout.as_mut().unwrap(), expect, &patience(of));
        child.kill().unwrap();
        child.wait().unwrap();
        said
    }

    #[test]
    fn a_line_of_one_is_told_from_lines_that_hold_one() {
        assert!(Expect::One.is_met(b"[ 0.1] x\r\n1\r\n", false));
        assert!(!Expect::One.is_met(b"11\n1", false));
        assert!(!Expect::One.is_met(b"x 1\n", true));
    }

    #[test]
    fn a_silent_room_is_given_up_at_its_deadline() {
        let began = Instant::now();
        let error = said_by("exec sleep 20", Expect::Ready, Duration::from_millis(300)).unwrap_err();
        assert!(error.to_string().contains("nothing was heard"), "{error:#}");
        assert!(began.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn an_end_without_the_word_is_an_error_with_what_was_said() {
        let error = said_by("echo no", Expect::One, Duration::from_secs(20)).unwrap_err();
        assert!(error.to_string().contains("no"), "{error:#}");
        assert!(said_by("echo so", Expect::End, Duration::from_secs(20)).is_ok());
    }

    #[test]
    fn a_timelines_marks_are_told_apart() {
        let text = b"start: clone\n        AT        TOOK  DONE\n  0.000 ms    0.000 ms  command begun\n117.833 ms   33.210 ms  request read\n1234.500 ms   43.099 ms  first output\n";
        assert_eq!(between("request read", "first output", text).unwrap(), Duration::from_micros(1_116_667));
        assert!(between("first output", "request read", text).unwrap_err().to_string().contains("before"));
        assert!(between("request", "first output", text).is_err(), "a mark's end is another mark's");
        assert!(between("request read", "first output", b"start: clone\n").is_err());
    }

    #[test]
    fn an_interrupt_ends_every_wait() {
        let flag = Arc::new(AtomicBool::new(true));
        let error = Patience::new(Duration::from_secs(60), &flag).check().unwrap_err();
        assert_eq!(error.to_string(), "interrupted");
    }
}
