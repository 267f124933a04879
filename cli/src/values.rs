//! What users type on the command line, and the types that it becomes.
//!
//! In: the text of one option. Out: a value in range, or one sentence that says what would have been right. Docker's
//! habits are kept wherever Docker has one, so that fingers and scripts need not learn anew.

pub(crate) mod environment;
pub(crate) mod size;
pub(crate) mod span;

use std::str::FromStr;

use anyhow::{Result, bail, ensure};
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

/// Linux's numbers on x86_64, signal(7). Real-time signals are counted from 34, as the C library does.
const SIGNALS: [(&str, u8); 34] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
    ("RTMIN", 34),
    ("RTMAX", 64),
];

impl FromStr for Signal {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Ok(number) = text.parse::<u8>() {
            ensure!((1..=64).contains(&number), "signals have numbers from 1 to 64");
            return Ok(Self(number));
        }
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        if let Some(&(_, number)) = SIGNALS.iter().find(|(known, _)| *known == name) {
            return Ok(Self(number));
        }
        let real_time = match (name.strip_prefix("RTMIN+"), name.strip_prefix("RTMAX-")) {
            (Some(above), _) => above.parse::<u8>().ok().and_then(|n| n.checked_add(34)),
            (_, Some(below)) => below.parse::<u8>().ok().and_then(|n| 64u8.checked_sub(n)),
            (None, None) => None,
        };
        match real_time {
            Some(number @ 34..=64) => Ok(Self(number)),
            Some(_) | None => bail!("give a signal's name, such as TERM or SIGUSR1, or its number"),
        }
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
    fn signals_go_by_name_or_number() {
        let number = |text: &str| text.parse::<Signal>().map(|signal| signal.0).ok();
        assert_eq!(number("TERM"), Some(15));
        assert_eq!(number("sigkill"), Some(9));
        assert_eq!(number("SIGUSR1"), Some(10));
        assert_eq!(number("9"), Some(9));
        assert_eq!(number("RTMIN+3"), Some(37));
        assert_eq!(number("SIGRTMAX-1"), Some(63));
        for wrong in ["", "0", "65", "SIG", "NOPE", "RTMIN+31", "RTMAX-31", "-9"] {
            assert_eq!(number(wrong), None, "{wrong}");
        }
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
