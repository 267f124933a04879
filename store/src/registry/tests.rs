//! Against a registry that is slow, broken or hostile.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

use super::*;
use crate::archive::InThisProcess;
use crate::document::{OCI_LAYER, OCI_MANIFEST};
use crate::progress::{Progress, Quiet};
use crate::testing::{Sample, descriptor, options, sentence, store};
use crate::{Image, Policy, Store};

mod server;

use server::{Reply, Request, Server, honest, ranged, reply};

fn pull(store: &Store, name: &str) -> Result<Image, StoreError> {
    pull_with(store, name, &options())
}

fn pull_with(store: &Store, name: &str, options: &PullOptions) -> Result<Image, StoreError> {
    store.acquire(&name.parse().unwrap(), options, &InThisProcess, &Quiet)
}

fn big() -> Vec<u8> {
    (0..400_000_u32).flat_map(u32::to_le_bytes).collect()
}

#[test]
fn an_image_is_pulled_with_every_blob_once_and_then_known_without_the_registry() {
    let (_folder, store) = store();
    let sample = Sample::new("amd64", &[b"one", b"two", b"one", b"three", b"four", b"five"]);
    let answer = honest(&sample);
    let server = Server::start(move |request, _| answer(request));
    let image = pull(&store, &server.name()).unwrap();
    assert_eq!(image.digest, sample.digest());
    assert_eq!(image.name, server.name());
    assert_eq!(server.requests("/blobs/").len(), 6, "five layers and a configuration");
    assert_eq!(server.requests("/manifests/").len(), 1);
    let before = server.requests("").len();
    pull(&store, &server.name()).unwrap();
    assert_eq!(server.requests("").len(), before, "the store knows it");
    pull_with(&store, &server.name(), &PullOptions { policy: Policy::Always, ..options() }).unwrap();
    assert_eq!(server.requests("").len(), before + 1, "only the manifest is asked for again");
    let never = PullOptions { policy: Policy::Never, ..options() };
    pull_with(&store, &server.name(), &never).unwrap();
    let other = format!("{}/name:other", server.address);
    assert!(sentence(pull_with(&store, &other, &never)).contains("name:other"));
}

#[test]
fn an_index_leads_to_the_platforms_manifest_and_a_digest_names_content() {
    let (_folder, store) = store();
    let (amd, arm) = (Sample::new("amd64", &[b"amd"]), Sample::new("arm64", &[b"arm"]));
    let mine = amd.digest();
    let both = Sample::index(vec![(arm, "arm64"), (amd, "amd64")]);
    let answer = honest(&both);
    let server = Server::start(move |request, _| answer(request));
    assert_eq!(pull(&store, &server.name()).unwrap().digest, mine);
    let by_digest = format!("{}/name@{mine}", server.address);
    assert_eq!(pull(&store, &by_digest).unwrap().digest, mine);
    let arm = PullOptions { platform: "linux/arm64".parse().unwrap(), ..options() };
    assert_eq!(pull_with(&store, &server.name(), &arm).unwrap().config.platform.architecture, "arm64");
    let sparc = PullOptions { platform: "linux/sparc64".parse().unwrap(), ..options() };
    let said = sentence(pull_with(&store, &server.name(), &sparc));
    assert!(said.contains("linux/arm64") && said.contains("linux/sparc64"), "{said}");
}

#[test]
fn a_download_goes_on_where_the_connection_broke() {
    let (_folder, store) = store();
    let blob = big();
    let sample = Sample::new("amd64", &[&blob]);
    let content = blob.clone();
    let server = Server::with_blob(&sample, &blob, move |request, number| {
        let reply = ranged(request, &content);
        // Each try but the last brings half a megabyte.
        if number < 3 { reply.broken(500_000) } else { reply }
    });
    let image = pull(&store, &server.name()).unwrap();
    assert_eq!(image.layers[0].digest, Digest::of(&blob));
    let ranges: Vec<Option<String>> = server
        .requests(&Digest::of(&blob).to_string())
        .iter()
        .map(|request| request.headers.get("range").cloned())
        .collect();
    let expected = [None, Some("bytes=500000-"), Some("bytes=1000000-"), Some("bytes=1500000-")];
    assert_eq!(ranges, expected.map(|range| range.map(str::to_owned)));
}

