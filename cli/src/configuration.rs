//! What carrel runs with: flags, then environment, then a file, then defaults; `--print-config` shows the outcome.
//!
//! The file is JSON, [`File`] its fields. A field that isn't known, or has a wrong value, is an error that names it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use carrel_host::Patience;
use carrel_store::templates::TemplateBounds;
use serde::{Deserialize, Serialize};

use crate::arguments::runner::RunnerOptions;
use crate::arguments::{Global, LogFormat};
use crate::values::{size, span};

/// The outcome.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Configuration {
    /// Where all state lives.
    pub(crate) home: PathBuf,
    /// Where images and templates are; homes of one user may share it.
    pub(crate) store: PathBuf,
    /// How diagnostics are written.
    pub(crate) log_format: LogFormat,
    /// How much is said, in tracing's filter syntax.
    pub(crate) log_level: String,
    /// The VMM's program; where there is none, `carrel-vmm` beside carrel itself, then on the PATH.
    pub(crate) vmm: Option<PathBuf>,
    /// The folder of guest kernel, initramfs and empty disk; where there is none, see docs/cli.md.
    pub(crate) assets: Option<PathBuf>,
    /// By what every deadline is stretched.
    pub(crate) patience: Patience,
    /// Whether a resident owner is asked to own rooms, where there is one.
    pub(crate) pool: bool,
    /// What templates may take of the disk, in bytes, before the longest unused go.
    pub(crate) template_bytes: u64,
    /// After how long an unused template goes, s.
    pub(crate) template_age_s: u64,
    /// How `carrel runner` runs programs.
    pub(crate) runner: RunnerOptions,
}

/// The file's fields; all optional.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    home: Option<PathBuf>,
    store: Option<PathBuf>,
    log_format: Option<LogFormat>,
    log_level: Option<String>,
    vmm: Option<PathBuf>,
    assets: Option<PathBuf>,
    patience: Option<Patience>,
    pool: Option<bool>,
    /// As `--max-size` of `template prune` takes it.
    template_bytes: Option<String>,
    /// As `--older-than` takes it.
    template_age: Option<String>,
    #[serde(default)]
    runner: RunnerOptions,
}

impl Configuration {
    /// Puts it together. `variable` looks up carrel's environment; flags with a variable of their own have it already.
    pub(crate) fn load(
        flags: &Global,
        is_root: bool,
        variable: &impl Fn(&str) -> Option<PathBuf>,
    ) -> Result<Self> {
        let default_home = || -> Result<PathBuf> {
            if is_root {
                return Ok("/var/lib/carrel".into());
            }
            // XDG base directory specification: a relative path is to be ignored.
            let data = variable("XDG_DATA_HOME").filter(|path| path.is_absolute());
            data.or_else(|| variable("HOME").map(|home| home.join(".local/share")))
                .map(|data| data.join("carrel"))
                .context("Set CARREL_HOME, or HOME, so that carrel knows where to keep its state.")
        };
        let (file, home) = match (&flags.config, &flags.home) {
            (Some(config), home) => {
                let file = read(config)?;
                let home = match home.clone().or_else(|| file.home.clone()) {
                    Some(home) => home,
                    None => default_home()?,
                };
                (file, home)
            }
            (None, home) => {
                let home = home.clone().map_or_else(default_home, Ok)?;
                let config = home.join("carrel.json");
                let file = if config.exists() { read(&config)? } else { File::default() };
                let home = if flags.home.is_some() { home } else { file.home.clone().unwrap_or(home) };
                (file, home)
            }
        };
        let home = std::path::absolute(&home)
            .with_context(|| format!("The home {} is no usable path.", home.display()))?;
        let store = flags.store.clone().or(file.store).unwrap_or_else(|| home.join("store"));
        let store = std::path::absolute(&store)
            .with_context(|| format!("The store {} is no usable path.", store.display()))?;
        let patience: Option<Patience> = variable("CARREL_PATIENCE")
            .map(|factor| factor.to_string_lossy().parse().context("CARREL_PATIENCE is wrong."))
            .transpose()?;
        let bounds = TemplateBounds::default();
        let text = |name: &str, file: Option<String>| {
            variable(name).map(|value| value.to_string_lossy().into_owned()).or(file)
        };
        let template_bytes = text("CARREL_TEMPLATE_BYTES", file.template_bytes)
            .map_or(Ok(bounds.most_bytes), |text| size::bytes(&text))
            .context("CARREL_TEMPLATE_BYTES (template_bytes) is wrong.")?;
        let template_age = text("CARREL_TEMPLATE_AGE", file.template_age)
            .map_or(Ok(bounds.unused_for), |text| span::parse(&text))
            .context("CARREL_TEMPLATE_AGE (template_age) is wrong.")?;
        Ok(Self {
            home,
            store,
            template_bytes,
            template_age_s: template_age.as_secs(),
            log_format: flags.log_format.or(file.log_format).unwrap_or_default(),
            log_level: flags.log_level.clone().or(file.log_level).unwrap_or_else(|| "warn".to_owned()),
            vmm: variable("CARREL_VMM").or(file.vmm),
            assets: variable("CARREL_ASSETS").or(file.assets),
            patience: patience.or(file.patience).unwrap_or_default(),
            pool: switch("CARREL_POOL", variable)?.or(file.pool).unwrap_or(true),
            runner: RunnerOptions::from_environment(variable).over(file.runner),
        })
    }
}

