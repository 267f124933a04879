//! What every program finds around it: who is who, names, time zones, certificates, a home, temporary folders. Nothing else of the host's `/etc` comes along.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use super::layer::Ids;
use super::tree::{Owner, Skip, Tree};

/// Taken along as they are, where there are any: the time zone, names of services, certificates, as Debian and as Fedora keep them.
const FILES: [&str; 7] = [
    "/etc/localtime",
    "/etc/services",
    "/etc/protocols",
    "/etc/ld.so.cache",
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/mime.types",
];
/// The one locale that programs may count on: the others take 200 MB.
const LOCALES: [&str; 2] = ["/usr/lib/locale/C.utf8", "/usr/lib/locale/C.UTF-8"];

/// As whom the program runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Its name.
    pub name: String,
    /// Its number.
    pub uid: u32,
    /// Its group's.
    pub gid: u32,
    /// Its home; empty and its own in the room.
    pub home: PathBuf,
}

impl Account {
    /// The user with this number, as this host's `/etc/passwd` calls him, at home where `home` says, else where that file says, else below `/home`.
    #[must_use]
    pub fn of(uid: u32, gid: u32, home: Option<&Path>) -> Self {
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        Self::among(&passwd, uid, gid, home)
    }

    fn among(passwd: &str, uid: u32, gid: u32, home: Option<&Path>) -> Self {
        let number = uid.to_string();
        let entry = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
        let entry =
            entry.into_iter().find(|fields| fields.get(2) == Some(&number.as_str()) && fields.len() >= 6);
        let plain = |name: &&str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic() && b != b':');
        let name = entry.as_ref().and_then(|fields| fields.first()).filter(|name| plain(name));
        let known = entry.as_ref().and_then(|fields| fields.get(5)).map(PathBuf::from);
        let absolute = |path: &PathBuf| path.is_absolute();
        let home = home.map(Path::to_owned).filter(absolute).or(known.filter(absolute));
        let name = name.map_or_else(|| format!("user{uid}"), |name| (*name).to_owned());
        let home = home.unwrap_or_else(|| Path::new("/home").join(&name));
        Self { name, uid, gid, home }
    }

    pub(crate) fn ids(&self) -> Ids {
        Ids { uid: self.uid, gid: self.gid }
    }
}

/// The lowest layer.
pub(crate) fn tree(account: &Account) -> Tree {
    let mut tree = Tree::default();
    for path in FILES.into_iter().chain(LOCALES) {
        // One that isn't here is nobody's need.
        let _ = tree.add(Path::new(path), Skip::Nothing);
    }
    tree.left_out.clear();
    let Account { name, uid, gid, home } = account;
    let home_text = home.to_str().filter(|home| !home.contains([':', '\n'])).unwrap_or("/");
    let mut passwd = String::from("root:x:0:0:root:/root:/bin/sh\n");
    let mut group = String::from("root:x:0:\n");
    if *uid != 0 {
        let _ = writeln!(passwd, "{name}:x:{uid}:{gid}::{home_text}:/bin/sh");
    }
    if *gid != 0 {
        let _ = writeln!(group, "{name}:x:{gid}:");
    }
    passwd.push_str("nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n");
    group.push_str("tty:x:5:\nnogroup:x:65534:\n");
    tree.text("/etc/passwd", passwd);
    tree.text("/etc/group", group);
    tree.text("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n".into());
    tree.directory("/tmp", 0o1777, Owner::Root);
    tree.directory("/var/tmp", 0o1777, Owner::Root);
    tree.directory("/root", 0o700, Owner::Root);
    let owner = if *uid == 0 { Owner::Root } else { Owner::User };
    if home_text != "/" && home_text != "/root" {
        tree.directory(home, 0o755, owner);
    }
    tree
}

#[cfg(test)]
mod tests {
    use super::super::tree::Node;
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nme:x:1000:100:,,,:/home/me:/bin/zsh\nodd:x:7\n";

    #[test]
    fn a_user_is_called_as_on_the_host() {
        let me = Account::among(PASSWD, 1000, 100, None);
        assert_eq!((me.name.as_str(), me.home.as_path()), ("me", Path::new("/home/me")));
        let elsewhere = Account::among(PASSWD, 1000, 100, Some(Path::new("/data/me")));
        assert_eq!(elsewhere.home, Path::new("/data/me"));
        let unknown = Account::among(PASSWD, 7, 7, Some(Path::new("relative")));
        assert_eq!((unknown.name.as_str(), unknown.home.as_path()), ("user7", Path::new("/home/user7")));
    }

    #[test]
    fn everybody_is_in_the_rooms_files_and_has_a_home() {
        let me = Account::among(PASSWD, 1000, 100, None);
        let tree = tree(&me);
        let node = |path: &str| {
            tree.nodes().find(|(known, _)| *known == Path::new(path)).map(|(_, node)| node.clone())
        };
        let Some(Node::Text { content, .. }) = node("/etc/passwd") else { panic!("no passwd") };
        assert!(content.contains("me:x:1000:100::/home/me:/bin/sh\n") && content.starts_with("root:x:0:0:"));
        let Some(Node::Directory { mode, owner }) = node("/home/me") else { panic!("no home") };
        assert_eq!((mode, owner), (0o755, Owner::User));
        let Some(Node::Directory { mode, .. }) = node("/tmp") else { panic!("no /tmp") };
        assert_eq!(mode, 0o1777);
    }
}
