//! With what people really use: images made by `umoci`, copied by `skopeo`, served by Debian's `docker-registry`, over TLS too.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use carrel_store::archive::InThisProcess;
use carrel_store::progress::Quiet;
use carrel_store::{Compression, Image, Platform, PullOptions, Store};

/// Runs a program of the machine's, which has to succeed.
fn run(program: &str, arguments: &[&str]) {
    let output =
        Command::new(program).args(arguments).output().expect("umoci, skopeo and openssl are installed");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
}

fn skopeo(arguments: &[&str]) {
    let mut all = vec!["copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false"];
    all.extend(arguments);
    run("skopeo", &all);
}

/// A layout with an image of two layers, made by umoci.
fn layout(folder: &Path) -> String {
    let path = folder.join("layout");
    let image = format!("{}:latest", path.display());
    for (number, size) in [(1, 3_000_000_u32), (2, 10)] {
        let content: Vec<u8> =
            (0..size).map(|n| (n.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0]).collect();
        fs::write(folder.join(format!("file{number}")), content).unwrap();
    }
    run("umoci", &["init", "--layout", path.to_str().unwrap()]);
    run("umoci", &["new", "--image", &image]);
    for number in [1, 2] {
        let file = folder.join(format!("file{number}"));
        let to = format!("/file{number}");
        run("umoci", &["insert", "--rootless", "--image", &image, file.to_str().unwrap(), &to]);
    }
    run("umoci", &["config", "--image", &image, "--config.cmd", "cat", "--config.env", "A=b"]);
    format!("oci:{image}")
}

fn options() -> PullOptions {
    let platform: Platform = "linux/amd64".parse().unwrap();
    PullOptions { platform, docker_config: None, ..PullOptions::default() }
}

fn acquire(folder: &Path, name: &str) -> Image {
    let store = Store::open(&folder.join(format!("store-{}", name.len()))).unwrap();
    let image = store
        .acquire(&name.parse().unwrap(), &options(), &InThisProcess, &Quiet)
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    for layer in &image.layers {
        assert_eq!(store.blob(&layer.digest).unwrap().metadata().unwrap().len(), layer.size);
    }
    assert_eq!((image.config.cmd[0].as_str(), image.config.env.last().unwrap().as_str()), ("cat", "A=b"));
    image
}

/// A registry that runs while this lives.
struct Registry {
    process: Child,
    port: u16,
}

impl Registry {
    fn start(folder: &Path, tls: Option<(&Path, &Path)>) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let tls = tls.map_or(String::new(), |(certificate, key)| {
            format!(", tls: {{certificate: {}, key: {}}}", certificate.display(), key.display())
        });
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: 127.0.0.1:{port}{tls}}}\n",
            folder.join("registry").display()
        );
        let configuration = folder.join("registry.yml");
        fs::write(&configuration, text).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&configuration)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is installed");
        let registry = Self { process, port };
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(30), "the registry listens");
            thread::sleep(Duration::from_millis(20));
        }
        registry
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn an_image_is_the_same_from_a_layout_archives_and_a_registry() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let layout = layout(folder);
    let original = acquire(folder, &layout);
    let diff_ids = |image: &Image| image.layers.iter().map(|layer| layer.diff_id.clone()).collect::<Vec<_>>();
    assert_eq!(original.layers.len(), 2);
    assert!(original.layers.iter().all(|layer| layer.compression == Compression::Gzip));

    let oci = format!("oci-archive:{}:it", folder.join("oci.tar").display());
    skopeo(&[&layout, &oci]);
    assert_eq!(acquire(folder, &oci).digest, original.digest);

    let docker = format!("docker-archive:{}:name:tag", folder.join("docker.tar").display());
    skopeo(&[&layout, &docker]);
    let saved = acquire(folder, &docker);
    assert_eq!(diff_ids(&saved), diff_ids(&original));
    assert!(saved.layers.iter().all(|layer| layer.compression == Compression::None));

    let registry = Registry::start(folder, None);
    let remote = format!("127.0.0.1:{}/deep/name:tag", registry.port);
    skopeo(&[&layout, &format!("docker://{remote}")]);
    assert_eq!(acquire(folder, &remote).digest, original.digest);

    let schema2 = format!("127.0.0.1:{}/schema2:tag", registry.port);
    skopeo(&["--format", "v2s2", &layout, &format!("docker://{schema2}")]);
    let converted = acquire(folder, &schema2);
    assert_ne!(converted.digest, original.digest);
    assert_eq!(converted.layers, original.layers);

    // From plain layers: what is packed already, this skopeo leaves as it is, and a registry may have it by then.
    let zstd = format!("oci:{}:latest", folder.join("zstd").display());
    skopeo(&["--dest-compress", "--dest-compress-format", "zstd", &docker, &zstd]);
    let packed = acquire(folder, &zstd);
    assert!(packed.layers.iter().all(|layer| layer.compression == Compression::Zstd));
    assert_eq!(diff_ids(&packed), diff_ids(&original));
}

