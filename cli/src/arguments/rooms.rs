//! Commands on rooms that exist. ROOM is a name, an id, or the beginning of an id that fits only one.

use std::time::Duration;

use clap::Args;

use crate::values::{Signal, span};

const PS_EXAMPLES: &str = "\
Examples:
  carrel ps
  carrel ps -a --json | jq -r '.[] | select(.state == \"exited\") | .id'
  carrel stop $(carrel ps -q)";

/// `carrel ps`.
#[derive(Debug, Args)]
#[command(after_help = PS_EXAMPLES)]
pub(crate) struct PsArgs {
    /// Also rooms that have ended
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Print JSON
    #[arg(long, conflicts_with = "quiet")]
    pub(crate) json: bool,
    /// Print ids only
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

const LOGS_EXAMPLES: &str = "\
Examples:
  carrel logs web
  carrel logs -f --tail 20 --timestamps web

What the room wrote to stdout comes on stdout, stderr on stderr.";

/// `carrel logs`.
#[derive(Debug, Args)]
#[command(after_help = LOGS_EXAMPLES)]
pub(crate) struct LogsArgs {
    /// Go on until the room ends
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only the last lines
    #[arg(short = 'n', long, value_name = "LINES")]
    pub(crate) tail: Option<usize>,
    /// Begin each line with its time
    #[arg(short, long)]
    pub(crate) timestamps: bool,
    /// The room
    pub(crate) room: String,
}

const STOP_EXAMPLES: &str = "\
Examples:
  carrel stop web
  carrel stop -t 0 web worker";

/// `carrel stop`.
#[derive(Debug, Args)]
#[command(after_help = STOP_EXAMPLES)]
pub(crate) struct StopArgs {
    /// How long to wait before SIGKILL [default: the room's own --stop-timeout]
    #[arg(short = 't', long = "time", value_name = "TIME", value_parser = span::parse)]
    pub(crate) time: Option<Duration>,
    /// The rooms
    #[arg(required = true, value_name = "ROOM")]
    pub(crate) rooms: Vec<String>,
}

const KILL_EXAMPLES: &str = "\
Examples:
  carrel kill web
  carrel kill -s HUP web";

/// `carrel kill`.
#[derive(Debug, Args)]
#[command(after_help = KILL_EXAMPLES)]
pub(crate) struct KillArgs {
    /// The signal, by name or number
    #[arg(short, long, value_name = "SIGNAL", default_value = "KILL")]
    pub(crate) signal: Signal,
    /// The rooms
    #[arg(required = true, value_name = "ROOM")]
    pub(crate) rooms: Vec<String>,
}

const RM_EXAMPLES: &str = "\
Examples:
  carrel rm web
  carrel rm -f web worker";

/// `carrel rm`.
#[derive(Debug, Args)]
#[command(after_help = RM_EXAMPLES)]
pub(crate) struct RmArgs {
    /// End rooms that still run
    #[arg(short, long)]
    pub(crate) force: bool,
    /// The rooms
    #[arg(required = true, value_name = "ROOM")]
    pub(crate) rooms: Vec<String>,
}

const EXEC_EXAMPLES: &str = "\
Examples:
  carrel exec web cat /etc/hostname
  carrel exec -it -u root web sh
  tar c . | carrel exec -i web tar x -C /srv

Exit status: as for `carrel run`.";

/// `carrel exec`.
#[derive(Debug, Args)]
#[command(
    after_help = EXEC_EXAMPLES,
    override_usage = "carrel exec [OPTIONS] ROOM COMMAND [ARGUMENT]..."
)]
pub(crate) struct ExecArgs {
    /// Attach standard input
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Set a variable beside the room's own
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Read variables from a file, one NAME=VALUE a line
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<std::path::PathBuf>,
    /// The user in place of the room's
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// The working directory in place of the room's
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// The room and the command; options after ROOM belong to COMMAND
    #[arg(required = true, num_args = 2.., trailing_var_arg = true, value_names = ["ROOM", "COMMAND"])]
    pub(crate) room_and_command: Vec<String>,
}

impl ExecArgs {
    /// The room.
    pub(crate) fn room(&self) -> &str {
        self.room_and_command.first().map_or("", String::as_str)
    }

    /// The command.
    pub(crate) fn command(&self) -> &[String] {
        self.room_and_command.get(1..).unwrap_or_default()
    }
}

const STATS_EXAMPLES: &str = "\
Examples:
  carrel stats
  carrel stats --no-stream web
  carrel stats --json --no-stream | jq '.[].guest.memory.current_bytes'";

/// `carrel stats`.
#[derive(Debug, Args)]
#[command(after_help = STATS_EXAMPLES)]
pub(crate) struct StatsArgs {
    /// Print JSON: an array each time
    #[arg(long)]
    pub(crate) json: bool,
    /// Print once and end
    #[arg(long)]
    pub(crate) no_stream: bool,
    /// How often
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = span::positive)]
    pub(crate) interval: Duration,
    /// Only these rooms
    #[arg(value_name = "ROOM")]
    pub(crate) rooms: Vec<String>,
}

const WAIT_EXAMPLES: &str = "\
Examples:
  carrel wait job
  carrel run -d --name job oci:./job && carrel wait job";

/// `carrel wait`.
#[derive(Debug, Args)]
#[command(after_help = WAIT_EXAMPLES)]
pub(crate) struct WaitArgs {
    /// The rooms
    #[arg(required = true, value_name = "ROOM")]
    pub(crate) rooms: Vec<String>,
}
