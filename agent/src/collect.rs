//! Files of a container that has ended, on their way to the host: [`carrel_protocol::returned`].
//!
//! It happens in a forked process: it blocks, and what it walks was made by a stranger, who may have made a million directories. Paths are resolved within
//! the container's root, and what is below a directory without any link, so that nothing of the agent's own root is ever sent.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use carrel_protocol::Message;
use carrel_protocol::agent::{Collect, ExitStatus, Failure};
use carrel_protocol::returned::{Done, Entry, FromRoom, Kind, LONGEST_PATH, Missing};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, openat2, readlinkat, statat};
use rustix::io::Errno;

use crate::fork::{self, Separate};
use crate::refusal::Refusal;
use crate::socket::Dialler;

/// Written at once.
const CHUNK: usize = 256 << 10;

/// Sends what was asked for. The stream's end is the answer to the host: without a [`Done`] before it, something failed.
///
/// # Errors
///
/// If the process can't be made, or ended without having sent all.
pub(crate) async fn in_a_child(dialler: &Dialler, rootfs: &Path, request: &Collect) -> Result<(), Refusal> {
    let child = fork::fork(Separate::default(), || {
        fork::close_all_but(&[]);
        // Who runs out of memory while collecting is this process, not the agent.
        let _ = std::fs::write("/proc/self/oom_score_adj", "500");
        u8::from(run(dialler, rootfs, request).is_err())
    });
    let failed =
        |why: String| Refusal::new(Failure::System, format!("files can't be sent to the host: {why}"));
    let child = child.map_err(|error| failed(error.to_string()))?;
    match child.wait().await {
        Ok(ExitStatus::Code(0)) => Ok(()),
        Ok(ended) => Err(failed(format!("whoever sends them ended early ({ended:?})"))),
        Err(error) => Err(failed(error.to_string())),
    }
}

