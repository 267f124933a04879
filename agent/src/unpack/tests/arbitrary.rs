//! Anything at all: no panic, nothing outside the root, nothing beyond the caps.

use std::io::Write;

use carrel_protocol::agent::{Compression, UnpackLimits};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::super::UnpackError;
use super::bed::{Bed, described};
use super::tarball::{Member, checksum, tar};
use super::zips;

const LIMITS: UnpackLimits = UnpackLimits { bytes: 256 << 10, entries: 40 };

fn within_caps(bed: &Bed, done: &Result<(u64, u64), UnpackError>) -> Result<(), TestCaseError> {
    let tree = bed.tree();
    prop_assert!(tree.len() <= usize::try_from(LIMITS.entries).unwrap(), "{} entries", tree.len());
    let sizes: std::collections::BTreeMap<u64, u64> =
        tree.values().map(|found| (found.inode, found.size)).collect();
    prop_assert!(sizes.values().sum::<u64>() <= LIMITS.bytes);
    if let Ok((bytes, entries)) = done {
        prop_assert!(*bytes <= LIMITS.bytes && *entries <= LIMITS.entries);
    }
    Ok(())
}

/// An archive with one of everything.
fn rich() -> Vec<u8> {
    tar(&[
        Member::directory("./").mode(0o755),
        Member::directory("d/"),
        Member::file("d/f", vec![b'x'; 700]).mode(0o4755).owner(1, 2),
        Member::symlink("l", "d"),
        Member::symlink("out", "../beside"),
        Member::file("l/through", "1"),
        Member::hard_link("h", "d/f"),
        Member::special(b'6', "p", (0, 0)),
        Member::special(b'3', "null", (1, 3)),
        Member::file("././@LongLink", vec![b'n'; 150]).kind(b'L'),
        Member::file("n", "long"),
        Member::file("x", "2")
            .record("path", "d/by-record")
            .record("SCHILY.xattr.user.a", "b")
            .record("mtime", "1.5"),
        Member::file("s", "data").record("GNU.sparse.size", "9000").record("GNU.sparse.map", "4096,4"),
        Member::file("s1", [&b"1\n0\n4\n"[..], &[0; 506], b"data"].concat())
            .record("GNU.sparse.major", "1")
            .record("GNU.sparse.minor", "0")
            .record("GNU.sparse.realsize", "5000"),
        Member::file("old", "data")
            .kind(b'S')
            .patch(386, b"00000001000\x0000000000004\0")
            .patch(483, b"00000010000\0"),
        Member::file("d/.wh.f", ""),
        Member::file("d/.wh..wh..opq", ""),
        Member::file("pax", "30 comment=of nobody's interest").kind(b'g'),
    ])
}

/// Where, and what is put there.
#[derive(Clone, Debug)]
enum Damage {
    Byte(Index, u8),
    Text(Index, &'static str),
    Cut(Index),
    Repeat(Index, Index),
    Swap(Index, Index),
}

fn damage() -> impl Strategy<Value = Damage> {
    let text = prop::sample::select(
        &[
            "../",
            "/",
            "..",
            "./",
            "777777777777",
            "\0\0\0\0",
            "-1",
            "99999999999999999999",
            ".wh.",
            "l/",
            "out/",
            "\u{80}",
            "18 ",
        ][..],
    );
    prop_oneof![
        4 => (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Damage::Byte(at, byte)),
        4 => (any::<Index>(), text).prop_map(|(at, text)| Damage::Text(at, text)),
        1 => any::<Index>().prop_map(Damage::Cut),
        1 => (any::<Index>(), any::<Index>()).prop_map(|(from, to)| Damage::Repeat(from, to)),
        2 => (any::<Index>(), any::<Index>()).prop_map(|(from, to)| Damage::Swap(from, to)),
    ]
}

/// `unit`: what moves as a whole; `fields`: where damage means most, from each unit's beginning.
fn damaged(mut bytes: Vec<u8>, unit: usize, damages: &[Damage]) -> Vec<u8> {
    for damage in damages {
        if bytes.len() < unit {
            return bytes;
        }
        let units = bytes.len() / unit;
        match damage {
            Damage::Byte(at, byte) => {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            Damage::Text(at, text) => {
                // What was cut before may have no room for it.
                let Some(last) = bytes.len().checked_sub(text.len()) else { continue };
                let at = at.index(last + 1);
                bytes[at..at + text.len()].copy_from_slice(text.as_bytes());
            }
            Damage::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Damage::Repeat(from, to) => {
                let part = bytes[from.index(units) * unit..][..unit].to_vec();
                let to = to.index(units) * unit;
                bytes.splice(to..to, part);
            }
            Damage::Swap(from, to) => {
                let (from, to) = (from.index(units) * unit, to.index(units) * unit);
                for at in 0..unit {
                    bytes.swap(from + at, to + at);
                }
            }
        }
    }
    bytes
}

/// Makes the checksums of whatever looks like a header true, so that what is inside is reached.
fn with_checksums(mut tar: Vec<u8>) -> Vec<u8> {
    for block in tar.chunks_exact_mut(512) {
        if &block[257..262] == b"ustar" {
            checksum(block);
        }
    }
    tar
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_no_layer_and_do_no_harm(
        bytes in vec(any::<u8>(), 0..3000),
        compression in prop::sample::select(&[Compression::None, Compression::Gzip, Compression::Zstd][..]),
    ) {
        let bed = Bed::new();
        let layer = described(compression, &bytes, &bytes);
        let done = bed.apply_described(LIMITS, &[(layer, bytes)]);
        within_caps(&bed, &done)?;
    }

    #[test]
    fn damaged_layers_do_no_harm(damages in vec(damage(), 1..12), lower in any::<bool>()) {
        let bed = Bed::new();
        let hostile = with_checksums(damaged(rich(), 512, &damages));
        let layers = if lower { vec![rich(), hostile] } else { vec![hostile] };
        let done = bed.apply_within(LIMITS, &layers);
        within_caps(&bed, &done)?;
    }

    #[test]
    fn damaged_gzip_and_zstd_do_no_harm(damages in vec(damage(), 1..6), gzip in any::<bool>()) {
        let (compression, packed) = if gzip {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(&rich()).unwrap();
            (Compression::Gzip, encoder.finish().unwrap())
        } else {
            (Compression::Zstd, zstd::bulk::compress(&rich(), 1).unwrap())
        };
        let sent = damaged(packed, 16, &damages);
        let bed = Bed::new();
        let layer = described(compression, &sent, &rich());
        let done = bed.apply_described(LIMITS, &[(layer, sent)]);
        within_caps(&bed, &done)?;
    }

    #[test]
    fn damaged_zips_do_no_harm(damages in vec(damage(), 1..10)) {
        let bed = Bed::new();
        let done = bed.unzip(LIMITS, &damaged(zips::rich(), 30, &damages));
        within_caps(&bed, &done)?;
    }

    #[test]
    fn arbitrary_bytes_are_no_zip(bytes in vec(any::<u8>(), 0..2000)) {
        let bed = Bed::new();
        prop_assert!(bed.unzip(LIMITS, &bytes).is_err());
        prop_assert!(bed.names().is_empty());
    }
}
