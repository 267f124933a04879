//! Names of entries, without `.` and empty parts. Pure: bytes in, a name or its fault out.

use super::refusal::NameFault;

/// The longest name, in bytes: `PATH_MAX`.
pub(super) const LONGEST: usize = 4096;

/// A name in its only form; for a symbolic link's target, seen from the link's folder. The archive's root is "".
pub(super) fn normal(raw: &[u8], folder: &str) -> Result<String, NameFault> {
    if raw.len() > LONGEST {
        return Err(NameFault::TooLong);
    }
    let text = std::str::from_utf8(raw).map_err(|_| NameFault::NotUtf8)?;
    if text.starts_with('/') {
        return Err(NameFault::Absolute);
    }
    if text.contains('\0') {
        return Err(NameFault::Nul);
    }
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    let may_climb = !parts.is_empty();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." if may_climb && parts.pop().is_some() => {}
            ".." => return Err(NameFault::LeadsOut),
            part => parts.push(part),
        }
    }
    let name = parts.join("/");
    // The folder's own length comes on top.
    if name.len() > LONGEST { Err(NameFault::TooLong) } else { Ok(name) }
}