fn run(dialler: &Dialler, rootfs: &Path, request: &Collect) -> io::Result<()> {
    let root = rustix::fs::open(rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let stream = dialler.open_blocking(&request.stream)?;
    send(&root, &request.paths, File::from(stream))
}

/// Writes the whole stream.
fn send(root: &OwnedFd, paths: &[String], to: impl Write) -> io::Result<()> {
    let mut sender = Sender { to: BufWriter::with_capacity(CHUNK, to), root: 0, left_out: 0 };
    for (number, path) in (0..).zip(paths) {
        sender.root = number;
        match openat2(
            root,
            path.as_str(),
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT,
        ) {
            Ok(top) => sender.whole(&top)?,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG) => {
                sender.say(Missing { root: number })?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    let left_out = sender.left_out;
    sender.say(Done { left_out })?;
    sender.to.flush()
}

struct Sender<W: Write> {
    to: BufWriter<W>,
    /// The number of the path that is being sent.
    root: u32,
    left_out: u64,
}

impl<W: Write> Sender<W> {
    fn say(&mut self, message: impl Into<FromRoom>) -> io::Result<()> {
        message.into().write_to(&mut self.to).map_err(io::Error::other)
    }

    fn entry(&mut self, path: &str, kind: Kind, found: &rustix::fs::Stat) -> io::Result<()> {
        let (root, mode) = (self.root, found.st_mode & 0o777);
        self.say(Entry { root, path: path.to_owned(), kind, mode, mtime: found.st_mtime })
    }

    /// What was asked for: a file, or a directory with all that is below.
    fn whole(&mut self, top: &OwnedFd) -> io::Result<()> {
        let found = rustix::fs::fstat(top)?;
        match FileType::from_raw_mode(found.st_mode) {
            FileType::RegularFile => {
                let file = rustix::fs::open(by_proc(top), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
                self.file("", &file)
            }
            FileType::Directory => {
                self.entry("", Kind::Directory, &found)?;
                self.below(top)
            }
            FileType::Symlink
            | FileType::Fifo
            | FileType::Socket
            | FileType::CharacterDevice
            | FileType::BlockDevice
            | FileType::Unknown => {
                self.left_out += 1;
                Ok(())
            }
        }
    }

    fn below(&mut self, top: &OwnedFd) -> io::Result<()> {
        let mut folders = vec![String::new()];
        while let Some(folder) = folders.pop() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let at = if folder.is_empty() { "." } else { &folder };
            let opened = openat2(top, at, flags, Mode::empty(), BENEATH)?;
            let mut names: Vec<Vec<u8>> = Vec::new();
            for entry in Dir::read_from(&opened)? {
                let entry = entry?;
                let name = entry.file_name().to_bytes();
                if name != b"." && name != b".." {
                    names.push(name.to_vec());
                }
            }
            names.sort();
            for name in names {
                let path = String::from_utf8(name).ok().map(|name| match folder.as_str() {
                    "" => name,
                    folder => format!("{folder}/{name}"),
                });
                match path.filter(|path| path.len() <= LONGEST_PATH) {
                    Some(path) => self.one(&opened, path, &mut folders)?,
                    None => self.left_out += 1,
                }
            }
        }
        Ok(())
    }

    fn one(&mut self, folder: &OwnedFd, path: String, folders: &mut Vec<String>) -> io::Result<()> {
        let name = path.rsplit('/').next().unwrap_or(&path);
        let found = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(found.st_mode) {
            FileType::Directory => {
                self.entry(&path, Kind::Directory, &found)?;
                folders.push(path);
                Ok(())
            }
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = openat2(folder, name, flags, Mode::empty(), BENEATH)?;
                self.file(&path, &file)
            }
            FileType::Symlink => {
                let target = readlinkat(folder, name, Vec::new())?.into_string();
                match target {
                    Ok(target) => self.entry(&path, Kind::Link { target }, &found),
                    Err(_) => {
                        self.left_out += 1;
                        Ok(())
                    }
                }
            }
            FileType::Fifo
            | FileType::Socket
            | FileType::CharacterDevice
            | FileType::BlockDevice
            | FileType::Unknown => {
                self.left_out += 1;
                Ok(())
            }
        }
    }

    fn file(&mut self, path: &str, file: &OwnedFd) -> io::Result<()> {
        let found = rustix::fs::fstat(file)?;
        let bytes = u64::try_from(found.st_size).unwrap_or(0);
        self.entry(path, Kind::File { bytes }, &found)?;
        let file = File::from(file.try_clone()?);
        let copied = io::copy(&mut file.take(bytes), &mut self.to)?;
        // Nothing runs that could shorten it, but what was announced must come.
        if copied == bytes { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

const BENEATH: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// A descriptor that only names a file, opened for reading.
fn by_proc(file: &OwnedFd) -> String {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;

    use super::*;

    /// What is sent, in short: `path kind` and content.
    fn sent(root: &Path, paths: &[&str]) -> Vec<String> {
        let fd = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let paths: Vec<String> = paths.iter().map(|&path| path.to_owned()).collect();
        let mut bytes = Vec::new();
        send(&fd, &paths, &mut bytes).unwrap();
        let mut from = bytes.as_slice();
        let mut all = Vec::new();
        loop {
            match FromRoom::read_from(&mut from).unwrap() {
                FromRoom::Entry(Entry { root, path, kind, .. }) => all.push(match kind {
                    Kind::Directory => format!("{root} {path}/"),
                    Kind::Link { target } => format!("{root} {path} -> {target}"),
                    Kind::File { bytes } => {
                        let mut text = String::new();
                        Read::by_ref(&mut from).take(bytes).read_to_string(&mut text).unwrap();
                        format!("{root} {path}: {text}")
                    }
                }),
                FromRoom::Missing(Missing { root }) => all.push(format!("{root} missing")),
                FromRoom::Done(Done { left_out }) => {
                    all.push(format!("left out {left_out}"));
                    assert!(from.is_empty(), "more comes after the end");
                    return all;
                }
            }
        }
    }

    #[test]
    fn files_and_folders_are_sent_in_their_order() {
        let folder = tempfile::TempDir::new().unwrap();
        let root = folder.path();
        fs::create_dir_all(root.join("out/sub")).unwrap();
        for file in ["report", "out/b", "out/a", "out/sub/deep"] {
            fs::write(root.join(file), file).unwrap();
        }
        symlink("a", root.join("out/link")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, root.join("out/pipe"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        fs::write(root.join("out").join(std::ffi::OsStr::from_bytes(b"\xff")), "").unwrap();
        let sent = sent(root, &["/report", "/gone", "/out"]);
        let expected = [
            "0 : report",
            "1 missing",
            "2 /",
            "2 a: out/a",
            "2 b: out/b",
            "2 link -> a",
            "2 sub/",
            "2 sub/deep: out/sub/deep",
            "left out 2",
        ];
        assert_eq!(sent, expected);
    }

    #[test]
    fn links_lead_nowhere_outside_the_containers_root() {
        let folder = tempfile::TempDir::new().unwrap();
        let root = folder.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(folder.path().join("secret"), "the agent's").unwrap();
        fs::write(root.join("etc/secret"), "its own").unwrap();
        symlink("/etc/secret", root.join("absolute")).unwrap();
        symlink("../../../../etc/secret", root.join("climbing")).unwrap();
        symlink(folder.path().join("secret"), root.join("outside")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        let sent = sent(&root, &["/absolute", "/climbing", "/outside", "/loop", "/../secret"]);
        assert_eq!(sent, ["0 : its own", "1 : its own", "2 missing", "3 missing", "4 missing", "left out 0"]);
    }
}
