//! From an image's configuration and the user's words to a process: Docker's rules, as one pure function.
//!
//! | | given by the user | else |
//! |---|---|---|
//! | program | `--entrypoint`, then COMMAND; the image's `Cmd` is dropped | `Entrypoint`, then COMMAND or `Cmd` |
//! | environment | later wins | the image's first |
//! | directory, user | replaced | the image's, else `/` and root |

use carrel_protocol::agent::TerminalSize;
use thiserror::Error;

use crate::signal;
use crate::spec::ProcessSpec;

/// Where programs are looked for if the image doesn't say (Docker's own default).
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const SIGTERM: u8 = 15;

/// What can't be run.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ComposeError {
    /// Neither image nor user name a program.
    #[error("the image names no command; give one after it")]
    NoCommand,
    /// Not absolute.
    #[error("the working directory {0:?} is not absolute; begin it with /")]
    RelativeDirectory(String),
    /// Not a variable.
    #[error("{0:?} is no variable: give NAME=VALUE")]
    Variable(String),
    /// A string that no program can be given.
    #[error("{0} holds a NUL byte, which no program can be given")]
    Nul(&'static str),
    /// Unknown signal.
    #[error("the image's stop signal {0:?} is unknown; give another image or report this")]
    Signal(String),
}

impl Overrides {
    /// What is wrong whatever the image is: asked before one is fetched, and by [`compose`].
    ///
    /// # Errors
    ///
    /// A relative working directory.
    pub fn check(&self) -> Result<(), ComposeError> {
        // An image's relative directory is below its root, as runc has it; a user's is a slip.
        match &self.working_directory {
            Some(slip) if !slip.is_empty() && !slip.starts_with('/') => {
                Err(ComposeError::RelativeDirectory(slip.clone()))
            }
            _ => Ok(()),
        }
    }
}

/// The parts of an image's configuration that say what runs (OCI image-spec, config.md).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageDefaults {
    /// `Entrypoint`.
    pub entrypoint: Vec<String>,
    /// `Cmd`.
    pub cmd: Vec<String>,
    /// `Env`.
    pub environment: Vec<String>,
    /// `WorkingDir`; empty is `/`.
    pub working_directory: String,
    /// `User`; empty is root.
    pub user: String,
}

/// What the user said in their place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// `--entrypoint`; an empty one removes the image's.
    pub entrypoint: Option<String>,
    /// COMMAND.
    pub command: Vec<String>,
    /// `NAME=value`, from files first, then from options.
    pub environment: Vec<String>,
    /// `--workdir`.
    pub working_directory: Option<String>,
    /// `--user`.
    pub user: Option<String>,
    /// `--interactive`.
    pub interactive: bool,
    /// `--tty`, with the terminal's size now.
    pub terminal: Option<TerminalSize>,
}

/// The process that results.
pub fn compose(image: &ImageDefaults, overrides: &Overrides) -> Result<ProcessSpec, ComposeError> {
    overrides.check()?;
    let program: Vec<String> = match &overrides.entrypoint {
        None => image.entrypoint.clone(),
        Some(none) if none.is_empty() => Vec::new(),
        Some(own) => vec![own.clone()],
    };
    let rest = match (overrides.command.is_empty(), overrides.entrypoint.is_some()) {
        // The image's Cmd belongs to the image's Entrypoint: it goes with it (Docker's `--entrypoint`).
        (true, false) => image.cmd.clone(),
        (true, true) => Vec::new(),
        (false, _) => overrides.command.clone(),
    };
    let arguments: Vec<String> = program.into_iter().chain(rest).collect();
    if arguments.first().is_none_or(String::is_empty) {
        return Err(ComposeError::NoCommand);
    }
    let working_directory = match overrides.working_directory.as_ref().unwrap_or(&image.working_directory) {
        none if none.is_empty() => "/".to_owned(),
        relative if !relative.starts_with('/') => format!("/{relative}"),
        absolute => absolute.clone(),
    };
    let process = ProcessSpec {
        arguments,
        environment: environment(&image.environment, &overrides.environment)?,
        working_directory,
        user: overrides.user.as_ref().unwrap_or(&image.user).clone(),
        interactive: overrides.interactive,
        terminal: overrides.terminal,
    };
    let nul = |texts: &[String]| texts.iter().any(|text| text.contains('\0'));
    match () {
        () if nul(&process.arguments) => Err(ComposeError::Nul("the command")),
        () if nul(&process.environment) => Err(ComposeError::Nul("the environment")),
        () if process.working_directory.contains('\0') => Err(ComposeError::Nul("the working directory")),
        () => Ok(process),
    }
}

