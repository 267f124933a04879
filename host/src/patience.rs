//! How long anything may take. Emulated and busy hosts stretch every deadline by a factor.
//!
//! The command's configuration says it (`CARREL_PATIENCE`), once; a room's owner has it from the room's order.

use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A factor that no deadline is stretched by.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0} is no factor for deadlines: give a number from 0.1 to 1000")]
pub struct PatienceError(String);

/// By what every deadline is stretched: 0.1 to 1000, 1 where nobody says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Patience(f64);

impl TryFrom<f64> for Patience {
    type Error = PatienceError;

    fn try_from(factor: f64) -> Result<Self, PatienceError> {
        // Not a number is in no range.
        let fits = (0.1..=1000.0).contains(&factor);
        fits.then_some(Self(factor)).ok_or_else(|| PatienceError(factor.to_string()))
    }
}

impl From<Patience> for f64 {
    fn from(patience: Patience) -> Self {
        patience.0
    }
}

impl FromStr for Patience {
    type Err = PatienceError;

    fn from_str(text: &str) -> Result<Self, PatienceError> {
        text.parse::<f64>().map_err(|_| PatienceError(format!("{text:?}")))?.try_into()
    }
}

impl Patience {
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

    /// A room's silence while it sends files back.
    #[must_use]
    pub fn returned(self) -> Duration {
        self.of(60)
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

    /// Freezing a guest in which nothing runs yet.
    pub(crate) fn freeze(self) -> Duration {
        self.of(30)
    }

    /// Saving so many bytes of memory: half a minute, and as much for every 256 MiB.
    pub(crate) fn save(self, bytes: u64) -> Duration {
        self.of(30 + (bytes >> 28) * 30)
    }

    /// Starting a process.
    pub(crate) fn start(self) -> Duration {
        self.of(60)
    }

    /// A program's own way to where it says that it is ready to be cloned. Lambda gives that of a function (SnapStart's INIT) up to 15 minutes; nobody waits for an
    /// answer of this one.
    pub(crate) fn initialise(self) -> Duration {
        self.of(15 * 60)
    }

    /// For a template that another command makes: what all its steps may take, payloads of a few GiB included.
    pub(crate) fn template(self) -> Duration {
        self.of(10 * 60)
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

    /// From a command's request to the owner's answer. It may be telling a silent agent something, which has 10 s.
    pub(crate) fn answer(self) -> Duration {
        self.of(15)
    }

    /// From SIGKILL to the room's end at the latest, whatever its guest and its VMM do: dead, asked, stopped, killed; and ten seconds.
    pub(crate) fn ending(self) -> Duration {
        self.kill() + self.shut_down() + self.stop_vmm() * 2 + self.of(10)
    }

    /// From a stream's dial to its token: as long as the start that most of them are of, in which a guest may wait for its CPU between the two.
    pub(crate) fn token(self) -> Duration {
        self.start()
    }

    /// From a process's end to the last of its streams.
    pub(crate) fn identify(self) -> Duration {
        self.of(10)
    }

    /// A usage report from the guest.
    pub(crate) fn usage(self) -> Duration {
        self.of(3)
    }

    /// From a function's answer to its room's rest. An event that follows at once finds the room awake; where all takes longer, it comes later too.
    pub(crate) fn rest(self) -> Duration {
        self.of(1)
    }

    /// From one piece of memory that a guest gives up to the next: a MiB takes some 10 ms in an emulated host, when that is not busy.
    pub(crate) fn give_on(self) -> Duration {
        self.of(1)
    }

    /// All that a guest gives up before it rests: what a hostile one can have of its CPUs by giving page after page. In an emulated host that is a GiB.
    pub(crate) fn give(self) -> Duration {
        self.of(10)
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
    fn the_factor_stretches_every_deadline_and_nonsense_is_refused() {
        assert_eq!("2.5".parse::<Patience>().unwrap().boot(), Duration::from_secs(150));
        assert_eq!(Patience::default().boot(), Duration::from_secs(60));
        for nonsense in ["", "x", "nan", "inf", "-3", "0", "1001"] {
            assert!(nonsense.parse::<Patience>().is_err(), "{nonsense}");
        }
    }

    #[test]
    fn a_room_has_the_factor_that_its_order_says() {
        assert_eq!(serde_json::to_string(&Patience(2.5)).unwrap(), "2.5");
        assert_eq!(serde_json::from_str::<Patience>("20").unwrap(), Patience(20.0));
        assert!(serde_json::from_str::<Patience>("0").is_err());
    }
}
