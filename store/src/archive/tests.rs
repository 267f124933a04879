use std::fs;
use std::io::Write;

use proptest::prelude::*;

use super::header::BLOCK;
use super::refusal::MOST_ENTRIES;
use super::*;
use crate::testing::{Sample, acquire, sentence, store, tar as tar_of};

fn read(bytes: &[u8]) -> Result<Archive, ArchiveError> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    Archive::read(Section::open(file.path()).unwrap(), &InThisProcess)
}

fn refusal(bytes: &[u8]) -> String {
    match read(bytes) {
        Ok(archive) => panic!("accepted: {archive:?}"),
        Err(error) => error.to_string(),
    }
}

/// A header with these raw fields and a right checksum.
fn header(name: &[u8], kind: u8, size: u64, link: &[u8]) -> [u8; BLOCK] {
    let mut header = tar::Header::new_ustar();
    let raw = header.as_old_mut();
    raw.name[..name.len()].copy_from_slice(name);
    raw.linkname[..link.len()].copy_from_slice(link);
    raw.linkflag = [kind];
    header.set_size(size);
    header.set_cksum();
    *header.as_bytes()
}

fn ended(blocks: &[&[u8]]) -> Vec<u8> {
    let mut bytes = blocks.concat();
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    bytes.extend([0; 2 * BLOCK]);
    bytes
}

fn pax(record: &str) -> Vec<u8> {
    // The length counts its own digits.
    let length = (1..).find(|n| n.to_string().len() + 1 + record.len() + 1 == *n).unwrap();
    let content = format!("{length} {record}\n");
    let mut bytes = header(b"pax", b'x', content.len() as u64, b"").to_vec();
    bytes.extend(content.as_bytes());
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    bytes
}

fn content(archive: &Archive, name: &str) -> Vec<u8> {
    archive.file(name).unwrap().document().unwrap()
}

#[test]
fn an_image_in_an_oci_archive_is_acquired_like_one_in_a_layout() {
    let (folder, store) = store();
    let sample = Sample::new("amd64", &[b"layer", &vec![3; 2 << 20]]);
    let path = folder.path().join("image.tar");
    fs::write(&path, tar_of(&Sample::layout(&[(&sample, "it")]))).unwrap();
    for name in [format!("oci-archive:{}", path.display()), format!("oci-archive:{}:it", path.display())] {
        assert_eq!(acquire(&store, &name).unwrap().digest, sample.digest());
    }
    assert!(sentence(acquire(&store, &format!("oci-archive:{}:other", path.display()))).contains("\"it\""));
    assert!(sentence(acquire(&store, "oci-archive:/no/such.tar")).contains("/no/such.tar"));
}

#[test]
fn every_way_in_which_tools_write_names_and_sizes_is_read() {
    let long = "n".repeat(150);
    let pax_name = pax(&format!("path={long}"));
    let pax_size = pax("size=3");
    let mut gnu_name = header(b"././@LongLink", b'L', 151, b"").to_vec();
    gnu_name.extend([b"m".repeat(150).as_slice(), &[0; 362]].concat());
    let mut binary = header(b"binary", b'0', 0, b"");
    binary[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3]);
    let sum: u32 = binary
        .iter()
        .enumerate()
        .map(|(n, b)| if (148..156).contains(&n) { 32 } else { u32::from(*b) })
        .sum();
    binary[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let abc: &[u8] = &[b"abc".as_slice(), &[0; BLOCK - 3]].concat();
    let bytes = ended(&[
        &header(b"./", b'5', 0, b""),
        &header(b"./a", b'0', 3, b""),
        abc,
        &header(b"folder/", b'5', 0, b""),
        &header(b"folder/", b'5', 0, b""),
        &pax_name,
        &header(b"short", b'0', 3, b""),
        abc,
        &pax_size,
        &header(b"sized", b'0', 0, b""),
        abc,
        &gnu_name,
        &header(b"short", b'0', 3, b""),
        abc,
        &binary,
        abc,
        &header(b"folder/soft", b'2', 0, b"../a"),
        &header(b"hard", b'1', 0, b"./a"),
        &header(b"chain", b'2', 0, b"hard"),
    ]);
    let archive = read(&bytes).unwrap();
    for name in ["a", &long, "sized", &"m".repeat(150), "binary", "folder/soft", "hard"] {
        assert_eq!(content(&archive, name), b"abc", "{name}");
    }
    for name in ["folder", "chain", "nowhere", "", "../a", "./a"] {
        assert!(archive.file(name).is_none(), "{name}");
    }
}

