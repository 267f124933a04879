//! Quantities that can't hold a wrong value.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A quantity outside its range.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{what} must be between {min} and {max}, not {given}")]
pub struct OutOfRange {
    what: &'static str,
    min: u64,
    max: u64,
    given: u64,
}

macro_rules! ranged {
    ($(#[$doc:meta])* $name:ident($inner:ty), $what:literal, $min:expr, $max:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "u64", into = "u64")]
        pub struct $name($inner);

        impl $name {
            /// The smallest.
            pub const MIN: Self = Self($min);
            /// The largest.
            pub const MAX: Self = Self($max);

            /// The bare number.
            pub const fn get(self) -> $inner {
                self.0
            }
        }

        impl TryFrom<u64> for $name {
            type Error = OutOfRange;
            fn try_from(given: u64) -> Result<Self, OutOfRange> {
                <$inner>::try_from(given)
                    .ok()
                    .filter(|n| ($min..=$max).contains(n))
                    .map(Self)
                    .ok_or(OutOfRange { what: $what, min: $min.into(), max: $max.into(), given })
            }
        }

        impl From<$name> for u64 {
            fn from(n: $name) -> u64 {
                n.0.into()
            }
        }
    };
}

ranged!(
    /// How many virtual CPUs a microVM has: 1 to 16.
    VcpuCount(u8), "the number of vCPUs", 1u8, 16u8
);
ranged!(
    /// A microVM's memory: 64 MiB to 64 GiB, in MiB.
    MemoryMib(u32), "memory in MiB", 64u32, 65_536u32
);

impl VcpuCount {
    /// The least.
    pub const ONE: Self = Self(1);
}

impl MemoryMib {
    /// The same in bytes.
    pub const fn bytes(self) -> u64 {
        (self.0 as u64) << 20
    }
}
