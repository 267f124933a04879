//! `User` of an image's configuration (OCI config.md): `user`, `uid`, `user:group`, `uid:gid`, … looked up in the container's own
//! `/etc/passwd` and `/etc/group`. These are files of a stranger: read as regular files, with a cap, line by line; what
//! doesn't parse is no entry.

use std::io;
use std::io::Read;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, Mode, OFlags};
use thiserror::Error;

/// Why nobody can be run as.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum UserError {
    /// A name without an entry.
    #[error("the user '{0}' is not in the container's /etc/passwd; name one that is, or a number")]
    Unknown(String),
    /// A group's name without an entry.
    #[error(
        "the group '{group}' of the user '{user}' is not in the container's /etc/group; name one that is, or a number"
    )]
    UnknownGroup {
        /// As given.
        user: String,
        /// As given.
        group: String,
    },
    /// A number that is no id.
    #[error("'{0}' names no user; expected user, user:group, or numbers up to 4294967294")]
    Malformed(String),
}

/// Who a process runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups, the primary one not necessarily among them.
    pub(crate) groups: Vec<u32>,
    /// From the entry in passwd; `/` without one.
    pub(crate) home: String,
}

/// As much of a file is read.
const LARGEST: u64 = 4 << 20;
/// The kernel's NGROUPS_MAX.
const MOST_GROUPS: usize = 65_536;

/// Looks a user up in the files of the root that the calling process is in.
///
/// # Errors
///
/// See [`UserError`].
pub(crate) fn look_up(user: &str) -> Result<Identity, UserError> {
    let read = |path| read(path).unwrap_or_default();
    resolve(user, &read("/etc/passwd"), &read("/etc/group"))
}

/// Neither a pipe nor a device can make the reader wait.
fn read(path: &str) -> io::Result<String> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd: OwnedFd = rustix::fs::open(path, flags, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) != FileType::RegularFile {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut bytes = Vec::new();
    std::fs::File::from(fd).take(LARGEST).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        // name:password:uid:gid:comment:home:shell
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = id(fields.nth(1)?)?;
        let gid = id(fields.next()?)?;
        Some(Account { name, uid, gid, home: fields.nth(1).unwrap_or_default() })
    })
}

fn groups(group: &str) -> impl Iterator<Item = Group<'_>> {
    group.lines().filter_map(|line| {
        // name:password:gid:members
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = id(fields.nth(1)?)?;
        Some(Group { name, gid, members: fields.next().unwrap_or_default() })
    })
}

/// A decimal id. 2³²-1 means "unchanged" to the kernel and is none.
fn id(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|&id| digits && id != u32::MAX)
}