#[test]
fn an_image_that_docker_would_ask_for_by_digest_is_pulled_by_it() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let layout = layout(folder);
    let registry = Registry::start(folder, None);
    let remote = format!("127.0.0.1:{}/name", registry.port);
    skopeo(&[&layout, &format!("docker://{remote}:tag")]);
    let digest = acquire(folder, &format!("{remote}:tag")).digest;
    assert_eq!(acquire(folder, &format!("{remote}@{digest}")).digest, digest);
    let store = Store::open(&folder.join("store")).unwrap();
    for missing in ["name:other", "other:tag"] {
        let name = format!("127.0.0.1:{}/{missing}", registry.port);
        let said = store
            .acquire(&name.parse().unwrap(), &options(), &InThisProcess, &Quiet)
            .unwrap_err()
            .to_string();
        assert!(said.contains(&name) && said.contains("has no image"), "{said}");
    }
}

/// A certificate for this address that no authority but itself vouches for.
fn certificate(folder: &Path, name: &str, address: &str) -> (PathBuf, PathBuf) {
    let (certificate, key) = (folder.join(format!("{name}.pem")), folder.join(format!("{name}.key")));
    let alternative = format!("subjectAltName=IP:{address}");
    let pair = ["-keyout", key.to_str().unwrap(), "-out", certificate.to_str().unwrap()];
    let fixed = [
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-subj",
        "/CN=carrel test",
    ];
    // A leaf, not an authority: rustls tells them apart.
    let extensions = ["-addext", &alternative, "-addext", "basicConstraints=critical,CA:FALSE"];
    run("openssl", &[fixed.as_slice(), &extensions, &pair].concat());
    (certificate, key)
}

/// The environment decides which certificates are trusted, and a process has one: so this test runs itself again, with a name to pull.
const NAME: &str = "CARREL_TEST_TLS_NAME";

#[test]
fn a_registry_over_tls_is_trusted_by_the_machines_certificates_alone() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    if let Ok(name) = std::env::var(NAME) {
        let store = Store::open(folder).unwrap();
        match store.acquire(&name.parse().unwrap(), &options(), &InThisProcess, &Quiet) {
            Ok(image) => println!("pulled {}", image.name),
            Err(error) => {
                println!("refused: {error} {:?}", std::error::Error::source(&error).map(ToString::to_string))
            }
        }
        return;
    }
    let layout = layout(folder);
    // Loopback in another spelling, which is not taken for loopback: so HTTPS is spoken.
    let address = "::ffff:127.0.0.1";
    let (trusted, key) = certificate(folder, "trusted", address);
    let (other, _) = certificate(folder, "other", address);
    let registry = Registry::start(folder, Some((&trusted, &key)));
    skopeo(&[&layout, &format!("docker://127.0.0.1:{}/name:tag", registry.port)]);
    let name = format!("[{address}]:{}/name:tag", registry.port);
    let again = |certificates: &Path| {
        let output = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "--nocapture",
                "a_registry_over_tls_is_trusted_by_the_machines_certificates_alone",
            ])
            .env(NAME, &name)
            .env("SSL_CERT_FILE", certificates)
            .env_remove("SSL_CERT_DIR")
            .env_remove("HTTPS_PROXY")
            .env_remove("https_proxy")
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let said = again(&trusted);
    assert!(said.contains(&format!("pulled {name}")), "{said}");
    let said = again(&other);
    assert!(
        said.contains("refused") && said.contains("can't be reached") && said.contains("certificate"),
        "{said}"
    );
}
