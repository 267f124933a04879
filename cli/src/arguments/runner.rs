//! `carrel runner`, on the command line, in the environment and in the configuration file: one set of options.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde::{Deserialize, Serialize};

use super::run::UsageArgs;
use crate::values::{CpuMillis, Tmpfs, Without, size, span};

const EXAMPLES: &str = "\
The program runs in a microVM of its own, with the libraries and files that it
needs, in the same directory, as the same user, and ends as it would here:
streams, status, signals, files (--return).

Examples:
  carrel runner ./hello
  carrel runner --with tests/data --return report.xml ./suite --junit report.xml
  carrel runner --timeout 1m -- python3 -m pytest -q tests/test_one.py

As Cargo's runner, in .cargo/config.toml, for `cargo test` and `cargo nextest run`:
  [target.x86_64-unknown-linux-gnu]
  runner = [\"carrel\", \"runner\"]

Each option but --usage and --usage-file can be set in the environment too, as
CARREL_RUNNER_MEMORY=1g or CARREL_RUNNER_WITH=tests/data,fixtures (lists with
commas), or under \"runner\" in the configuration file. Flags win, lists add up.

Exit status: the program's own, or its signal; 124 timeout, 125 carrel failed,
126 the program can't be executed, 127 it does not exist.";

/// `carrel runner`.
#[derive(Debug, Args)]
#[command(
    after_help = EXAMPLES,
    override_usage = "carrel runner [OPTIONS] [--] PROGRAM [ARGUMENT]..."
)]
pub(crate) struct RunnerArgs {
    /// What the environment and the file can say too.
    #[command(flatten)]
    pub(crate) options: RunnerOptions,
    #[command(flatten)]
    pub(crate) usage: UsageArgs,
    /// The program and its arguments; options after PROGRAM belong to it
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_names = ["PROGRAM", "ARGUMENT"])]
    pub(crate) program_and_arguments: Vec<String>,
}

/// How programs are run, as text that was found to be right.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct RunnerOptions {
    /// Take a file, a folder or a program of PATH along; AT is its place in the room, without it the same path
    #[arg(long, value_name = "PATH[:AT]")]
    pub(crate) with: Vec<String>,
    /// Under Cargo, take the whole workspace along rather than the package
    #[arg(long)]
    pub(crate) workspace: bool,
    /// Bring a file or folder back when the program has ended, whatever its status; TO is its place here, without it the same path
    #[arg(long = "return", value_name = "PATH[:TO]")]
    #[serde(rename = "return")]
    pub(crate) returns: Vec<String>,
    /// What may come back, all files together [default: 1g]
    #[arg(long, value_name = "SIZE", value_parser = checked(size::bytes))]
    pub(crate) return_limit: Option<String>,
    /// The working directory in place of this one
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Set a variable; without a value, take it along (NAME* takes all that begin so)
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Leave a variable out that would go along (NAME* leaves out all that begin so)
    #[arg(long, value_name = "NAME")]
    pub(crate) unset_env: Vec<String>,
    /// The user in place of oneself: a name or number of this host's, and perhaps a group's number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// The room's memory, 64m to 64g [default: 512m]
    #[arg(short, long, value_name = "SIZE", value_parser = checked(size::memory))]
    pub(crate) memory: Option<String>,
    /// CPUs that the room may use, 0.01 to 16 [default: 1]
    #[arg(long, value_name = "NUMBER", value_parser = checked(str::parse::<CpuMillis>))]
    pub(crate) cpus: Option<String>,
    /// The size of the room's disk, which is sparse [default: 10g]
    #[arg(long, value_name = "SIZE", value_parser = checked(size::bytes))]
    pub(crate) disk: Option<String>,
    /// Mount a tmpfs
    #[arg(long, value_name = "PATH[:OPTIONS]", value_parser = checked(str::parse::<Tmpfs>))]
    pub(crate) tmpfs: Vec<String>,
    /// End the program after this time, with status 124
    #[arg(long, value_name = "TIME", value_parser = checked(span::positive))]
    pub(crate) timeout: Option<String>,
    /// Boot this kernel in place of the one that carrel came with
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Do without parts of the VMM's confinement: cgroup, namespaces, capabilities, seccomp, or all of them
    #[arg(
        long,
        value_name = "PARTS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "all",
        value_parser = checked(str::parse::<Without>)
    )]
    pub(crate) unconfined: Option<String>,
    /// Begin with a boot, not as a clone of the program's template
    #[arg(long, env = "CARREL_COLD", value_parser = clap::builder::BoolishValueParser::new(), action = clap::ArgAction::SetTrue)]
    pub(crate) cold: bool,
    /// Begin as a clone of the program itself, taken where it said at /run/carrel/clone.sock that it was ready; its arguments and variables are
    /// part of what a template is made for, its input is each room's own. See docs/snapshots.md
    #[arg(long, visible_alias = "initialized")]
    pub(crate) initialised: bool,
    /// Who may share templates, and with them pages of memory, with this room: rooms of the same domain [default: this user]
    #[arg(long, value_name = "NAME", env = "CARREL_DOMAIN")]
    pub(crate) domain: Option<String>,
    /// Print when what happened, from the command's start to the program's end, on stderr
    #[arg(long)]
    pub(crate) timeline: bool,
    /// Don't say what was left out
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// Keeps the text of what can be parsed.
fn checked<T: 'static>(
    parse: impl Fn(&str) -> Result<T> + Clone + Send + Sync + 'static,
) -> impl Fn(&str) -> Result<String> + Clone + Send + Sync + 'static {
    move |text| parse(text).map(|_| text.to_owned())
}

