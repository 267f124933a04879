//! Which of the caller's variables a program in a room has. A room is for what nobody trusts, and an environment is where tokens are: what isn't known to be
//! harmless and of use stays outside, unless it is asked for by name.

/// Known by name.
const NAMES: [&str; 27] = [
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "LANGUAGE",
    "TZ",
    "TERM",
    "COLORTERM",
    "COLUMNS",
    "LINES",
    "NO_COLOR",
    "FORCE_COLOR",
    "CLICOLOR",
    "CLICOLOR_FORCE",
    "CI",
    "DEBUG",
    "OUT_DIR",
    "PWD",
    "LD_LIBRARY_PATH",
    "VIRTUAL_ENV",
    "SOURCE_DATE_EPOCH",
    "CARGO_CRATE_NAME",
    "CARGO_PRIMARY_PACKAGE",
    "CARGO_TARGET_TMPDIR",
    "UNICODE_VERSION",
];
/// Known by how they begin. Not all of `CARGO_`: registries' tokens begin so too.
const BEGINNINGS: [&str; 12] = [
    "LC_",
    "RUST_",
    "CARGO_PKG_",
    "CARGO_MANIFEST_",
    "CARGO_BIN_",
    "NEXTEST",
    "PYTHON",
    "PYTEST_",
    "PROPTEST_",
    "QUICKCHECK_",
    "INSTA_",
    "TRYBUILD",
];

/// Whether a variable goes along. `patterns` are further names; one that ends in `*` is a beginning.
pub(crate) fn goes_along(name: &str, patterns: &[String]) -> bool {
    let matches = |pattern: &String| match pattern.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => name == pattern,
    };
    NAMES.contains(&name)
        || BEGINNINGS.iter().any(|beginning| name.starts_with(beginning))
        || patterns.iter().any(matches)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tests_need_goes_along_and_secrets_stay() {
        for name in ["PATH", "LC_ALL", "RUST_BACKTRACE", "CARGO_PKG_NAME", "NEXTEST_RUN_ID", "PYTHONPATH"] {
            assert!(goes_along(name, &[]), "{name}");
        }
        for name in [
            "AWS_SECRET_ACCESS_KEY",
            "GITHUB_TOKEN",
            "CARGO_REGISTRY_TOKEN",
            "CARGO_REGISTRIES_OWN_TOKEN",
            "SSH_AUTH_SOCK",
            "TMPDIR",
            "LD_PRELOAD",
            "CARREL_HOME",
            "CARREL_STORE",
        ] {
            assert!(!goes_along(name, &[]), "{name}");
        }
    }

    #[test]
    fn more_goes_along_by_name_or_beginning() {
        let patterns = ["MY_*".to_owned(), "ONE".to_owned()];
        assert!(goes_along("MY_FLAG", &patterns) && goes_along("ONE", &patterns));
        assert!(!goes_along("ONE_MORE", &patterns) && !goes_along("OTHER", &patterns));
    }
}
