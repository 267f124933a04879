//! Where things are: the home with its rooms, the store, the assets that rooms boot from, the VMM.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use carrel_host::{Assets, Home};
use carrel_store::Store;

use crate::configuration::Configuration;

/// The rooms. Opening them sweeps up what killed owners left, and killed commands in the store.
pub(crate) fn home(configuration: &Configuration) -> Result<Home> {
    store(configuration)?;
    let home = Home::open(&configuration.home, assets(configuration)?, configuration.patience)?;
    Ok(if configuration.pool { home } else { home.without_resident() })
}

/// The images and templates.
pub(crate) fn store(configuration: &Configuration) -> Result<Store> {
    let store = Store::open(&configuration.store)?;
    Ok(store.with_template_bounds(configuration.template_bounds()))
}

/// The image layout of a managed runtime, where there is such a runtime.
pub(crate) fn runtime(configuration: &Configuration, name: &str) -> Result<Option<PathBuf>> {
    let layout = assets_directory(configuration)?.join("runtimes").join(name);
    // A name is a word, never a path that leads elsewhere.
    let word = !name.is_empty() && !name.starts_with('.') && !name.contains('/');
    Ok((word && layout.is_dir()).then_some(layout))
}

/// Names of the managed runtimes that are there.
pub(crate) fn runtimes(configuration: &Configuration) -> Result<Vec<String>> {
    let folder = assets_directory(configuration)?.join("runtimes");
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

/// What every room needs, as files; they may not be there.
pub(crate) fn assets(configuration: &Configuration) -> Result<Assets> {
    let folder = assets_directory(configuration)?;
    Ok(Assets {
        kernel: folder.join("vmlinux"),
        initramfs: folder.join("initramfs.cpio"),
        scratch: folder.join("scratch.ext4"),
        vmm: vmm(configuration, &folder)?,
    })
}

fn own_directory() -> Result<PathBuf> {
    let program = std::env::current_exe().context("carrel can't find out where its own program is.")?;
    Ok(program.parent().unwrap_or(Path::new("/")).to_owned())
}

/// The configured folder; else carrel's own if a kernel is there; else `lib/carrel` beside its `bin`.
pub(super) fn assets_directory(configuration: &Configuration) -> Result<PathBuf> {
    if let Some(folder) = &configuration.assets {
        let cannot = || format!("The folder of assets {} is no usable path.", folder.display());
        return std::path::absolute(folder).with_context(cannot);
    }
    let own = own_directory()?;
    Ok(if own.join("vmlinux").is_file() { own } else { own.join("../lib/carrel") })
}

/// The configured program; else the one beside carrel, in the assets, on the PATH.
pub(super) fn vmm(configuration: &Configuration, assets: &Path) -> Result<PathBuf> {
    match &configuration.vmm {
        Some(program) => std::path::absolute(program)
            .with_context(|| format!("The VMM {} is no usable path.", program.display())),
        None => program("carrel-vmm", assets),
    }
}

/// A program of ours: beside carrel, in the assets, on the PATH.
pub(super) fn program(name: &str, assets: &Path) -> Result<PathBuf> {
    let on_path = std::env::var_os("PATH").unwrap_or_default();
    let folders = [own_directory()?, assets.to_owned()];
    let found = folders.into_iter().chain(std::env::split_paths(&on_path)).map(|folder| folder.join(name));
    let beside = own_directory()?.join(name);
    // Where there is none, the place where it should be is named by whoever opens it.
    Ok(found.into_iter().find(|program| program.is_file()).unwrap_or(beside))
}