/// One value a name, the last one said, at the place where the name was first said. Images may hold what is no variable: that is left out.
fn environment(image: &[String], own: &[String]) -> Result<Vec<String>, ComposeError> {
    let name =
        |variable: &str| variable.split_once('=').map(|(name, _)| name.to_owned()).filter(|n| !n.is_empty());
    let mut all: Vec<(String, String)> = Vec::new();
    let mut set = |name: String, variable: &str| match all.iter_mut().find(|(known, _)| *known == name) {
        Some((_, value)) => variable.clone_into(value),
        None => all.push((name, variable.to_owned())),
    };
    set("PATH".into(), DEFAULT_PATH);
    for variable in image {
        if let Some(name) = name(variable) {
            set(name, variable);
        }
    }
    for variable in own {
        set(name(variable).ok_or_else(|| ComposeError::Variable(variable.clone()))?, variable);
    }
    Ok(all.into_iter().map(|(_, variable)| variable).collect())
}

/// The number of an image's `StopSignal`, in any form that [`signal::number`] knows; SIGTERM where there is none.
pub fn stop_signal(image: Option<&str>) -> Result<u8, ComposeError> {
    let Some(text) = image.map(str::trim).filter(|text| !text.is_empty()) else { return Ok(SIGTERM) };
    signal::number(text).ok_or_else(|| ComposeError::Signal(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn image() -> ImageDefaults {
        ImageDefaults {
            entrypoint: words("entry -x"),
            cmd: words("default args"),
            environment: words("PATH=/bin A=image B=image nonsense"),
            working_directory: "/srv".into(),
            user: "app".into(),
        }
    }

    fn arguments(entrypoint: Option<&str>, command: &str) -> Result<Vec<String>, ComposeError> {
        let overrides = Overrides {
            entrypoint: entrypoint.map(Into::into),
            command: words(command),
            ..Default::default()
        };
        compose(&image(), &overrides).map(|process| process.arguments)
    }

    #[test]
    fn the_command_follows_dockers_table() {
        assert_eq!(arguments(None, "").unwrap(), words("entry -x default args"));
        assert_eq!(arguments(None, "own").unwrap(), words("entry -x own"));
        assert_eq!(arguments(Some("other"), "").unwrap(), words("other"));
        assert_eq!(arguments(Some("other"), "own y").unwrap(), words("other own y"));
        assert_eq!(arguments(Some(""), "own").unwrap(), words("own"));
        assert_eq!(arguments(Some(""), "").unwrap_err(), ComposeError::NoCommand);
    }

    #[test]
    fn later_variables_win_and_keep_their_place() {
        let overrides = Overrides { environment: words("B=own C=1 C=2"), ..Default::default() };
        let process = compose(&image(), &overrides).unwrap();
        assert_eq!(process.environment, words("PATH=/bin A=image B=own C=2"));
        let wrong = Overrides { environment: words("=x"), ..Default::default() };
        assert_eq!(compose(&image(), &wrong).unwrap_err(), ComposeError::Variable("=x".into()));
    }

    #[test]
    fn an_image_without_anything_gets_dockers_defaults() {
        let overrides = Overrides { command: words("sh"), ..Default::default() };
        let process = compose(&ImageDefaults::default(), &overrides).unwrap();
        assert_eq!((process.working_directory.as_str(), process.user.as_str()), ("/", ""));
        assert_eq!(process.environment, [DEFAULT_PATH]);
        assert_eq!(compose(&ImageDefaults::default(), &Overrides::default()), Err(ComposeError::NoCommand));
    }

    #[test]
    fn directories_and_users_are_replaced() {
        let overrides = Overrides {
            working_directory: Some("/w".into()),
            user: Some("1:2".into()),
            ..Default::default()
        };
        let process = compose(&image(), &overrides).unwrap();
        assert_eq!((process.working_directory.as_str(), process.user.as_str()), ("/w", "1:2"));
        let relative = Overrides { working_directory: Some("w".into()), ..Default::default() };
        assert_eq!(compose(&image(), &relative).unwrap_err(), ComposeError::RelativeDirectory("w".into()));
    }

    #[test]
    fn what_no_program_can_be_given_is_refused() {
        let overrides = Overrides { command: vec!["a\0b".into()], ..Default::default() };
        assert_eq!(compose(&image(), &overrides).unwrap_err(), ComposeError::Nul("the command"));
    }

    #[test]
    fn an_images_stop_signal_may_be_any_and_is_sigterm_where_there_is_none() {
        for (text, number) in [("SIGRTMAX-1", 63), (" SIGQUIT ", 3), ("", 15), ("  ", 15)] {
            assert_eq!(stop_signal(Some(text)), Ok(number), "{text:?}");
        }
        assert_eq!(stop_signal(None), Ok(15));
        assert_eq!(stop_signal(Some("SIGNOPE")), Err(ComposeError::Signal("SIGNOPE".into())));
    }
}
