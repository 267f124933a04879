//! Keys: what a template is called, and all that is ever put into a path for it.
//!
//! In: whatever makes a template what it is (kernel, agent, payload, machine, isolation domain…), which the host knows and this crate doesn't.
//! Out: 64 lower-case hexadecimal digits, the SHA-256 of its [canonical](super::canonical) JSON.

use std::fmt::{self, Debug, Display, Formatter};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::canonical::{CanonicalError, canonical};
use crate::digest::Digest;
use crate::printable::Printable;

/// How many digits a key has.
const DIGITS: usize = 64;

/// Why words are no key.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no template's key: a key has exactly 64 lower-case hexadecimal digits.")]
pub struct KeyError(Printable);

/// A template's name: 64 digits `0-9a-f`, safe as part of a path.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TemplateKey(String);

impl TemplateKey {
    /// The key of what is made of exactly this: the SHA-256 of its canonical JSON. Two things that serialise to the same JSON, in whatever
    /// order, have the same key.
    ///
    /// # Errors
    ///
    /// If it can't be written as JSON, or holds a number that is no integer.
    pub fn of(made_of: &impl Serialize) -> Result<Self, CanonicalError> {
        Ok(Self(Digest::of(&canonical(made_of)?).digits().to_owned()))
    }

    /// The digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TemplateKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        if text.len() == DIGITS && are_digits(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(KeyError(Printable::new(text)))
        }
    }
}

/// Whether these could be the first digits of a key.
pub(super) fn are_digits(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

impl Display for TemplateKey {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Debug for TemplateKey {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        Display::fmt(self, f)
    }
}

impl Serialize for TemplateKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TemplateKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_key_is_the_digest_of_the_canonical_form() {
        #[derive(Serialize)]
        struct MadeOf {
            kernel: &'static str,
            domain: &'static str,
            tsc_khz: u64,
            cpuid: [u32; 2],
        }
        let key = TemplateKey::of(&MadeOf {
            kernel: "sha256:00",
            domain: "default",
            tsc_khz: 2_400_000,
            cpuid: [0, u32::MAX],
        });
        // printf '{"cpuid":[0,4294967295],"domain":"default","kernel":"sha256:00","tsc_khz":2400000}' | sha256sum
        const GOLDEN: &str = "d8beb9faa3ada3616a5eff522d88c2ab63a28017c4da5bbeb183e53f3558e0f6";
        assert_eq!(key.unwrap().as_str(), GOLDEN);
        let in_another_order = json!({
            "tsc_khz": 2_400_000, "kernel": "sha256:00", "cpuid": [0, 4_294_967_295_u32], "domain": "default",
        });
        assert_eq!(TemplateKey::of(&in_another_order).unwrap().as_str(), GOLDEN);
    }

    #[test]
    fn the_order_of_a_hash_map_does_not_show() {
        let names = ["a", "b", "c", "d", "e", "f", "g"];
        let keys = [0, 1, 2, 3].map(|_| {
            let map: HashMap<&str, usize> = names.iter().map(|name| (*name, name.len())).collect();
            TemplateKey::of(&map).unwrap()
        });
        assert!(keys.windows(2).all(|pair| pair[0] == pair[1]));
    }

    #[test]
    fn what_could_lead_elsewhere_is_no_key() {
        let good = "0123456789abcdef".repeat(4);
        assert_eq!(good.parse::<TemplateKey>().unwrap().to_string(), good);
        let slashed = format!("../{}", &good[3..]);
        let nul = format!("{}\0", &good[1..]);
        let wide = "０".repeat(64);
        let many_bytes = format!("{}é", &good[2..]);
        for wrong in [
            "",
            ".",
            "..",
            "making",
            &good[1..],
            &format!("{good}0"),
            &good.to_uppercase(),
            &slashed,
            &nul,
            &wide,
            &many_bytes,
            &format!("{good}\n"),
            &format!(" {}", &good[1..]),
        ] {
            assert!(wrong.parse::<TemplateKey>().is_err(), "{wrong:?}");
            let json = serde_json::to_string(wrong).unwrap();
            assert!(serde_json::from_str::<TemplateKey>(&json).is_err(), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn a_key_is_one_harmless_name_or_none(text in prop_oneof![".{0,80}", "[0-9a-f/.]{64}", "[0-9a-f]{64}"]) {
            if let Ok(key) = text.parse::<TemplateKey>() {
                prop_assert_eq!(key.as_str(), &text);
                prop_assert!(text.len() == 64 && text.bytes().all(|byte| b"0123456789abcdef".contains(&byte)));
            }
        }
    }
}
