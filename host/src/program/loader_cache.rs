//! `/etc/ld.so.cache`: where ldconfig(8) found libraries (glibc, `sysdeps/generic/dl-cache.h`, the form "glibc-ld.so.cache1.1").
//!
//! ```text
//!   [ld.so-1.7.0 … ]  glibc-ld.so.cache1.1 │ count u32 │ … 24 bytes │ entries: flags i32, key u32, value u32, os u32, hwcap u64 │ strings
//!    the old form,    ▲ offsets of strings count from here
//!    passed over
//! ```

use std::path::PathBuf;

const MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
const HEADER: usize = 48;
const ENTRY: usize = 24;
/// `FLAG_ELF_LIBC6 | FLAG_X8664_LIB64`.
const X86_64: u32 = 0x0303;

/// Libraries by name.
#[derive(Clone, Debug, Default)]
pub(crate) struct LoaderCache {
    /// Name, path, and whether it is for every CPU; in the order of the file.
    entries: Vec<(String, PathBuf, bool)>,
}

impl LoaderCache {
    /// What these bytes say; nothing if they are no such cache. Entries that lead out of it are passed over.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let Some(start) = bytes.windows(MAGIC.len()).position(|window| window == MAGIC) else {
            return Self::default();
        };
        let cache = bytes.get(start..).unwrap_or_default();
        let number = |at: usize| {
            let four = cache.get(at..at.checked_add(4)?)?;
            four.try_into().ok().map(u32::from_le_bytes)
        };
        let string = |offset: u32| {
            let rest = cache.get(usize::try_from(offset).ok()?..)?;
            let end = rest.iter().position(|byte| *byte == 0)?;
            std::str::from_utf8(rest.get(..end)?).ok().map(str::to_owned)
        };
        let count = usize::try_from(number(MAGIC.len()).unwrap_or(0)).unwrap_or(0);
        let most = cache.len().saturating_sub(HEADER) / ENTRY;
        let entry = |n: usize| {
            let at = HEADER + n * ENTRY;
            if number(at)? != X86_64 {
                return None;
            }
            let every_cpu = (number(at + 16)?, number(at + 20)?) == (0, 0);
            Some((string(number(at + 4)?)?, PathBuf::from(string(number(at + 8)?)?), every_cpu))
        };
        Self { entries: (0..count.min(most)).filter_map(entry).collect() }
    }

    /// Paths of a library: those for every CPU first, since the room's may be another than this machine's.
    pub(crate) fn paths<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a PathBuf> {
        let of = move |every| {
            self.entries
                .iter()
                .filter(move |(known, _, cpu)| known == name && *cpu == every)
                .map(|(_, path, _)| path)
        };
        of(true).chain(of(false))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    /// A cache of these entries: flags, name, path, hwcap.
    fn cache(entries: &[(u32, &str, &str, u64)]) -> Vec<u8> {
        let (mut table, mut strings) = (Vec::new(), Vec::new());
        let base = HEADER + entries.len() * ENTRY;
        let mut put = |text: &str| {
            let at = u32::try_from(base + strings.len()).unwrap();
            strings.extend_from_slice(text.as_bytes());
            strings.push(0);
            at
        };
        for (flags, name, path, hwcap) in entries {
            for number in [*flags, put(name), put(path), 0] {
                table.extend_from_slice(&number.to_le_bytes());
            }
            table.extend_from_slice(&hwcap.to_le_bytes());
        }
        let mut all = MAGIC.to_vec();
        all.extend_from_slice(&u32::try_from(entries.len()).unwrap().to_le_bytes());
        all.resize(HEADER, 0);
        [all, table, strings].concat()
    }

    #[test]
    fn a_library_is_found_by_its_name_and_the_one_for_every_cpu_first() {
        let bytes = cache(&[
            (X86_64, "libm.so.6", "/lib/fast/libm.so.6", 1 << 62),
            (0x0003, "libm.so.6", "/lib32/libm.so.6", 0),
            (X86_64, "libm.so.6", "/lib/libm.so.6", 0),
        ]);
        let old_form_first = [b"ld.so-1.7.0\0\0\0\0\0".as_slice(), &bytes].concat();
        for bytes in [bytes, old_form_first] {
            let cache = LoaderCache::parse(&bytes);
            let found: Vec<_> = cache.paths("libm.so.6").collect();
            assert_eq!(found, [Path::new("/lib/libm.so.6"), Path::new("/lib/fast/libm.so.6")]);
            assert_eq!(cache.paths("libm.so").count(), 0);
        }
    }

    #[test]
    fn this_machines_own_cache_has_its_c_library() {
        let Ok(bytes) = std::fs::read("/etc/ld.so.cache") else { return };
        let cache = LoaderCache::parse(&bytes);
        assert!(cache.paths("libc.so.6").next().unwrap().exists());
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..400), at in 0_usize..80, byte: u8) {
            let _ = LoaderCache::parse(&[MAGIC, &bytes].concat());
            let mut good = cache(&[(X86_64, "a", "/a", 0), (X86_64, "b", "/b", 1)]);
            let at = at % good.len();
            good[at] = byte;
            let _ = LoaderCache::parse(&good);
        }
    }
}
