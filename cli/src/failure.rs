//! How carrel fails: one sentence on stderr, its causes below it, and a documented exit status.
//!
//! ```text
//!   command ── Ok(status) ────────────────▶ that status
//!           ├─ Err, broken pipe on stdout ─▶ 0, silently: the reader had enough
//!           ├─ Err with a Status in its chain ▶ that status
//!           └─ Err ────────────────────────▶ the command's own: 125 for run, exec, invoke, else 1
//! ```

use std::fmt;
use std::io::{self, Write};

use carrel_protocol::one_line;

use crate::arguments::LogFormat;

/// The command line is wrong.
pub(crate) const USAGE: u8 = 2;
/// A command failed.
pub(crate) const FAILED: u8 = 1;
/// carrel failed, not the workload (Docker's).
pub(crate) const OURS: u8 = 125;
/// A function's runtime ended, or did not begin.
pub(crate) const RUNTIME_FAILED: u8 = 3;
/// A function's response was too large.
pub(crate) const TOO_LARGE: u8 = 4;
/// The workload ran into its `--timeout` (timeout(1)'s).
pub(crate) const TIMED_OUT: u8 = 124;

/// An error that has an exit status of its own.
#[derive(Debug)]
pub(crate) struct WithStatus {
    status: u8,
    message: String,
}

impl WithStatus {
    /// One sentence and the status that it ends with.
    pub(crate) fn new(status: u8, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }
}

impl fmt::Display for WithStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for WithStatus {}

/// Writes the error to stderr and returns the exit status.
pub(crate) fn report(error: &anyhow::Error, default: u8, format: LogFormat) -> u8 {
    if is_broken_pipe(error) {
        return 0;
    }
    let status = error.downcast_ref::<WithStatus>().map_or(default, |known| known.status);
    let text = match format {
        LogFormat::Text => as_text(error),
        LogFormat::Json => as_json(error, status),
    };
    // If stderr is gone too, the status alone must do.
    let _ = io::stderr().write_all(text.as_bytes());
    status
}

/// Whether the reader of our output went away. Only stdout's: a broken socket is a failure like any other.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<OutputGone>().is_some()
}

/// Standard output has no reader any more.
#[derive(Debug)]
pub(crate) struct OutputGone;

impl fmt::Display for OutputGone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Nobody reads the output any more.")
    }
}

impl std::error::Error for OutputGone {}

/// Writes to stdout at once.
pub(crate) fn print(text: impl fmt::Display) -> anyhow::Result<()> {
    print_bytes(text.to_string().as_bytes())
}

/// Writes bytes to stdout at once.
pub(crate) fn print_bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(OutputGone.into()),
        Err(error) => Err(anyhow::Error::new(error).context("Standard output can't be written.")),
    }
}

fn as_text(error: &anyhow::Error) -> String {
    let mut text = format!("carrel: {}\n", clean(&error.to_string()));
    for cause in causes(error) {
        text.push_str(&format!("  caused by: {cause}\n"));
    }
    text
}

fn as_json(error: &anyhow::Error, status: u8) -> String {
    let object = serde_json::json!({
        "level": "ERROR",
        "message": clean(&error.to_string()),
        "causes": causes(error).collect::<Vec<_>>(),
        "status": status,
    });
    format!("{object}\n")
}

/// The chain below the first sentence, without repetitions.
fn causes(error: &anyhow::Error) -> impl Iterator<Item = String> {
    let mut last = clean(&error.to_string());
    error.chain().skip(1).filter_map(move |cause| {
        let text = clean(&cause.to_string());
        let new = !last.ends_with(&text);
        new.then(|| {
            last.clone_from(&text);
            text
        })
    })
}

/// One line without control characters: some of this text was made by guests and registries.
fn clean(text: &str) -> String {
    one_line(text, 2000)
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn causes_stand_below_one_sentence() {
        let error = Err::<(), _>(anyhow!("connection refused")).context("the manifest").context("No image.");
        assert_eq!(
            as_text(&error.unwrap_err()),
            "carrel: No image.\n  caused by: the manifest\n  caused by: connection refused\n"
        );
    }

    #[test]
    fn a_status_survives_further_context() {
        let error =
            anyhow::Error::new(WithStatus::new(TIMED_OUT, "no answer in time")).context("The room ended.");
        assert_eq!(report(&error, OURS, LogFormat::Json), TIMED_OUT);
        assert_eq!(report(&anyhow!("else"), OURS, LogFormat::Json), OURS);
    }

    #[test]
    fn a_reader_that_left_is_no_failure() {
        assert_eq!(report(&anyhow::Error::new(OutputGone), FAILED, LogFormat::Text), 0);
    }

    #[test]
    fn text_from_elsewhere_cannot_drive_the_terminal() {
        assert_eq!(as_text(&anyhow!("a\x1b[2Jb\r\nc")), "carrel: a[2Jb  c\n");
    }

    #[test]
    fn json_is_one_line() {
        let text = as_json(&anyhow!("a\nb"), 3);
        assert_eq!(text, "{\"causes\":[],\"level\":\"ERROR\",\"message\":\"a b\",\"status\":3}\n");
    }
}
