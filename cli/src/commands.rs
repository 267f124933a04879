//! One function a command: what was asked, one call into store or host, what came back.

mod doctor;
mod images;
mod invoke;
mod payload;
mod place;
mod report;
mod rooms;
mod run;
mod signals;

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
        Command::Completions(args) => completions(&args),
        Command::Version(args) => version(&args),
        Command::Owner(args) => Ok(carrel_host::owner::run(&args.room).map(|()| 0)?),
    }
}

fn completions(args: &CompletionsArgs) -> Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "carrel", &mut script);
    failure::print_bytes(&script)?;
    Ok(0)
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