#[test]
fn a_pull_takes_up_what_an_earlier_one_left_and_doubts_it_if_need_be() {
    let blob = big();
    let sample = Sample::new("amd64", &[&blob]);
    for torn in [false, true] {
        let (_folder, store) = store();
        let name = format!("sha256-{}.part", Digest::of(&blob).digits());
        let mut left = blob[..700_000].to_vec();
        left[1234] ^= u8::from(torn);
        fs::write(store.root().join("ingest").join(name), left).unwrap();
        let content = blob.clone();
        let server = Server::with_blob(&sample, &blob, move |request, _| ranged(request, &content));
        pull(&store, &server.name()).unwrap();
        let asked = server.requests(&Digest::of(&blob).to_string());
        assert_eq!(asked[0].headers["range"], "bytes=700000-");
        assert_eq!(asked.len(), if torn { 2 } else { 1 });
    }
}

#[test]
fn a_registry_without_ranges_or_with_wrong_ones_is_asked_for_the_whole_again() {
    let blob = big();
    let sample = Sample::new("amd64", &[&blob]);
    for kind in ["ignores", "shifts", "refuses"] {
        let (_folder, store) = store();
        let content = blob.clone();
        let server = Server::with_blob(&sample, &blob, move |request, number| match (number, kind) {
            (0, _) => reply(200, &content).broken(600_000),
            (1, "shifts") => reply(206, &content[1..]).with("Content-Range", "bytes 1-9/1600000"),
            (1, "refuses") => reply(416, b""),
            _ => {
                assert!(kind == "ignores" || !request.headers.contains_key("range"));
                reply(200, &content)
            }
        });
        pull(&store, &server.name()).unwrap_or_else(|error| panic!("{kind}: {error}"));
    }
}

#[test]
fn lies_about_content_and_length_are_named_and_leave_no_image() {
    let blob = big();
    let sample = Sample::new("amd64", &[&blob]);
    type Lie = fn(&[u8]) -> Reply;
    let lies: [(&str, Lie); 5] = [
        ("wrong digest", |blob| {
            let mut other = blob.to_vec();
            other[77] ^= 1;
            reply(200, &other)
        }),
        ("size", |blob| reply(200, &blob[..100])),
        ("size", |blob| reply(200, &[blob, b"more"].concat())),
        // Without an announced length the body itself has to be counted.
        ("size", |blob| {
            let body = [blob, b"and more"].concat();
            let mut reply = reply(200, &body);
            reply.headers = vec![("Connection".into(), "close".into())];
            reply.body.push(0);
            reply.sent = body.len();
            reply
        }),
        ("truncated", |blob| reply(200, blob).broken(0)),
    ];
    for (word, lie) in lies {
        let (_folder, store) = store();
        let content = blob.clone();
        let server = Server::with_blob(&sample, &blob, move |_, _| lie(&content));
        let said = sentence(pull(&store, &server.name()));
        assert!(said.contains(word) && said.contains(Digest::of(&blob).digits()), "{word}: {said}");
        assert!(store.images().unwrap().is_empty());
        assert!(store.blob(&Digest::of(&blob)).is_err());
        let asked = server.requests(&Digest::of(&blob).to_string()).len();
        assert!(asked <= 5, "{word}: a lie is not asked for again and again ({asked})");
    }
}

#[test]
fn a_registry_that_stalls_is_given_up_in_time_and_what_came_is_kept() {
    let (_folder, store) = store();
    let blob = big();
    let sample = Sample::new("amd64", &[&blob]);
    let content = blob.clone();
    let server = Server::with_blob(&sample, &blob, move |request, number| {
        let mut reply = ranged(request, &content).broken(if number == 0 { 300_000 } else { 0 });
        reply.hangs = true;
        reply
    });
    let begun = std::time::Instant::now();
    let patience = Patience { stall: Duration::from_millis(500), ..options().patience };
    let said = sentence(pull_with(&store, &server.name(), &PullOptions { patience, ..options() }));
    assert!(said.contains("truncated") && said.contains("300000 of 1600000"), "{said}");
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    let kept = fs::read_dir(store.root().join("ingest")).unwrap().next().unwrap().unwrap();
    assert_eq!(kept.metadata().unwrap().len(), 300_000);
}

