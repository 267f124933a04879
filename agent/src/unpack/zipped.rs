//! A function's code: a zip's files, below the directory that the request names. Owned by root, with the modes that the zip has;
//! what would be written through a link, encrypted, or outside is refused.

use std::fs::File;
use std::io::{self, Read};

use rustix::fs::{FileType, Mode, OFlags, mkdirat, openat, symlinkat};
use zip::ZipArchive;
use zip::result::ZipError;

use super::tree::{LONGEST_PATH, Place, Relative, Tree};
use super::{Budget, CHUNK, UnpackError};

/// `S_IFMT` of the modes that Unix programs put into zips.
const TYPE: u32 = 0o170_000;

/// Unpacks a zip.
///
/// # Errors
///
/// It is none, or hostile, too large, or the file system refuses.
pub(super) fn unpack(file: File, tree: &mut Tree, budget: &mut Budget) -> Result<(), UnpackError> {
    let mut archive = ZipArchive::new(io::BufReader::new(file)).map_err(damaged)?;
    for number in 0..archive.len() {
        budget.take_entry()?;
        let mut file = archive.by_index(number).map_err(damaged)?;
        let raw = file.name_raw().to_vec();
        let entry = || super::shown(&raw);
        let wrong = |problem: String| UnpackError::Entry { entry: entry(), problem };
        let write = |source| UnpackError::Write { entry: entry(), source };
        if raw.starts_with(b"/") {
            return Err(wrong("would escape by its absolute name".into()));
        }
        let path = Relative::parse(&raw).map_err(wrong)?;
        let mode = file.unix_mode().unwrap_or_default();
        let kind = if file.is_dir() { FileType::Directory } else { FileType::from_raw_mode(mode & TYPE) };
        let Some((parent, name)) = path.split() else { continue };
        let directory = tree.descend(parent, budget)?;
        let place = Place { directory, name };
        let found = place.look().map_err(write)?.map(|found| FileType::from_raw_mode(found.st_mode));
        if kind == FileType::Directory && found == Some(FileType::Directory) {
            continue;
        }
        if found.is_some() {
            place.remove().map_err(write)?;
            tree.forget();
        }
        budget.expect_bytes(&raw, file.size())?;
        let directory = &*place.directory.fd;
        match kind {
            // Whatever its mode says: the function's user must be able to look inside.
            FileType::Directory => {
                mkdirat(directory, name, Mode::from_raw_mode(0o755)).map_err(|error| write(error.into()))?;
            }
            FileType::Symlink => {
                let mut target = Vec::new();
                let most = u64::try_from(LONGEST_PATH).unwrap_or(u64::MAX);
                Read::take(&mut file, most + 1)
                    .read_to_end(&mut target)
                    .map_err(|error| damaged(error.into()))?;
                if target.is_empty() || target.len() > LONGEST_PATH || target.contains(&0) {
                    return Err(wrong("is a symbolic link to nothing that has a name".into()));
                }
                budget.take_bytes(u64::try_from(target.len()).unwrap_or(u64::MAX))?;
                symlinkat(target.as_slice(), directory, name).map_err(|error| write(error.into()))?;
            }
            // Zips from elsewhere than Unix have no type.
            FileType::RegularFile | FileType::Unknown => {
                let permissions = if mode & 0o777 == 0 { 0o644 } else { mode & 0o777 };
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = openat(directory, name, flags, Mode::from_raw_mode(permissions));
                let made = made.map_err(|error| write(error.into()))?;
                copy(&mut file, File::from(made), budget, &raw)?;
            }
            FileType::Fifo | FileType::Socket | FileType::CharacterDevice | FileType::BlockDevice => {
                return Err(wrong("is neither a file, a directory nor a symbolic link".into()));
            }
        }
    }
    Ok(())
}

/// Data of a file. What it really unpacks to counts, not what it says.
fn copy(from: &mut impl Read, mut to: File, budget: &mut Budget, raw: &[u8]) -> Result<(), UnpackError> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = from.read(&mut chunk).map_err(|error| damaged(error.into()))?;
        if read == 0 {
            return Ok(());
        }
        budget.take_bytes(u64::try_from(read).unwrap_or(u64::MAX))?;
        io::Write::write_all(&mut to, chunk.get(..read).unwrap_or_default())
            .map_err(|source| UnpackError::Write { entry: super::shown(raw), source })?;
    }
}

fn damaged(error: ZipError) -> UnpackError {
    UnpackError::Damaged { what: "the zip".into(), source: io::Error::other(error) }
}
