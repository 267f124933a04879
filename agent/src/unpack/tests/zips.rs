//! Zips, honest and others, written byte by byte (APPNOTE 6.3.10, 4.3).

use std::fs;
use std::os::unix::fs::MetadataExt;

use carrel_protocol::agent::{Failure, UnpackLimits};
use flate2::Crc;

use super::bed::{AMPLE, Bed, said};

/// One entry, in both of its headers.
#[derive(Clone)]
pub(super) struct Item {
    name: Vec<u8>,
    data: Vec<u8>,
    /// High half of the external attributes.
    mode: u32,
    /// 3 is Unix, 0 DOS.
    system: u16,
    flags: u16,
    method: u16,
    /// As the headers say it.
    packed: Vec<u8>,
    size: Option<u32>,
    extra: Vec<u8>,
    /// Another entry's, by its number.
    shares: Option<usize>,
    /// Sizes follow the data.
    streamed: bool,
}

impl Item {
    fn new(name: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Self {
        let data = data.as_ref().to_vec();
        Self {
            name: name.as_ref().to_vec(),
            packed: data.clone(),
            data,
            mode: 0o100_644,
            system: 3,
            flags: 0,
            method: 0,
            size: None,
            extra: Vec::new(),
            shares: None,
            streamed: false,
        }
    }

    fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    fn deflated(self) -> Self {
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
        std::io::Write::write_all(&mut encoder, &self.data).unwrap();
        Self { packed: encoder.finish().unwrap(), method: 8, ..self }
    }

    fn crc(&self) -> u32 {
        let mut crc = Crc::new();
        crc.update(&self.data);
        crc.sum()
    }

    /// From "version needed" to the length of the extra field, as both headers have it. The time is 2024-02-29 12:34:56.
    fn middle(&self, sizes: bool) -> Vec<u8> {
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap();
        let flags = self.flags | if self.streamed { 8 } else { 0 };
        let mut all = Vec::new();
        for number in [20, flags, self.method, 12 << 11 | 34 << 5 | 28, (2024 - 1980) << 9 | 2 << 5 | 29] {
            all.extend(number.to_le_bytes());
        }
        let numbers = [self.crc(), length(&self.packed), self.size.unwrap_or(length(&self.data))];
        for number in if sizes { numbers } else { [0; 3] } {
            all.extend(number.to_le_bytes());
        }
        all.extend(u16::try_from(self.name.len()).unwrap().to_le_bytes());
        all.extend(u16::try_from(self.extra.len()).unwrap().to_le_bytes());
        all
    }
}

fn zip(items: &[Item]) -> Vec<u8> {
    let (mut all, mut offsets) = (Vec::new(), Vec::new());
    for item in items {
        if let Some(other) = item.shares {
            offsets.push(offsets[other]);
            continue;
        }
        offsets.push(u32::try_from(all.len()).unwrap());
        all.extend(b"PK\x03\x04");
        all.extend(item.middle(!item.streamed));
        all.extend(&item.name);
        all.extend(&item.extra);
        all.extend(&item.packed);
        if item.streamed {
            all.extend(b"PK\x07\x08");
            all.extend(&item.middle(true)[10..22]);
        }
    }
    let start = all.len();
    for (item, offset) in items.iter().zip(offsets) {
        all.extend(b"PK\x01\x02");
        all.extend((item.system << 8 | 20).to_le_bytes());
        all.extend(item.middle(true));
        all.extend([0; 6]);
        all.extend((item.mode << 16).to_le_bytes());
        all.extend(offset.to_le_bytes());
        all.extend(&item.name);
        all.extend(&item.extra);
    }
    let length = u32::try_from(all.len() - start).unwrap();
    let count = u16::try_from(items.len()).unwrap();
    all.extend(b"PK\x05\x06\0\0\0\0");
    all.extend(count.to_le_bytes());
    all.extend(count.to_le_bytes());
    all.extend(length.to_le_bytes());
    all.extend(u32::try_from(start).unwrap().to_le_bytes());
    all.extend([0; 2]);
    all
}

/// One of everything, to be damaged.
pub(super) fn rich() -> Vec<u8> {
    zip(&[
        Item::new("d/", "").mode(0o040_700),
        Item::new("d/app.py", "print()".repeat(100)).deflated(),
        Item::new("link", "d").mode(0o120_777),
        Item { streamed: true, ..Item::new("bootstrap", "#!/bin/sh").mode(0o100_755) },
        Item { system: 0, mode: 0, ..Item::new("dos", "1") },
    ])
}

/// Plain files.
pub(super) fn of(files: &[(&str, &str)]) -> Vec<u8> {
    zip(&files.iter().map(|(name, text)| Item::new(name, text)).collect::<Vec<_>>())
}

fn mode(bed: &Bed, path: &str) -> u32 {
    bed.stat(path).mode()
}

#[test]
fn files_have_their_content_permissions_and_times() {
    let bed = Bed::new();
    // Info-ZIP's extended timestamp: the modification time alone.
    let unix_time = [&b"UT\x05\0\x01"[..], &1_600_000_000_u32.to_le_bytes()].concat();
    let items = [
        Item::new("lib/", "").mode(0o040_700),
        Item::new("lib/deep/app.py", "print()".repeat(1000)).deflated(),
        Item::new("bootstrap", "#!/bin/sh").mode(0o106_755),
        Item::new("private", "x").mode(0o100_600),
        Item::new("modeless", "x").mode(0),
        Item { system: 0, mode: 0, ..Item::new("dos", "x") },
        Item { extra: unix_time, ..Item::new("timed", "x") },
        Item { streamed: true, ..Item::new("streamed", "y".repeat(5000)).deflated() },
        Item::new("link", "lib/deep").mode(0o120_777),
        Item::new("outward", "/etc/passwd").mode(0o120_777),
        Item::new("empty", ""),
    ];
    bed.unzip(AMPLE, &zip(&items)).unwrap();
    assert_eq!(bed.text("lib/deep/app.py"), "print()".repeat(1000));
    assert_eq!(bed.text("streamed"), "y".repeat(5000));
    // Directories are for all to enter; setuid is nothing that code brings.
    assert_eq!((mode(&bed, "lib"), mode(&bed, "bootstrap")), (0o040_755, 0o100_755));
    assert_eq!((mode(&bed, "private"), mode(&bed, "modeless")), (0o100_600, 0o100_644));
    assert_eq!(mode(&bed, "dos") & 0o170_444, 0o100_444);
    assert_eq!(bed.stat("timed").mtime(), 1_600_000_000);
    // 2024-02-29T12:34:56Z.
    assert_eq!((bed.stat("dos").mtime(), bed.stat("link").mtime()), (1_709_210_096, 1_709_210_096));
    assert_eq!(fs::read_link(bed.at("link")).unwrap().to_str(), Some("lib/deep"));
    assert_eq!(fs::read_link(bed.at("outward")).unwrap().to_str(), Some("/etc/passwd"));
    assert!(bed.tree().values().all(|found| found.owner == (0, 0)));
}

#[test]
fn days_are_counted_as_the_calendar_has_them() {
    let days = super::super::zipped::days_since_epoch;
    assert_eq!((days(1970, 1, 1), days(1980, 1, 1), days(2000, 2, 29)), (0, 3652, 11_016));
    assert_eq!((days(2000, 3, 1), days(2024, 12, 31), days(2107, 12, 31)), (11_017, 20_088, 50_402));
    assert_eq!(days(2100, 3, 1) - days(2100, 2, 28), 1);
}

#[test]
fn names_that_would_escape_are_refused() {
    for (name, problem) in [
        ("../beside/secret", "would escape by '..'"),
        ("a/../../beside/secret", "would escape by '..'"),
        ("/etc/passwd", "absolute name"),
        ("/", "absolute name"),
        ("a\0b", "zero byte"),
        ("", "has no name"),
        ("./.", "has no name"),
        (&*"n/".repeat(2048), "4095 are the most"),
    ] {
        let bed = Bed::new();
        let said = said(bed.unzip(AMPLE, &zip(&[Item::new(name, "x").mode(0o100_644)])));
        assert!(said.contains(problem), "{name}: {said}");
        assert!(bed.names().is_empty());
    }
}

#[test]
fn backslashes_and_drives_are_characters() {
    let bed = Bed::new();
    let items = [Item::new("..\\..\\x", "1"), Item::new("C:\\y", "2"), Item::new("dir\\", "3")];
    bed.unzip(AMPLE, &zip(&items)).unwrap();
    assert_eq!(bed.names(), ["..\\..\\x", "C:\\y", "dir\\"]);
    assert_eq!(bed.text("dir\\"), "3");
}

#[test]
fn nothing_is_written_through_a_link() {
    let bed = Bed::new();
    let out = bed.beside();
    let out = out.to_str().unwrap();
    for target in [out, "../beside", "d", "."] {
        let bed = Bed::new();
        let items = [
            Item::new("d/", "").mode(0o040_755),
            Item::new("l", target).mode(0o120_777),
            Item::new("l/secret", "taken"),
        ];
        let said = said(bed.unzip(AMPLE, &zip(&items)));
        assert_eq!(said, "the entry 'l/secret' would be written through a symbolic link");
    }
    // One in the place of a link replaces it.
    let secret = format!("{out}/secret");
    let items = [Item::new("l", secret).mode(0o120_777), Item::new("./l", "mine")];
    bed.unzip(AMPLE, &zip(&items)).unwrap();
    assert_eq!(bed.text("l"), "mine");
    let bed = Bed::new();
    let items =
        [Item::new("l", out).mode(0o120_777), Item::new("./l/", "").mode(0o040_755), Item::new("l/x", "1")];
    bed.unzip(AMPLE, &zip(&items)).unwrap();
    assert_eq!(bed.names(), ["l", "l/x"]);
}

#[test]
fn links_that_lead_nowhere_and_what_is_no_file_are_refused() {
    for target in [&b""[..], b"a\0b", &[b't'; 4096]] {
        let item = Item::new("l", target).mode(0o120_777);
        assert!(said(Bed::new().unzip(AMPLE, &zip(&[item]))).contains("symbolic link to nothing"));
    }
    for kind in [0o010_644, 0o020_644, 0o060_644, 0o140_644] {
        let item = Item::new("odd", "").mode(kind);
        assert!(said(Bed::new().unzip(AMPLE, &zip(&[item]))).contains("'odd' is neither a file"));
    }
}

#[test]
fn the_later_of_two_with_one_name_wins_and_a_file_is_no_directory() {
    let bed = Bed::new();
    bed.unzip(AMPLE, &zip(&[Item::new("a", "1").mode(0o100_755), Item::new("b", "x"), Item::new("a", "2")]))
        .unwrap();
    assert_eq!((bed.text("a"), mode(&bed, "a")), ("2".into(), 0o100_644));
    let bed = Bed::new();
    bed.unzip(AMPLE, &zip(&[Item::new("a", "1"), Item::new(".//a", "2")])).unwrap();
    assert_eq!(bed.text("a"), "2");
    let said = said(Bed::new().unzip(AMPLE, &zip(&[Item::new("a", "1"), Item::new("a/b", "2")])));
    assert!(said.starts_with("the entry 'a/b' can't be written"), "{said}");
}

#[test]
fn encryption_and_unusual_compression_are_named() {
    let encrypted = Item { flags: 1, ..Item::new("secret", "x".repeat(20)) };
    let said_of = |item| said(Bed::new().unzip(AMPLE, &zip(&[item])));
    assert_eq!(said_of(encrypted), "the entry 'secret' is encrypted; make the zip without a password");
    for method in [1, 9, 12, 14, 93, 95, 99] {
        let said = said_of(Item { method, ..Item::new("odd", "x") });
        assert!(
            said.contains("only stored and deflated") || said.contains("the zip is damaged"),
            "{method}: {said}"
        );
    }
    assert!(said_of(Item { method: 14, ..Item::new("odd", "x") }).contains("'odd' is compressed by"));
}

#[test]
fn data_that_are_others_than_announced_are_damaged() {
    let mut wrong_sum = zip(&[Item::new("f", "content")]);
    let at = wrong_sum.windows(7).position(|bytes| bytes == b"content").unwrap();
    wrong_sum[at] = b'C';
    let lying = |size| zip(&[Item { size: Some(size), ..Item::new("f", "x".repeat(5000)).deflated() }]);
    let broken = zip(&[Item { packed: vec![0xff; 50], ..Item::new("f", "x".repeat(5000)).deflated() }]);
    for bytes in [wrong_sum, lying(10), broken, b"PK".to_vec(), Vec::new(), rich()[..200].to_vec()] {
        let bed = Bed::new();
        let error = bed.unzip(AMPLE, &bytes).unwrap_err();
        assert_eq!(error.failure(), Failure::BadPayload, "{error:?}");
        assert!(carrel_protocol::chain(&error).starts_with("the zip is damaged"));
        assert!(bed.tree().values().all(|found| found.size <= 5000));
    }
}

#[test]
fn caps_hold_whatever_the_headers_say() {
    let limits = UnpackLimits { bytes: 100_000, entries: 20 };
    let zeros = Item::new("f", vec![0; 10 << 20]).deflated();
    for size in [None, Some(0), Some(50_000), Some(99_999), Some(u32::MAX - 1)] {
        let bed = Bed::new();
        bed.unzip(limits, &zip(&[Item { size, ..zeros.clone() }])).unwrap_err();
        assert!(bed.tree().values().all(|found| found.size <= 100_000), "{size:?}");
    }
    // All share the data of the first.
    let kernel = Item::new("0", vec![0; 60_000]).deflated();
    let quoted: Vec<_> = (0..10)
        .map(|n: usize| Item {
            name: n.to_string().into_bytes(),
            shares: (n > 0).then_some(0),
            ..kernel.clone()
        })
        .collect();
    let error = Bed::new().unzip(limits, &zip(&quoted)).unwrap_err();
    assert_eq!(error.failure(), Failure::PayloadTooLarge, "{error:?}");
    let many: Vec<_> = (0..21).map(|n| Item::new(n.to_string(), "")).collect();
    assert!(said(Bed::new().unzip(limits, &zip(&many))).contains("more than 20 entries"));
    let deep = Item::new("a/".repeat(20) + "f", "");
    assert!(said(Bed::new().unzip(limits, &zip(&[deep]))).contains("more than 20 entries"));
}

#[test]
fn zip64_directories_of_more_than_65535_entries_are_read_and_their_lies_are_not() {
    let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for n in 0..66_000 {
        writer.start_file(n.to_string(), options).unwrap();
    }
    let mut bytes = writer.finish().unwrap().into_inner();
    let error = Bed::new().unzip(UnpackLimits { bytes: 1 << 20, entries: 1000 }, &bytes).unwrap_err();
    assert!(carrel_protocol::chain(&error).contains("more than 1000 entries"));
    let bed = Bed::new();
    assert_eq!(bed.unzip(AMPLE, &bytes).unwrap().1, 66_000);
    assert_eq!(fs::read_dir(bed.root()).unwrap().count(), 66_000);
    // APPNOTE 4.3.14: the counts and the directory's size and place are 24 to 56 bytes into the record.
    let at = bytes.windows(4).rposition(|found| found == b"PK\x06\x06").unwrap();
    for field in [24, 32, 40, 48] {
        let honest = bytes[at + field..at + field + 8].to_vec();
        bytes[at + field..at + field + 8].fill(0xfe);
        let bed = Bed::new();
        let _ = bed.unzip(UnpackLimits { bytes: 1 << 20, entries: 10 }, &bytes);
        assert!(bed.names().len() <= 10);
        bytes[at + field..at + field + 8].copy_from_slice(&honest);
    }
}

#[test]
fn sizes_beyond_4_gib_are_believed_by_nobody() {
    // A zip64 extra field that says 2⁴⁰ bytes for a few.
    let extra = [&[1, 0, 16, 0][..], &(1_u64 << 40).to_le_bytes(), &7_u64.to_le_bytes()].concat();
    let mut item = Item { extra, ..Item::new("f", "content") };
    item.size = Some(u32::MAX);
    let mut bytes = zip(&[item]);
    // Both sizes come from the extra field.
    for signature in [&b"PK\x03\x04"[..], b"PK\x01\x02"] {
        let at = bytes.windows(4).position(|found| found == signature).unwrap();
        let sizes = at + if signature == b"PK\x03\x04" { 18 } else { 20 };
        bytes[sizes..sizes + 8].fill(0xff);
    }
    let bed = Bed::new();
    let error = bed.unzip(AMPLE, &bytes).unwrap_err();
    assert_eq!(error.failure(), Failure::PayloadTooLarge, "{error:?}");
    assert!(bed.names().is_empty());
}
