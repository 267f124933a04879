//! The `carrel` command: reads the command line, makes one call into the store or the host, renders what comes back.
//!
//! ```text
//!   arguments ─▶ configuration ─▶ commands::* ─▶ carrel_store | carrel_host
//!                                     │
//!        exit status ◀── failure ◀────┴──▶ table | JSON on stdout
//! ```

mod arguments;
mod commands;
mod configuration;
mod failure;
mod table;
mod terminal;
mod values;

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Mutex;

use carrel_host::archive;
use carrel_host::owner::Journal;
use carrel_host::pool::ahead;
use clap::Parser;
use clap::error::ErrorKind;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

use arguments::{Cli, Command, LogFormat};
use configuration::Configuration;

fn main() -> ExitCode {
    carrel_protocol::abort_on_panic();
    // Processes that carrel starts for itself. One will meet an archive: it reads no configuration and opens nothing before it is confined.
    let mut words = std::env::args_os().skip(1);
    match words.next() {
        Some(word) if word == archive::COMMAND => return ExitCode::from(archive::serve(words)),
        Some(word) if word == ahead::COMMAND => return ExitCode::from(ahead::serve(words)),
        _ => {}
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return ExitCode::from(usage_error(&error)),
    };
    let mut format = cli.global.log_format.unwrap_or_default();
    let default = cli.command.as_ref().map_or(failure::FAILED, failure_status);
    match dispatch(cli, &mut format) {
        Ok(status) => ExitCode::from(status),
        Err(error) => ExitCode::from(failure::report(&error, default, format)),
    }
}

/// Carries out the command. `format` becomes what the configuration says, as soon as that is known.
fn dispatch(cli: Cli, format: &mut LogFormat) -> anyhow::Result<u8> {
    let is_root = rustix::process::geteuid().is_root();
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(Into::into);
    let mut configuration = Configuration::load(&cli.global, is_root, &variable)?;
    *format = configuration.log_format;
    if cli.global.print_config {
        if let Some(Command::Runner(args)) = &cli.command {
            configuration.runner = args.options.clone().over(configuration.runner);
        }
        failure::print(format_args!("{}\n", serde_json::to_string_pretty(&configuration)?))?;
        return Ok(0);
    }
    listen(&configuration, writer(cli.command.as_ref()))?;
    match cli.command {
        Some(command) => commands::run(command, &configuration),
        None => Err(failure::WithStatus::new(failure::USAGE, "Give a command: see carrel --help.").into()),
    }
}

/// Diagnostics go to stderr, never to stdout; an owner's, which nobody watches and its guest can provoke, to a log of bounded size.
fn writer(command: Option<&Command>) -> BoxMakeWriter {
    match command {
        Some(Command::Owner(args)) => match Journal::open(&args.room) {
            Ok(journal) => BoxMakeWriter::new(Mutex::new(journal)),
            Err(_) => BoxMakeWriter::new(std::io::stderr),
        },
        Some(_) | None => BoxMakeWriter::new(std::io::stderr),
    }
}

fn listen(configuration: &Configuration, writer: BoxMakeWriter) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&configuration.log_level).map_err(|error| {
        anyhow::Error::new(error).context(format!("The log level '{}' is wrong.", configuration.log_level))
    })?;
    // A log that can't be written, on a full disk, must not end its writer.
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).log_internal_errors(false);
    match configuration.log_format {
        LogFormat::Text => builder.with_ansi(false).with_target(false).init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
    Ok(())
}

/// Prints what clap has to say, errors as one sentence of carrel's own form. Help and version go to stdout and are no error.
fn usage_error(error: &clap::Error) -> u8 {
    if !error.use_stderr() {
        let _ = error.print();
        return 0;
    }
    let path = arguments::command_path(std::env::args_os().skip(1));
    let command = path.as_deref();
    // If nobody reads it, the status still says it.
    let _ = if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        // Help that was not asked for.
        error.print()
    } else {
        io::stderr().write_all(failure::wrong_line(error, command).as_bytes())
    };
    // Whoever runs a workload takes its status for the workload's own, so a wrong line must not look like one.
    match command {
        Some("run" | "exec" | "runner" | "invoke") => failure::OURS,
        Some(_) | None => failure::USAGE,
    }
}

/// The status of a failure that has none of its own.
fn failure_status(command: &Command) -> u8 {
    match command {
        Command::Run(_) | Command::Runner(_) | Command::Exec(_) | Command::Invoke(_) => failure::OURS,
        Command::Doctor(_)
        | Command::Ps(_)
        | Command::Logs(_)
        | Command::Stop(_)
        | Command::Kill(_)
        | Command::Rm(_)
        | Command::Stats(_)
        | Command::Wait(_)
        | Command::Pull(_)
        | Command::Images(_)
        | Command::Rmi(_)
        | Command::Prune(_)
        | Command::Template(_)
        | Command::Pool(_)
        | Command::Bench(_)
        | Command::Completions(_)
        | Command::Version(_)
        | Command::Owner(_) => failure::FAILED,
    }
}