#[test]
fn names_that_lead_out_or_come_twice_are_refused() {
    for (name, kind, link) in [
        (b"../a".as_slice(), b'0', b"".as_slice()),
        (b"a/../../b", b'0', b""),
        (b"/etc/passwd", b'0', b""),
        (b"\xff", b'0', b""),
        (b"a/l", b'2', b"../../b"),
        (b"l", b'2', b"../b"),
        (b"l", b'2', b"/etc/passwd"),
        (b"l", b'1', b"../b"),
    ] {
        let said = refusal(&ended(&[&header(name, kind, 0, link)]));
        assert!(said.contains("has an entry called"), "{said}");
    }
    let twice = ended(&[&header(b"a", b'0', 0, b""), &header(b"./a", b'0', 0, b"")]);
    assert!(refusal(&twice).contains("twice"));
    let escaping = ended(&[&pax("path=../../a"), &header(b"a", b'0', 0, b"")]);
    assert!(refusal(&escaping).contains("leads out"));
}

#[test]
fn what_is_no_tar_packed_cut_off_or_damaged_is_told_apart() {
    assert!(refusal(b"").contains("no tar"));
    assert!(refusal(b"short").contains("no tar"));
    assert!(refusal(&[b'x'; 4096]).contains("no tar"));
    assert!(refusal(&[&[0x1f, 0x8b][..], &[0; 600]].concat()).contains("gunzip"));
    let whole = ended(&[&header(b"a", b'0', 600, b""), &[7; 600], &[0; 424], &header(b"b", b'0', 0, b"")]);
    read(&whole).unwrap();
    for length in [512 + 600, 512 + 1024 + 100, 512 + 1024 + 512] {
        assert!(refusal(&whole[..length]).contains("truncated"), "{length}");
    }
    let mut damaged = whole;
    damaged[512 + 1024] ^= 1;
    assert!(refusal(&damaged).contains("checksum"));
    assert!(refusal(&ended(&[&header(b"a", b'0', 1 << 32, b"")])).contains("truncated"));
    assert!(
        refusal(&ended(&[&pax("size=18446744073709551615"), &header(b"a", b'0', 0, b"")]))
            .contains("truncated")
    );
}

#[test]
fn what_has_no_business_in_an_image_archive_is_refused() {
    for kind in [b'3', b'4', b'6', b'S', b'M', b'V', b'\xff'] {
        assert!(refusal(&ended(&[&header(b"odd", kind, 0, b"")])).contains("odd"));
    }
    assert!(refusal(&ended(&[&header(b"a", b'0', 0, b""), &pax("GNU.sparse.major=1")])).contains("sparse"));
    assert!(
        refusal(&ended(&[&header(b"a", b'0', 0, b""), &header(b"x", b'x', 1 << 20, b"")])).contains("64 KiB")
    );
    let flood = header(b"d/", b'5', 0, b"");
    let mut bytes = Vec::new();
    for n in 0..=MOST_ENTRIES {
        bytes.extend(header(n.to_string().as_bytes(), b'0', 0, b""));
    }
    bytes.extend(flood);
    assert!(refusal(&bytes).contains("16384"));
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
        let _ = read(&bytes);
    }

    #[test]
    fn a_header_with_any_field_overwritten_is_read_or_refused(
        at in 0_usize..512,
        bytes in proptest::collection::vec(any::<u8>(), 1..24),
        fix in any::<bool>(),
    ) {
        let mut block = header(b"name", b'0', 3, b"");
        let end = (at + bytes.len()).min(BLOCK);
        block[at..end].copy_from_slice(&bytes[..end - at]);
        if fix {
            let mut fixed = tar::Header::new_old();
            fixed.as_mut_bytes().copy_from_slice(&block);
            fixed.set_cksum();
            block = *fixed.as_bytes();
        }
        let _ = read(&ended(&[&block, b"abc"]));
    }

    #[test]
    fn extensions_of_any_content_are_read_or_refused(content in proptest::collection::vec(any::<u8>(), 0..200)) {
        let extension = header(b"pax", b'x', content.len() as u64, b"");
        let mut padded = content;
        padded.resize(padded.len().next_multiple_of(BLOCK), 0);
        let _ = read(&ended(&[&extension, &padded, &header(b"a", b'0', 0, b"")]));
    }
}
