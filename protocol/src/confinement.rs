//! The parts of the VMM's confinement: what the host asks the VMM to do without, and what both name in errors.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A part of the VMM's confinement that an operator can do without, when told so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// A cgroup of its own.
    Cgroup,
    /// User, mount, PID, network, IPC and UTS namespaces, and the empty root that they make possible.
    Namespaces,
    /// No capabilities.
    Capabilities,
    /// System-call filters.
    Seccomp,
}

/// A word that names no part.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0:?} is no part of the confinement: they are cgroup, namespaces, capabilities and seccomp")]
pub struct UnknownPart(pub String);

impl Part {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Cgroup, Self::Namespaces, Self::Capabilities, Self::Seccomp];
}

impl FromStr for Part {
    type Err = UnknownPart;

    fn from_str(text: &str) -> Result<Self, UnknownPart> {
        Self::ALL
            .into_iter()
            .find(|part| part.to_string() == text)
            .ok_or_else(|| UnknownPart(text.to_owned()))
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cgroup => "cgroup",
            Self::Namespaces => "namespaces",
            Self::Capabilities => "capabilities",
            Self::Seccomp => "seccomp",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_known_by_its_name() {
        for part in Part::ALL {
            assert_eq!(part.to_string().parse(), Ok(part));
        }
        assert!("all".parse::<Part>().is_err());
    }
}
