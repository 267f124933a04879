//! Commands on templates. TEMPLATE is a key, or the beginning of one (4 digits at least) that fits only one.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::invoke::FunctionArgs;
use super::run::{MachineArgs, ProcessArgs, SourceArgs};
use crate::values::{size, span};

const TEMPLATE_EXAMPLES: &str = "\
Examples:
  carrel template create debian:12
  carrel template create-function --initialised --zip f.zip --handler app.handler
  carrel template ls
  carrel template pin 3f2a91c07b1e
  carrel template prune --max-size 20g --older-than 7d --dry-run

A template is a room that was frozen: its clones start in milliseconds. Templates
are made when they are first needed, and made again if they are gone. Whoever makes
one removes others that nobody used for 30 days, and the longest unused beyond 10 GiB:
see CARREL_TEMPLATE_AGE and CARREL_TEMPLATE_BYTES in docs/cli.md.";

/// `carrel template`.
#[derive(Debug, Args)]
#[command(after_help = TEMPLATE_EXAMPLES, arg_required_else_help = true, disable_help_subcommand = true)]
pub(crate) struct TemplateArgs {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: TemplateCommand,
}

/// The commands on templates.
#[derive(Debug, Subcommand)]
pub(crate) enum TemplateCommand {
    /// Make the template of an image, or of a workload that is ready, unless it is there
    Create(Box<CreateArgs>),
    /// Make the template of a function, or of one that waits for its first event, unless it is there
    CreateFunction(Box<CreateFunctionArgs>),
    /// List templates, the last used first
    Ls(LsArgs),
    /// Show all that is known of templates
    Inspect(InspectArgs),
    /// Make templates stay: prune leaves them alone, and rm refuses them
    Pin(PinArgs),
    /// Let templates go again
    Unpin(UnpinArgs),
    /// Remove templates; their clones run on
    Rm(RmArgs),
    /// Read templates in full, and throw damaged ones away
    Verify(VerifyArgs),
    /// Remove templates by age and size
    Prune(PruneArgs),
}

const CREATE_EXAMPLES: &str = "\
Examples:
  carrel template create debian:12
  carrel template create -m 1g --cpus 2 --pin oci:./job
  carrel template create --initialised -e MODEL=small oci:./app python3 server.py

A room finds the template if `carrel run` is given the same image, memory, CPUs, disk,
kernel and domain; with --initialised also the same command, variables, user, working
directory, mounts, -i and -t. What such a command says before it is ready goes to
standard error, here and nowhere else.

Exit status: 0 if it is there, made now or before; 1 if it can't be made.";

/// `carrel template create`.
#[derive(Debug, Args)]
#[command(
    after_help = CREATE_EXAMPLES,
    override_usage = "carrel template create [OPTIONS] IMAGE [COMMAND [ARGUMENT]...]"
)]
pub(crate) struct CreateArgs {
    /// Of the workload itself, once it said at /run/carrel/clone.sock that it is ready
    #[arg(long, visible_alias = "initialized")]
    pub(crate) initialised: bool,
    /// Its clones attach standard input
    #[arg(short, long, requires = "initialised")]
    pub(crate) interactive: bool,
    /// Its clones have a terminal
    #[arg(short, long, requires = "initialised")]
    pub(crate) tty: bool,
    #[command(flatten)]
    pub(crate) made: MadeArgs,
    #[command(flatten)]
    pub(crate) source: SourceArgs,
    /// The image, and with --initialised the command in place of its own
    #[arg(required = true, trailing_var_arg = true, value_names = ["IMAGE", "COMMAND"])]
    pub(crate) image_and_command: Vec<String>,
    // After all of the above: a heading holds for what follows it.
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

/// What becomes of a template that is made ahead of need.
#[derive(Debug, Args)]
pub(crate) struct MadeArgs {
    /// Who may share it [default: this user]
    #[arg(long, value_name = "NAME", env = "CARREL_DOMAIN")]
    pub(crate) domain: Option<String>,
    /// Make it stay: see `carrel template pin`
    #[arg(long)]
    pub(crate) pin: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

const CREATE_FUNCTION_EXAMPLES: &str = "\
Examples:
  carrel template create-function --zip f.zip --handler app.handler
  carrel template create-function --initialised --pin -m 256m -e STAGE=live --zip f.zip --handler app.handler
  carrel template create-function --initialised --image docker://localhost:5000/fn:1

An event finds the template if `carrel invoke` is given the same code, runtime,
memory, kernel and domain; with --initialised also the same handler, variables, name
and timeout. With it the function's INIT runs here, and its log goes to standard
error; what INIT made, connections and credentials too, is then as old as the template.

Exit status: 0 if it is there, made now or before; 1 if it can't be made.";

/// `carrel template create-function`.
#[derive(Debug, Args)]
#[command(after_help = CREATE_FUNCTION_EXAMPLES)]
pub(crate) struct CreateFunctionArgs {
    /// Of the function itself, once it waits for its first event
    #[arg(long, visible_alias = "initialized")]
    pub(crate) initialised: bool,
    #[command(flatten)]
    pub(crate) made: MadeArgs,
    #[command(flatten)]
    pub(crate) function: FunctionArgs,
}

impl CreateArgs {
    /// The image.
    pub(crate) fn image(&self) -> &str {
        self.image_and_command.first().map_or("", String::as_str)
    }