impl Configuration {
    /// What templates may take.
    pub(crate) fn template_bounds(&self) -> TemplateBounds {
        let unused_for = Duration::from_secs(self.template_age_s);
        TemplateBounds { most_bytes: self.template_bytes, unused_for }
    }
}

/// A variable that turns something on or off, in the words that flags' variables take.
fn switch(name: &str, variable: &impl Fn(&str) -> Option<PathBuf>) -> Result<Option<bool>> {
    let Some(word) = variable(name) else { return Ok(None) };
    match word.to_string_lossy().to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" | "y" | "t" => Ok(Some(true)),
        "" | "0" | "false" | "no" | "off" | "n" | "f" => Ok(Some(false)),
        other => bail!("{name} is {other:?}: give true or false."),
    }
}

fn read(path: &Path) -> Result<File> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("The configuration file {} can't be read.", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("Mend the configuration file {}.", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags() -> Global {
        Global {
            home: None,
            store: None,
            config: None,
            log_format: None,
            log_level: None,
            print_config: false,
        }
    }

    fn no_variables(_: &str) -> Option<PathBuf> {
        None
    }

    #[test]
    fn root_has_a_fixed_home_and_others_their_data_folder() {
        let of = |is_root, variables: &[(&str, &str)]| {
            let look_up = |name: &str| {
                variables.iter().find(|(known, _)| *known == name).map(|(_, value)| PathBuf::from(value))
            };
            Configuration::load(&flags(), is_root, &look_up).map(|config| config.home)
        };
        assert_eq!(of(true, &[]).unwrap(), Path::new("/var/lib/carrel"));
        assert_eq!(of(false, &[("HOME", "/h")]).unwrap(), Path::new("/h/.local/share/carrel"));
        let xdg = [("HOME", "/h"), ("XDG_DATA_HOME", "/d")];
        assert_eq!(of(false, &xdg).unwrap(), Path::new("/d/carrel"));
        let relative = [("HOME", "/h"), ("XDG_DATA_HOME", "d")];
        assert_eq!(of(false, &relative).unwrap(), Path::new("/h/.local/share/carrel"));
        assert!(of(false, &[]).unwrap_err().to_string().contains("CARREL_HOME"));
    }

    #[test]
    fn flags_win_over_the_environment_and_the_environment_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("carrel.json");
        std::fs::write(&config, r#"{"log_level":"info","log_format":"json","vmm":"/file","assets":"/file"}"#)
            .unwrap();
        let given =
            Global { home: Some(dir.path().to_owned()), log_level: Some("debug".to_owned()), ..flags() };
        let look_up = |name: &str| (name == "CARREL_VMM").then(|| PathBuf::from("/variable"));
        let loaded = Configuration::load(&given, true, &look_up).unwrap();
        assert_eq!(loaded.log_level, "debug");
        assert_eq!(loaded.log_format, LogFormat::Json);
        assert_eq!(loaded.vmm.unwrap(), Path::new("/variable"));
        assert_eq!(loaded.assets.unwrap(), Path::new("/file"));
    }

    #[test]
    fn the_store_is_in_the_home_unless_it_is_said_to_be_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let of = |store: Option<&str>| {
            let given =
                Global { home: Some(dir.path().to_owned()), store: store.map(PathBuf::from), ..flags() };
            Configuration::load(&given, true, &no_variables).unwrap().store
        };
        assert_eq!(of(None), dir.path().join("store"));
        std::fs::write(dir.path().join("carrel.json"), r#"{"store":"/file"}"#).unwrap();
        assert_eq!((of(None), of(Some("/flag"))), ("/file".into(), "/flag".into()));
        // Owners and rooms have working directories of their own.
        assert_eq!(of(Some("here")), std::env::current_dir().unwrap().join("here"));
    }

    #[test]
    fn patience_is_the_environments_or_the_files_and_nonsense_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let given = Global { home: Some(dir.path().to_owned()), ..flags() };
        let of = |factor: Option<&str>| {
            let look_up = |name: &str| factor.filter(|_| name == "CARREL_PATIENCE").map(PathBuf::from);
            Configuration::load(&given, true, &look_up).map(|loaded| f64::from(loaded.patience))
        };
        assert_eq!(of(None).unwrap(), 1.0);
        std::fs::write(dir.path().join("carrel.json"), r#"{"patience":20}"#).unwrap();
        assert_eq!((of(None).unwrap(), of(Some("2.5")).unwrap()), (20.0, 2.5));
        let error = format!("{:#}", of(Some("soon")).unwrap_err());
        assert!(error.contains("CARREL_PATIENCE") && error.contains("soon"), "{error}");
    }

    #[test]
    fn a_pool_is_used_unless_somebody_says_otherwise() {
        let of = |word: Option<&str>| {
            let look_up = |name: &str| match name {
                "HOME" => Some(PathBuf::from("/nowhere")),
                _ => word.filter(|_| name == "CARREL_POOL").map(PathBuf::from),
            };
            Configuration::load(&flags(), false, &look_up).map(|loaded| loaded.pool)
        };
        assert!(of(None).unwrap() && of(Some("on")).unwrap());
        assert!(!of(Some("0")).unwrap() && !of(Some("False")).unwrap());
        assert!(of(Some("perhaps")).unwrap_err().to_string().contains("CARREL_POOL"));
    }

    #[test]
    fn templates_bounds_are_the_environments_the_files_or_ten_gibibytes_and_thirty_days() {
        let dir = tempfile::tempdir().unwrap();
        let given = Global { home: Some(dir.path().to_owned()), ..flags() };
        let of = |bytes: Option<&str>| {
            let look_up = |name: &str| bytes.filter(|_| name == "CARREL_TEMPLATE_BYTES").map(PathBuf::from);
            Configuration::load(&given, true, &look_up).map(|loaded| loaded.template_bounds())
        };
        assert_eq!(of(None).unwrap(), TemplateBounds::default());
        std::fs::write(dir.path().join("carrel.json"), r#"{"template_bytes":"1g","template_age":"7d"}"#)
            .unwrap();
        let week = Duration::from_secs(7 * 86_400);
        assert_eq!(of(None).unwrap(), TemplateBounds { most_bytes: 1 << 30, unused_for: week });
        assert_eq!(of(Some("2m")).unwrap(), TemplateBounds { most_bytes: 2 << 20, unused_for: week });
        let error = format!("{:#}", of(Some("much")).unwrap_err());
        assert!(error.contains("CARREL_TEMPLATE_BYTES"), "{error}");
    }

    #[test]
    fn a_wrong_field_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let given = Global { home: Some(dir.path().to_owned()), ..flags() };
        for (text, field) in [
            (r#"{"hoem":"/x"}"#, "hoem"),
            (r#"{"log_format":"xml"}"#, "xml"),
            (r#"{"patience":0}"#, "0.1 to 1000"),
        ] {
            std::fs::write(dir.path().join("carrel.json"), text).unwrap();
            let error = Configuration::load(&given, true, &no_variables).unwrap_err();
            assert!(format!("{error:#}").contains(field), "{error:#}");
        }
    }

    #[test]
    fn a_file_that_was_named_must_exist() {
        let given = Global { config: Some("/nowhere/carrel.json".into()), ..flags() };
        let error = Configuration::load(&given, true, &no_variables).unwrap_err();
        assert!(error.to_string().contains("/nowhere/carrel.json"));
    }
}
