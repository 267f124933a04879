//! What honest layers do (OCI image-spec, layer.md).

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use super::bed::{Bed, said};
use super::tarball::{MTIME, Member, tar};

#[test]
fn every_kind_of_entry_is_made_as_it_was() {
    let bed = Bed::new();
    let layer = tar(&[
        Member::directory("./").mode(0o751).owner(3, 4),
        Member::directory("bin/").mode(0o750).owner(1, 2),
        Member::file("bin/su", "su").mode(0o6755).owner(1000, 1001),
        Member::symlink("bin/sh", "su").owner(7, 8),
        Member::hard_link("bin/same", "bin/su"),
        Member::special(b'3', "null", (1, 3)).mode(0o666),
        Member::special(b'4', "disk", (254, 1)),
        Member::special(b'6', "pipe", (0, 0)).mode(0o620).owner(5, 5),
        Member::directory("tmp").mode(0o1777),
        Member::file("contiguous", "data").kind(b'7'),
        Member::file("old", "data").kind(0),
        Member::file("olddir/", "").kind(0).mode(0o700),
    ]);
    bed.apply(&[layer]).unwrap();
    let root = std::fs::metadata(bed.root()).unwrap();
    assert_eq!((root.mode() & 0o7777, root.uid(), root.gid()), (0o751, 3, 4));
    let su = bed.stat("bin/su");
    assert_eq!((su.mode(), su.uid(), su.gid(), su.nlink()), (0o106_755, 1000, 1001, 2));
    assert_eq!(bed.stat("bin/same").ino(), su.ino());
    let sh = bed.stat("bin/sh");
    assert_eq!((sh.uid(), sh.gid()), (7, 8));
    assert_eq!(std::fs::read_link(bed.at("bin/sh")).unwrap().to_str(), Some("su"));
    let null = bed.stat("null");
    assert!(null.file_type().is_char_device());
    assert_eq!((null.rdev(), null.mode() & 0o7777), (rustix::fs::makedev(1, 3), 0o666));
    let disk = bed.stat("disk");
    assert!(disk.file_type().is_block_device() && disk.rdev() == rustix::fs::makedev(254, 1));
    let pipe = bed.stat("pipe");
    assert!(pipe.file_type().is_fifo());
    assert_eq!((pipe.mode() & 0o7777, pipe.uid()), (0o620, 5));
    assert_eq!(bed.stat("tmp").mode() & 0o7777, 0o1777);
    assert_eq!((bed.text("contiguous"), bed.text("old")), ("data".into(), "data".into()));
    assert_eq!(bed.stat("olddir").mode(), 0o040_700);
    for path in ["bin", "bin/su", "bin/sh", "null", "pipe", "tmp"] {
        assert_eq!(bed.stat(path).mtime(), i64::try_from(MTIME).unwrap(), "{path}");
    }
}

#[test]
fn times_are_to_the_nanosecond_and_may_lie_before_1970() {
    let bed = Bed::new();
    bed.apply(&[tar(&[
        Member::file("fine", "").record("mtime", "1600000000.123456789"),
        Member::file("old", "").record("mtime", "-1.5"),
        Member::file("binary", "").patch(136, [0xff; 12]),
    ])])
    .unwrap();
    assert_eq!((bed.stat("fine").mtime(), bed.stat("fine").mtime_nsec()), (1_600_000_000, 123_456_789));
    assert_eq!((bed.stat("old").mtime(), bed.stat("old").mtime_nsec()), (-2, 500_000_000));
    assert_eq!(bed.stat("binary").mtime(), -1);
}

#[test]
fn parents_that_are_missing_are_made_and_existing_ones_kept() {
    let bed = Bed::new();
    let lower = tar(&[Member::directory("a").mode(0o700), Member::file("x/y/z", "1")]);
    let upper = tar(&[Member::file("a/b/c", "2")]);
    bed.apply(&[lower, upper]).unwrap();
    assert_eq!(bed.stat("a").mode() & 0o7777, 0o700);
    assert_eq!(bed.stat("a/b").mode() & 0o7777, 0o755);
    assert_eq!((bed.text("a/b/c"), bed.text("x/y/z")), ("2".into(), "1".into()));
}

#[test]
fn a_directory_entry_over_a_directory_changes_it_and_keeps_what_is_in_it() {
    let bed = Bed::new();
    let lower = tar(&[Member::directory("d"), Member::file("d/kept", "1")]);
    let upper = tar(&[Member::directory("d").mode(0o711).owner(9, 9).mtime(5)]);
    bed.apply(&[lower, upper]).unwrap();
    let found = bed.stat("d");
    assert_eq!((found.mode() & 0o7777, found.uid(), found.mtime()), (0o711, 9, 5));
    assert_eq!(bed.text("d/kept"), "1");
}

