//! The resident owner's command line.

use std::ops::RangeInclusive;
use std::time::Duration;

use carrel_host::resident::Factor;
use clap::{Args, Subcommand};

use crate::values::span;

const POOL_EXAMPLES: &str = "\
Examples:
  carrel pool                        until Ctrl-C, for this home
  carrel pool --ready 16 --idle 10m  ends when it had no room for ten minutes
  carrel pool status --json | jq .rooms

While it runs, `run`, `runner` and `invoke` have their rooms owned by it and start in
VMMs that it has ready; without it they start an owner of their own. Rooms of
`run --detach` always have one of their own.

A function's room waits for another event of the same function (code, settings and
domain) for the time of --warm, and takes it without a start; `invoke --isolation
event` and `--cold` do without. Meanwhile it rests: its guest gives back what memory
it has free and stands still, until an event or a command wakes it. Where the host has no more for a new room, those
that have waited longest end.

With systemd: a socket unit with ListenSequentialPacket=HOME/pool.sock, and a
service unit with ExecStart=carrel pool --idle 5m and Delegate=yes (docs/host.md).

Signals: TERM or INT, no new rooms, and the end when the last has ended; once more,
the end at once, and that of all its rooms.";

/// `carrel pool`.
#[derive(Debug, Args)]
#[command(after_help = POOL_EXAMPLES, args_conflicts_with_subcommands = true, disable_help_subcommand = true)]
pub(crate) struct PoolArgs {
    /// What to do instead.
    #[command(subcommand)]
    pub(crate) command: Option<PoolCommand>,
    /// VMMs to keep ready for each kind of machine that was asked for lately; 0: none at any time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(0..=1024))]
    ready: u16,
    /// Keep as many ready as were lately asked for at once, up to so many
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(0..=1024))]
    ready_at_most: u16,
    /// End after so long without a room [default: never]
    #[arg(long, value_name = "TIME", value_parser = span::positive)]
    pub(crate) idle: Option<Duration>,
    /// Keep the room of a function that has answered for so long, for its next event; 0s: end it
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = span::parse)]
    pub(crate) warm: Duration,
    /// Promise rooms so many times the host's memory [default: 16]
    #[arg(long, value_name = "FACTOR")]
    pub(crate) memory_overcommit: Option<Factor>,
    /// Promise rooms so many times the host's CPUs [default: 100]
    #[arg(long, value_name = "FACTOR")]
    pub(crate) cpu_overcommit: Option<Factor>,
}

impl PoolArgs {
    /// How many VMMs of a kind are kept ready: the fewest and the most.
    pub(crate) fn ready(&self) -> RangeInclusive<usize> {
        let most = if self.ready == 0 { 0 } else { self.ready_at_most.max(self.ready) };
        self.ready.into()..=most.into()
    }
}

/// The commands on a resident owner.
#[derive(Debug, Subcommand)]
pub(crate) enum PoolCommand {
    /// Show what the home's resident owner has and has promised
    Status(StatusArgs),
}

/// `carrel pool status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
