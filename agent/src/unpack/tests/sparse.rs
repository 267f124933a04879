//! Files with holes, in each of GNU tar's formats, and maps that lie.

use std::os::unix::fs::MetadataExt;

use super::bed::{Bed, said};
use super::tarball::{Member, tar};

/// 8 bytes at 4096, 8 at 1 MiB, 2 MiB in all.
const DATA: &[u8] = b"at 4096.at 1 MiB";
const NUMBERS: [u64; 4] = [4096, 8, 1 << 20, 8];
const SIZE: u64 = 2 << 20;

fn joined(numbers: &[u64], by: &str) -> String {
    numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(by)
}

/// 0.0: a record for each number, in order.
fn version_0_0() -> Member {
    let start = Member::file("f", DATA)
        .record("GNU.sparse.size", SIZE.to_string())
        .record("GNU.sparse.numblocks", "2");
    NUMBERS.chunks(2).fold(start, |member, pair| {
        let member = member.record("GNU.sparse.offset", pair[0].to_string());
        member.record("GNU.sparse.numbytes", pair[1].to_string())
    })
}

fn version_0_1() -> Member {
    Member::file("GNUSparseFile.1/f", DATA)
        .record("GNU.sparse.size", SIZE.to_string())
        .record("GNU.sparse.numblocks", "2")
        .record("GNU.sparse.name", "f")
        .record("GNU.sparse.map", joined(&NUMBERS, ","))
}

/// 1.0: the map in lines before the data, padded to a block.
fn version_1_0(map: &str) -> Member {
    let mut data = map.as_bytes().to_vec();
    data.resize(data.len().next_multiple_of(512), 0);
    data.extend(DATA);
    Member::file("GNUSparseFile.1/f", data)
        .record("GNU.sparse.major", "1")
        .record("GNU.sparse.minor", "0")
        .record("GNU.sparse.name", "f")
        .record("GNU.sparse.realsize", SIZE.to_string())
}

fn octal(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| format!("{number:011o}\0").into_bytes()).collect()
}

/// Old GNU: four pieces in the header, the rest in blocks of 21 after it.
fn old_gnu(numbers: &[u64], data: &[u8], size: u64) -> Vec<u8> {
    let (first, rest) = numbers.split_at(numbers.len().min(8));
    let more: Vec<&[u64]> = rest.chunks(42).collect();
    let head = Member::file("f", "")
        .kind(b'S')
        .size(data.len().try_into().unwrap())
        .patch(257, b"ustar  \0")
        .patch(345, [0; 155])
        .patch(386, octal(first))
        .patch(482, [u8::from(!more.is_empty())])
        .patch(483, octal(&[size]));
    let mut all = head.bytes();
    for (number, pieces) in more.iter().enumerate() {
        let mut block = octal(pieces);
        block.resize(512, 0);
        block[504] = u8::from(number + 1 < more.len());
        all.extend(block);
    }
    all.extend(data);
    all.resize(all.len().next_multiple_of(512), 0);
    all
}

fn has_its_holes(bed: &Bed) {
    let content = std::fs::read(bed.at("f")).unwrap();
    assert_eq!(content.len(), usize::try_from(SIZE).unwrap());
    assert_eq!((&content[4096..4104], &content[1 << 20..(1 << 20) + 8]), (&DATA[..8], &DATA[8..]));
    assert_eq!(content.iter().filter(|&&byte| byte != 0).count(), DATA.len());
    assert!(bed.stat("f").blocks() * 512 < 64 << 10, "the holes are none");
}

#[test]
fn holes_in_all_four_formats_stay_holes() {
    let map = format!("2\n{}\n", joined(&NUMBERS, "\n"));
    let archives = [
        version_0_0().bytes(),
        version_0_1().bytes(),
        version_1_0(&map).bytes(),
        old_gnu(&NUMBERS, DATA, SIZE),
    ];
    for sparse in archives {
        let bed = Bed::new();
        bed.apply(&[[sparse, tar(&[Member::file("after", "1")])].concat()]).unwrap();
        has_its_holes(&bed);
        assert_eq!(bed.names(), ["after", "f"]);
    }
}

