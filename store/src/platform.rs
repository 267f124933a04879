//! Platforms: `linux/amd64`, `linux/arm64/v8`, and which of an image's manifests fits one (OCI image-index.md, "platform").

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::printable::Printable;

/// Why words are no platform.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no platform: write OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT, such as linux/amd64.")]
pub struct PlatformError(Printable);

/// What an image was built for, in Go's words (`GOOS`, `GOARCH`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// `linux`.
    #[serde(default)]
    pub os: String,
    /// `amd64`, `arm64`…
    #[serde(default)]
    pub architecture: String,
    /// Of `amd64`: `v2`, `v3`; of `arm`: `v6`, `v7`; of `arm64`: `v8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// This machine's: guests run on the host's own processor.
    #[must_use]
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self { os: "linux".into(), architecture: architecture.into(), variant: None }
    }

    /// How well an image for `self` suits somebody who wants `wanted`: higher is better, `None` is not at all.
    ///
    /// Without a variant in the wish, the image that asks for the least processor wins: it runs everywhere.
    #[must_use]
    pub fn suits(&self, wanted: &Self) -> Option<u8> {
        if self.os != wanted.os || self.architecture != wanted.architecture {
            return None;
        }
        let has = self.normal_variant();
        let wants = wanted.normal_variant();
        match wanted.variant {
            None if has == wants => Some(u8::MAX),
            None => Some(u8::MAX - 1 - has.min(u8::MAX - 1)),
            Some(_) if has <= wants => Some(u8::MAX - (wants - has)),
            Some(_) => None,
        }
    }

    /// The variant as a number; without one, the architecture's first.
    fn normal_variant(&self) -> u8 {
        let number = self.variant.as_deref().and_then(|variant| variant.strip_prefix('v'));
        let first = match self.architecture.as_str() {
            "amd64" => 1,
            "arm" => 7,
            "arm64" => 8,
            _ => 0,
        };
        number.and_then(|number| number.split('.').next()?.parse().ok()).unwrap_or(first)
    }
}

impl Default for Platform {
    fn default() -> Self {
        Self::host()
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let wrong = || PlatformError(Printable::new(text));
        let words: Vec<&str> = text.split('/').collect();
        let plain = |word: &&str| {
            !word.is_empty() && word.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_'))
        };
        if !words.iter().all(plain) {
            return Err(wrong());
        }
        let (os, architecture, variant) = match words[..] {
            [os, architecture] => (os, architecture, None),
            [os, architecture, variant] => (os, architecture, Some(variant.to_owned())),
            _ => return Err(wrong()),
        };
        let architecture = match architecture {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Ok(Self { os: os.into(), architecture: architecture.into(), variant })
    }
}

impl Display for Platform {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let known = |word: &str| if word.is_empty() { "unknown".into() } else { word.to_owned() };
        write!(f, "{}/{}", known(&self.os), known(&self.architecture))?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        text.parse().unwrap()
    }

    #[test]
    fn platforms_are_read_and_written() {
        assert_eq!(platform("linux/arm/v7").to_string(), "linux/arm/v7");
        assert_eq!(platform("linux/x86_64"), platform("linux/amd64"));
        for wrong in ["", "linux", "linux/", "linux/amd64/", "linux/a/b/c", "Linux/amd64", "linux/am d64"] {
            assert!(wrong.parse::<Platform>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_least_demanding_variant_wins_unless_one_is_asked_for() {
        let wanted = platform("linux/amd64");
        let plain = platform("linux/amd64").suits(&wanted);
        assert!(plain > platform("linux/amd64/v2").suits(&wanted));
        assert!(platform("linux/amd64/v2").suits(&wanted) > platform("linux/amd64/v3").suits(&wanted));
        let wanted = platform("linux/amd64/v3");
        assert!(platform("linux/amd64/v3").suits(&wanted) > platform("linux/amd64").suits(&wanted));
        assert_eq!(platform("linux/amd64/v4").suits(&wanted), None);
        assert_eq!(platform("linux/arm64").suits(&wanted), None);
        assert_eq!(platform("linux/arm64/v8").suits(&platform("linux/arm64")), Some(u8::MAX));
    }
}
