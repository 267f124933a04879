use std::fs;
use std::path::Path;

use super::super::tree::Skip;
use super::*;

const IDS: Ids = Ids { uid: 1000, gid: 1000 };

fn wanted(tree: &Tree) -> Wanted<'_> {
    Wanted { tree, times: Times::Dropped, ids: IDS, mentions: None }
}

fn store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store")).unwrap();
    (folder, store)
}

/// A tree of this folder, at `/at` in the room.
fn tree(folder: &Path) -> Tree {
    let mut tree = Tree::default();
    tree.add_at(folder, Path::new("/at"), Skip::Nothing).unwrap();
    tree
}

/// Past the tick within which a write could go unseen.
fn settle() {
    std::thread::sleep(std::time::Duration::from_millis(40));
}

#[test]
fn the_same_files_are_the_same_layer_wherever_and_whenever_they_were_made() {
    let (folder, store) = store();
    let mut digests = Vec::new();
    for name in ["one", "two"] {
        let root = folder.path().join(name);
        fs::create_dir_all(root.join("sub")).unwrap();
        let mut names = ["b", "a", "sub/c"];
        if name == "two" {
            names.reverse();
        }
        for file in names {
            fs::write(root.join(file), file).unwrap();
        }
        settle();
        digests.push(wanted(&tree(&root)).obtain(&store).unwrap().spec.digest);
    }
    assert_eq!(digests[0], digests[1]);
    // With their times they differ: the folder of the second is younger, and so may its files be.
    let kept = |name: &str| {
        let tree = tree(&folder.path().join(name));
        let file = File::options().write(true).open(folder.path().join(name).join("a")).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(name.len() as u64))
            .unwrap();
        drop(tree);
        let tree = self::tree(&folder.path().join(name));
        Wanted { times: Times::Kept, ..wanted(&tree) }.obtain(&store).unwrap().spec.digest
    };
    assert_ne!(kept("one"), digests[0]);
}

#[test]
fn a_layer_is_a_tar_of_what_the_tree_says() {
    let (folder, store) = store();
    let root = folder.path().join("files");
    fs::create_dir_all(root.join("sub")).unwrap();
    fs::write(root.join("sub/file"), "content").unwrap();
    std::os::unix::fs::symlink("sub/file", root.join("link")).unwrap();
    let long = format!("sub/{}", "x".repeat(200));
    fs::write(root.join(&long), "long").unwrap();
    let mut tree = tree(&root);
    tree.text("/etc/passwd", "root:x:0:0::/root:/bin/sh\n".into());
    tree.directory("/home/me", 0o700, Owner::User);
    let layer = wanted(&tree).obtain(&store).unwrap();
    let mut archive = tar::Archive::new(&layer.file);
    let mut seen = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        let header = entry.header();
        let path = entry.path().unwrap().to_str().unwrap().to_owned();
        assert_eq!(header.mtime().unwrap(), 0);
        seen.push((path, header.uid().unwrap(), text));
    }
    let own = if rustix::process::geteuid().is_root() { 0 } else { 1000 };
    let expected = [
        ("at", own, ""),
        ("at/link", 0, ""),
        ("at/sub", own, ""),
        ("at/sub/file", own, "content"),
        (&format!("at/{long}"), own, "long"),
        ("etc/passwd", 0, "root:x:0:0::/root:/bin/sh\n"),
        ("home/me", 1000, ""),
    ];
    assert_eq!(seen, expected.map(|(path, uid, text)| (path.to_owned(), uid, text.to_owned())));
}

#[test]
fn what_has_not_changed_is_not_read_again_and_what_has_is() {
    let (folder, store) = store();
    let root = folder.path().join("files");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("file"), "one").unwrap();
    settle();
    let before = tree(&root);
    let first = wanted(&before).obtain(&store).unwrap().spec;
    // Nobody could read it now; nobody has to.
    fs::remove_file(root.join("file")).unwrap();
    assert_eq!(wanted(&before).obtain(&store).unwrap().spec, first);
    fs::write(root.join("file"), "two").unwrap();
    let second = wanted(&tree(&root)).obtain(&store).unwrap().spec;
    assert_ne!(second.digest, first.digest);
    let error = {
        // The second may have settled by now and be known; this one was never read.
        fs::write(root.join("file"), "three").unwrap();
        let tree = tree(&root);
        fs::write(root.join("file"), "longer than before").unwrap();
        wanted(&tree).obtain(&store).unwrap_err()
    };
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("was changed") && cause.contains("file"), "{cause}");
}

#[test]
fn programs_in_a_layer_are_noted_with_what_they_need_and_whom_they_name() {
    let (folder, store) = store();
    let root = folder.path().join("files");
    fs::create_dir(&root).unwrap();
    fs::copy("/bin/sh", root.join("program")).unwrap();
    // Across the end of a piece that is read, and at the very end.
    let mut text = vec![b'.'; 8190];
    text.extend_from_slice(b"/t/debug/first-bin\0 /t/debug/ /t/debug/second_bin");
    fs::write(root.join("text"), &text).unwrap();
    let tree = tree(&root);
    let layer = Wanted { mentions: Some("/t/debug/"), ..wanted(&tree) }.obtain(&store).unwrap();
    assert_eq!(layer.notes.objects.len(), 1);
    assert!(layer.notes.objects[0].needs.interpreter.is_some());
    for name in ["first-bin", "second_bin"] {
        assert!(layer.notes.mentioned.iter().any(|found| found == name), "{:?}", layer.notes.mentioned);
    }
}
