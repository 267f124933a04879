//! Layers as they travel: compressed, announced, verified.

use std::io::Write;

use carrel_protocol::agent::{Compression, Failure, Layer, UnpackLimits};
use flate2::write::GzEncoder;

use super::super::UnpackError;
use super::bed::{AMPLE, Bed, described, said, sha256};
use super::tarball::{Member, tar};

fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(plain).unwrap();
    encoder.finish().unwrap()
}

fn zstd(plain: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(plain, 3).unwrap()
}

fn layer() -> Vec<u8> {
    let noise: Vec<u8> = (0..200_000_u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    tar(&[Member::file("f", "content"), Member::file("noise", noise)])
}

fn one(bed: &Bed, layer: Layer, sent: Vec<u8>) -> Result<(u64, u64), UnpackError> {
    bed.apply_described(AMPLE, &[(layer, sent)])
}

fn honest(
    bed: &Bed,
    compression: Compression,
    sent: Vec<u8>,
    plain: &[u8],
) -> Result<(u64, u64), UnpackError> {
    one(bed, described(compression, &sent, plain), sent)
}

#[test]
fn gzip_zstd_and_plain_layers_unpack_to_the_same() {
    let plain = layer();
    let (half, rest) = plain.split_at(plain.len() / 2);
    // RFC 8878, 3.1.2: skippable frames may stand anywhere.
    let skippable = [&0x184D_2A53_u32.to_le_bytes()[..], &5_u32.to_le_bytes(), b"aside"].concat();
    for (compression, sent) in [
        (Compression::None, plain.clone()),
        (Compression::Gzip, gzip(&plain)),
        (Compression::Gzip, [gzip(half), gzip(b""), gzip(rest)].concat()),
        (Compression::Zstd, zstd(&plain)),
        (Compression::Zstd, [&skippable, &zstd(half)[..], &skippable, &zstd(rest), &skippable].concat()),
    ] {
        let bed = Bed::new();
        let counted = honest(&bed, compression, sent, &plain).unwrap();
        assert_eq!(counted, (plain.len().try_into().unwrap(), 2));
        assert_eq!(bed.text("f"), "content");
    }
}

#[test]
fn sha512_is_a_digest_too_and_others_are_named() {
    let plain = tar(&[Member::file("f", "1")]);
    let digest = <sha2::Sha512 as sha2::Digest>::digest(&plain);
    let sha512 = format!("sha512:{}", digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    let mut layer = described(Compression::None, &plain, &plain);
    layer.blob.digest.clone_from(&sha512);
    layer.diff_id = sha512;
    one(&Bed::new(), layer.clone(), plain.clone()).unwrap();
    for wrong in ["md5:d41d8cd98f00b204e9800998ecf8427e", "sha256:abc", "", &layer.diff_id.to_uppercase()] {
        let as_diff_id = Layer { diff_id: wrong.into(), ..layer.clone() };
        assert!(said(one(&Bed::new(), as_diff_id, plain.clone())).contains("is no sha256 or sha512 digest"));
        let mut as_digest = layer.clone();
        as_digest.blob.digest = wrong.into();
        assert!(said(one(&Bed::new(), as_digest, plain.clone())).contains("is no sha256 or sha512 digest"));
    }
}

#[test]
fn a_blob_that_is_another_than_announced_is_named_whatever_it_breaks() {
    let plain = layer();
    for (compression, sent) in [
        (Compression::None, plain.clone()),
        (Compression::Gzip, gzip(&plain)),
        (Compression::Zstd, zstd(&plain)),
    ] {
        let announced = described(compression, &sent, &plain);
        for at in [0, 3, sent.len() / 2, sent.len() - 1] {
            let mut damaged = sent.clone();
            damaged[at] ^= 0x55;
            let said = said(one(&Bed::new(), announced.clone(), damaged.clone()));
            let found = sha256(&damaged);
            assert!(
                said.contains(&announced.blob.digest) && said.contains(&found),
                "{compression:?} {at}: {said}"
            );
        }
        for length in [0, 1, sent.len() / 2, sent.len() - 1] {
            let said = said(one(&Bed::new(), announced.clone(), sent[..length].to_vec()));
            let expected = format!("its size is {length} bytes, {} were announced", sent.len());
            assert!(said.contains(&expected), "{compression:?}: {said}");
        }
        let longer = [&sent[..], b"more"].concat();
        assert!(said(one(&Bed::new(), announced, longer)).contains("more than the"));
    }
}

#[test]
fn a_layer_that_unpacks_to_another_than_its_diff_id_is_refused() {
    let plain = layer();
    let sent = gzip(&plain);
    let mut lying = described(Compression::Gzip, &sent, b"something else");
    let error = one(&Bed::new(), lying.clone(), sent).unwrap_err();
    assert_eq!(error.failure(), Failure::BadPayload);
    let said = carrel_protocol::chain(&error);
    assert!(
        said.contains(&lying.blob.digest) && said.contains(&sha256(&plain)) && said.contains(&lying.diff_id)
    );
    // What follows the archive's end is part of it.
    let padded = [&plain[..], &[0; 4096]].concat();
    let sent = gzip(&padded);
    lying = described(Compression::Gzip, &sent, &plain);
    assert!(one(&Bed::new(), lying, sent.clone()).is_err());
    honest(&Bed::new(), Compression::Gzip, sent, &padded).unwrap();
}

#[test]
fn streams_that_are_cut_short_or_followed_by_garbage_are_damaged() {
    let plain = layer();
    for (compression, whole) in [(Compression::Gzip, gzip(&plain)), (Compression::Zstd, zstd(&plain))] {
        for sent in [
            whole[..whole.len() - 1].to_vec(),
            whole[..whole.len() / 2].to_vec(),
            [&whole[..], b"garbage"].concat(),
            Vec::new(),
            b"no archive at all".to_vec(),
            plain.clone(),
        ] {
            let length = sent.len();
            let error = honest(&Bed::new(), compression, sent, &plain).unwrap_err();
            assert_eq!(error.failure(), Failure::BadPayload, "{compression:?} {length}: {error:?}");
        }
    }
    for length in [1, 511, 513, 1024 + 5, plain.len() / 2] {
        let sent = plain[..length].to_vec();
        let error = honest(&Bed::new(), Compression::None, sent.clone(), &sent).unwrap_err();
        assert!(matches!(error, UnpackError::Damaged { .. }), "{length}: {error:?}");
    }
}

#[test]
fn an_archive_may_lack_its_end_and_be_empty() {
    let plain = layer();
    let endless = plain[..plain.len() - 1024].to_vec();
    let bed = Bed::new();
    honest(&bed, Compression::None, endless.clone(), &endless).unwrap();
    assert_eq!(bed.text("f"), "content");
    for empty in [Vec::new(), vec![0; 512], vec![0; 1024]] {
        assert_eq!(honest(&Bed::new(), Compression::None, empty.clone(), &empty).unwrap().1, 0);
    }
}

#[test]
fn a_bomb_is_read_to_its_cap_and_no_further() {
    // 1 GiB of zeros, below a name, between headers, after the end: 1 MiB as gzip, 32 KiB as zstd.
    let zeros = vec![0_u8; 1 << 20];
    let mut whiteout = Member::file(".wh.x", "").size(1 << 30).bytes();
    whiteout.truncate(512);
    let mut file = Member::file("f", "").size(1 << 30).bytes();
    file.truncate(512);
    let mut global = Member::file("g", "").kind(b'g').size(1 << 30).bytes();
    global.truncate(512);
    for head in [whiteout, file, global, vec![0; 512]] {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        encoder.write_all(&head).unwrap();
        for _ in 0..1024 {
            encoder.write_all(&zeros).unwrap();
        }
        let sent = encoder.finish().unwrap();
        assert!(sent.len() < 1 << 20);
        let limits = UnpackLimits { bytes: 4 << 20, entries: 10 };
        let bed = Bed::new();
        let layer = described(Compression::Zstd, &sent, b"");
        let error = bed.apply_described(limits, &[(layer, sent)]).unwrap_err();
        assert_eq!(error.failure(), Failure::PayloadTooLarge, "{error:?}");
    }
}

#[test]
fn a_window_larger_than_a_room_is_refused() {
    // Magic, a descriptor without single segment, a window of 2³¹ bytes; then one last raw block (RFC 8878, 3.1.1).
    let frame = [&0xFD2F_B528_u32.to_le_bytes()[..], &[0x00, 21 << 3, 0x01, 0, 0]].concat();
    let error = honest(&Bed::new(), Compression::Zstd, frame, b"").unwrap_err();
    assert!(matches!(error, UnpackError::Damaged { .. }), "{error:?}");
}

#[test]
fn a_bomb_of_a_million_entries_in_a_few_kilobytes_is_refused() {
    // The same header over and over: a whiteout of nothing is the cheapest entry, and an entry all the same.
    let whiteout = &tar(&[Member::file(".wh.x", "")])[..512];
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    for _ in 0..1_000_001 {
        encoder.write_all(whiteout).unwrap();
    }
    let packed = encoder.finish().unwrap();
    assert!(packed.len() < 100_000, "{}", packed.len());
    // Carrel's own limits (docs/cli.md).
    let limits = UnpackLimits { bytes: 10 << 30, entries: 1_000_000 };
    // It is refused before there is a digest of all of it.
    let layer = described(Compression::Zstd, &packed, b"");
    assert!(
        said(Bed::new().apply_described(limits, &[(layer, packed)])).contains("more than 1000000 entries")
    );
}
