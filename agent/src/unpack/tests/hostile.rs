//! Layers made to escape, to lie, or to be too much.

use carrel_protocol::agent::{Failure, UnpackLimits};

use super::super::UnpackError;
use super::bed::{AMPLE, Bed, said};
use super::tarball::{Member, record, tar};

fn within(bytes: u64, entries: u64) -> UnpackLimits {
    UnpackLimits { bytes, entries }
}

#[test]
fn names_that_climb_are_refused_and_absolute_ones_kept_inside() {
    for name in [
        "../beside/secret",
        "../../../../../tmp/secret",
        "a/../../beside/secret",
        "a/../secret",
        "a/..",
        "..",
        "/../beside/secret",
        "../.wh.secret",
    ] {
        let bed = Bed::new();
        let said = said(bed.apply(&[tar(&[Member::file(name, "taken")])]));
        assert_eq!(said, format!("the entry '{name}' would escape by '..' in its name"));
        let bed = Bed::new();
        let by_record = tar(&[Member::file("harmless", "taken").record("path", name)]);
        assert!(bed.apply(&[by_record]).is_err());
        assert!(bed.names().is_empty());
    }
    let bed = Bed::new();
    let absolute = bed.beside().join("secret");
    bed.apply(&[tar(&[Member::file(absolute.to_str().unwrap(), "inside")])]).unwrap();
    assert_eq!(bed.text(absolute.strip_prefix("/").unwrap().to_str().unwrap()), "inside");
}

#[test]
fn nothing_is_written_removed_or_linked_through_a_link_that_leads_out() {
    let bed = Bed::new();
    let out = bed.beside();
    let out = out.to_str().unwrap();
    for attack in [
        vec![Member::symlink("l", out), Member::file("l/secret", "taken")],
        vec![Member::symlink("l", "../beside"), Member::file("l/new", "taken")],
        vec![Member::symlink("l", out), Member::file("l/.wh.secret", "")],
        vec![Member::symlink("l", out), Member::file("l/.wh..wh..opq", "")],
        vec![Member::symlink("l", out), Member::hard_link("mine", "l/secret"), Member::file("mine", "taken")],
        vec![Member::symlink("l", format!("{out}/secret")), Member::file("l", "taken").mode(0o777)],
        vec![
            Member::symlink("l", format!("{out}/secret")),
            Member::hard_link("h", "l"),
            Member::directory("h"),
        ],
        vec![Member::symlink("l", out), Member::directory("l").mode(0o777).owner(1, 1)],
        vec![Member::symlink("l", out).record("SCHILY.xattr.user.x", "1").mode(0o4777).owner(1, 1).mtime(1)],
        vec![Member::directory("d"), Member::symlink("d/l", out), Member::file("d/l/../../x", "taken")],
        vec![Member::symlink("a", "b"), Member::symlink("b", "a"), Member::file("a/x", "")],
        vec![Member::symlink("self", "self"), Member::directory("self/x")],
        vec![Member::symlink("proc", "/proc/self/cwd"), Member::file("proc/x", "")],
    ] {
        // Allowed to fail; what is outside is looked at by the bed each time.
        let _ = bed.apply(&[tar(&[Member::file("lower", "")]), tar(&attack)]);
    }
}

#[test]
fn the_root_is_a_directory_and_stays_one() {
    for member in [Member::file("./", "x"), Member::symlink("/", "/etc"), Member::special(b'6', ".", (0, 0))]
    {
        let bed = Bed::new();
        assert!(bed.apply(&[tar(&[member])]).is_err());
        assert!(bed.root().is_dir());
    }
    let bed = Bed::new();
    bed.apply(&[tar(&[Member::file("a", "1")]), tar(&[Member::file(".wh..", "")])]).unwrap_err();
    assert_eq!(bed.text("a"), "1");
}

#[test]
fn names_and_targets_with_zero_bytes_or_none_are_refused() {
    for (member, problem) in [
        (Member::file("f", "").record("path", "a\0b"), "zero byte"),
        (Member::symlink("l", "").record("linkpath", "a\0b"), "symbolic link to nothing"),
        (Member::symlink("l", ""), "symbolic link to nothing"),
        (Member::symlink("l", "").record("linkpath", "t".repeat(4096)), "symbolic link to nothing"),
        (Member::hard_link("h", "").record("linkpath", "a\0b"), "zero byte"),
    ] {
        let said = said(Bed::new().apply(&[tar(&[member])]));
        assert!(said.contains(problem), "{said}");
    }
}

