//! A whole request: blobs that are dialled one after another, layers, then zips in their places.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread::JoinHandle;

use carrel_protocol::agent::{Blob, Compression, ContainerId, Failure, Prepare, Stream, Token, Zip};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tempfile::TempDir;

use super::super::{Done, UnpackError, run};
use super::bed::{AMPLE, described, said, sha256};
use super::tarball::{Member, tar};
use super::zips;
use crate::socket::Dialler;

/// A host that sends each of its blobs to whoever dials the next port.
struct Host {
    folder: TempDir,
    request: Prepare,
    sent: Vec<Vec<u8>>,
}

impl Host {
    fn new() -> Self {
        let request =
            Prepare { container: ContainerId(0), layers: Vec::new(), zips: Vec::new(), limits: AMPLE };
        Self { folder: TempDir::new().unwrap(), request, sent: Vec::new() }
    }

    fn next_stream(&mut self, sent: Vec<u8>) -> Stream {
        self.sent.push(sent);
        let port = u32::try_from(self.sent.len()).unwrap();
        Stream { port, token: Token([port.to_le_bytes()[0]; 16]) }
    }

    fn layer(mut self, compression: Compression, sent: Vec<u8>, plain: &[u8]) -> Self {
        let mut layer = described(compression, &sent, plain);
        layer.blob.stream = self.next_stream(sent);
        self.request.layers.push(layer);
        self
    }

    fn zip(mut self, at: &str, sent: Vec<u8>) -> Self {
        let (digest, size) = (sha256(&sent), sent.len().try_into().unwrap());
        let blob = Blob { digest, size, stream: self.next_stream(sent) };
        self.request.zips.push(Zip { blob, at: at.into() });
        self
    }

    fn container(&self) -> PathBuf {
        self.folder.path().join("container")
    }

    fn root(&self, path: &str) -> PathBuf {
        self.container().join("rootfs").join(path)
    }

    /// Serves the first `served` blobs and unpacks, in a thread with an umask of its own, as the agent's child has.
    fn unpack(&self, served: usize) -> Result<Done, UnpackError> {
        let servers: Vec<JoinHandle<()>> = (1_u8..)
            .zip(&self.sent)
            .take(served)
            .map(|(port, sent)| {
                let listener = UnixListener::bind(self.folder.path().join(format!("vsock_{port}"))).unwrap();
                let sent = sent.clone();
                std::thread::spawn(move || {
                    let (mut connection, _) = listener.accept().unwrap();
                    let mut token = [0; 16];
                    connection.read_exact(&mut token).unwrap();
                    assert_eq!(token, [port; 16]);
                    // Whoever finds a blob wrong hangs up.
                    let _ = connection.write_all(&sent);
                })
            })
            .collect();
        let done = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    // SAFETY: no table of descriptors is unshared.
                    unsafe { unshare_unsafe(UnshareFlags::FS) }.unwrap();
                    run(&Dialler::Unix(self.folder.path().join("vsock")), &self.container(), &self.request)
                })
                .join()
                .unwrap()
        });
        // Those that were never dialled are still waiting: they end with the test's process.
        for server in servers.into_iter().filter(JoinHandle::is_finished) {
            server.join().unwrap();
        }
        done
    }
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(plain).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn layers_come_first_and_zips_go_where_the_image_leads() {
    let lower = tar(&[
        Member::file("var/task/old.py", "image's"),
        Member::file("var/task/app.py", "image's"),
        Member::symlink("opt", "/usr/opt"),
        Member::directory("usr/opt"),
        Member::file("gone", "1"),
    ]);
    let upper = tar(&[Member::file(".wh.gone", "")]);
    let host = Host::new()
        .layer(Compression::Gzip, gzip(&lower), &lower)
        .layer(Compression::Zstd, zstd::bulk::compress(&upper, 1).unwrap(), &upper)
        .zip("/var/task", zips::of(&[("app.py", "zip's"), ("lib/new.py", "2")]))
        .zip("/opt", zips::of(&[("python/layer.py", "3")]))
        .zip("/made/here", zips::of(&[("x", "4")]));
    let done = host.unpack(5).unwrap();
    for (path, text) in [
        ("var/task/old.py", "image's"),
        ("var/task/app.py", "zip's"),
        ("var/task/lib/new.py", "2"),
        ("usr/opt/python/layer.py", "3"),
        ("made/here/x", "4"),
    ] {
        assert_eq!(fs::read_to_string(host.root(path)).unwrap(), text, "{path}");
    }
    assert!(!host.root("gone").exists());
    assert_eq!(fs::metadata(host.root("")).unwrap().mode() & 0o7777, 0o755);
    // Two tars and four small files; five entries, `var` and `var/task`; a whiteout; four in zips, `lib`, `python`, `made`, `here`.
    let bytes = lower.len() + upper.len() + "zip's234".len();
    assert_eq!((done.bytes, done.entries), (bytes.try_into().unwrap(), 5 + 3 + 1 + 4 + 4));
    // The spool has no name, and no longer has space.
    let names: Vec<_> =
        fs::read_dir(host.container()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["rootfs"]);
}

