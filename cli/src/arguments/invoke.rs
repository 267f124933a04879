//! `carrel invoke`.

use std::path::PathBuf;
use std::time::Duration;

use carrel_host::function::FunctionMemory;
use clap::{ArgGroup, Args, ValueEnum};

use super::run::{BeginArgs, UsageArgs};
use crate::values::{Without, size, span};

const EXAMPLES: &str = "\
Examples:
  carrel invoke --zip f.zip --runtime python3.11 --handler app.handler --event '{\"n\": 1}'
  carrel invoke --zip f.zip --handler app.handler --event @event.json --timeout 10s
  carrel invoke --zip bootstrap.zip --runtime provided --event - < event.json
  carrel invoke --image docker://localhost:5000/fn:1 --handler app.handler -m 256m
  carrel invoke --zip f.zip --handler app.handler --events events.jsonl --isolation event --initialised

The response is written to stdout, the function's log and the START, END and
REPORT lines to stderr. Of several events each response ends with a new line.

Exit status: 0 the function answered; 1 it answered with an error, which is
printed in place of the response; 3 its runtime ended or failed to start; 4 its
response was too large; 124 it ran into its timeout; 125 carrel failed. Of several
events, the first that was not answered decides; the others are handled all the same.";

/// What events share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Isolation {
    /// A room, as long as its runtime lives.
    Room,
    /// Nothing: each has a fresh clone, which is thrown away after it.
    Event,
}

/// What a function is.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("code").required(true).args(["zip", "image"]))]
pub(crate) struct FunctionArgs {
    /// The function's code as a zip
    #[arg(long, value_name = "FILE")]
    pub(crate) zip: Option<PathBuf>,
    /// The function as an image; see `carrel run --help` for its forms
    #[arg(long, value_name = "IMAGE", conflicts_with = "runtime")]
    pub(crate) image: Option<String>,
    /// Speak plain HTTP with the image's registry; loopback ones are spoken to so anyway
    #[arg(long)]
    pub(crate) insecure: bool,
    /// What runs the zip: python3.11, or provided for a zip with its own `bootstrap`
    #[arg(long, value_name = "RUNTIME", default_value = "python3.11")]
    pub(crate) runtime: String,
    /// What the runtime calls, such as module.function
    #[arg(long, value_name = "HANDLER")]
    pub(crate) handler: Option<String>,
    /// The function's memory, from 128m to 10240m; its CPU share follows it
    #[arg(short, long, value_name = "SIZE", default_value = "128m", value_parser = size::function_memory)]
    pub(crate) memory: FunctionMemory,
    /// How long it may take, up to 15 minutes
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = span::positive)]
    pub(crate) timeout: Duration,
    /// Set a variable; without a value it is taken from carrel's own environment
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Read variables from a file, one NAME=VALUE a line
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// The function's name, as it sees it
    #[arg(long, value_name = "NAME", default_value = "function")]
    pub(crate) name: String,
    /// Boot this kernel in place of the one that carrel came with
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Do without parts of the VMM's confinement: cgroup, namespaces, capabilities, seccomp, or all of them; `carrel doctor` says what this
    /// host can't give
    #[arg(long, value_name = "PARTS", num_args = 0..=1, require_equals = true, default_missing_value = "all")]
    pub(crate) unconfined: Option<Without>,
}

/// `carrel invoke`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct InvokeArgs {
    #[command(flatten)]
    pub(crate) function: FunctionArgs,
    /// The event, as JSON; @FILE reads it from a file, - from standard input; several are handled one after another
    #[arg(long, value_name = "JSON|@FILE|-", default_value = "{}", allow_hyphen_values = true)]
    pub(crate) event: Vec<String>,
    /// Every line of a file, or of standard input (-), is an event; empty ones are passed over
    #[arg(long, value_name = "FILE|-", conflicts_with = "event")]
    pub(crate) events: Option<PathBuf>,
    /// What several events share: a room and the runtime in it, as on Lambda; or nothing, each having a room of its own
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = Isolation::Room)]
    pub(crate) isolation: Isolation,
    #[command(flatten)]
    pub(crate) begin: BeginArgs,
    #[command(flatten)]
    pub(crate) usage: UsageArgs,
}