fn is_number(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

fn resolve(user: &str, passwd: &str, group: &str) -> Result<Identity, UserError> {
    let malformed = || UserError::Malformed(user.to_owned());
    // As runc has it, either half may be empty: images say `$USER:$GROUP` of variables that nobody set.
    let (name, group_name) = user.split_once(':').unwrap_or((user, ""));
    let name = if name.is_empty() { "0" } else { name };
    let named_group = Some(group_name).filter(|group| !group.is_empty());
    // Names come first, even such that look like numbers (as getpwnam, then getpwuid, would have it).
    let account = accounts(passwd)
        .find(|account| account.name == name)
        .or_else(|| accounts(passwd).find(|account| id(name) == Some(account.uid)));
    let (uid, own_gid, home) = match &account {
        Some(account) => (account.uid, account.gid, account.home),
        None if is_number(name) => (id(name).ok_or_else(malformed)?, 0, ""),
        None => return Err(UserError::Unknown(name.to_owned())),
    };
    let (gid, groups) = match named_group {
        Some(wanted) => {
            let found = groups(group).find(|group| group.name == wanted).map(|group| group.gid);
            let gid = match found {
                Some(gid) => gid,
                None if is_number(wanted) => id(wanted).ok_or_else(malformed)?,
                None => {
                    let (user, group) = (name.to_owned(), wanted.to_owned());
                    return Err(UserError::UnknownGroup { user, group });
                }
            };
            (gid, Vec::new())
        }
        // Supplementary groups belong to a name (OCI config.md: where no group is given, those of the user's entry).
        None => {
            let member = |group: &Group<'_>| {
                account
                    .as_ref()
                    .is_some_and(|account| group.members.split(',').any(|one| one == account.name))
            };
            (own_gid, groups(group).filter(member).map(|group| group.gid).take(MOST_GROUPS).collect())
        }
    };
    let home = if home.is_empty() { "/" } else { home };
    Ok(Identity { uid, gid, groups, home: home.to_owned() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n# no entry\nreader:x:1000:1000::/home/reader:\n7:x:1007:70::/seven:\nbroken:x:many:1::/:\nbare:x:5:6\n";
    const GROUP: &str =
        "root:x:0:\nreaders:x:1000:\nquiet:x:2000:someone,reader\nloud:x:2001:readers\n7:x:700:\n";

    fn identity(user: &str) -> Result<Identity, UserError> {
        resolve(user, PASSWD, GROUP)
    }

    fn ids(user: &str) -> (u32, u32, Vec<u32>) {
        let found = identity(user).unwrap();
        (found.uid, found.gid, found.groups)
    }

    #[test]
    fn nobody_named_is_root() {
        assert_eq!(identity("").unwrap(), identity("root").unwrap());
        assert_eq!(identity("").unwrap().home, "/root");
        assert_eq!(resolve("", "", "").unwrap().home, "/");
    }

    #[test]
    fn a_name_has_its_groups_and_home() {
        assert_eq!(ids("reader"), (1000, 1000, vec![2000]));
        assert_eq!(ids("1000"), (1000, 1000, vec![2000]));
        assert_eq!(identity("reader").unwrap().home, "/home/reader");
        assert_eq!(ids("bare"), (5, 6, vec![]));
    }

    #[test]
    fn a_named_group_replaces_all_others() {
        assert_eq!(ids("reader:quiet"), (1000, 2000, vec![]));
        assert_eq!(ids("1000:4343"), (1000, 4343, vec![]));
        assert_eq!(ids("4242:readers"), (4242, 1000, vec![]));
    }

    #[test]
    fn numbers_need_no_entry_and_names_that_are_numbers_come_first() {
        assert_eq!(ids("4242"), (4242, 0, vec![]));
        assert_eq!(ids("7"), (1007, 70, vec![]));
        assert_eq!(ids("7:7"), (1007, 700, vec![]));
    }

    #[test]
    fn either_half_may_be_empty() {
        assert_eq!((identity(":"), identity("reader:")), (identity(""), identity("reader")));
        assert_eq!(ids(":readers"), (0, 1000, vec![]));
    }

    #[test]
    fn what_no_number_is_is_a_name() {
        for name in ["-1", "+1", "0x0", " 0", "1 ", "１"] {
            assert_eq!(identity(name), Err(UserError::Unknown(name.into())), "{name}");
        }
        assert!(matches!(identity("0:-1"), Err(UserError::UnknownGroup { .. })));
        assert!(matches!(identity("0:0:0"), Err(UserError::UnknownGroup { .. })));
    }

    #[test]
    fn what_is_no_entry_is_passed_over() {
        let passwd = "::0:0::/:\nreader\nreader:x\nreader:x:1\nreader:x:-1:1\nreader:x:4294967295:1\nreader:x: 5:1\n+::::::\nreader:x:8:9\n";
        let found = resolve("reader", passwd, "").unwrap();
        assert_eq!((found.uid, found.gid, &*found.home), (8, 9, "/"));
        // The first of two counts.
        let twice = resolve("a", "a:x:1:1::/one:\na:x:2:2::/two:\n", "g:x:5:a\ng:x:6:a,a\n").unwrap();
        assert_eq!((twice.uid, &*twice.home, twice.groups), (1, "/one", vec![5, 6]));
    }

    #[test]
    fn more_groups_than_the_kernel_takes_are_cut() {
        let group: String = (0..70_000).map(|gid| format!("g{gid}:x:{gid}:reader\n")).collect();
        assert_eq!(resolve("reader", PASSWD, &group).unwrap().groups.len(), MOST_GROUPS);
    }

    #[test]
    fn only_regular_files_are_read_and_no_more_than_the_cap() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(path("long"), "x".repeat(5 << 20)).unwrap();
        std::fs::write(path("odd"), b"\xffname\n").unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, path("pipe"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert_eq!(u64::try_from(read(&path("long")).unwrap().len()).unwrap(), LARGEST);
        assert_eq!(read(&path("odd")).unwrap(), "\u{fffd}name\n");
        // None of these makes the reader wait.
        for none in [&*path("pipe"), "/dev/zero", "/dev/tty", "/", &path("missing")] {
            assert!(read(none).is_err(), "{none}");
        }
    }

    #[test]
    fn the_unknown_is_named() {
        assert_eq!(identity("nobody-here"), Err(UserError::Unknown("nobody-here".into())));
        assert_eq!(identity("broken"), Err(UserError::Unknown("broken".into())));
        assert!(matches!(identity("reader:none"), Err(UserError::UnknownGroup { .. })));
        for malformed in ["99999999999", "4294967295", "1:4294967295", ":4294967295"] {
            assert_eq!(identity(malformed), Err(UserError::Malformed(malformed.into())));
        }
    }

    proptest! {
        #[test]
        fn no_file_and_no_user_is_too_strange(user in ".{0,40}", passwd in ".{0,200}", group in ".{0,200}") {
            if let Ok(found) = resolve(&user, &passwd, &group) {
                prop_assert!(found.uid != u32::MAX && found.gid != u32::MAX && !found.home.is_empty());
            }
        }
    }
}
