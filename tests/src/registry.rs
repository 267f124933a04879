//! A real registry on loopback: Debian's `docker-registry`.

use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::wait_for;

/// Who may use a registry that asks: name and password.
pub const READER: (&str, &str) = ("reader", "turn the page");
/// The same as `htpasswd -B` writes it.
const READER_HTPASSWD: &str = "reader:$2b$04$PasuWCMZwv66tCq5om0Ikuyf3yAfFmjjUhZqTzZ6rPEz4ZIYFqMEK\n";

/// A registry that runs while this lives.
pub struct Registry {
    process: Child,
    log: PathBuf,
    /// Only for [`READER`].
    asks: bool,
    /// `127.0.0.1:PORT`.
    pub address: String,
}

impl Registry {
    /// Starts one that keeps its blobs below this folder.
    pub fn start(folder: &Path) -> Self {
        Self::serve(folder, "")
    }

    /// Starts one that only [`READER`] may use.
    pub fn start_for_reader(folder: &Path) -> Self {
        let accounts = folder.join("registry.htpasswd");
        fs::write(&accounts, READER_HTPASSWD).unwrap();
        Self::serve(folder, &format!("auth: {{htpasswd: {{realm: books, path: {}}}}}\n", accounts.display()))
    }

    fn serve(folder: &Path, auth: &str) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let blobs = folder.join("registry");
        let configuration = folder.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: {address}}}\n{auth}",
            blobs.display()
        );
        fs::write(&configuration, text).unwrap();
        let log = folder.join("registry.log");
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&configuration)
            .stdin(Stdio::null())
            .stdout(File::create(&log).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is installed");
        wait_for("the registry", || TcpStream::connect(&address).ok());
        Self { process, log, asks: !auth.is_empty(), address }
    }

    /// Requests so far.
    pub fn requests(&self) -> Vec<Request> {
        fs::read_to_string(&self.log).unwrap().lines().filter_map(Request::parse).collect()
    }

    /// Pushes an image with `skopeo` and returns its name there.
    pub fn push(&self, image: &str, name: &str) -> String {
        let pushed = format!("{}/{name}", self.address);
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false", image]);
        if self.asks {
            skopeo.arg(format!("--dest-creds={}:{}", READER.0, READER.1));
        }
        let output = skopeo.arg(format!("docker://{pushed}")).output().expect("skopeo is installed");
        assert!(output.status.success(), "skopeo: {}", String::from_utf8_lossy(&output.stderr));
        pushed
    }
}

/// A line of the registry's access log.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// `GET`, ….
    pub method: String,
    /// `/v2/…`.
    pub path: String,
    /// 206 for a part that was asked for by a range.
    pub status: u16,
    /// Of the body, sent.
    pub bytes: u64,
}

impl Request {
    /// For a blob's bytes.
    pub fn is_blob(&self) -> bool {
        self.method == "GET" && self.path.contains("/blobs/")
    }

    /// Of `HOST - - [TIME] "GET /v2/… HTTP/1.1" 206 1234 "" "agent"`.
    fn parse(line: &str) -> Option<Self> {
        let mut quoted = line.split('"');
        let mut request = quoted.nth(1)?.split(' ');
        let mut numbers = quoted.next()?.split_whitespace();
        Some(Self {
            method: request.next()?.to_owned(),
            path: request.next()?.to_owned(),
            status: numbers.next()?.parse().ok()?,
            bytes: numbers.next()?.parse().ok()?,
        })
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_access_log_is_understood() {
        let line = r#"127.0.0.1 - - [21/Nov/2026:16:00:00 +0000] "GET /v2/a/blobs/sha256:0 HTTP/1.1" 206 1234 "" "carrel/0.1""#;
        let request = Request::parse(line).unwrap();
        assert_eq!((&*request.method, &*request.path), ("GET", "/v2/a/blobs/sha256:0"));
        assert_eq!((request.status, request.bytes), (206, 1234));
        assert_eq!(Request::parse("time=now level=info"), None);
    }
}
