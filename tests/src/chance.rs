//! Chance that can be had again: all that a test draws follows from one number, which it prints.

use std::time::{SystemTime, UNIX_EPOCH};

/// A generator (xorshift64*, Vigna 2016): for tests, not for secrets.
#[derive(Debug)]
pub struct Chance(u64);

impl Default for Chance {
    fn default() -> Self {
        Self::new()
    }
}

impl Chance {
    /// From `CARREL_TEST_SEED`, or from the clock.
    pub fn new() -> Self {
        let seed = match std::env::var("CARREL_TEST_SEED") {
            Ok(text) => text.parse().expect("CARREL_TEST_SEED is a number"),
            Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs(),
        };
        println!("CARREL_TEST_SEED={seed}");
        Self::from_seed(seed)
    }

    /// From this number.
    pub fn from_seed(seed: u64) -> Self {
        // It never leaves 0; and neighbours should not begin alike.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number from 0 to `end` - 1; `end` is 1 at least.
    pub fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let drawn = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16;
        usize::try_from(drawn % u64::try_from(end).unwrap()).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_and_neither_end_is_missed() {
        let draw = |seed| {
            let mut chance = Chance::from_seed(seed);
            (0..200).map(|_| chance.below(6)).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        assert_eq!(draw(0).into_iter().collect::<std::collections::BTreeSet<_>>().len(), 6);
    }
}
