//! One function a command: what was asked, one call into store or host, what came back.

mod begin;
mod bench;
mod doctor;
mod images;
mod invoke;
mod payload;
mod place;
mod pool;
mod report;
mod rooms;
mod run;
mod runner;
mod signals;
mod template;

use anyhow::Result;
use clap::CommandFactory;

use crate::arguments::{Cli, Command, CompletionsArgs, VersionArgs};
use crate::configuration::Configuration;
use crate::failure;

/// Carries out a command and returns carrel's exit status.
pub(crate) fn run(command: Command, configuration: &Configuration) -> Result<u8> {
    match command {
        Command::Doctor(args) => doctor::doctor(&args, configuration),
        Command::Run(args) => run::run(&args, configuration),
        Command::Runner(args) => runner::runner(&args, configuration),
        Command::Exec(args) => run::exec(&args, configuration),
        Command::Invoke(args) => invoke::invoke(&args, configuration),
        Command::Ps(args) => rooms::ps(&args, configuration),
        Command::Logs(args) => rooms::logs(&args, configuration),
        Command::Stop(args) => rooms::stop(&args, configuration),
        Command::Kill(args) => rooms::kill(&args, configuration),
        Command::Rm(args) => rooms::rm(&args, configuration),
        Command::Wait(args) => rooms::wait(&args, configuration),
        Command::Stats(args) => rooms::stats(&args, configuration),
        Command::Pull(args) => images::pull(&args, configuration),
        Command::Images(args) => images::images(&args, configuration),
        Command::Rmi(args) => images::rmi(&args, configuration),
        Command::Prune(args) => images::prune(&args, configuration),
        Command::Template(args) => template::template(&args, configuration),
        Command::Pool(args) => pool::pool(&args, configuration),
        Command::Bench(args) => bench::bench(&args, configuration),
        Command::Completions(args) => completions(&args),
        Command::Version(args) => version(&args),
        Command::Owner(args) => Ok(carrel_host::owner::run(&args.room).map(|()| 0)?),
    }
}

fn completions(args: &CompletionsArgs) -> Result<u8> {
    failure::print_bytes(&completion_script(args.shell))?;
    Ok(0)
}

/// Of what is shown: nobody types the other commands.
fn completion_script(shell: clap_complete::Shell) -> Vec<u8> {
    let all = Cli::command();
    let shown = all.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    let mut shown = clap::Command::new("carrel").args(all.get_arguments().cloned()).subcommands(shown);
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut shown, "carrel", &mut script);
    script
}

fn version(args: &VersionArgs) -> Result<u8> {
    let version = env!("CARGO_PKG_VERSION");
    if args.json {
        let object = serde_json::json!({
            "carrel": version,
            "protocol": { "agent": carrel_protocol::agent::VERSION, "vmm": carrel_protocol::vmm::VERSION },
        });
        failure::print(format_args!("{object}\n"))?;
    } else {
        failure::print(format_args!("carrel {version}\n"))?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use clap::ValueEnum;
    use clap_complete::Shell;

    use super::*;

    #[test]
    fn every_shell_completes_what_is_shown_and_nothing_else() {
        for shell in Shell::value_variants() {
            let script = String::from_utf8(completion_script(*shell)).unwrap();
            for word in ["invoke", "completions", "--usage-file", "--stop-timeout"] {
                assert!(script.contains(word.trim_start_matches('-')), "{shell}: no {word}");
            }
            // Its name as each shell writes one, and what is said of it: others speak of owners, too.
            for owner in ["__owner", "(owner)", "'owner'", "\"owner\"", "never by hand"] {
                assert!(!script.contains(owner), "{shell} offers the owner: {owner}");
            }
        }
    }

    #[test]
    fn bash_understands_its_script() {
        let mut bash = Command::new("bash").arg("-n").stdin(Stdio::piped()).spawn().unwrap();
        bash.stdin.take().unwrap().write_all(&completion_script(Shell::Bash)).unwrap();
        assert!(bash.wait().unwrap().success());
    }
}