#[test]
fn a_zips_place_stays_inside_the_root() {
    let outside = TempDir::new().unwrap();
    let layer = tar(&[Member::symlink("var/task", outside.path().to_str().unwrap())]);
    let host =
        Host::new().layer(Compression::None, layer.clone(), &layer).zip("/var/task", zips::of(&[("f", "1")]));
    host.unpack(2).unwrap();
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    let inside = outside.path().strip_prefix("/").unwrap().join("f");
    assert_eq!(fs::read_to_string(host.root(inside.to_str().unwrap())).unwrap(), "1");
    let host = Host::new().zip("/../outside", zips::of(&[("f", "1")]));
    assert!(said(host.unpack(1)).contains("would escape by '..'"));
    // And what is there may be no directory.
    let layer = tar(&[Member::file("var/task", "")]);
    let host =
        Host::new().layer(Compression::None, layer.clone(), &layer).zip("/var/task", zips::of(&[("f", "1")]));
    assert_eq!(host.unpack(2).unwrap_err().failure(), Failure::BadPayload);
}

#[test]
fn a_zip_that_is_another_than_announced_is_not_even_opened() {
    let mut host = Host::new().zip("/var/task", zips::of(&[("f", "content")]));
    let announced = host.request.zips[0].blob.digest.clone();
    host.sent[0][40] ^= 1;
    let said = said(host.unpack(1));
    assert!(said.contains(&announced) && said.contains("pull the image again"), "{said}");
    assert!(!host.root("var/task").exists());
}

#[test]
fn a_host_that_does_not_answer_is_no_fault_of_the_payload() {
    let layer = tar(&[Member::file("f", "")]);
    let host = Host::new().layer(Compression::None, layer.clone(), &layer).zip("/z", zips::of(&[]));
    let error = host.unpack(1).unwrap_err();
    assert_eq!(error.failure(), Failure::System);
    assert!(carrel_protocol::chain(&error).starts_with("dialling the host for a zip failed"));
}

#[test]
fn a_directory_that_is_there_already_through_a_link_is_not_the_containers() {
    let host = Host::new();
    let outside = TempDir::new().unwrap();
    fs::create_dir(host.container()).unwrap();
    symlink(outside.path(), host.container().join("rootfs")).unwrap();
    assert!(host.unpack(0).is_err());
}

#[test]
fn a_full_disk_is_said_to_be_one() {
    let image = TempDir::new().unwrap();
    let path = image.path().to_owned();
    std::thread::spawn(move || {
        // SAFETY: no table of descriptors is unshared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
        let private =
            rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        let none = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", &path, "tmpfs", none, c"size=256k,nr_inodes=20").unwrap();
        let large = tar(&[Member::file("f", vec![1; 1 << 20])]);
        let many: Vec<_> = (0..40).map(|n| Member::directory(n.to_string())).collect();
        for layer in [large, tar(&many)] {
            let mut host = Host::new().layer(Compression::None, layer.clone(), &layer);
            host.folder = TempDir::new_in(&path).unwrap();
            let error = host.unpack(1).unwrap_err();
            assert_eq!(error.failure(), Failure::DiskFull, "{error:?}");
        }
    })
    .join()
    .unwrap();
}
