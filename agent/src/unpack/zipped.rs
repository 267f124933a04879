//! A function's code: a zip's files, below the directory that the request names. Owned by root, with the permissions and times that
//! the zip has (Python compares its sources' times with those in their `.pyc`); what would be written through a link, is
//! encrypted, or leads outside is refused. Of two entries with one name the later wins. A backslash is no separator.
//!
//! Source: PKWARE's APPNOTE 6.3.10; Info-ZIP's extrafld.txt.

use std::fs::File;
use std::io::{self, Read};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, Timespec, Timestamps, futimens, mkdirat, openat, symlinkat, utimensat,
};
use rustix::io::Errno;
use zip::extra_fields::ExtraField;
use zip::read::ZipFile;
use zip::result::ZipError;
use zip::{CompressionMethod, ZipArchive};

use super::tree::{LONGEST_PATH, Place, Relative, Tree};
use super::{Budget, CHUNK, UnpackError};

/// `S_IFMT` of the modes that Unix programs put into zips.
const TYPE: u32 = 0o170_000;

/// Unpacks a zip.
///
/// # Errors
///
/// It is none, or hostile, too large, or the file system refuses.
pub(super) fn unpack(file: File, tree: &mut Tree, budget: &Budget) -> Result<(), UnpackError> {
    let mut archive = ZipArchive::new(io::BufReader::new(file)).map_err(damaged)?;
    for number in 0..archive.len() {
        budget.take_entry()?;
        // Not yet asking for its data: what is refused is to be refused by its name.
        let (raw, encrypted, method) = {
            let file = archive.by_index_raw(number).map_err(damaged)?;
            (file.name_raw().to_vec(), file.encrypted(), file.compression())
        };
        let wrong = |problem: String| UnpackError::Entry { entry: super::shown(&raw), problem };
        if encrypted {
            return Err(wrong("is encrypted; make the zip without a password".into()));
        }
        if !matches!(method, CompressionMethod::Stored | CompressionMethod::Deflated) {
            return Err(wrong(format!(
                "is compressed by {method}; only stored and deflated entries are taken"
            )));
        }
        let mut file = archive.by_index(number).map_err(damaged)?;
        entry(&mut file, &raw, tree, budget)?;
    }
    Ok(())
}

fn entry(
    file: &mut ZipFile<'_, impl Read>,
    raw: &[u8],
    tree: &mut Tree,
    budget: &Budget,
) -> Result<(), UnpackError> {
    let wrong = |problem: &str| UnpackError::Entry { entry: super::shown(raw), problem: problem.into() };
    let write = |source| UnpackError::Write { entry: super::shown(raw), source };
    let refused = |error: Errno| write(error.into());
    if raw.starts_with(b"/") {
        return Err(wrong("would escape by its absolute name"));
    }
    let path = Relative::parse(raw).map_err(|problem| wrong(&problem))?;
    let mode = file.unix_mode().unwrap_or_default();
    let kind = if raw.ends_with(b"/") { FileType::Directory } else { FileType::from_raw_mode(mode & TYPE) };
    let Some((parent, name)) = path.split() else {
        return if kind == FileType::Directory { Ok(()) } else { Err(wrong("has no name")) };
    };
    let through_link = |error: &UnpackError| matches!(error, UnpackError::Write { source, .. } if source.raw_os_error() == Some(libc::ELOOP));
    let directory = tree.descend(parent, budget).map_err(|error| {
        if through_link(&error) {
            wrong("would be written through a symbolic link")
        } else {
            error.of_entry(raw)
        }
    })?;
    let place = Place { directory, name };
    let found = place.look().map_err(write)?.map(|found| FileType::from_raw_mode(found.st_mode));
    if kind == FileType::Directory && found == Some(FileType::Directory) {
        return Ok(());
    }
    if found.is_some() {
        place.remove().map_err(write)?;
        tree.forget();
    }
    budget.expect_bytes(raw, file.size())?;
    let directory = &*place.directory.fd;
    match kind {
        // Whatever its mode says: the function's user must be able to look inside.
        FileType::Directory => mkdirat(directory, name, Mode::from_raw_mode(0o755)).map_err(refused)?,
        FileType::Symlink => {
            let mut target = Vec::new();
            let most = u64::try_from(LONGEST_PATH).unwrap_or(u64::MAX);
            Read::take(&mut *file, most + 1)
                .read_to_end(&mut target)
                .map_err(|error| damaged(error.into()))?;
            budget.take_bytes(u64::try_from(target.len()).unwrap_or(u64::MAX))?;
            if target.is_empty() || target.len() > LONGEST_PATH || target.contains(&0) {
                return Err(wrong("is a symbolic link to nothing that has a name"));
            }
            symlinkat(target.as_slice(), directory, name).map_err(refused)?;
            if let Some(times) = times(file) {
                utimensat(directory, name, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(refused)?;
            }
        }
        // Zips from elsewhere than Unix have no type.
        FileType::RegularFile | FileType::Unknown => {
            let permissions = Mode::from_raw_mode(if mode & 0o777 == 0 { 0o644 } else { mode & 0o777 });
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut made = File::from(openat(directory, name, flags, permissions).map_err(refused)?);
            copy(file, &mut made, budget, raw)?;
            rustix::fs::fchmod(&made, permissions).map_err(refused)?;
            if let Some(times) = times(file) {
                futimens(&made, &times).map_err(refused)?;
            }
        }
        FileType::Fifo | FileType::Socket | FileType::CharacterDevice | FileType::BlockDevice => {
            return Err(wrong("is neither a file, a directory nor a symbolic link"));
        }
    }
    Ok(())
}

/// When it was changed: Unix's time where the zip has one, else DOS's, which is local to nowhere and taken as UTC.
fn times(file: &ZipFile<'_, impl Read>) -> Option<Timestamps> {
    let unix = file.extra_data_fields().find_map(|field| {
        let ExtraField::ExtendedTimestamp(times) = field else { return None };
        times.mod_time().map(i64::from)
    });
    let seconds = unix.or_else(|| {
        let dos = file.last_modified()?;
        let days = days_since_epoch(dos.year().into(), dos.month().into(), dos.day().into());
        Some(
            ((days * 24 + i64::from(dos.hour())) * 60 + i64::from(dos.minute())) * 60
                + i64::from(dos.second()),
        )
    })?;
    let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
    Some(Timestamps { last_access: time, last_modification: time })
}

/// Of the Gregorian calendar, from 1970 to 2107, DOS's last year.
pub(super) fn days_since_epoch(year: i64, month: i64, day: i64) -> i64 {
    // Years begin in March, so that the odd day is the last.
    let year = if month > 2 { year } else { year - 1 };
    let in_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    365 * year + year / 4 - year / 100 + year / 400 + in_year - 719_468
}

/// Data of a file. What it really unpacks to counts, not what it says.
fn copy(from: &mut impl Read, to: &mut File, budget: &Budget, raw: &[u8]) -> Result<(), UnpackError> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = from.read(&mut chunk).map_err(|error| damaged(error.into()))?;
        if read == 0 {
            return Ok(());
        }
        budget.take_bytes(u64::try_from(read).unwrap_or(u64::MAX))?;
        io::Write::write_all(to, chunk.get(..read).unwrap_or_default())
            .map_err(|source| UnpackError::Write { entry: super::shown(raw), source })?;
    }
}

fn damaged(error: ZipError) -> UnpackError {
    UnpackError::Damaged { what: "the zip".into(), source: io::Error::other(error) }
}