#[test]
fn owners_that_are_none_are_refused() {
    // 2³²-1 is "unchanged" to chown(2): the file would be root's.
    let member = Member::file("f", "").mode(0o4755);
    for member in [
        member.clone().record("uid", "4294967295"),
        member.clone().record("gid", "4294967295"),
        member.clone().record("uid", "4294967296"),
        member.clone().record("uid", "-1"),
        member.clone().patch(108, [0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]),
        member.clone().patch(108, [0xff; 8]),
    ] {
        let bed = Bed::new();
        assert!(matches!(bed.apply(&[tar(&[member])]), Err(UnpackError::Entry { .. })));
        assert!(bed.names().is_empty());
    }
    let bed = Bed::new();
    let large = member.patch(108, [0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xfe]);
    bed.apply(&[tar(&[large])]).unwrap();
    assert_eq!(bed.tree()[std::path::Path::new("f")].owner.0, u32::MAX - 1);
}

#[test]
fn data_of_what_has_none_is_no_archive_in_the_archive() {
    // A reader that believed these sizes would pass over the next entry; one that doesn't, as Go's, sees it.
    for kind in [b'1', b'2', b'3', b'4', b'5', b'6'] {
        let bed = Bed::new();
        let mut first = Member::symlink("first", "other").kind(kind).size(512);
        first.device = (1, 3);
        bed.apply(&[tar(&[Member::file("other", ""), first, Member::file("seen", "1")])]).unwrap();
        assert_eq!(bed.text("seen"), "1", "{}", char::from(kind));
    }
    // And what looks like an archive inside of a file is its content.
    let bed = Bed::new();
    let inner = tar(&[Member::file("inner", "x")]);
    let slashed = Member::file("file/", &inner);
    bed.apply(&[tar(&[Member::file("a", &inner), slashed])]).unwrap();
    assert_eq!(bed.names(), ["a", "file"]);
    assert_eq!(bed.tree()[std::path::Path::new("file")].content, inner);
}

#[test]
fn entries_beyond_the_cap_are_refused_and_made_parents_count() {
    let bed = Bed::new();
    let layer = tar(&[Member::file("a/b/c", ""), Member::file("a/b/d", "")]);
    assert_eq!(bed.apply_within(within(1 << 20, 4), std::slice::from_ref(&layer)).unwrap().1, 4);
    let bed = Bed::new();
    let error = bed.apply_within(within(1 << 20, 3), &[layer]).unwrap_err();
    assert_eq!(error.failure(), Failure::PayloadTooLarge);
    assert!(bed.names().len() <= 3);
    let whiteouts: Vec<_> = (0..10).map(|n| Member::file(format!(".wh.{n}"), "")).collect();
    let layers = [tar(&[Member::file("x", "")]), tar(&whiteouts)];
    assert!(said(Bed::new().apply_within(within(1 << 20, 10), &layers)).contains("more than 10 entries"));
}

#[test]
fn bytes_beyond_the_cap_are_refused_before_they_are_written() {
    let bed = Bed::new();
    let layer = tar(&[Member::file("small", "1"), Member::file("large", vec![1; 100_000])]);
    let error = bed.apply_within(within(50_000, 100), std::slice::from_ref(&layer)).unwrap_err();
    assert!(carrel_protocol::chain(&error).contains("'large' of 100000 bytes"));
    assert_eq!(error.failure(), Failure::PayloadTooLarge);
    assert_eq!(bed.names(), ["small"]);
    // All layers together.
    let layer = tar(&[Member::file("f", vec![1; 1000])]);
    let length = u64::try_from(layer.len()).unwrap();
    assert_eq!(
        Bed::new().apply_within(within(2 * length, 9), &[layer.clone(), layer.clone()]).unwrap().0,
        2 * length
    );
    assert!(Bed::new().apply_within(within(2 * length - 1, 9), &[layer.clone(), layer]).is_err());
}

#[test]
fn holes_count_as_if_they_were_data() {
    let sparse = |size: &str| {
        Member::file("f", "data")
            .record("GNU.sparse.major", "0")
            .record("GNU.sparse.minor", "1")
            .record("GNU.sparse.size", size)
            .record("GNU.sparse.map", "0,4")
    };
    for size in ["2000000", "18446744073709551615", "9223372036854775807"] {
        let bed = Bed::new();
        let error = bed.apply_within(within(1 << 20, 100), &[tar(&[sparse(size)])]).unwrap_err();
        assert_eq!(error.failure(), Failure::PayloadTooLarge, "{size}");
        assert!(bed.tree().values().all(|found| found.size <= 1 << 20));
    }
    let two = tar(&[sparse("600000"), Member { name: b"g".to_vec(), ..sparse("600000") }]);
    assert!(Bed::new().apply_within(within(1 << 20, 100), &[two]).is_err());
    let bed = Bed::new();
    let counted = bed.apply_within(within(1 << 20, 100), &[tar(&[sparse("600000")])]).unwrap().0;
    assert!(counted >= 600_000 && bed.stat("f").len() == 600_000);
    // Larger than the file system takes, under caps that don't mind.
    let boundless = within(u64::MAX, 100);
    let error = Bed::new().apply_within(boundless, &[tar(&[sparse("9223372036854775807")])]).unwrap_err();
    assert_eq!(error.failure(), Failure::PayloadTooLarge);
}

