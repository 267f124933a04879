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
use clap::CommandFactory;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::arguments::{Cli, LogFormat};

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

/// What is wrong with the command line, as one sentence, and where its right form is to be read. `command` is its command, with the one below it
/// where there is one.
pub(crate) fn wrong_line(error: &clap::Error, command: Option<&str>) -> String {
    let known = command.filter(|path| {
        let below = |above: clap::Command, word| above.find_subcommand(word).cloned();
        path.split(' ').try_fold(Cli::command(), below).is_some()
    });
    let name = known.map_or_else(|| "carrel".to_owned(), |word| format!("carrel {word}"));
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(word)) => Some(word.clone()),
        Some(ContextValue::Strings(words)) => words.first().cloned(),
        Some(_) | None => None,
    };
    let argument = context(ContextKind::InvalidArg).filter(|_| error.kind() == ErrorKind::UnknownArgument);
    let wrong = match (argument, context(ContextKind::InvalidSubcommand)) {
        (Some(word), _) if word.starts_with('-') => format!("`{name}` has no option '{word}'"),
        (Some(word), _) => format!("`{name}` takes no argument '{word}'"),
        (None, Some(word)) => format!("There is no command '{word}'"),
        (None, None) => first_paragraph(error),
    };
    let like = [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand].into_iter().find_map(context);
    let like = like.map_or_else(String::new, |like| format!(", but there is '{like}'"));
    format!("carrel: {}\n", as_sentence(&clean(&format!("{wrong}{like}; see `{name} --help`"))))
}

/// What clap says is wrong; hints, usage and the way to the help follow in paragraphs of their own.
fn first_paragraph(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let first = text.split("\n\n").next().unwrap_or_default();
    first.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// With a capital letter and a full stop, whoever wrote it. What begins with a name stays as it is: a registry's, or a digest.
fn as_sentence(text: &str) -> String {
    let first = text.split(' ').next().unwrap_or_default();
    let mut letters = text.chars();
    let mut sentence = match letters.next() {
        Some(letter) if first.bytes().all(|b| b.is_ascii_lowercase()) => {
            letter.to_ascii_uppercase().to_string() + letters.as_str()
        }
        Some(_) | None => text.to_owned(),
    };
    if !sentence.ends_with(['.', '!', '?']) && !sentence.is_empty() {
        sentence.push('.');
    }
    sentence
}

fn as_text(error: &anyhow::Error) -> String {
    let mut text = format!("carrel: {}\n", as_sentence(&clean(&error.to_string())));
    for cause in causes(error) {
        text.push_str(&format!("  caused by: {cause}\n"));
    }
    text
}

fn as_json(error: &anyhow::Error, status: u8) -> String {
    let object = serde_json::json!({
        "level": "ERROR",
        "message": as_sentence(&clean(&error.to_string())),
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
    use clap::Parser;

    use super::*;
    use crate::arguments::command_path;

    #[test]
    fn causes_stand_below_one_sentence() {
        let error = Err::<(), _>(anyhow!("connection refused")).context("the manifest").context("No image.");
        assert_eq!(
            as_text(&error.unwrap_err()),
            "carrel: No image.\n  caused by: the manifest\n  caused by: connection refused\n"
        );
    }

    #[test]
    fn a_wrong_line_is_one_sentence_that_leads_to_the_help() {
        let said = |line: &[&str]| {
            let error = Cli::try_parse_from(std::iter::once(&"carrel").chain(line)).unwrap_err();
            wrong_line(&error, command_path(line.iter().map(Into::into)).as_deref())
        };
        for (line, sentence) in [
            (&["run", "--bad", "img"][..], "`carrel run` has no option '--bad'; see `carrel run --help`."),
            (
                &["run", "--nam", "x", "img"],
                "`carrel run` has no option '--nam', but there is '--name'; see `carrel run --help`.",
            ),
            (&["ps", "more"], "`carrel ps` takes no argument 'more'; see `carrel ps --help`."),
            (
                &["template", "prune", "--max-sise", "1g"],
                "`carrel template prune` has no option '--max-sise', but there is '--max-size'; see `carrel template prune --help`.",
            ),
            (
                &["template", "inspct", "x"],
                "There is no command 'inspct', but there is 'inspect'; see `carrel template --help`.",
            ),
            (&["sotp"], "There is no command 'sotp', but there is 'stop'; see `carrel --help`."),
            (
                &["run", "-m", "1m", "img"],
                "Invalid value '1m' for '--memory <SIZE>': a room's memory is between 64 MiB and 64 GiB, and a bare number counts bytes: give it as 512m or 1g; see `carrel run --help`.",
            ),
            (
                &["run"],
                "The following required arguments were not provided: <IMAGE> [COMMAND]...; see `carrel run --help`.",
            ),
            (
                &["run", "-d", "--usage", "img"],
                "The argument '--detach' cannot be used with '--usage[=<FORMAT>]'; see `carrel run --help`.",
            ),
        ] {
            assert_eq!(said(line), format!("carrel: {sentence}\n"));
        }
    }

    #[test]
    fn sentences_begin_and_end_as_such_and_names_stay_as_they_are() {
        assert_eq!(
            as_sentence("the image names no command; give one"),
            "The image names no command; give one."
        );
        assert_eq!(as_sentence("sha256:00 comes truncated."), "sha256:00 comes truncated.");
        assert_eq!(as_sentence("docker.io can't be reached"), "docker.io can't be reached.");
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
        assert_eq!(as_text(&anyhow!("a\x1b[2Jb\r\nc")), "carrel: a[2Jb  c.\n");
    }

    #[test]
    fn json_is_one_line() {
        let text = as_json(&anyhow!("a\nb"), 3);
        assert_eq!(text, "{\"causes\":[],\"level\":\"ERROR\",\"message\":\"A b.\",\"status\":3}\n");
    }
}
