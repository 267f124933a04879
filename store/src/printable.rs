//! Words of strangers in our sentences: what a registry, a manifest or an archive says goes to a terminal only without
//! control characters, and only so much of it.

use std::fmt::{self, Debug, Display, Formatter};

use serde::{Deserialize, Serialize};

/// Longer ones are cut, in characters.
const LONGEST: usize = 200;

/// Text that is safe to print: at most 200 characters, none of which controls a terminal or reorders a line.
/// Read from another process it is cleaned again.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String")]
pub struct Printable(String);

impl From<String> for Printable {
    fn from(text: String) -> Self {
        Self::new(&text)
    }
}

impl Printable {
    /// Keeps what can be printed of this text.
    #[must_use]
    pub fn new(text: &str) -> Self {
        let mut kept: String =
            text.chars().filter(|c| !c.is_control() && !reorders(*c)).take(LONGEST + 1).collect();
        if kept.chars().count() > LONGEST {
            kept = kept.chars().take(LONGEST).chain(['…']).collect();
        }
        Self(kept)
    }
}

/// Unicode's directional formatting characters (UAX #9), which make a line read as another.
fn reorders(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

impl Display for Printable {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Debug for Printable {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_dropped_and_long_texts_cut() {
        assert_eq!(Printable::new("a\x1b[31mb\u{202e}\r\nc").to_string(), "a[31mbc");
        let told: Printable = serde_json::from_str(r#""a\u001bb""#).unwrap();
        assert_eq!(told.to_string(), "ab");
        assert_eq!(Printable::new(&"x".repeat(10_000)).to_string().chars().count(), LONGEST + 1);
    }
}
