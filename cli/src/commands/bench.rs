//! `carrel bench`: hands over to `carrel-bench`, a program of its own, since who runs rooms needs neither its code nor its plots.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};

use super::place;
use crate::arguments::BenchArgs;
use crate::configuration::Configuration;

/// `carrel bench`. Returns only if the program can't be executed.
pub(crate) fn bench(args: &BenchArgs, configuration: &Configuration) -> Result<u8> {
    let assets = place::assets_directory(configuration)?;
    let program = place::program("carrel-bench", &assets)?;
    let mut command = Command::new(&program);
    command.arg("isolation").args(&args.options).env("CARREL_ASSETS", &assets);
    command.env("CARREL_VMM", place::vmm(configuration, &assets)?);
    Err(command.exec()).with_context(|| {
        format!(
            "{} can't be executed: install carrel-bench beside carrel, or build it with scripts/bench.",
            program.display()
        )
    })
}