    /// The command that replaces the image's own; empty if none was given.
    pub(crate) fn command(&self) -> &[String] {
        self.image_and_command.get(1..).unwrap_or_default()
    }
}

const LS_EXAMPLES: &str = "\
Examples:
  carrel template ls
  carrel template ls --json | jq -r '.[] | select(.pinned) | .key'";

/// `carrel template ls`.
#[derive(Debug, Args)]
#[command(after_help = LS_EXAMPLES)]
pub(crate) struct LsArgs {
    /// Print JSON
    #[arg(long, conflicts_with = "quiet")]
    pub(crate) json: bool,
    /// Print keys only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Show keys in full
    #[arg(long)]
    pub(crate) keys: bool,
}

const INSPECT_EXAMPLES: &str = "\
Examples:
  carrel template inspect 3f2a91c07b1e
  carrel template inspect --json 3f2a91c07b1e | jq '.[0].description'";

/// `carrel template inspect`.
#[derive(Debug, Args)]
#[command(after_help = INSPECT_EXAMPLES)]
pub(crate) struct InspectArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The templates
    #[arg(required = true, value_name = "TEMPLATE")]
    pub(crate) templates: Vec<String>,
}

const PIN_EXAMPLES: &str = "\
Examples:
  carrel template pin 3f2a91c07b1e";

/// `carrel template pin`.
#[derive(Debug, Args)]
#[command(after_help = PIN_EXAMPLES)]
pub(crate) struct PinArgs {
    /// The templates
    #[arg(required = true, value_name = "TEMPLATE")]
    pub(crate) templates: Vec<String>,
}

const UNPIN_EXAMPLES: &str = "\
Examples:
  carrel template unpin 3f2a91c07b1e";

/// `carrel template unpin`.
#[derive(Debug, Args)]
#[command(after_help = UNPIN_EXAMPLES)]
pub(crate) struct UnpinArgs {
    /// The templates
    #[arg(required = true, value_name = "TEMPLATE")]
    pub(crate) templates: Vec<String>,
}

const RM_EXAMPLES: &str = "\
Examples:
  carrel template rm 3f2a91c07b1e
  carrel template rm $(carrel template ls -q)

The disk space of a template is free when its last clone has ended.";

/// `carrel template rm`.
#[derive(Debug, Args)]
#[command(after_help = RM_EXAMPLES)]
pub(crate) struct RmArgs {
    /// The templates
    #[arg(required = true, value_name = "TEMPLATE")]
    pub(crate) templates: Vec<String>,
}

const VERIFY_EXAMPLES: &str = "\
Examples:
  carrel template verify
  carrel template verify --json 3f2a91c07b1e

Exit status: 0 if all are sound, 1 if one was damaged and thrown away.";

/// `carrel template verify`.
#[derive(Debug, Args)]
#[command(after_help = VERIFY_EXAMPLES)]
pub(crate) struct VerifyArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The templates [default: all]
    #[arg(value_name = "TEMPLATE")]
    pub(crate) templates: Vec<String>,
}

const PRUNE_EXAMPLES: &str = "\
Examples:
  carrel template prune                     what dead makers left, and damaged ones
  carrel template prune --older-than 7d     also those not used for a week
  carrel template prune --max-size 20g      also the longest unused, until 20 GiB stay
  carrel template prune --all --dry-run     every one that is not pinned";

/// `carrel template prune`.
#[derive(Debug, Args)]
#[command(after_help = PRUNE_EXAMPLES)]
pub(crate) struct PruneArgs {
    /// Every one that is not pinned
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Those that were not used for this long
    #[arg(long, value_name = "TIME", value_parser = span::parse)]
    pub(crate) older_than: Option<Duration>,
    /// The longest unused, until all together take no more of the disk than this
    #[arg(long, value_name = "SIZE", value_parser = size::bytes)]
    pub(crate) max_size: Option<u64>,
    /// Say what would go, remove nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