#[test]
fn files_replace_directories_and_back_and_the_last_of_an_archive_wins() {
    let bed = Bed::new();
    let lower = tar(&[Member::file("d/deep/f", "1"), Member::file("f", "1"), Member::symlink("l", "d")]);
    let upper = tar(&[
        Member::file("d", "now a file"),
        Member::directory("f"),
        Member::file("f/inside", "2"),
        Member::directory("l"),
        Member::file("twice", "first").mode(0o4755),
        Member::file("twice", "second"),
    ]);
    bed.apply(&[lower, upper]).unwrap();
    assert_eq!(bed.names(), ["d", "f", "f/inside", "l", "twice"]);
    assert_eq!((bed.text("d"), bed.text("twice")), ("now a file".into(), "second".into()));
    assert_eq!(bed.stat("twice").mode(), 0o100_644);
    assert!(bed.stat("l").is_dir());
}

#[test]
fn a_replaced_file_leaves_its_other_names_alone() {
    let bed = Bed::new();
    let lower = tar(&[Member::file("a", "old"), Member::hard_link("b", "a")]);
    bed.apply(&[lower, tar(&[Member::file("a", "new").mode(0o600)])]).unwrap();
    assert_eq!((bed.text("a"), bed.text("b")), ("new".into(), "old".into()));
    assert_eq!(bed.stat("b").mode() & 0o777, 0o644);
}

#[test]
fn whiteouts_hide_lower_layers_only_in_any_order() {
    let bed = Bed::new();
    let lower = tar(&[
        Member::file("gone", "1"),
        Member::file("dir/gone", "1"),
        Member::file("dir/deep/gone", "1"),
        Member::file("back", "old"),
        Member::file("both", "old"),
        Member::file("kept", "1"),
    ]);
    let upper = tar(&[
        Member::file("both", "new"),
        Member::file(".wh.both", ""),
        Member::file(".wh.gone", ""),
        Member::file("dir/mine", "2"),
        Member::file(".wh.dir", ""),
        Member::file(".wh.back", ""),
        Member::file("back", "new"),
        Member::file(".wh.never-was", ""),
        Member::file("nowhere/.wh.x", ""),
        Member::file("kept/.wh.x", ""),
    ]);
    bed.apply(&[lower, upper]).unwrap();
    assert_eq!(bed.names(), ["back", "both", "dir", "dir/mine", "kept"]);
    assert_eq!((bed.text("back"), bed.text("both")), ("new".into(), "new".into()));
}

#[test]
fn an_opaque_directory_hides_all_of_lower_layers_and_nothing_of_its_own() {
    for first in [true, false] {
        let bed = Bed::new();
        let lower = tar(&[
            Member::file("d/a", "1"),
            Member::file("d/sub/b", "1"),
            Member::file("d/sub/deep/c", "1"),
            Member::symlink("d/l", "a"),
        ]);
        let opaque = Member::file("d/.wh..wh..opq", "");
        let own = [
            Member::directory("d"),
            Member::file("d/mine", "2"),
            Member::file("d/sub/mine", "2"),
            Member::file("d/a", "2"),
        ];
        let upper = if first { tar([opaque].iter().chain(&own)) } else { tar(own.iter().chain(&[opaque])) };
        bed.apply(&[lower, upper]).unwrap();
        assert_eq!(bed.names(), ["d", "d/a", "d/mine", "d/sub", "d/sub/mine"], "{first}");
        assert_eq!(bed.text("d/a"), "2");
    }
}

#[test]
fn in_the_lowest_layer_there_is_nothing_to_hide() {
    let bed = Bed::new();
    bed.apply(&[tar(&[
        Member::file("a", "1"),
        Member::file(".wh.a", ""),
        Member::file(".wh..wh..opq", ""),
        Member::file(".wh..wh.plnk", ""),
    ])])
    .unwrap();
    assert_eq!(bed.names(), ["a"]);
}

#[test]
fn a_whiteout_must_name_something() {
    for name in [".wh.", "a/.wh..", ".wh..."] {
        let bed = Bed::new();
        let layers = [tar(&[Member::file("a/b", "1")]), tar(&[Member::file(name, "")])];
        assert!(said(bed.apply(&layers)).contains("is a whiteout of nothing"), "{name}");
        assert_eq!(bed.text("a/b"), "1");
    }
}