impl RunnerOptions {
    /// What the environment says; `variable` looks it up.
    pub(crate) fn from_environment(variable: &impl Fn(&str) -> Option<PathBuf>) -> Self {
        let path = |name: &str| variable(&format!("CARREL_RUNNER_{name}"));
        let text = |name: &str| path(name).map(|value| value.to_string_lossy().into_owned());
        let list = |name: &str| -> Vec<String> {
            let text = text(name).unwrap_or_default();
            text.split([',', '\n']).filter(|word| !word.is_empty()).map(str::to_owned).collect()
        };
        let flag = |name: &str| text(name).is_some_and(|text| !matches!(text.as_str(), "0" | "false" | "no"));
        Self {
            with: list("WITH"),
            workspace: flag("WORKSPACE"),
            returns: list("RETURN"),
            return_limit: text("RETURN_LIMIT"),
            dir: path("DIR"),
            env: list("ENV"),
            unset_env: list("UNSET_ENV"),
            user: text("USER"),
            memory: text("MEMORY"),
            cpus: text("CPUS"),
            disk: text("DISK"),
            tmpfs: list("TMPFS"),
            timeout: text("TIMEOUT"),
            kernel: path("KERNEL"),
            unconfined: text("UNCONFINED"),
            cold: flag("COLD"),
            initialised: flag("INITIALISED"),
            domain: text("DOMAIN"),
            timeline: flag("TIMELINE"),
            quiet: flag("QUIET"),
        }
    }

    /// These, where they say something, over others. Lists add up, the others' first.
    pub(crate) fn over(self, others: Self) -> Self {
        let list = |own: Vec<String>, others: Vec<String>| others.into_iter().chain(own).collect();
        Self {
            with: list(self.with, others.with),
            workspace: self.workspace || others.workspace,
            returns: list(self.returns, others.returns),
            return_limit: self.return_limit.or(others.return_limit),
            dir: self.dir.or(others.dir),
            env: list(self.env, others.env),
            unset_env: list(self.unset_env, others.unset_env),
            user: self.user.or(others.user),
            memory: self.memory.or(others.memory),
            cpus: self.cpus.or(others.cpus),
            disk: self.disk.or(others.disk),
            tmpfs: list(self.tmpfs, others.tmpfs),
            timeout: self.timeout.or(others.timeout),
            kernel: self.kernel.or(others.kernel),
            unconfined: self.unconfined.or(others.unconfined),
            cold: self.cold || others.cold,
            initialised: self.initialised || others.initialised,
            domain: self.domain.or(others.domain),
            timeline: self.timeline || others.timeline,
            quiet: self.quiet || others.quiet,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_says_what_flags_say() {
        let look_up = |name: &str| match name {
            "CARREL_RUNNER_MEMORY" => Some("1g".into()),
            "CARREL_RUNNER_WITH" => Some("a:/b,c".into()),
            "CARREL_RUNNER_WORKSPACE" => Some("1".into()),
            "CARREL_RUNNER_QUIET" => Some("0".into()),
            _ => None,
        };
        let found = RunnerOptions::from_environment(&look_up);
        assert_eq!(found.memory.as_deref(), Some("1g"));
        assert_eq!(found.with, ["a:/b", "c"]);
        assert!(found.workspace && !found.quiet && !found.cold);
    }

    #[test]
    fn flags_win_and_lists_add_up() {
        let text = |text: &str| Some(text.to_owned());
        let flags =
            RunnerOptions { memory: text("1g"), with: vec!["own".into()], ..RunnerOptions::default() };
        let file = RunnerOptions {
            memory: text("2g"),
            cpus: text("2"),
            with: vec!["file".into()],
            cold: true,
            domain: text("file's"),
            timeline: true,
            ..RunnerOptions::default()
        };
        let both = flags.over(file);
        assert_eq!((both.memory, both.cpus, both.cold), (text("1g"), text("2"), true));
        assert_eq!((both.domain, both.timeline), (text("file's"), true));
        assert_eq!(both.with, ["file", "own"]);
    }
}
