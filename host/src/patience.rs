//! How long anything may take. Emulated and busy hosts stretch every deadline by the factor in `CARREL_PATIENCE`.

use std::time::Duration;

/// The largest factor.
const MOST: f64 = 1000.0;

/// Deadlines of one process, stretched by its factor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience(f64);

impl Patience {
    /// The factor from the environment; 1 where there is none, or none that makes sense.
    pub(crate) fn from_environment() -> Self {
        Self::parse(std::env::var("CARREL_PATIENCE").ok().as_deref())
    }

    pub(crate) fn parse(text: Option<&str>) -> Self {
        let factor = text.and_then(|text| text.parse::<f64>().ok()).filter(|factor| factor.is_finite());
        Self(factor.map_or(1.0, |factor| factor.clamp(0.1, MOST)))
    }

    fn of(self, seconds: u64) -> Duration {
        Duration::from_secs(seconds).mul_f64(self.0)
    }

    /// From the VMM's start to the agent's first word.
    pub(crate) fn boot(self) -> Duration {
        self.of(60)
    }

    /// Fetching and unpacking so many bytes: two minutes, and one more for every 256 MiB.
    pub(crate) fn prepare(self, bytes: u64) -> Duration {
        self.of(120 + (bytes >> 28) * 60)
    }

    /// Reading the headers of one archive: seconds on the slowest disk.
    pub(crate) fn archive(self) -> Duration {
        self.of(60)
    }

    /// A function's INIT: Lambda's ten seconds.
    pub(crate) fn init(self) -> Duration {
        self.of(10)
    }

    /// What an invocation may take beyond INIT and its own timeout.
    pub(crate) fn invoke(self) -> Duration {
        self.of(30)
    }

    /// Starting a process.
    pub(crate) fn start(self) -> Duration {
        self.of(60)
    }

    /// From SIGKILL to the workload's end.
    pub(crate) fn kill(self) -> Duration {
        self.of(15)
    }

    /// From the request to shut down to the VMM's end.
    pub(crate) fn shut_down(self) -> Duration {
        self.of(15)
    }

    /// From the request to stop to the VMM's end.
    pub(crate) fn stop_vmm(self) -> Duration {
        self.of(3)
    }

    /// From a stream's dial to its token, and from a process's end to its last stream's dial.
    pub(crate) fn identify(self) -> Duration {
        self.of(10)
    }

    /// A usage report from the guest.
    pub(crate) fn usage(self) -> Duration {
        self.of(3)
    }

    /// From a command's start of an owner to the owner's first sign of life.
    pub(crate) fn owner(self) -> Duration {
        self.of(30)
    }

    /// A guest of a few instructions, from its launch to its end.
    pub(crate) fn probe(self) -> Duration {
        self.of(3)
    }

    /// The doctor's trial of the guest's kernel and agent: three times what an emulated host takes at its worst.
    pub(crate) fn first_boot(self) -> Duration {
        self.of(20)
    }
}

impl Default for Patience {
    fn default() -> Self {
        Self(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_factor_stretches_every_deadline_and_nonsense_none() {
        assert_eq!(Patience::parse(Some("2.5")).boot(), Duration::from_secs(150));
        for nonsense in [None, Some(""), Some("x"), Some("nan"), Some("inf")] {
            assert_eq!(Patience::parse(nonsense).boot(), Duration::from_secs(60));
        }
        assert_eq!(Patience::parse(Some("-3")).boot(), Duration::from_secs(6));
    }
}
