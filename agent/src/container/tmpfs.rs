//! Options of a container's tmpfs mounts, as `mount -o` takes them: parsed strictly, so that a wrong one is named rather
//! than passed on to the kernel.

use std::ffi::CString;

use rustix::mount::MountFlags;
use thiserror::Error;

/// Why options are none.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum TmpfsError {
    /// Not in the list.
    #[error(
        "'{0}' is no option of a tmpfs; there are size=, mode=, nr_inodes=, uid=, gid=, ro, rw, exec, noexec, suid, nosuid, dev, nodev, noatime and relatime"
    )]
    Unknown(String),
    /// A number is none.
    #[error(
        "'{0}' has no value that a tmpfs takes, as in size=64m, size=50%, mode=1777, nr_inodes=10k, uid=1000"
    )]
    Value(String),
}

/// What mount(2) wants.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) flags: MountFlags,
    pub(crate) text: CString,
}

/// Parses comma-separated options; later ones win. As with Docker, a tmpfs is nosuid, nodev and noexec with mode 1777 unless told
/// otherwise.
///
/// # Errors
///
/// See [`TmpfsError`].
pub(crate) fn parse(options: &str) -> Result<Options, TmpfsError> {
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let mut text = vec!["mode=1777".to_owned()];
    for option in options.split(',').filter(|option| !option.is_empty()) {
        let (name, value) =
            option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)));
        let valid = |valid: bool| if valid { Ok(()) } else { Err(TmpfsError::Value(option.to_owned())) };
        match (name, value) {
            ("size" | "nr_inodes", Some(value)) => valid(is_size(value, name == "size"))?,
            ("mode", Some(value)) => {
                valid(u32::from_str_radix(value, 8).is_ok_and(|mode| mode <= 0o7777) && plain(value))?;
            }
            ("uid" | "gid", Some(value)) => valid(plain(value) && value.parse::<u32>().is_ok())?,
            ("ro", None) => flags |= MountFlags::RDONLY,
            ("rw", None) => flags -= MountFlags::RDONLY,
            ("exec", None) => flags -= MountFlags::NOEXEC,
            ("noexec", None) => flags |= MountFlags::NOEXEC,
            ("suid", None) => flags -= MountFlags::NOSUID,
            ("nosuid", None) => flags |= MountFlags::NOSUID,
            ("dev", None) => flags -= MountFlags::NODEV,
            ("nodev", None) => flags |= MountFlags::NODEV,
            ("noatime", None) => flags |= MountFlags::NOATIME,
            ("relatime", None) => flags |= MountFlags::RELATIME,
            (_, _) => return Err(TmpfsError::Unknown(option.to_owned())),
        }
        if value.is_some() {
            text.push(option.to_owned());
        }
    }
    let text = CString::new(text.join(",")).map_err(|_| TmpfsError::Unknown(options.to_owned()))?;
    Ok(Options { flags, text })
}

fn plain(number: &str) -> bool {
    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}

/// Digits and one of k, m, g; a share of memory in per cent where `percent` allows that.
fn is_size(value: &str, percent: bool) -> bool {
    let number = match value.as_bytes().last() {
        Some(b'%') if percent => {
            return value
                .strip_suffix('%')
                .is_some_and(|n| plain(n) && n.parse::<u8>().is_ok_and(|n| n <= 100));
        }
        Some(b'k' | b'm' | b'g' | b'K' | b'M' | b'G') => value.get(..value.len() - 1).unwrap_or_default(),
        _ => value,
    };
    plain(number) && number.len() <= 15
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_options_a_tmpfs_is_as_dockers() {
        let options = parse("").unwrap();
        assert_eq!(options.flags, MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC);
        assert_eq!(options.text.to_str(), Ok("mode=1777"));
    }

    #[test]
    fn options_are_passed_on_and_flags_are_flags() {
        let options = parse("size=64m,mode=700,exec,ro,uid=1000,nr_inodes=10k").unwrap();
        assert_eq!(options.flags, MountFlags::NOSUID | MountFlags::NODEV | MountFlags::RDONLY);
        assert_eq!(options.text.to_str(), Ok("mode=1777,size=64m,mode=700,uid=1000,nr_inodes=10k"));
        assert_eq!(parse("ro,rw").unwrap().flags, parse("").unwrap().flags);
    }

    #[test]
    fn the_later_option_wins_and_every_flag_has_its_opposite() {
        let flags = |options: &str| parse(options).unwrap().flags;
        for (on, off) in [("ro", "rw"), ("noexec", "exec"), ("nosuid", "suid"), ("nodev", "dev")] {
            assert_ne!(flags(on), flags(off), "{on}");
            assert_eq!(flags(&format!("{off},{on}")), flags(on));
            assert_eq!(flags(&format!("{on},{off}")), flags(off));
        }
        assert_eq!(flags("noatime,relatime") - flags(""), MountFlags::NOATIME | MountFlags::RELATIME);
        assert_eq!(flags(",,rw,"), flags(""));
    }

    #[test]
    fn values_are_checked_to_their_ends() {
        for right in [
            "size=0",
            "size=100%",
            "size=999999999999999",
            "size=1G",
            "mode=7777",
            "mode=0",
            "uid=4294967295",
            "gid=0",
        ] {
            let text = parse(right).unwrap().text;
            assert_eq!(text.to_str().unwrap(), format!("mode=1777,{right}"));
        }
        for wrong in [
            "size=1000000000000000",
            "size=k",
            "size=%",
            "size=1kk",
            "size=１",
            "mode=10000",
            "mode=",
            "mode=-1",
            "uid=4294967296",
            "gid=+1",
        ] {
            assert_eq!(parse(wrong), Err(TmpfsError::Value(wrong.to_owned())));
        }
        assert!(parse("size=1\0").is_err() && parse("\0").is_err());
    }

    #[test]
    fn what_is_no_option_is_named() {
        for wrong in ["huge=always", "size", "SIZE=1m", "exec=1", "mpol=bind", " ro", "size=1m ro"] {
            assert!(parse(wrong).unwrap_err().to_string().contains(wrong), "{wrong}");
        }
        for wrong in [
            "size=",
            "size=x",
            "size=-1",
            "size=1t",
            "size=101%",
            "mode=8",
            "mode=+7",
            "uid=root",
            "nr_inodes=5%",
        ] {
            assert_eq!(parse(wrong), Err(TmpfsError::Value(wrong.to_owned())));
        }
    }
}
