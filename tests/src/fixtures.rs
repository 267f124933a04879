//! Where the images and functions are that `tests/fixtures/build` made.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The path of a fixture. It has to be built: whole-system tests run where nothing can be.
pub fn path(name: &str) -> PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    let directory = DIRECTORY.get_or_init(|| {
        if let Some(directory) = std::env::var_os("CARREL_FIXTURES") {
            return directory.into();
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/build");
        let output = Command::new(script).arg("--print-path").output().expect("tests/fixtures/build runs");
        assert!(output.status.success(), "tests/fixtures/build: {}", String::from_utf8_lossy(&output.stderr));
        PathBuf::from(String::from_utf8(output.stdout).unwrap().trim_end())
    });
    let path = directory.join(name);
    assert!(path.exists(), "{} is missing: run tests/fixtures/build", path.display());
    path
}

/// An image fixture as `carrel run` takes it.
pub fn image(name: &str) -> String {
    format!("oci:{}:latest", path(name).display())
}

/// The small image that most tests use.
pub fn busybox() -> String {
    image("busybox")
}
