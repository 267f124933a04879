//! Names of signals, as users, images and Docker write them.

/// Linux's, signal(7), from 1 on in order.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
    "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
    "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];
/// Second names.
const ALIASES: [(&str, u8); 3] = [("IOT", 6), ("CLD", 17), ("POLL", 29)];
/// Real-time signals, as the C library counts them: it keeps 32 and 33 for itself.
const RTMIN: u8 = 34;
const RTMAX: u8 = 64;

/// The number, 1 to 64, of `TERM`, `SIGTERM`, `term`, `15`, `RTMIN+3` or `RTMAX-1`; `None` for what is no signal.
pub fn number(text: &str) -> Option<u8> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let plain = || NAMES.iter().position(|known| *known == name).and_then(|at| u8::try_from(at + 1).ok());
    let alias = || ALIASES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?;
    let above = || match name.strip_prefix("RTMIN")? {
        "" => Some(RTMIN),
        more => RTMIN.checked_add(digits(more.strip_prefix('+')?)?),
    };
    let below = || match name.strip_prefix("RTMAX")? {
        "" => Some(RTMAX),
        less => RTMAX.checked_sub(digits(less.strip_prefix('-')?)?),
    };
    let real_time = || above().or_else(below).filter(|number| (RTMIN..=RTMAX).contains(number));
    let numbered = || digits(text).filter(|number| (1..=RTMAX).contains(number));
    numbered().or_else(plain).or_else(alias).or_else(real_time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_go_by_many_names() {
        for (text, expected) in [
            ("TERM", 15),
            ("SIGTERM", 15),
            ("sigkill", 9),
            ("quit", 3),
            ("SIGSYS", 31),
            ("IOT", 6),
            ("9", 9),
            ("64", 64),
            ("RTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("RTMIN+30", 64),
            ("SIGRTMAX-1", 63),
            ("RTMAX", 64),
        ] {
            assert_eq!(number(text), Some(expected), "{text}");
        }
        for wrong in [
            "", "0", "65", "256", "SIG", "NOPE", "RTMIN+31", "RTMIN3", "RTMAX-31", "RTMAX+1", "-9", "+9",
            "SIG9",
        ] {
            assert_eq!(number(wrong), None, "{wrong}");
        }
    }
}
