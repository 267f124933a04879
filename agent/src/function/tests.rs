//! The Runtime API over real loopback, an invented host at the other side.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;

use carrel_protocol::agent::{Stream, Token};
use rustix::net::sockopt;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpStream, UnixListener};
use tokio::task::{JoinHandle, LocalSet};

use super::*;
use crate::container::cgroup::Cgroup;

const ID: &str = "8476a536-e9f4-11e8-9739-2dfe598c3fcd";
const LIMIT: u64 = 1000;

/// A function whose cgroup is a folder, and a host.
struct Bench {
    folder: tempfile::TempDir,
    dialler: Dialler,
    function: Rc<Function>,
    next_port: u32,
}

/// What an HTTP client sees.
#[derive(Debug)]
struct Seen {
    status: u16,
    head: String,
    body: String,
}

fn test<F: Future<Output = ()>>(body: impl FnOnce(Bench) -> F) {
    // Longer than any test: what a busy machine takes is no INIT that is late.
    test_with(60_000, body);
}

fn test_with<F: Future<Output = ()>>(init_timeout_ms: u32, body: impl FnOnce(Bench) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let limited = async {
        tokio::time::timeout(Duration::from_secs(30), async { body(Bench::new(init_timeout_ms).await).await })
            .await
    };
    LocalSet::new().block_on(&runtime, limited).expect("it hangs");
}

impl Bench {
    async fn new(init_timeout_ms: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let group = folder.path().join("cgroup");
        std::fs::create_dir(&group).unwrap();
        let cgroup = Cgroup::at(&group);
        std::fs::write(group.join("cpu.max"), "7200 100000\n").unwrap();
        std::fs::write(group.join("memory.peak"), "12345\n").unwrap();
        let dialler = Dialler::Unix(folder.path().join("vsock"));
        let spec = agent::Function { init_timeout_ms, response_bytes: LIMIT };
        let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let function = Function::serve_at(anywhere, &spec, cgroup).await.unwrap();
        function.begin();
        Self { folder, dialler, function, next_port: 1 }
    }

    fn cgroup_file(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(self.folder.path().join("cgroup").join(name)).ok()
    }

    fn listen(&mut self) -> (Stream, UnixListener) {
        let port = self.next_port;
        self.next_port += 1;
        let path: PathBuf = self.folder.path().join(format!("vsock_{port}"));
        (Stream { port, token: Token([7; 16]) }, UnixListener::bind(path).unwrap())
    }

    /// The host's part of an invocation: how it was told to end, and what came over the response stream.
    fn invoke(&mut self, event: &str, timeout_ms: u32) -> JoinHandle<(Result<Invoked, Refusal>, String)> {
        let (event_stream, event_listener) = self.listen();
        let (response_stream, response_listener) = self.listen();
        let request = Invoke {
            id: ID.into(),
            event: event_stream,
            event_bytes: event.len().try_into().unwrap(),
            response: response_stream,
            timeout_ms,
            headers: BTreeMap::from([("Trace-Id".to_owned(), "Root=1".to_owned())]),
        };
        let (function, dialler, event) = (Rc::clone(&self.function), self.dialler.clone(), event.to_owned());
        spawn_local(async move {
            let host = async {
                let (mut socket, _) = event_listener.accept().await?;
                socket.read_exact(&mut [0; 16]).await?;
                socket.write_all(event.as_bytes()).await?;
                drop(socket);
                let (mut socket, _) = response_listener.accept().await?;
                let mut said = String::new();
                socket.read_exact(&mut [0; 16]).await?;
                socket.read_to_string(&mut said).await?;
                io::Result::Ok(said)
            };
            tokio::pin!(host);
            let invoking = function.invoke(&dialler, request);
            tokio::pin!(invoking);
            tokio::select! {
                said = &mut host => (invoking.await, said.unwrap()),
                invoked = &mut invoking => {
                    let said = if invoked.is_ok() { host.await.unwrap() } else { String::new() };
                    (invoked, said)
                }
            }
        })
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.function.address).await.unwrap()
    }

    async fn raw(&self, request: &str) -> Seen {
        let mut stream = self.connect().await;
        stream.write_all(request.as_bytes()).await.unwrap();
        read(&mut stream).await
    }

    async fn get(&self, path: &str) -> Seen {
        self.raw(&format!("GET /2018-06-01/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).await
    }

    async fn next(&self) -> Seen {
        self.get("runtime/invocation/next").await
    }

    async fn post(&self, path: &str, headers: &str, body: &str) -> Seen {
        self.raw(&format!(
            "POST /2018-06-01/runtime/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n{body}",
            body.len()
        ))
        .await
    }

    async fn respond(&self, body: &str) -> Seen {
        self.post(&format!("invocation/{ID}/response"), "Content-Type: application/json\r\n", body).await
    }
}

async fn read(stream: &mut TcpStream) -> Seen {
    let mut all = String::new();
    stream.read_to_string(&mut all).await.unwrap();
    let (head, body) = all.split_once("\r\n\r\n").expect("an HTTP response");
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Seen { status, head: head.to_lowercase(), body: body.to_owned() }
}

/// A header of an answer.
fn header<'a>(seen: &'a Seen, name: &str) -> Option<&'a str> {
    seen.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