#[test]
fn maps_may_be_longer_than_a_block() {
    let numbers: Vec<u64> = (0..200).flat_map(|n| [n * 8192, 1]).collect();
    let data: Vec<u8> = (0..200).map(|n| n + 1).collect();
    let size = 200 * 8192;
    let map = format!("200\n{}\n", joined(&numbers, "\n"));
    let mut with_map = map.into_bytes();
    with_map.resize(with_map.len().next_multiple_of(512), 0);
    with_map.extend(&data);
    let version_1_0 = Member::file("f", with_map)
        .record("GNU.sparse.major", "1")
        .record("GNU.sparse.realsize", size.to_string());
    for sparse in [old_gnu(&numbers, &data, size), version_1_0.bytes()] {
        let bed = Bed::new();
        bed.apply(&[[sparse, tar(&[Member::file("after", "1")])].concat()]).unwrap();
        let content = std::fs::read(bed.at("f")).unwrap();
        let found: Vec<u8> = content.iter().copied().filter(|&byte| byte != 0).collect();
        assert_eq!((content.len(), found), (usize::try_from(size).unwrap(), data.clone()));
        assert_eq!(bed.text("after"), "1");
    }
}

#[test]
fn a_file_may_be_one_hole_or_none() {
    let bed = Bed::new();
    let hole =
        Member::file("hole", "").record("GNU.sparse.size", "100000").record("GNU.sparse.map", "100000,0");
    let full = Member::file("full", "data").record("GNU.sparse.size", "4").record("GNU.sparse.map", "0,4");
    bed.apply(&[tar(&[hole, full])]).unwrap();
    assert_eq!((bed.stat("hole").len(), bed.stat("hole").blocks()), (100_000, 0));
    assert_eq!(bed.text("full"), "data");
}

#[test]
fn maps_that_lie_are_refused_by_name() {
    let map_0_1 =
        |map: &str| Member::file("f", DATA).record("GNU.sparse.size", "100").record("GNU.sparse.map", map);
    for (sparse, problem) in [
        (map_0_1("0,17").bytes(), "17 bytes and 16 bytes of data"),
        (map_0_1("0").bytes(), "ends in the middle"),
        (map_0_1("8,8,0,8").bytes(), "out of order"),
        (map_0_1("0,8,4,8").bytes(), "out of order"),
        (map_0_1("90,16").bytes(), "beyond its size"),
        (map_0_1("18446744073709551615,16").bytes(), "beyond its size"),
        (map_0_1("0,16,x,1").bytes(), "for GNU.sparse.map"),
        (map_0_1("0,-16").bytes(), "for GNU.sparse.map"),
        (map_0_1("").bytes(), "for GNU.sparse.map"),
        (Member::file("f", DATA).record("GNU.sparse.map", "0,16").bytes(), "holes and no size"),
        (version_0_1().record("GNU.sparse.major", "2").bytes(), "unknown format 2.0"),
        (version_0_1().record("GNU.sparse.odd", "2").bytes(), "unknown record GNU.sparse.odd"),
        (version_1_0("2\n0\n8\n").bytes(), "malformed sparse map"),
        (version_1_0("1\n0\n17\n").bytes(), "17 bytes and 16 bytes of data"),
        (version_1_0("-1\n").bytes(), "malformed sparse map"),
        (version_1_0("99999999\n").bytes(), "malformed sparse map"),
        (version_1_0("99999999999999999999999\n").bytes(), "malformed sparse map"),
        (version_1_0("\n").bytes(), "malformed sparse map"),
        (version_1_0(&"1".repeat(600)).bytes(), "malformed sparse map"),
        (old_gnu(&[0, 17], DATA, 100), "17 bytes and 16 bytes of data"),
        (old_gnu(&[50, 8, 0, 8], DATA, 100), "out of order"),
        (old_gnu(&[0, 16], DATA, 8), "beyond its size"),
    ] {
        let said = said(Bed::new().apply(&[[sparse, tar(&[])].concat()]));
        assert!(said.starts_with("the entry '") && said.contains(problem), "{problem}: {said}");
    }
}

#[test]
fn a_map_without_end_is_refused() {
    let mut endless = old_gnu(&[0, 16], DATA, 100);
    // Sorted, and each followed by another: 2¹⁸ pieces are the most.
    endless[482] = 1;
    super::tarball::checksum(&mut endless[..512]);
    endless.truncate(512);
    let mut block = octal(&[16, 0].repeat(21));
    block.resize(512, 0);
    block[504] = 1;
    endless.extend(block.repeat(13_000));
    assert!(said(Bed::new().apply(&[endless])).contains("more than 262144 pieces"));
    let numbers: Vec<String> = (0..600_000).map(|_| "16".to_owned()).collect();
    let records = numbers
        .chunks(50_000)
        .fold(Member::file("f", DATA).record("GNU.sparse.size", "100"), |member, chunk| {
            chunk.iter().fold(member, |member, one| member.record("GNU.sparse.offset", one))
        });
    // 15 MB of records: the cap on headers is nearer than the one on pieces.
    assert!(said(Bed::new().apply(&[tar(&[records])])).contains("extended headers of more than"));
}
