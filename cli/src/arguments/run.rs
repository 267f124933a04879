//! `carrel run`, in Docker's habits.

use std::path::PathBuf;
use std::time::Duration;

use carrel_protocol::units::MemoryMib;
use clap::{Args, ValueEnum};

use crate::values::{CpuMillis, Tmpfs, Without, size, span};

const EXAMPLES: &str = "\
IMAGE is one of
  name[:tag|@digest], docker://HOST/name[:tag]   a registry's, kept in the store
  oci:DIR[:TAG]                                  an OCI layout
  oci-archive:FILE[:TAG]                         the same in a tar
  docker-archive:FILE[:REF]                      what `docker save` writes

Examples:
  carrel run debian:12 cat /etc/os-release
  carrel run -it --name desk debian:12 bash
  carrel run -i oci:./image sha256sum < large.bin
  carrel run -d --name web -m 512m --cpus 0.5 oci:./web
  carrel run --timeout 30s --usage=json --usage-file use.json oci:./job
  carrel run --read-only --tmpfs /tmp:size=64m -u 1000:1000 oci:./job ./test
  carrel run --initialised oci:./app python3 server.py

The room is always removed when it ends (Docker's --rm), except that a detached
room's logs and status stay until `carrel rm` or `carrel prune`.
Standard input is attached only with -i, and never with -d.

Exit status: the command's own; 124 timeout, 125 carrel failed, 126 the command
can't be executed, 127 it does not exist, 128+n it was ended by signal n.";

/// `carrel run`.
#[derive(Debug, Args)]
#[command(
    after_help = EXAMPLES,
    override_usage = "carrel run [OPTIONS] IMAGE [COMMAND [ARGUMENT]...]"
)]
pub(crate) struct RunArgs {
    /// Print the room's id and leave it running
    #[arg(short, long, conflicts_with_all = ["usage", "usage_file"])]
    pub(crate) detach: bool,
    /// Attach standard input; with -d it is open, and nobody writes to it
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the command a terminal; with -d one of 24 lines of 80, whose output goes to the log
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// A name for the room, to be used in place of its id
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) source: SourceArgs,
    /// Accepted for Docker's sake: rooms are always removed when they end
    #[arg(long)]
    pub(crate) rm: bool,
    /// The image, and the command in place of its own; options after IMAGE belong to COMMAND
    #[arg(required = true, trailing_var_arg = true, value_names = ["IMAGE", "COMMAND"])]
    pub(crate) image_and_command: Vec<String>,
    // After all of the above: a heading holds for what follows it.
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
    #[command(flatten)]
    pub(crate) begin: BeginArgs,
    #[command(flatten)]
    pub(crate) ends: EndArgs,
    #[command(flatten)]
    pub(crate) usage: UsageArgs,
}

impl RunArgs {
    /// The image.
    pub(crate) fn image(&self) -> &str {
        self.image_and_command.first().map_or("", String::as_str)
    }

    /// The command that replaces the image's own; empty if none was given.
    pub(crate) fn command(&self) -> &[String] {
        self.image_and_command.get(1..).unwrap_or_default()
    }
}

/// How the image is had.
#[derive(Debug, Args)]
pub(crate) struct SourceArgs {
    /// When to fetch the image
    #[arg(long, value_enum, default_value_t = Pull::Missing, value_name = "WHEN")]
    pub(crate) pull: Pull,
    /// Choose this platform's image, such as linux/amd64
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    pub(crate) platform: Option<String>,
    /// Speak plain HTTP with the registry; loopback ones are spoken to so anyway
    #[arg(long)]
    pub(crate) insecure: bool,
}

/// What the command is run as.
#[derive(Debug, Args)]
#[command(next_help_heading = "Process")]
pub(crate) struct ProcessArgs {
    /// Set a variable; without a value it is taken from carrel's own environment
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Read variables from a file, one NAME=VALUE a line
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// The working directory in place of the image's
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// The user in place of the image's: a name or number, and perhaps a group
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// The program in place of the image's entry point; an empty one removes it
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<String>,
}

/// What the microVM is like.
#[derive(Debug, Args)]
#[command(next_help_heading = "Machine")]
pub(crate) struct MachineArgs {
    /// The room's memory, 64m to 64g [default: 512m]
    #[arg(short, long, value_name = "SIZE", value_parser = size::memory)]
    pub(crate) memory: Option<MemoryMib>,
    /// CPUs that the room may use, 0.01 to 16; rounded up it is the number of vCPUs [default: 1]
    #[arg(long, value_name = "NUMBER")]
    pub(crate) cpus: Option<CpuMillis>,
    /// The size of the room's disk, which is sparse [default: 10g]
    #[arg(long, value_name = "SIZE", value_parser = size::bytes)]
    pub(crate) disk: Option<u64>,
    /// The root can't be written to
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Mount a tmpfs
    #[arg(long, value_name = "PATH[:OPTIONS]")]
    pub(crate) tmpfs: Vec<Tmpfs>,
    /// Boot this kernel in place of the one that carrel came with
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Do without parts of the VMM's confinement: cgroup, namespaces, capabilities, seccomp, or all of them; `carrel doctor` says what this
    /// host can't give
    #[arg(long, value_name = "PARTS", num_args = 0..=1, require_equals = true, default_missing_value = "all")]
    pub(crate) unconfined: Option<Without>,
}

/// How the room begins.
#[derive(Debug, Args)]
#[command(next_help_heading = "Start")]
pub(crate) struct BeginArgs {
    /// Begin with a boot, not as a clone of the image's template
    #[arg(long, env = "CARREL_COLD", value_parser = clap::builder::BoolishValueParser::new(), action = clap::ArgAction::SetTrue)]
    pub(crate) cold: bool,
    /// Begin as a clone of the workload itself, taken where it was ready: a function that waits for its first event, a program that said so at
    /// /run/carrel/clone.sock. What it was told and had drawn by then is the same in every clone: see docs/snapshots.md
    #[arg(long, visible_alias = "initialized")]
    pub(crate) initialised: bool,
    /// Who may share templates, and with them pages of memory, with this room: rooms of the same domain [default: this user]
    #[arg(long, value_name = "NAME", env = "CARREL_DOMAIN")]
    pub(crate) domain: Option<String>,
    /// Print when what happened, from the command's start to its first output, on stderr
    #[arg(long)]
    pub(crate) timeline: bool,
}

/// How the room ends.
#[derive(Debug, Args)]
#[command(next_help_heading = "End")]
pub(crate) struct EndArgs {
    /// End the room after this time, with status 124
    #[arg(long, value_name = "TIME", value_parser = span::positive)]
    pub(crate) timeout: Option<Duration>,
    /// How long the command has between its stop signal and SIGKILL [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = span::parse)]
    pub(crate) stop_timeout: Option<Duration>,
}

/// Where usage is reported.
#[derive(Debug, Args)]
#[command(next_help_heading = "Usage")]
pub(crate) struct UsageArgs {
    /// Report what the room used when it ends, on stderr
    #[arg(
        long,
        value_enum,
        value_name = "FORMAT",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "table"
    )]
    pub(crate) usage: Option<UsageFormat>,
    /// Write the usage report there; JSON unless --usage says otherwise
    #[arg(long, value_name = "FILE")]
    pub(crate) usage_file: Option<PathBuf>,
}

/// How usage is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum UsageFormat {
    /// For people.
    Table,
    /// By docs/usage.schema.json.
    Json,
}

/// When an image is fetched from its registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Pull {
    /// Always ask the registry.
    Always,
    /// Only if the store doesn't have it.
    Missing,
    /// Only use what the store has.
    Never,
}