fn now_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap();
    now.as_millis().try_into().unwrap()
}

#[test]
fn an_event_goes_in_and_its_answer_comes_out() {
    test(|mut bench| async move {
        assert_eq!(bench.function.environment()[0].0, "AWS_LAMBDA_RUNTIME_API");
        assert_eq!(bench.cgroup_file("cpu.max").unwrap(), "max", "INIT has all of the CPU");
        let host = bench.invoke(r#"{"n":1}"#, 5000);
        let before = now_ms();
        let seen = bench.next().await;
        assert_eq!((seen.status, seen.body.as_str()), (200, r#"{"n":1}"#));
        assert_eq!(bench.cgroup_file("cpu.max").unwrap(), "7200 100000", "INIT is over");
        for (name, value) in [
            ("lambda-runtime-aws-request-id", ID),
            ("lambda-runtime-invocation-id", ID),
            ("lambda-runtime-trace-id", "root=1"),
            ("content-type", "application/json"),
        ] {
            assert_eq!(header(&seen, name), Some(value), "{seen:?}");
        }
        let deadline: u64 = header(&seen, "lambda-runtime-deadline-ms").unwrap().parse().unwrap();
        assert!((before + 5000..=now_ms() + 5000).contains(&deadline), "{deadline}");
        let seen = bench.respond("[1]").await;
        assert_eq!((seen.status, seen.body.as_str()), (202, r#"{"status":"OK"}"#));
        let (invoked, said) = host.await.unwrap();
        let invoked = invoked.unwrap();
        assert_eq!(said, "[1]");
        assert_eq!(invoked.outcome, Outcome::Response { content_type: "application/json".into() });
        assert_eq!((invoked.response_bytes, invoked.memory_peak_bytes), (3, 12345));
        assert!(invoked.init_us.is_some() && invoked.duration_us > 0, "{invoked:?}");
        // A second event, to the same runtime: INIT is told once.
        let host = bench.invoke("2", 5000);
        assert_eq!(bench.next().await.body, "2");
        bench.respond("two").await;
        let (invoked, said) = host.await.unwrap();
        assert_eq!((said.as_str(), invoked.unwrap().init_us), ("two", None));
        assert_eq!(bench.cgroup_file("cgroup.kill"), None);
    });
}

#[test]
fn an_error_is_passed_on_with_its_type() {
    test(|mut bench| async move {
        let host = bench.invoke("{}", 5000);
        bench.next().await;
        let headers = "Lambda-Runtime-Function-Error-Type: Function.Odd\r\n";
        let seen = bench.post(&format!("invocation/{ID}/error"), headers, "{\"errorType\":\"Odd\"}").await;
        assert_eq!(seen.status, 202);
        let (invoked, said) = host.await.unwrap();
        assert_eq!(invoked.unwrap().outcome, Outcome::Error { error_type: "Function.Odd".into() });
        assert_eq!(said, "{\"errorType\":\"Odd\"}");
    });
}

#[test]
fn an_init_error_ends_the_first_invocation_even_if_it_came_before() {
    test(|mut bench| async move {
        let headers = "Lambda-Runtime-Function-Error-Type: Runtime.ImportModuleError\r\n";
        assert_eq!(bench.post("init/error", headers, "no module").await.status, 202);
        let again = bench.post("init/error", headers, "no module").await;
        assert_eq!(again.status, 403);
        assert!(
            again.body.contains("InvalidStateTransition") && again.body.contains("InitError"),
            "{again:?}"
        );
        assert_eq!(bench.next().await.status, 403);
        let (invoked, said) = bench.invoke("{}", 5000).await.unwrap();
        let invoked = invoked.unwrap();
        let outcome = Outcome::InitError { error_type: "Runtime.ImportModuleError".into() };
        assert_eq!((invoked.outcome, invoked.duration_us, said.as_str()), (outcome, 0, "no module"));
    });
}

#[test]
fn what_is_out_of_turn_is_refused_as_on_lambda() {
    test(|mut bench| async move {
        let refused = async |path: &str, status: u16, kind: &str| {
            let seen = bench.post(path, "", "x").await;
            assert_eq!(seen.status, status, "{path}: {seen:?}");
            assert!(seen.body.contains(&format!("\"errorType\":\"{kind}\"")), "{path}: {seen:?}");
        };
        let response = format!("invocation/{ID}/response");
        refused(&response, 400, "InvalidRequestID").await;
        refused("invocation/next", 405, "MethodNotAllowed").await;
        refused("nowhere", 404, "NotFound").await;
        assert_eq!(bench.get("../2020-01-01/extension/register").await.status, 404);
        assert_eq!(bench.get("ping").await.body, "pong");
        let host = bench.invoke("{}", 5000);
        bench.next().await;
        let refused = async |path: &str, status: u16, kind: &str| {
            let seen = bench.post(path, "", "x").await;
            assert_eq!((seen.status, seen.body.contains(kind)), (status, true), "{path}: {seen:?}");
        };
        refused("invocation/another/response", 400, "InvalidRequestID").await;
        refused("init/error", 403, "InvalidStateTransition").await;
        assert_eq!(bench.next().await.status, 403, "one event at a time");
        let mode = "Lambda-Runtime-Function-Response-Mode: guessing\r\n";
        assert_eq!(bench.post(&response, mode, "x").await.status, 400);
        assert_eq!(bench.respond("1").await.status, 202);
        host.await.unwrap().0.unwrap();
        refused(&response, 403, "InvalidStateTransition").await;
        refused(&format!("invocation/{ID}/error"), 403, "InvalidStateTransition").await;
    });
}

#[test]
fn an_answer_that_is_too_large_is_cut_whether_its_length_is_said_or_not() {
    test(|mut bench| async move {
        let large = "x".repeat(1001);
        let host = bench.invoke("{}", 5000);
        bench.next().await;
        let seen = bench.respond(&large).await;
        assert_eq!(seen.status, 413, "{seen:?}");
        assert!(seen.body.contains("Exceeded maximum allowed payload size (1000 bytes)."), "{seen:?}");
        let (invoked, said) = host.await.unwrap();
        assert_eq!(invoked.unwrap().outcome, Outcome::ResponseTooLarge { bytes: 1001 });
        assert_eq!(said, "");
        let host = bench.invoke("{}", 5000);
        bench.next().await;
        let chunked = format!(
            "POST /2018-06-01/runtime/invocation/{ID}/response HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
             Transfer-Encoding: chunked\r\n\r\n258\r\n{0}\r\n258\r\n{0}\r\n0\r\n\r\n",
            "y".repeat(600)
        );
        assert_eq!(bench.raw(&chunked).await.status, 413);
        assert_eq!(host.await.unwrap().0.unwrap().outcome, Outcome::ResponseTooLarge { bytes: 1200 });
    });
}

/// Begins a streamed response.
async fn stream(bench: &Bench) -> TcpStream {
    let mut stream = bench.connect().await;
    let head = format!(
        "POST /2018-06-01/runtime/invocation/{ID}/response HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
         Content-Type: text/plain\r\nLambda-Runtime-Function-Response-Mode: streaming\r\n\
         Trailer: Lambda-Runtime-Function-Error-Type, Lambda-Runtime-Function-Error-Body\r\n\
         Transfer-Encoding: chunked\r\n\r\n6\r\nfirst \r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

#[test]
fn a_streamed_answer_may_be_larger() {
    test(|mut bench| async move {
        let host = bench.invoke("{}", 5000);
        bench.next().await;
        let mut client = stream(&bench).await;
        let more = format!("7d0\r\n{}\r\n0\r\n\r\n", "z".repeat(2000));
        client.write_all(more.as_bytes()).await.unwrap();
        assert_eq!(read(&mut client).await.status, 202);
        let (invoked, said) = host.await.unwrap();
        let invoked = invoked.unwrap();
        assert_eq!(invoked.outcome, Outcome::Response { content_type: "text/plain".into() });
        assert_eq!((said.len(), invoked.response_bytes), (2006, 2006));
    });
}

#[test]
fn a_stream_that_fails_says_so_in_its_trailers() {
    test(|mut bench| async move {
        let host = bench.invoke("{}", 5000);
        bench.next().await;
        let mut client = stream(&bench).await;
        let end = "0\r\nLambda-Runtime-Function-Error-Type: Function.Halfway\r\n\
                   Lambda-Runtime-Function-Error-Body: eyJlIjoxfQ==\r\n\r\n";
        client.write_all(end.as_bytes()).await.unwrap();
        assert_eq!(read(&mut client).await.status, 202);
        let (invoked, said) = host.await.unwrap();
        assert_eq!(invoked.unwrap().outcome, Outcome::Error { error_type: "Function.Halfway".into() });
        assert_eq!(said, "first {\"e\":1}");
    });
}

#[test]
fn a_stream_that_breaks_off_is_an_error() {
    test(|mut bench| async move {
        let host = bench.invoke("{}", 5000);
        bench.next().await;
        let client = stream(&bench).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(client);
        let (invoked, said) = host.await.unwrap();
        assert_eq!(
            invoked.unwrap().outcome,
            Outcome::Error { error_type: "Runtime.TruncatedResponse".into() }
        );
        assert_eq!(said, "first ");
    });
}

#[test]
fn an_answer_that_broke_off_before_it_counted_can_be_posted_again() {
    test(|mut bench| async move {
        let host = bench.invoke("{}", 5000);
        bench.next().await;
        let mut client = bench.connect().await;
        let half = format!(
            "POST /2018-06-01/runtime/invocation/{ID}/response HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf"
        );
        client.write_all(half.as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(bench.respond("meanwhile").await.status, 403);
        drop(client);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(bench.respond("whole").await.status, 202);
        assert_eq!(host.await.unwrap().1, "whole");
    });
}

#[test]
fn a_runtime_that_never_asks_is_killed_after_init() {
    test_with(300, |mut bench| async move {
        let (invoked, _) = bench.invoke("{}", 60_000).await.unwrap();
        let invoked = invoked.unwrap();
        assert_eq!((invoked.outcome, invoked.duration_us), (Outcome::InitTimedOut, 0));
        assert!(invoked.init_us.unwrap() >= 300_000, "{:?}", invoked.init_us);
        assert_eq!(bench.cgroup_file("cgroup.kill").as_deref(), Some("1"));
    });
}

#[test]
fn a_runtime_that_never_answers_is_killed_at_its_timeout() {
    test(|mut bench| async move {
        let host = bench.invoke("{}", 200);
        bench.next().await;
        let invoked = host.await.unwrap().0.unwrap();
        assert_eq!(invoked.outcome, Outcome::TimedOut);
        assert!((200_000..2_000_000).contains(&invoked.duration_us), "{}", invoked.duration_us);
        assert_eq!(bench.cgroup_file("cgroup.kill").as_deref(), Some("1"));
    });
}

#[test]
fn a_runtime_that_never_comes_back_for_the_next_event_is_killed_too() {
    test(|mut bench| async move {
        let host = bench.invoke("1", 200);
        bench.next().await;
        bench.respond("1").await;
        host.await.unwrap().0.unwrap();
        let invoked = bench.invoke("2", 200).await.unwrap().0.unwrap();
        assert_eq!(invoked.outcome, Outcome::TimedOut);
        assert_eq!(bench.cgroup_file("cgroup.kill").as_deref(), Some("1"));
    });
}

#[test]
fn a_runtime_that_ends_is_reported_and_its_end_waits_for_that() {
    test(|mut bench| async move {
        let host = bench.invoke("{}", 60_000);
        bench.next().await;
        bench.function.exited(ExitStatus::Code(9), false).await;
        assert!(bench.function.exchange.turn().is_some(), "the invocation is over when this returns");
        let invoked = host.await.unwrap().0.unwrap();
        assert_eq!(invoked.outcome, Outcome::Exited { status: ExitStatus::Code(9), out_of_memory: false });
        assert!(invoked.duration_us > 0);
        // And all later ones.
        let invoked = bench.invoke("{}", 60_000).await.unwrap().0.unwrap();
        assert_eq!(invoked.outcome, Outcome::Exited { status: ExitStatus::Code(9), out_of_memory: false });
        assert_eq!(invoked.duration_us, 0);
    });
}

#[test]
fn a_runtime_that_answers_and_ends_at_once_has_answered() {
    test(|mut bench| async move {
        let host = bench.invoke("{}", 60_000);
        bench.next().await;
        let client = bench.connect().await;
        let post = format!(
            "POST /2018-06-01/runtime/invocation/{ID}/response HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nok"
        );
        // In the socket, and not read yet, when the end is told.
        assert_eq!(client.try_write(post.as_bytes()).unwrap(), post.len());
        bench.function.exited(ExitStatus::Code(0), false).await;
        let (invoked, said) = host.await.unwrap();
        assert!(matches!(invoked.unwrap().outcome, Outcome::Response { .. }));
        assert_eq!(said, "ok");
    });
}

#[test]
fn a_second_invocation_meanwhile_is_refused() {
    test(|mut bench| async move {
        let host = bench.invoke("1", 60_000);
        bench.next().await;
        let refusal = bench.invoke("2", 60_000).await.unwrap().0.unwrap_err();
        assert_eq!(refusal.failure, Failure::BadRequest);
        bench.respond("1").await;
        host.await.unwrap().0.unwrap();
    });
}

#[test]
fn an_event_that_lies_about_its_size_is_refused() {
    test(|mut bench| async move {
        for (bytes, says) in [(EVENT_BYTES + 1, "too large"), (7, "announced")] {
            let (event, listener) = bench.listen();
            let (response, _kept) = bench.listen();
            let request = Invoke {
                id: ID.into(),
                event,
                event_bytes: bytes,
                response,
                timeout_ms: 1000,
                headers: BTreeMap::new(),
            };
            let host = spawn_local(async move {
                let (mut socket, _) = listener.accept().await.unwrap();
                socket.read_exact(&mut [0; 16]).await.unwrap();
                socket.write_all(b"12345").await.unwrap();
            });
            let refusal = bench.function.invoke(&bench.dialler, request).await.unwrap_err();
            assert_eq!(refusal.failure, Failure::BadRequest);
            assert!(refusal.message.contains(says), "{refusal:?}");
            host.abort();
        }
    });
}

#[test]
fn headers_without_end_and_connections_without_number_cost_the_workload_alone() {
    test(|mut bench| async move {
        let long =
            format!("GET /2018-06-01/ping HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "x".repeat(200 << 10));
        let mut client = bench.connect().await;
        // The answer may come, and the connection end, before all was sent.
        let _ = client.write_all(long.as_bytes()).await;
        let mut seen = Vec::new();
        let _ = client.read_to_end(&mut seen).await;
        assert!(!seen.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&seen));
        let many = format!("GET /2018-06-01/ping HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(65));
        assert_eq!(bench.raw(&many).await.status, 431);
        // All connections silent: the next one waits, and is served when one of them goes.
        let mut silent = Vec::new();
        for _ in 0..16 {
            silent.push(bench.connect().await);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        let mut waiting = bench.connect().await;
        waiting.write_all(b"GET /2018-06-01/ping HTTP/1.1\r\nConnection: close\r\n\r\n").await.unwrap();
        let answered = tokio::time::timeout(Duration::from_millis(200), waiting.readable()).await;
        assert!(answered.is_err(), "a seventeenth connection is served");
        silent.pop();
        assert_eq!(read(&mut waiting).await.body, "pong");
        drop(silent);
        let host = bench.invoke("{}", 5000);
        assert_eq!(bench.next().await.status, 200);
        bench.respond("fine").await;
        assert_eq!(host.await.unwrap().1, "fine");
    });
}

#[test]
fn a_client_that_stops_waiting_takes_no_event_along() {
    test(|mut bench| async move {
        let mut client = bench.connect().await;
        client
            .write_all(b"GET /2018-06-01/runtime/invocation/next HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
        drop(client);
        tokio::time::sleep(Duration::from_millis(50)).await;
        let host = bench.invoke("kept", 5000);
        assert_eq!(bench.next().await.body, "kept");
        bench.respond("1").await;
        host.await.unwrap().0.unwrap();
    });
}

#[test]
fn a_request_for_an_event_outlasts_the_cloning_and_init_was_the_templates() {
    test(|mut bench| async move {
        let function = Rc::clone(&bench.function);
        let ready = spawn_local(async move { function.ready().await });
        tokio::task::yield_now().await;
        assert!(!ready.is_finished(), "the runtime is still loading");
        let mut client = bench.connect().await;
        let next =
            b"GET /2018-06-01/runtime/invocation/next HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        client.write_all(next).await.unwrap();
        assert!(ready.await.unwrap());
        bench.function.cloned();
        // Nothing was answered meanwhile.
        assert!(tokio::time::timeout(Duration::from_millis(50), client.readable()).await.is_err());
        let host = bench.invoke("of the clone", 5000);
        assert_eq!(read(&mut client).await.body, "of the clone");
        bench.respond("1").await;
        let invoked = host.await.unwrap().0.unwrap();
        assert_eq!(invoked.init_us, None);
    });
}

#[test]
fn an_init_that_a_clone_goes_on_with_has_all_of_its_time() {
    test(|mut bench| async move {
        // INIT may take 300 ms; the template used up most of that.
        tokio::time::sleep(Duration::from_millis(180)).await;
        bench.function.cloned();
        let host = bench.invoke("{}", 5000);
        tokio::time::sleep(Duration::from_millis(150)).await;
        assert_eq!(bench.next().await.status, 200);
        bench.respond("1").await;
        let invoked = host.await.unwrap().0.unwrap();
        assert!(matches!(invoked.outcome, Outcome::Response { .. }));
        let init = invoked.init_us.unwrap();
        assert!((150_000..330_000).contains(&init), "{init}");
    });
}

#[test]
fn a_runtime_that_ends_or_fails_is_never_ready() {
    test(|bench| async move {
        bench.post("init/error", "", "{}").await;
        assert!(!bench.function.ready().await);
    });
    test(|bench| async move {
        bench.function.exited(ExitStatus::Code(1), false).await;
        assert!(!bench.function.ready().await);
    });
}