#[test]
fn busy_registries_are_asked_again_and_broken_ones_given_up() {
    let (_folder, store) = store();
    let sample = Sample::new("amd64", &[b"layer"]);
    let answer = honest(&sample);
    let server = Server::start(move |request, number| match number {
        0 => reply(429, b"").with("Retry-After", "0"),
        1 => reply(503, b"down"),
        2 => answer(request),
        3 => reply(500, b""),
        4 => answer(request),
        5 => reply(502, b""),
        _ => answer(request),
    });
    pull(&store, &server.name()).unwrap();
    let server = Server::start(|_, _| {
        let error = json!({ "errors": [{ "code": "UNKNOWN", "message": "the disk\u{1b}[31m is on fire" }] });
        reply(500, error.to_string().as_bytes())
    });
    let said = sentence(pull(&store, &server.name()));
    assert!(said.contains("the disk[31m is on fire (UNKNOWN, 500)") && !said.contains('\u{1b}'), "{said}");
    assert_eq!(server.requests("").len(), 4);
    let limited = Server::start(|_, _| reply(429, b"").with("Retry-After", "3600"));
    assert!(sentence(pull(&store, &limited.name())).contains("429"));
    assert_eq!(limited.requests("").len(), 1, "nobody waits for an hour");
}

#[test]
fn a_document_that_breaks_off_is_asked_for_again() {
    let (_folder, store) = store();
    let sample = Sample::new("amd64", &[b"layer"]);
    let answer = honest(&sample);
    // 0 is the manifest, 1 the configuration.
    let server = Server::start(move |request, number| match number {
        1 => answer(request).broken(10),
        _ => answer(request),
    });
    pull(&store, &server.name()).unwrap();
    assert_eq!(server.requests("/blobs/").len(), 3);
}

#[test]
fn what_does_not_exist_or_can_not_be_reached_is_told_apart() {
    let (_folder, store) = store();
    let mut sample = Sample::new("amd64", &[b"layer"]);
    let answer = honest(&sample);
    let server = Server::start(move |request, _| answer(request));
    let other = format!("{}/no/such:image", server.address);
    let said = sentence(pull(&store, &other));
    assert!(said.contains(&other) && said.contains("has no image"), "{said}");
    sample.blobs.remove(&Digest::of(b"layer"));
    let answer = honest(&sample);
    let server = Server::start(move |request, _| answer(request));
    assert!(sentence(pull(&store, &server.name())).contains("lacks"));
    let said = sentence(pull(&store, "127.0.0.1:1/name:tag"));
    assert!(said.contains("127.0.0.1:1") && said.contains("can't be reached"), "{said}");
    assert!(!said.contains("--insecure"), "it was spoken to in plain HTTP: {said}");
}

#[test]
fn manifests_that_are_too_large_lying_or_no_images_are_refused() {
    let (_folder, store) = store();
    let huge = Server::start(|_, _| reply(200, &vec![b' '; (4 << 20) + 1]));
    assert!(sentence(pull(&store, &huge.name())).contains("too large"));
    let sample = Sample::new("amd64", &[b"layer"]);
    let wrong = Digest::of(b"something else");
    let bytes = sample.blobs[&sample.digest()].clone();
    let lying = Server::start(move |_, _| {
        reply(200, &bytes)
            .with("Content-Type", OCI_MANIFEST)
            .with("Docker-Content-Digest", &wrong.to_string())
    });
    assert!(sentence(pull(&store, &lying.name())).contains("wrong digest"));
    let forged = format!("{}/name@{}", lying.address, Digest::of(b"asked for"));
    assert!(sentence(pull(&store, &forged)).contains("wrong digest"));
    let page = Server::start(|_, _| reply(200, b"<html>").with("Content-Type", "text/html; charset=utf-8"));
    assert!(sentence(pull(&store, &page.name())).contains("not what"));
    let mut chart = Sample::new("amd64", &[]);
    let config = chart.add("application/vnd.cncf.helm.config.v1+json", b"{}");
    chart.manifest(&config, &[descriptor(OCI_LAYER, b"")]);
    let answer = honest(&chart);
    let server = Server::start(move |request, _| answer(request));
    assert!(sentence(pull(&store, &server.name())).contains("helm"));
    assert!(store.images().unwrap().is_empty());
}

