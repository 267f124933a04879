//! `-e` and `--env-file`, by Docker's rules.
//!
//! `NAME=value` sets, `NAME` alone takes the value from carrel's own environment and is left out where there is none. In a
//! file, blank lines and lines that begin with `#` are skipped, white space before a name is dropped, and everything after the
//! first `=` is the value as it stands: no quotes, no escapes, no expansion. Files come first, `-e` after them, later wins.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};

/// More than this is no environment (ARG_MAX of Linux is 2 MiB for arguments and environment together).
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Collects `NAME=value` strings from files and options. `own` looks a name up in carrel's own environment.
pub(crate) fn collect(
    files: &[PathBuf],
    options: &[String],
    own: &impl Fn(&str) -> Option<String>,
) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for file in files {
        let text = read(file)?;
        let found = parse_file(&text, own)
            .with_context(|| format!("Mend the environment file {}.", file.display()))?;
        all.extend(found);
    }
    for option in options {
        all.extend(parse_one(option, own)?);
    }
    Ok(all)
}

fn read(file: &Path) -> Result<String> {
    let cannot = || format!("The environment file {} can't be read.", file.display());
    let size = std::fs::metadata(file).with_context(cannot)?.len();
    if size > MAX_FILE_BYTES {
        bail!("The environment file {} has {size} bytes; 1 MiB is allowed.", file.display());
    }
    let bytes = std::fs::read(file).with_context(cannot)?;
    String::from_utf8(bytes).map_err(|_| anyhow!("The environment file {} is not UTF-8.", file.display()))
}

fn parse_file(text: &str, own: &impl Fn(&str) -> Option<String>) -> Result<Vec<String>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut found = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let one = parse_one(line, own).with_context(|| format!("line {number}"))?;
        found.extend(one);
    }
    Ok(found)
}

/// One `NAME=value` or `NAME`.
fn parse_one(text: &str, own: &impl Fn(&str) -> Option<String>) -> Result<Option<String>> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (text, None),
    };
    if name.is_empty() {
        bail!("'{text}' names no variable: write NAME=value.");
    }
    if name.contains(char::is_whitespace) {
        bail!("The variable name '{name}' contains white space: write NAME=value.");
    }
    if text.contains('\0') {
        bail!("The variable '{name}' contains a NUL byte.");
    }
    Ok(match value {
        Some(_) => Some(text.to_owned()),
        None => own(name).map(|value| format!("{name}={value}")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(name: &str) -> Option<String> {
        (name == "LANG").then(|| "C.UTF-8".to_owned())
    }

    #[test]
    fn a_bare_name_comes_from_the_own_environment_or_is_left_out() {
        let options = ["A=1".to_owned(), "LANG".to_owned(), "MISSING".to_owned(), "EMPTY=".to_owned()];
        let found = collect(&[], &options, &own).unwrap();
        assert_eq!(found, ["A=1", "LANG=C.UTF-8", "EMPTY="]);
    }

    #[test]
    fn a_file_keeps_values_as_they_stand() {
        let text =
            "\u{feff}# comment\n\n  A=1\nB=\"quoted\" # not a comment\r\nC= spaced \nLANG\nMISSING\nD=x=y\n";
        let found = parse_file(text, &own).unwrap();
        assert_eq!(found, ["A=1", "B=\"quoted\" # not a comment", "C= spaced ", "LANG=C.UTF-8", "D=x=y"]);
    }

    #[test]
    fn a_wrong_line_is_named() {
        let wrong = |text| format!("{:#}", parse_file(text, &own).unwrap_err());
        assert!(wrong("A=1\n=2\n").starts_with("line 2: "));
        assert!(wrong("A B=1\n").contains("'A B' contains white space"));
        assert!(wrong("A=\0\n").contains("NUL"));
    }

    #[test]
    fn options_come_after_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("env");
        std::fs::write(&file, "A=file\n").unwrap();
        let found = collect(&[file], &["A=option".to_owned()], &own).unwrap();
        assert_eq!(found, ["A=file", "A=option"]);
    }

    #[test]
    fn a_file_that_is_missing_or_not_text_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("env");
        let message = collect(std::slice::from_ref(&file), &[], &own).unwrap_err().to_string();
        assert!(message.contains(file.to_str().unwrap()));
        std::fs::write(&file, [0xff, 0xfe]).unwrap();
        let message = collect(&[file], &[], &own).unwrap_err().to_string();
        assert!(message.ends_with("is not UTF-8."));
    }
}