#[test]
fn hard_links_reach_lower_layers_links_and_what_a_later_whiteout_hides() {
    let bed = Bed::new();
    let lower = tar(&[
        Member::file("file", "1").mode(0o4755).owner(5, 6),
        Member::symlink("link", "nowhere"),
        Member::directory("real"),
        Member::file("real/f", "2"),
        Member::symlink("way", "/real"),
    ]);
    let upper = tar(&[
        // Its own head says something else: the file's stays.
        Member::hard_link("second", "/file").mode(0o600).owner(1, 1),
        Member::hard_link("link2", "./link"),
        Member::hard_link("through", "way/f"),
        Member::file(".wh.file", ""),
        // Links have no data, whatever their size says.
        Member::hard_link("sized", "second").size(4096),
        Member::file("after", "3"),
    ]);
    bed.apply(&[lower, upper]).unwrap();
    let second = bed.stat("second");
    assert_eq!((second.mode(), second.uid(), second.nlink()), (0o104_755, 5, 2));
    assert_eq!(bed.stat("link2").ino(), bed.stat("link").ino());
    assert_eq!(bed.stat("through").ino(), bed.stat("real/f").ino());
    assert!(!bed.at("file").exists());
    assert_eq!((bed.text("sized"), bed.text("after")), ("1".into(), "3".into()));
}

#[test]
fn hard_links_to_nothing_to_directories_or_out_are_refused() {
    for (target, problem) in [
        ("missing", "which the image doesn't have"),
        ("hidden", "which the image doesn't have"),
        ("", "which the image doesn't have"),
        ("../beside/secret", "would escape"),
        ("d", "can't be written"),
    ] {
        let bed = Bed::new();
        let lower = tar(&[Member::directory("d"), Member::file("hidden", "1")]);
        let upper = tar(&[Member::file(".wh.hidden", ""), Member::hard_link("new", target)]);
        let said = said(bed.apply(&[lower, upper]));
        assert!(said.contains("'new'") && said.contains(problem), "{target}: {said}");
    }
}

#[test]
fn links_on_the_way_are_followed_inside_the_root() {
    let bed = Bed::new();
    let outside = bed.beside();
    let lower = tar(&[
        Member::directory("run"),
        Member::symlink("var/run", "/run"),
        Member::symlink("up", "../../../../run"),
        Member::symlink("dangling", "made/by/need"),
        Member::symlink("out", outside.to_str().unwrap()),
        Member::symlink("chain", "var/run"),
    ]);
    let upper = tar(&[
        Member::file("var/run/a", "1"),
        Member::file("up/b", "2"),
        Member::file("dangling/c", "3"),
        Member::file("out/secret", "inside"),
        Member::file("chain/d", "4"),
    ]);
    bed.apply(&[lower, upper]).unwrap();
    for (path, text) in [("run/a", "1"), ("run/b", "2"), ("made/by/need/c", "3"), ("run/d", "4")] {
        assert_eq!(bed.text(path), text);
    }
    assert_eq!(bed.text(&format!("{}/secret", outside.to_str().unwrap().trim_start_matches('/'))), "inside");
    assert!(bed.stat("var/run").is_symlink());
}

#[test]
fn a_parent_that_a_link_replaces_in_between_leads_elsewhere() {
    let bed = Bed::new();
    let layer = tar(&[
        Member::directory("a"),
        Member::file("a/before", "1"),
        Member::directory("b"),
        Member::symlink("a", "b"),
        Member::file("a/after", "2"),
    ]);
    bed.apply(&[layer]).unwrap();
    assert_eq!(bed.names(), ["a", "b", "b/after"]);
}

#[test]
fn a_directorys_time_is_its_last_entrys_and_nobody_elses() {
    let bed = Bed::new();
    let layer = tar(&[
        Member::directory("d").mtime(10),
        Member::file("d/f", "later"),
        Member::directory("gone/inner").mtime(20),
        Member::directory("gone").mtime(21),
        Member::file("gone", "a file now").mtime(22),
        Member::directory("moved").mtime(30),
        Member::directory("moved/inner").mtime(31),
        Member::directory("there/inner").mtime(40),
        Member::symlink("moved", "there").mtime(32),
        Member::directory("twice").mtime(50),
        Member::directory("twice").mtime(51),
    ]);
    bed.apply(&[layer]).unwrap();
    let time = |path: &str| bed.stat(path).mtime();
    assert_eq!((time("d"), time("gone"), time("twice")), (10, 22, 51));
    assert_eq!((time("moved"), time("there/inner")), (32, 40));
}

