//! Commands on the store.

use std::time::Duration;

use clap::Args;

use crate::values::{Without, span};

const PULL_EXAMPLES: &str = "\
Examples:
  carrel pull debian:12
  carrel pull --insecure docker://registry.lan:5000/team/job:7
  carrel pull oci-archive:job.tar

Credentials are those of `docker login` (~/.docker/config.json). Plain HTTP is
used for loopback addresses, and elsewhere only with --insecure.";

/// `carrel pull`.
#[derive(Debug, Args)]
#[command(after_help = PULL_EXAMPLES)]
pub(crate) struct PullArgs {
    /// Speak plain HTTP with the registry
    #[arg(long)]
    pub(crate) insecure: bool,
    /// Choose this platform's image, such as linux/amd64
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    pub(crate) platform: Option<String>,
    /// Print digests only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Do without parts of the confinement of the process that reads an archive: namespaces, capabilities, seccomp, or all of them
    #[arg(long, value_name = "PARTS", num_args = 0..=1, require_equals = true, default_missing_value = "all")]
    pub(crate) unconfined: Option<Without>,
    /// The images
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<String>,
}

const IMAGES_EXAMPLES: &str = "\
Examples:
  carrel images
  carrel images --digests
  carrel images --json | jq -r '.[].digest'";

/// `carrel images`.
#[derive(Debug, Args)]
#[command(after_help = IMAGES_EXAMPLES)]
pub(crate) struct ImagesArgs {
    /// Print JSON
    #[arg(long, conflicts_with = "quiet")]
    pub(crate) json: bool,
    /// Print digests only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Show digests in full
    #[arg(long)]
    pub(crate) digests: bool,
}

const RMI_EXAMPLES: &str = "\
Examples:
  carrel rmi debian:12
  carrel rmi $(carrel images -q)";

/// `carrel rmi`.
#[derive(Debug, Args)]
#[command(after_help = RMI_EXAMPLES)]
pub(crate) struct RmiArgs {
    /// The images, by name or digest
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<String>,
}

const PRUNE_EXAMPLES: &str = "\
Examples:
  carrel prune                    what no image refers to, and rooms that ended
  carrel prune --all              also every image that no room uses, and templates
  carrel prune --all --older-than 7d --dry-run";

/// `carrel prune`.
#[derive(Debug, Args)]
#[command(after_help = PRUNE_EXAMPLES)]
pub(crate) struct PruneArgs {
    /// Also images, not just what belongs to none, and templates that are not pinned
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Say what would go, remove nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Only what was not used for this long
    #[arg(long, value_name = "TIME", value_parser = span::parse)]
    pub(crate) older_than: Option<Duration>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
