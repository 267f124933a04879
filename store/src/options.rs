//! How an image is acquired: when a registry is asked, for what, and how long it is waited for.

use std::path::PathBuf;
use std::time::Duration;

use crate::platform::Platform;

/// When a registry is asked. Layouts and archives are always read: they are at hand, and asking costs little.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Every time: a tag may have moved.
    Always,
    /// If the store doesn't know the name, or only for another platform.
    #[default]
    Missing,
    /// Never.
    Never,
}

/// How to acquire an image.
#[derive(Clone, Debug)]
pub struct PullOptions {
    /// When a registry is asked.
    pub policy: Policy,
    /// Speak plain HTTP with this registry, even if it is on another machine.
    pub insecure: bool,
    /// Which of an image's platforms is wanted.
    pub platform: Platform,
    /// How many blobs a registry is asked for at once, 1 or more.
    pub parallel: usize,
    /// The folder of Docker's `config.json`, where credentials are; without one, everything is pulled anonymously.
    pub docker_config: Option<PathBuf>,
    /// How long a registry is waited for.
    pub patience: Patience,
}

impl Default for PullOptions {
    /// For this machine, four blobs at once, and with the credentials of `$DOCKER_CONFIG` or `~/.docker`.
    fn default() -> Self {
        let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".docker"));
        Self {
            policy: Policy::default(),
            insecure: false,
            platform: Platform::host(),
            parallel: 4,
            docker_config: std::env::var_os("DOCKER_CONFIG").map(PathBuf::from).or_else(home),
            patience: Patience::default(),
        }
    }
}

/// How long a registry is waited for, and how often it is asked again.
#[derive(Clone, Debug)]
pub struct Patience {
    /// For its name to be found, and for a connection.
    pub connect: Duration,
    /// For an answer to begin, and for each next piece of it.
    pub stall: Duration,
    /// How many tries in a row may bring nothing before a blob is given up.
    pub retries: u32,
    /// Before the first repetition; doubled for each after it, up to 30 s.
    pub pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            stall: Duration::from_secs(30),
            retries: 5,
            pause: Duration::from_millis(300),
        }
    }
}
