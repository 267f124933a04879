//! Functions as zips.

use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// A zip made entry by entry, hostile ones included.
pub struct FunctionZip(ZipWriter<Cursor<Vec<u8>>>);

impl Default for FunctionZip {
    fn default() -> Self {
        Self::new()
    }
}

impl FunctionZip {
    /// An empty one.
    pub fn new() -> Self {
        Self(ZipWriter::new(Cursor::new(Vec::new())))
    }

    /// Adds a file that everybody can read.
    #[must_use]
    pub fn file(self, name: &str, content: impl AsRef<[u8]>) -> Self {
        self.file_with_mode(name, content, 0o644)
    }

    /// Adds a file with this mode.
    #[must_use]
    pub fn file_with_mode(mut self, name: &str, content: impl AsRef<[u8]>, mode: u32) -> Self {
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Deflated)
            .unix_permissions(mode);
        self.0.start_file(name, options).unwrap();
        self.0.write_all(content.as_ref()).unwrap();
        self
    }

    /// Adds a symbolic link.
    #[must_use]
    pub fn link(mut self, name: &str, target: &str) -> Self {
        self.0.add_symlink(name, target, SimpleFileOptions::default()).unwrap();
        self
    }

    /// Its bytes.
    pub fn bytes(self) -> Vec<u8> {
        self.0.finish().unwrap().into_inner()
    }

    /// Writes it into a folder and returns its path.
    pub fn write(self, folder: &Path) -> PathBuf {
        let path = folder.join("function.zip");
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }
}

/// A Python function, module `app`.
pub fn python(folder: &Path, source: &str) -> String {
    FunctionZip::new().file("app.py", source).write(folder).to_str().unwrap().to_owned()
}
