//! What users type on the command line, and the types that it becomes.
//!
//! In: the text of one option. Out: a value in range, or one sentence that says what would have been right. Docker's
//! habits are kept wherever Docker has one, so that fingers and scripts need not learn anew.

pub(crate) mod environment;
pub(crate) mod size;
pub(crate) mod span;

use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use carrel_host::signal;
use carrel_host::spec::Part;

/// A share of the host's processors, in thousandths of one CPU: `--cpus 1.5` is 1,500. From 10 to 16,000.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CpuMillis(u32);

impl CpuMillis {
    const MIN: u32 = 10;
    const MAX: u32 = 16_000;

    /// Thousandths of one CPU.
    pub(crate) const fn get(self) -> u32 {
        self.0
    }
}

impl FromStr for CpuMillis {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || anyhow::anyhow!("give a number of CPUs between 0.01 and 16, such as 0.5 or 2");
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        if whole.is_empty() && fraction.is_empty() || !digits(whole) || !digits(fraction) {
            return Err(wrong());
        }
        let whole: u32 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| wrong())? };
        // Digits beyond the third are dropped: a millionth of a CPU can't be scheduled.
        let thousandths: u32 = format!("{fraction:0<3}")[..3].parse().map_err(|_| wrong())?;
        whole
            .checked_mul(1000)
            .and_then(|millis| millis.checked_add(thousandths))
            .filter(|millis| (Self::MIN..=Self::MAX).contains(millis))
            .map(Self)
            .ok_or_else(wrong)
    }
}

/// Parts of the VMM's confinement to do without: `all`, or their names with commas between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Without(pub(crate) Vec<Part>);

impl FromStr for Without {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "all" => Ok(Self(Part::ALL.to_vec())),
            parts => Ok(Self(parts.split(',').map(str::parse).collect::<Result<_, _>>()?)),
        }
    }
}

/// A signal by name (`TERM`, `SIGTERM`, `term`, `RTMIN+1`) or number, 1 to 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Signal(pub(crate) u8);

impl FromStr for Signal {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = signal::number(text);
        let wrong = "give a signal's name, such as TERM or SIGUSR1, or its number, from 1 to 64";
        Ok(Self(number.with_context(|| wrong)?))
    }
}

/// `--tmpfs PATH[:OPTIONS]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tmpfs {
    /// Absolute.
    pub(crate) path: String,
    /// As `mount -o` takes them.
    pub(crate) options: String,
}

impl FromStr for Tmpfs {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (path, options) = text.split_once(':').unwrap_or((text, ""));
        ensure!(
            path.starts_with('/') && path != "/",
            "give an absolute path below /, with options after a colon: /run:size=64m,mode=1777"
        );
        ensure!(!path.split('/').any(|part| part == ".."), "the path must not contain '..'");
        Ok(Self { path: path.to_owned(), options: options.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_read_in_thousandths() {
        let millis = |text: &str| text.parse::<CpuMillis>().map(CpuMillis::get).ok();
        assert_eq!(millis("1"), Some(1000));
        assert_eq!(millis("0.5"), Some(500));
        assert_eq!(millis(".25"), Some(250));
        assert_eq!(millis("1.2345"), Some(1234));
        assert_eq!(millis("16"), Some(16_000));
        assert_eq!(millis("0.01"), Some(10));
        for wrong in ["", ".", "0", "0.001", "16.001", "-1", "1,5", "1e3", "4294968", "x", "1.x", "+1"] {
            assert_eq!(millis(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn parts_are_named_one_by_one_or_all_at_once() {
        let parts = |text: &str| text.parse::<Without>().map(|without| without.0).ok();
        assert_eq!(parts("all"), Some(Part::ALL.to_vec()));
        assert_eq!(parts("seccomp,cgroup"), Some(vec![Part::Seccomp, Part::Cgroup]));
        for wrong in ["", "everything", "cgroup,", "all,cgroup"] {
            assert_eq!(parts(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn what_is_no_signal_is_told_what_would_be() {
        assert_eq!("SIGUSR1".parse::<Signal>().unwrap(), Signal(10));
        assert!("NOPE".parse::<Signal>().unwrap_err().to_string().contains("SIGUSR1"));
    }

    #[test]
    fn tmpfs_takes_a_path_and_options() {
        let tmpfs: Tmpfs = "/run:size=64m,mode=1777".parse().unwrap();
        assert_eq!((tmpfs.path.as_str(), tmpfs.options.as_str()), ("/run", "size=64m,mode=1777"));
        let bare: Tmpfs = "/cache".parse().unwrap();
        assert_eq!(bare.options, "");
        for wrong in ["", "run", "/", ":size=1m", "/a/../b"] {
            assert!(wrong.parse::<Tmpfs>().is_err(), "{wrong}");
        }
    }
}
