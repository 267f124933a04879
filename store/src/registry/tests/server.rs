//! A registry on loopback that answers what a test wants, byte by byte if need be.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::digest::Digest;
use crate::document::OCI_MANIFEST;
use crate::testing::Sample;

/// What came in.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) method: String,
    /// With its query.
    pub(super) path: String,
    /// Names in lower case.
    pub(super) headers: BTreeMap<String, String>,
    pub(super) body: String,
}

/// What goes out, byte by byte if need be.
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
    /// Of the body, before the connection breaks.
    pub(super) sent: usize,
    /// Nothing more comes, and the connection stays open.
    pub(super) hangs: bool,
}

pub(super) fn reply(status: u16, body: &[u8]) -> Reply {
    let headers = vec![("Content-Length".into(), body.len().to_string())];
    Reply { status, headers, body: body.to_vec(), sent: body.len(), hangs: false }
}

impl Reply {
    pub(super) fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Breaks after so many bytes of its body.
    pub(super) fn broken(mut self, after: usize) -> Self {
        self.sent = after.min(self.body.len());
        self
    }
}

type Handler = dyn Fn(&Request, usize) -> Reply + Send + Sync;

/// A server that answers each request, given its number, with what the handler says. It lives until the test ends.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    pub(super) fn start(handler: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests: Arc<Mutex<Vec<Request>>> = Arc::default();
        let (seen, handler): (_, Arc<Handler>) = (Arc::clone(&requests), Arc::new(handler));
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let (seen, handler) = (Arc::clone(&seen), Arc::clone(&handler));
                thread::spawn(move || serve(&connection, &seen, &*handler));
            }
        });
        Self { address, requests }
    }

    /// Serves a sample as `name:tag`, with one blob answered by somebody else.
    pub(super) fn with_blob(
        sample: &Sample,
        blob: &[u8],
        handler: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let path = format!("/v2/name/blobs/{}", Digest::of(blob));
        let asked = AtomicUsize::new(0);
        let honest = honest(sample);
        Self::start(move |request, _| {
            if request.path == path {
                handler(request, asked.fetch_add(1, Ordering::Relaxed))
            } else {
                honest(request)
            }
        })
    }

    pub(super) fn name(&self) -> String {
        format!("{}/name:tag", self.address)
    }

    pub(super) fn requests(&self, part: &str) -> Vec<Request> {
        self.requests.lock().unwrap().iter().filter(|request| request.path.contains(part)).cloned().collect()
    }
}

fn serve(connection: &TcpStream, seen: &Mutex<Vec<Request>>, handler: &Handler) -> Option<()> {
    let mut reader = BufReader::new(connection.try_clone().ok()?);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|count| *count > 0)?;
        let mut words = line.split_whitespace();
        let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            headers.insert(name.to_lowercase(), value.to_owned());
        }
        let length = headers.get("content-length").and_then(|value| value.parse().ok()).unwrap_or(0);
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let request = Request { method, path, headers, body: String::from_utf8(body).ok()? };
        let number = {
            let mut seen = seen.lock().unwrap();
            seen.push(request.clone());
            seen.len() - 1
        };
        let reply = handler(&request, number);
        let mut head = format!("HTTP/1.1 {} Word\r\n", reply.status);
        for (name, value) in &reply.headers {
            head += &format!("{name}: {value}\r\n");
        }
        let mut out = connection;
        out.write_all(format!("{head}\r\n").as_bytes()).ok()?;
        out.write_all(&reply.body[..reply.sent]).ok()?;
        if reply.hangs {
            thread::sleep(Duration::from_secs(60));
        }
        if reply.sent < reply.body.len() {
            connection.shutdown(Shutdown::Both).ok()?;
        }
    }
}

/// Answers for a sample as an honest registry does, without ranges.
pub(super) fn honest(sample: &Sample) -> impl Fn(&Request) -> Reply + Send + Sync + use<> {
    let (blobs, top) = (sample.blobs.clone(), sample.digest());
    move |request| {
        let name = request.path.rsplit('/').next().unwrap();
        let digest = if name == "tag" { Some(top.clone()) } else { name.parse().ok() };
        let found = digest.and_then(|digest| Some((blobs.get(&digest)?.clone(), digest)));
        let Some((bytes, digest)) = found else {
            let error = json!({ "errors": [{ "code": "MANIFEST_UNKNOWN", "message": "manifest unknown" }] });
            return reply(404, error.to_string().as_bytes());
        };
        reply(200, &bytes)
            .with("Content-Type", OCI_MANIFEST)
            .with("Docker-Content-Digest", &digest.to_string())
    }
}

/// The part of a blob that a request's Range asks for, as RFC 9110 has it answered.
pub(super) fn ranged(request: &Request, blob: &[u8]) -> Reply {
    let Some(start) = request.headers.get("range") else { return reply(200, blob) };
    let start: usize = start.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse().unwrap();
    let range = format!("bytes {start}-{}/{}", blob.len() - 1, blob.len());
    reply(206, &blob[start..]).with("Content-Range", &range)
}