#[test]
fn what_is_read_over_counts_too() {
    // Headers without an entry, data without a file, an archive without an end: a packed layer is a thousandth of them.
    let limits = within(1 << 20, 100);
    let header = |kind| Member::file("x", record("comment", &[b'c'; 1000])).kind(kind);
    for members in [
        vec![header(b'g'); 2000],
        vec![Member::file(".wh.x", vec![0; 2 << 20])],
        vec![Member::file("./@PaxHeader", vec![b'c'; 2 << 20]).kind(b'g')],
    ] {
        let layers = [tar(&[Member::file("lower", "")]), tar(&members)];
        assert!(said(Bed::new().apply_within(limits, &layers)).contains("more than 1048576 bytes"));
    }
    let mut endless = tar(&[Member::file("f", "")]);
    endless.resize(2 << 20, 0);
    assert!(said(Bed::new().apply_within(limits, &[endless])).contains("more than 1048576 bytes"));
}

#[test]
fn extended_headers_are_capped_for_an_entry_as_a_whole() {
    let header = |kind| Member::file("x", record("comment", &vec![b'c'; 300_000])).kind(kind);
    let long = |length: usize| Member::file("././@LongLink", vec![b'n'; length]).kind(b'L');
    let entry = Member::file("f", "");
    let enough = [header(b'x'), header(b'x'), header(b'x'), entry.clone()];
    Bed::new().apply(&[tar(&enough)]).unwrap();
    for members in
        [vec![header(b'x'); 4], vec![long(2 << 20)], vec![header(b'x').size(1 << 40)], vec![long(400_000); 3]]
    {
        let said = said(Bed::new().apply(&[tar(members.iter().chain([&entry]))]));
        assert!(said.contains("extended headers of more than"), "{said}");
    }
    let many = (0..257).fold(entry, |entry, n| entry.record(&format!("SCHILY.xattr.user.{n}"), "x"));
    assert!(said(Bed::new().apply(&[tar(&[many])])).contains("more than 256 extended attributes"));
}

#[test]
fn attributes_that_no_file_can_have_are_refused() {
    for (name, value, problem) in [
        ("user.x", vec![0; 65_537], "65536 of value are the most"),
        (&*format!("user.{}", "n".repeat(256)), vec![], "255 bytes of name"),
        ("", vec![], "255 bytes of name"),
        ("security.capability", vec![1, 2, 3], "can't be written"),
    ] {
        let member = Member::file("f", "").record(&format!("SCHILY.xattr.{name}"), value);
        let said = said(Bed::new().apply(&[tar(&[member])]));
        assert!(said.contains(problem), "{said}");
    }
    for (name, value) in [("user.%", "eHg"), ("user.%2", "eHg"), ("user.%+1", "eHg"), ("user.x", "?")] {
        let member = Member::file("f", "").record(&format!("LIBARCHIVE.xattr.{name}"), value);
        assert!(said(Bed::new().apply(&[tar(&[member])])).contains("in its extended header"), "{name}");
    }
}

#[test]
fn global_headers_change_nothing() {
    let bed = Bed::new();
    let body = [record("path", b"../../elsewhere"), record("uid", b"77"), record("size", b"999")].concat();
    bed.apply(&[tar(&[Member::file("pax_global_header", body).kind(b'g'), Member::file("f", "1")])]).unwrap();
    assert_eq!((bed.text("f"), bed.tree()[std::path::Path::new("f")].owner), ("1".into(), (0, 0)));
}

#[test]
fn unknown_types_are_refused_by_name() {
    for kind in [b'V', b'D', b'M', b'N', b'X', b'8', 0xff] {
        let said = said(Bed::new().apply(&[tar(&[Member::file("odd", "").kind(kind)])]));
        assert!(said.contains("'odd' is of the unknown type"), "{said}");
    }
}

#[test]
fn a_tree_deeper_than_any_path_is_an_error_or_removed_and_nothing_worse() {
    // Each link leads 100 directories further down than the one before, to 3,500 components.
    let step = vec!["d"; 100].join("/");
    let deeper = |links: usize| -> Vec<u8> {
        let mut members = vec![Member::file(format!("{step}/f"), ""), Member::symlink("l0", &step)];
        for n in 1..links {
            members.push(Member::file(format!("l{}/{step}/f", n - 1), ""));
            members.push(Member::symlink(format!("l{n}"), format!("l{}/{step}", n - 1)));
        }
        tar(&members)
    };
    super::bed::with_many_descriptors();
    let bed = Bed::new();
    bed.apply(&[deeper(35), tar(&[Member::file(".wh.d", "")])]).unwrap();
    assert!(!bed.at("d").exists());
    // More than 40 links in one another are ELOOP.
    assert!(said(Bed::new().apply_within(AMPLE, &[deeper(60)])).contains("can't be written"));
}