/// A registry that wants a token, and the service that gives it, in one.
fn with_tokens(sample: &Sample, may: impl Fn(&Request) -> bool + Send + Sync + 'static) -> Server {
    let answer = honest(sample);
    Server::start(move |request, _| {
        if request.path.starts_with("/token") {
            return if may(request) {
                reply(200, br#"{"token": "good", "expires_in": 60}"#)
            } else {
                reply(401, br#"{"errors": [{"code": "UNAUTHORIZED", "message": "who are you"}]}"#)
            };
        }
        if request.headers.get("authorization").is_some_and(|value| value == "Bearer good") {
            return answer(request);
        }
        let host = &request.headers["host"];
        let challenge = format!(r#"Bearer realm="http://{host}/token?a=b",service="the service""#);
        reply(401, b"{}").with("WWW-Authenticate", &challenge)
    })
}

#[test]
fn a_token_is_fetched_once_anonymously_for_what_is_public() {
    let (_folder, store) = store();
    let server = with_tokens(&Sample::new("amd64", &[b"one", b"two"]), |request| {
        assert!(!request.headers.contains_key("authorization"));
        request.path.contains("a=b") && request.path.contains("service=the%20service")
    });
    pull(&store, &server.name()).unwrap();
    let tokens = server.requests("/token");
    assert_eq!(tokens.len(), 1, "{tokens:?}");
    assert!(
        tokens[0].path.contains("scope=repository:name:pull")
            || tokens[0].path.contains("repository%3Aname%3Apull")
    );
}

/// Options with this `config.json`.
fn logged_in(folder: &std::path::Path, config: &serde_json::Value) -> PullOptions {
    let folder = folder.join("docker");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    PullOptions { docker_config: Some(folder), ..options() }
}

#[test]
fn passwords_and_identity_tokens_buy_tokens_and_nothing_else_does() {
    let sample = Sample::new("amd64", &[b"layer"]);
    let basic = STANDARD.encode("me:secret");
    let expected = format!("Basic {basic}");
    let server = with_tokens(&sample, move |request| {
        request.headers.get("authorization") == Some(&expected)
            || (request.method == "POST"
                && request.body.contains("refresh_token=identity")
                && request.body.contains("grant_type=refresh_token"))
    });
    for auth in [json!({ "auth": basic }), json!({ "identitytoken": "identity" })] {
        let (folder, store) = store();
        let options = logged_in(folder.path(), &json!({ "auths": { server.address.to_string(): auth } }));
        pull_with(&store, &server.name(), &options).unwrap();
    }
    let (folder, store) = store();
    let other = json!({ "auths": { "other.example": { "auth": basic } } });
    let said = sentence(pull_with(&store, &server.name(), &logged_in(folder.path(), &other)));
    assert!(said.contains("who are you") && said.contains("docker login"), "{said}");
}

#[test]
fn basic_authentication_is_given_to_the_registry_that_asks_for_it() {
    let (folder, store) = store();
    let basic = STANDARD.encode("me:secret");
    let answer = honest(&Sample::new("amd64", &[b"layer"]));
    let expected = format!("Basic {basic}");
    let server = Server::start(move |request, _| match request.headers.get("authorization") {
        Some(value) if *value == expected => answer(request),
        _ => reply(401, b"").with("WWW-Authenticate", "Basic realm=\"here\""),
    });
    assert!(sentence(pull(&store, &server.name())).contains("docker login"));
    let config = json!({ "auths": { server.address.to_string(): { "auth": basic } } });
    pull_with(&store, &server.name(), &logged_in(folder.path(), &config)).unwrap();
}

#[test]
fn a_token_that_expires_during_the_pull_is_renewed() {
    let (_folder, store) = store();
    let sample = Sample::new("amd64", &[b"one", b"two", b"three"]);
    let answer = honest(&sample);
    let issued = AtomicUsize::new(0);
    let used = AtomicUsize::new(0);
    let server = Server::start(move |request, _| {
        if request.path.starts_with("/token") {
            let number = issued.fetch_add(1, Ordering::Relaxed) + 1;
            return reply(200, format!(r#"{{"access_token": "t{number}"}}"#).as_bytes());
        }
        // Each token is good for three requests.
        let current = format!("Bearer t{}", issued.load(Ordering::Relaxed));
        if request.headers.get("authorization") == Some(&current)
            && !(used.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(4)
        {
            return answer(request);
        }
        let challenge = format!(r#"Bearer realm="http://{}/token""#, request.headers["host"]);
        reply(401, b"").with("WWW-Authenticate", &challenge)
    });
    let options = PullOptions { parallel: 1, ..options() };
    pull_with(&store, &server.name(), &options).unwrap();
    assert_eq!(server.requests("/token").len(), 2);
}

#[test]
fn redirects_are_followed_without_the_proof_and_circles_are_not() {
    let (_folder, store) = store();
    let blob = big();
    let sample = Sample::new("amd64", &[&blob]);
    let content = blob.clone();
    let cdn = Server::start(move |request, number| {
        assert!(!request.headers.contains_key("authorization"), "the proof went to another origin");
        // A signature that has expired: the registry is asked for a new one.
        if number == 0 { reply(403, b"expired") } else { ranged(request, &content) }
    });
    let address = cdn.address;
    let answer = honest(&sample);
    let wanted = format!("/blobs/{}", Digest::of(&blob));
    let registry = Server::start(move |request, _| {
        if request.path.starts_with("/token") {
            return reply(200, br#"{"token": "good"}"#);
        }
        if !request.headers.contains_key("authorization") {
            let challenge = format!(r#"Bearer realm="http://{}/token""#, request.headers["host"]);
            return reply(401, b"").with("WWW-Authenticate", &challenge);
        }
        if request.path.ends_with(&wanted) {
            return reply(307, b"").with("Location", &format!("http://{address}/signed?s=1"));
        }
        answer(request)
    });
    pull(&store, &registry.name()).unwrap();
    assert_eq!(cdn.requests("/signed").len(), 2);
    let circle = Server::start(|request, _| reply(302, b"").with("Location", &request.path));
    assert!(sentence(pull(&store, &circle.name())).contains("again and again"));
    assert_eq!(circle.requests("").len(), 6);
    let away = Server::start(|_, _| reply(302, b"").with("Location", "http://registry.example/x"));
    assert!(sentence(pull(&store, &away.name())).contains("registry.example"));
}

/// Counts what it is told.
#[derive(Default)]
struct Count(Arc<Mutex<(u64, usize)>>);

impl Progress for Count {
    fn started(&self, _what: &str, _total: u64) -> Box<dyn Transfer> {
        Box::new(Self(Arc::clone(&self.0)))
    }
}

impl Transfer for Count {
    fn advanced(&self, bytes: u64) {
        self.0.lock().unwrap().0 += bytes;
    }

    fn restarted(&self) {
        self.0.lock().unwrap().0 = 0;
    }

    fn finished(&self) {
        self.0.lock().unwrap().1 += 1;
    }
}

#[test]
fn progress_adds_up_to_what_came() {
    let (_folder, store) = store();
    let blob = big();
    let sample = Sample::new("amd64", &[&blob]);
    let content = blob.clone();
    let server = Server::with_blob(&sample, &blob, move |request, number| match number {
        0 => reply(200, &content).broken(400_000),
        _ => ranged(request, &content),
    });
    let count = Count::default();
    store.acquire(&server.name().parse().unwrap(), &options(), &InThisProcess, &count).unwrap();
    assert_eq!(*count.0.lock().unwrap(), (blob.len() as u64, 1));
}

#[test]
fn two_processes_that_pull_the_same_blob_fetch_it_once() {
    let (_folder, store) = store();
    let blob = big();
    let sample = Sample::new("amd64", &[&blob]);
    let content = blob.clone();
    let server = Server::with_blob(&sample, &blob, move |request, _| {
        thread::sleep(Duration::from_millis(100));
        ranged(request, &content)
    });
    thread::scope(|scope| {
        for _ in 0..4 {
            // A store of its own each, as processes have.
            let store = Store::open(store.root()).unwrap();
            let name = server.name();
            scope.spawn(move || pull(&store, &name).unwrap());
        }
    });
    assert_eq!(server.requests(&Digest::of(&blob).to_string()).len(), 1);
}

#[test]
fn a_failing_layer_stops_the_others() {
    let (_folder, store) = store();
    let blob = big();
    let sample = Sample::new("amd64", &[b"broken", &blob]);
    let answer = honest(&sample);
    let bad = format!("/blobs/{}", Digest::of(b"broken"));
    let slow = format!("/blobs/{}", Digest::of(&blob));
    let server = Server::start(move |request, _| {
        if request.path.ends_with(&bad) {
            return reply(200, b"BROKEN");
        }
        if request.path.ends_with(&slow) {
            return ranged(request, &blob).broken(1000);
        }
        answer(request)
    });
    let said = sentence(pull(&store, &server.name()));
    assert!(said.contains("wrong digest"), "{said}");
    assert!(store.images().unwrap().is_empty());
}
