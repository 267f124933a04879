//! A real registry on loopback: Debian's `docker-registry`.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::wait_for;

/// A registry that runs while this lives.
pub struct Registry {
    process: Child,
    /// `127.0.0.1:PORT`.
    pub address: String,
}

impl Registry {
    /// Starts one that keeps its blobs below this folder.
    pub fn start(folder: &Path) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let blobs = folder.join("registry");
        let configuration = folder.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: {address}}}\n",
            blobs.display()
        );
        std::fs::write(&configuration, text).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&configuration)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is installed");
        wait_for("the registry", || TcpStream::connect(&address).ok());
        Self { process, address }
    }

    /// Pushes an image with `skopeo` and returns its name there.
    pub fn push(&self, image: &str, name: &str) -> String {
        let pushed = format!("{}/{name}", self.address);
        let output = Command::new("skopeo")
            .args(["copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false", image])
            .arg(format!("docker://{pushed}"))
            .output()
            .expect("skopeo is installed");
        assert!(output.status.success(), "skopeo: {}", String::from_utf8_lossy(&output.stderr));
        pushed
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