#[test]
fn files_in_setgid_directories_have_the_group_of_their_own_entry() {
    let bed = Bed::new();
    bed.apply(&[tar(&[
        Member::directory("local").mode(0o2775).owner(0, 50),
        Member::file("local/f", "1"),
        Member::directory("local/d"),
        Member::symlink("local/l", "f"),
    ])])
    .unwrap();
    assert_eq!(bed.stat("local").mode() & 0o7777, 0o2775);
    for path in ["local/f", "local/d", "local/l"] {
        assert_eq!(bed.stat(path).gid(), 0, "{path}");
    }
    assert_eq!(bed.stat("local/d").mode() & 0o7777, 0o755);
}

#[test]
fn attributes_come_in_both_spellings_and_capabilities_survive_the_owner() {
    let bed = Bed::new();
    // cap_net_raw+ep (vfs_cap_data, revision 2).
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    bed.apply(&[tar(&[
        Member::file("ping", "x")
            .mode(0o755)
            .owner(10, 10)
            .record("SCHILY.xattr.security.capability", capability),
        Member::file("f", "x")
            .record("LIBARCHIVE.xattr.user.odd%20name", "AAH/")
            .record("LIBARCHIVE.xattr.user.both", "eHg")
            .record("SCHILY.xattr.user.both", "plain=\nvalue")
            .record("SCHILY.xattr.user.empty", ""),
        Member::directory("d").record("SCHILY.xattr.user.on", "directory"),
        // None of these has room for users' attributes: passed over, as by tar.
        Member::symlink("l", "f").record("SCHILY.xattr.user.on", "link"),
        Member::special(b'6', "p", (0, 0)).record("SCHILY.xattr.user.on", "pipe"),
        Member::file("labelled", "x").record("SCHILY.xattr.nonsense", "x"),
    ])])
    .unwrap();
    assert_eq!(bed.attribute("ping", "security.capability").unwrap(), capability);
    assert_eq!(bed.attribute("f", "user.odd name").unwrap(), [0, 1, 255]);
    assert_eq!(bed.attribute("f", "user.both").unwrap(), b"plain=\nvalue");
    assert_eq!(bed.attribute("f", "user.empty").unwrap(), b"");
    assert_eq!(bed.attribute("d", "user.on").unwrap(), b"directory");
    assert_eq!(bed.attribute("l", "user.on"), None);
}

#[test]
fn names_are_bytes_and_long_ones_come_in_three_ways() {
    let bed = Bed::new();
    let long = "n".repeat(200);
    let deep = vec!["d"; 120].join("/");
    let by_gnu = [&long[..], "\0"].concat();
    bed.apply(&[tar(&[
        Member::file(b"odd \xff\xfe\n name", "1"),
        Member::file("short", "2").record("path", &deep),
        Member::file("././@LongLink", &by_gnu).kind(b'L'),
        Member::file("cut", "3"),
        Member::file("././@LongLink", &by_gnu).kind(b'K'),
        Member::symlink("to-long", "cut"),
        Member::file("name", "4").patch(345, "prefix/of"),
        // GNU's magic has no prefix: there are times.
        Member::file("gnu", "5").patch(257, b"ustar  \0").patch(345, "12345670123"),
        // An empty long name is none.
        Member::file("././@LongLink", "\0").kind(b'L'),
        Member::file("own", "6"),
    ])])
    .unwrap();
    let tree = bed.tree();
    let odd = std::ffi::OsStr::from_bytes(b"odd \xff\xfe\n name");
    assert_eq!(tree[std::path::Path::new(odd)].content, b"1");
    assert_eq!((bed.text(&deep), bed.text(&long)), ("2".into(), "3".into()));
    assert_eq!(std::fs::read_link(bed.at("to-long")).unwrap().to_str(), Some(&*long));
    assert_eq!(
        (bed.text("prefix/of/name"), bed.text("gnu"), bed.text("own")),
        ("4".into(), "5".into(), "6".into())
    );
}

#[test]
fn the_longest_path_is_unpacked_and_a_longer_one_refused() {
    super::bed::with_many_descriptors();
    let bed = Bed::new();
    // 2,048 components, 4,095 bytes.
    let longest = vec!["d"; 2048].join("/");
    bed.apply(&[tar(&[Member::file("x", "deep").record("path", &longest)])]).unwrap();
    let mut names = 0;
    let mut at = rustix::fs::open(bed.root(), rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    while let Ok(next) = rustix::fs::openat(&at, "d", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()) {
        (at, names) = (next, names + 1);
    }
    assert_eq!(names, 2048);
    let longer = tar(&[Member::file("x", "").record("path", format!("{longest}d"))]);
    assert!(said(Bed::new().apply(&[longer])).contains("4095 are the most"));
    let wide = tar(&[Member::file("x", "").record("path", "c".repeat(256))]);
    assert!(said(Bed::new().apply(&[wide])).contains("can't be written"));
}
