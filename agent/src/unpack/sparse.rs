//! Files with holes, in the four ways in which GNU tar writes them (tar manual, *Storing Sparse Files*): a map of where data are, and
//! a real size. Old GNU headers bring the map in their own fields, 0.0 and 0.1 in extended headers, 1.0 before the data.

use super::decimal::digits;

/// Pieces that a map may have: 4 MiB of memory.
pub(super) const MOST_PIECES: usize = 1 << 18;

/// What extended headers say of holes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sparse {
    /// The file's own name, where the header's is made up.
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_size: Option<u64>,
    /// Offsets and lengths, in pairs.
    pub(super) numbers: Vec<u64>,
    major: u64,
    minor: u64,
    mentioned: bool,
}

/// Where a file's data are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Map {
    /// Offset and length, ascending.
    pub(super) pieces: Vec<(u64, u64)>,
    pub(super) real_size: u64,
}

impl Sparse {
    /// One `GNU.sparse.…` record.
    pub(super) fn set(&mut self, name: &[u8], value: &[u8]) -> Result<(), String> {
        let wrong = || format!("has '{}' for GNU.sparse.{}", super::shown(value), super::shown(name));
        let number = || digits(value).ok_or_else(wrong);
        self.mentioned = true;
        match name {
            b"name" => self.name = Some(value.to_vec()).filter(|name| !name.is_empty()),
            b"size" | b"realsize" => self.real_size = Some(number()?),
            b"major" => self.major = number()?,
            b"minor" => self.minor = number()?,
            b"numblocks" => drop(number()?),
            b"offset" | b"numbytes" => self.push(number()?)?,
            b"map" => {
                self.numbers.clear();
                for one in value.split(|&byte| byte == b',') {
                    self.push(digits(one).ok_or_else(wrong)?)?;
                }
            }
            _ => return Err(format!("has an unknown record GNU.sparse.{}", super::shown(name))),
        }
        Ok(())
    }

    fn push(&mut self, number: u64) -> Result<(), String> {
        if self.numbers.len() >= 2 * MOST_PIECES {
            return Err(format!("has more than {MOST_PIECES} pieces"));
        }
        self.numbers.push(number);
        Ok(())
    }

    /// Whether the entry has holes.
    pub(super) fn is_set(&self) -> bool {
        self.mentioned
    }

    /// Whether the map comes before the data (format 1.0) rather than in the records (0.0 and 0.1).
    ///
    /// # Errors
    ///
    /// A format that GNU tar's manual doesn't have: a predicate of the entry.
    pub(super) fn map_is_in_the_data(&self) -> Result<bool, String> {
        match (self.major, self.minor) {
            (0, 0 | 1) => Ok(false),
            (1, 0) => Ok(true),
            (major, minor) => Err(format!("has holes in the unknown format {major}.{minor}")),
        }
    }
}

impl Map {
    /// Checks that the pieces are in order, inside the file, and as long together as the data.
    ///
    /// # Errors
    ///
    /// A predicate of the entry.
    pub(super) fn new(numbers: &[u64], real_size: u64, stored: u64) -> Result<Self, String> {
        let (pairs, []) = numbers.as_chunks::<2>() else {
            return Err("has a sparse map that ends in the middle".into());
        };
        let (mut end, mut sum) = (0_u64, 0_u64);
        for &[offset, length] in pairs {
            let next = offset.checked_add(length).filter(|&next| offset >= end && next <= real_size);
            end = next.ok_or("has a sparse map that is out of order or beyond its size")?;
            sum += length;
        }
        if sum != stored {
            return Err(format!("has a sparse map of {sum} bytes and {stored} bytes of data"));
        }
        Ok(Self { pieces: pairs.iter().map(|&[offset, length]| (offset, length)).collect(), real_size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_that_lie_are_refused() {
        assert!(Map::new(&[0, 5, 10, 5], 20, 10).is_ok());
        assert!(Map::new(&[20, 0], 20, 0).is_ok());
        for (numbers, real, stored) in [
            (&[0, 5, 4, 5][..], 20, 10),
            (&[10, 5, 0, 5], 20, 10),
            (&[0, 21], 20, 21),
            (&[u64::MAX, 2], u64::MAX, 2),
            (&[0, 5], 20, 6),
            (&[0], 20, 0),
        ] {
            Map::new(numbers, real, stored).unwrap_err();
        }
    }
}
