//! The command line: what can be typed, and the help that explains it. No logic beyond parsing.

pub(crate) mod images;
pub(crate) mod invoke;
pub(crate) mod pool;
pub(crate) mod rooms;
pub(crate) mod run;
pub(crate) mod runner;
pub(crate) mod template;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

const EXAMPLES: &str = "\
Examples:
  carrel doctor                                 can this host run rooms?
  carrel run alpine:3.20 uname -r               a command in a microVM of its own
  carrel run -it debian:12 bash                 a shell, with a terminal
  carrel run oci:./image sh -c 'exit 7'         an image from an OCI layout
  carrel runner ./tests --quick                 a program of this host's, alone with its files
  carrel invoke --zip f.zip --handler app.handler --event '{\"n\": 1}'
  carrel ps -a --json                           all rooms, for a script

Exit status:
  0        success
  1        the command failed; stderr says why
  2        the command line is wrong
  run, exec, runner: the workload's own status, or 124 timeout, 125 carrel failed,
             126 not executable, 127 not found, 128+n ended by signal n
  invoke:    0 response, 1 the function's error, 3 its runtime failed,
             4 response too large, 124 timeout, 125 carrel failed

Configuration: flags, then environment, then a file; see --print-config.";

/// Runs OCI images and Lambda functions, each in a microVM of its own.
#[derive(Debug, Parser)]
#[command(name = "carrel", version, after_help = EXAMPLES, max_term_width = 100)]
#[command(disable_help_subcommand = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub(crate) global: Global,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// Options of every command.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Where all state lives [default: /var/lib/carrel for root, else the XDG data directory]
    #[arg(long, global = true, env = "CARREL_HOME", value_name = "DIR")]
    pub(crate) home: Option<PathBuf>,
    /// Where images and templates are, which homes may share [default: store in the home]
    #[arg(long, global = true, env = "CARREL_STORE", value_name = "DIR")]
    pub(crate) store: Option<PathBuf>,
    /// Configuration file [default: carrel.json in the home, if it exists]
    #[arg(long, global = true, env = "CARREL_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// How diagnostics are written to stderr [default: text]
    #[arg(long, global = true, env = "CARREL_LOG_FORMAT", value_name = "FORMAT")]
    pub(crate) log_format: Option<LogFormat>,
    /// How much is said: off, error, warn, info, debug, trace, or tracing's filter syntax [default: warn]
    #[arg(long, global = true, env = "CARREL_LOG", value_name = "LEVEL")]
    pub(crate) log_level: Option<String>,
    /// Print the configuration that would be used, as JSON, and end
    #[arg(long, global = true)]
    pub(crate) print_config: bool,
}

/// The command of a line that may be wrong, without carrel's own name: the first word that is neither an option of every command nor such an
/// option's value.
pub(crate) fn command_word(line: impl Iterator<Item = OsString>) -> Option<OsString> {
    let definition = Cli::command();
    let takes_value = |word: &str| {
        let known = definition.get_arguments().find(|known| known.get_long() == word.strip_prefix("--"));
        known.is_some_and(|known| known.get_action().takes_values())
    };
    let mut line = line;
    while let Some(word) = line.next() {
        let Some(option) = word.to_str().filter(|word| word.starts_with('-')) else { return Some(word) };
        if takes_value(option) {
            line.next();
        }
    }
    None
}

/// The same, with the command below it where it has any: `template ls`.
pub(crate) fn command_path(mut line: impl Iterator<Item = OsString>) -> Option<String> {
    let word = command_word(&mut line)?.into_string().ok()?;
    let definition = Cli::command();
    let known = definition.find_subcommand(&word).filter(|known| known.has_subcommands());
    let below = known.and_then(|known| {
        let below = command_word(&mut line)?.into_string().ok()?;
        known.find_subcommand(&below).map(|below| format!("{word} {}", below.get_name()))
    });
    Some(below.unwrap_or(word))
}

/// How diagnostics are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Say whether this host can run rooms, and what mends it if not
    #[command(after_help = DOCTOR_EXAMPLES)]
    Doctor(DoctorArgs),
    /// Run a command in a new room
    Run(Box<run::RunArgs>),
    /// Run a program of this host's in a room of its own, as a test runner does
    Runner(Box<runner::RunnerArgs>),
    /// Run a function once, on one event
    Invoke(Box<invoke::InvokeArgs>),
    /// List rooms
    Ps(rooms::PsArgs),
    /// Show what a room wrote
    Logs(rooms::LogsArgs),
    /// End rooms: their stop signal, then SIGKILL
    Stop(rooms::StopArgs),
    /// Send a signal to rooms
    Kill(rooms::KillArgs),
    /// Remove rooms that have ended
    Rm(rooms::RmArgs),
    /// Run one more command in a running room
    Exec(rooms::ExecArgs),
    /// Show what rooms use, as it changes
    Stats(rooms::StatsArgs),
    /// Wait until rooms end and print their exit statuses
    Wait(rooms::WaitArgs),
    /// Fetch images into the store
    Pull(images::PullArgs),
    /// List images in the store
    Images(images::ImagesArgs),
    /// Remove images from the store
    Rmi(images::RmiArgs),
    /// Remove what nothing refers to
    Prune(images::PruneArgs),
    /// List, pin, verify and remove templates, of which rooms are cloned
    Template(template::TemplateArgs),
    /// Own rooms in one process that has ready what the next ones need
    Pool(pool::PoolArgs),
    /// Measure what isolation costs, beside other ways of it (carrel bench --help)
    #[command(disable_help_flag = true, after_help = BENCH_EXAMPLES)]
    Bench(BenchArgs),
    /// Print a shell's completion script
    #[command(after_help = COMPLETIONS_EXAMPLES)]
    Completions(CompletionsArgs),
    /// Print carrel's version
    Version(VersionArgs),
    /// A room's owner; started by `run`, never by hand
    #[command(hide = true)]
    Owner(OwnerArgs),
}

const DOCTOR_EXAMPLES: &str = "\
Examples:
  carrel doctor
  carrel doctor --json | jq '.checks[] | select(.status != \"ok\")'

Exit status: 0 if rooms can run here (perhaps with warnings), 1 if not.";

/// `carrel doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

const BENCH_EXAMPLES: &str = "\
Examples:
  carrel bench --list
  carrel bench --quick --out results";

/// `carrel bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Options of carrel-bench, which knows them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTION")]
    pub(crate) options: Vec<OsString>,
}

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  carrel completions bash > /etc/bash_completion.d/carrel
  carrel completions zsh > ~/.zfunc/_carrel
  carrel completions fish > ~/.config/fish/completions/carrel.fish";

/// `carrel completions`.
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell
    pub(crate) shell: clap_complete::Shell,
}

/// `carrel version`.
#[derive(Debug, Args)]
pub(crate) struct VersionArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `carrel owner`.
#[derive(Debug, Args)]
pub(crate) struct OwnerArgs {
    /// The room's directory
    pub(crate) room: PathBuf,
}

#[cfg(test)]
mod tests;
