//! The call over a real socket; the host is the outbox, the kernel an invented one.

use std::future::Future;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use super::*;
use crate::identity::tests::Invented;

struct Bench {
    hook: Hook,
    outgoing: mpsc::UnboundedReceiver<FromAgent>,
    folder: tempfile::TempDir,
}

struct Program(BufReader<UnixStream>);

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (outbox, outgoing) = mpsc::unbounded_channel();
        let guest = Rc::new(Invented::new());
        let hook =
            Hook::serve(&folder.path().join("0"), ProcessId(7), "template".into(), guest, outbox).unwrap();
        Self { hook, outgoing, folder }
    }

    async fn program(&self) -> Program {
        Program(BufReader::new(UnixStream::connect(self.folder.path().join("0/clone.sock")).await.unwrap()))
    }

    async fn told(&mut self) -> FromAgent {
        self.outgoing.recv().await.unwrap()
    }
}

impl Program {
    async fn say(&mut self, words: &str) {
        self.0.write_all(words.as_bytes()).await.unwrap();
    }

    async fn line(&mut self) -> String {
        let mut line = String::new();
        // With something unread on the agent's side the end is a reset.
        if let Err(error) = self.0.read_line(&mut line).await {
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
        line
    }

    async fn cloned(&mut self) -> Cloned {
        serde_json::from_str(&self.line().await).unwrap()
    }

    /// What is there already.
    fn now(&self) -> Option<Cloned> {
        let mut line = [0; 1024];
        let (read, _) =
            rustix::net::recv(self.0.get_ref(), &mut line, rustix::net::RecvFlags::DONTWAIT).ok()?;
        serde_json::from_slice(&line[..read]).ok()
    }
}

fn test(work: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let limited = async { tokio::time::timeout(Duration::from_secs(30), work).await };
    tokio::task::LocalSet::new().block_on(&runtime, limited).expect("it hangs");
}

fn ready() -> FromAgent {
    Ready { process: ProcessId(7) }.into()
}

#[test]
fn who_asked_while_a_room_was_about_to_sleep_is_answered_when_it_stays_awake() {
    test(async {
        let bench = Bench::new();
        let (mut first, mut second) = (bench.program().await, bench.program().await);
        bench.hook.sleep();
        first.say("subscribe\n").await;
        second.say("ready\n").await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(first.now().is_none());
        bench.hook.stay();
        assert_eq!(first.cloned().await.id, "template");
        // Once, and whoever waits to be cloned waits on.
        bench.hook.sleep();
        bench.hook.stay();
        assert!(first.now().is_none() && second.now().is_none());
        bench.hook.cloned("clone");
        assert_eq!((first.cloned().await.id, second.cloned().await.id), ("clone".into(), "clone".into()));
    });
}

#[test]
fn who_asks_a_room_that_sleeps_is_answered_when_it_knows_who_it_is() {
    test(async {
        let bench = Bench::new();
        let (mut first, mut second) = (bench.program().await, bench.program().await);
        first.say("subscribe\n").await;
        assert_eq!(first.cloned().await.id, "template");
        bench.hook.sleep();
        first.say("subscribe\n").await;
        second.say("ready\n").await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!((first.now(), second.now()), (None, None));
        bench.hook.cloned("clone");
        for program in [&mut first, &mut second] {
            assert_eq!(program.cloned().await.id, "clone");
            assert_eq!(program.now(), None, "once");
        }
        second.say("subscribe\n").await;
        assert_eq!(second.cloned().await.id, "clone");
    });
}

#[test]
fn who_is_ready_hears_in_the_clone_who_it_is() {
    test(async {
        let mut bench = Bench::new();
        let mut program = bench.program().await;
        program.say("rea").await;
        program.say("dy\n").await;
        assert_eq!(bench.told().await, ready());
        assert_eq!(program.now(), None);
        bench.hook.cloned("clone-1");
        let Cloned { id, realtime_ns, entropy } = program.cloned().await;
        assert_eq!((id.as_str(), realtime_ns), ("clone-1", 5_000));
        // A clone of the clone is told on the same connection.
        bench.hook.cloned("clone-2");
        let second = program.cloned().await;
        assert_eq!(second.id, "clone-2");
        assert_ne!(second.entropy, entropy);
    });
}

#[test]
fn a_line_is_a_json_object_with_the_entropy_in_hexadecimal() {
    test(async {
        let bench = Bench::new();
        let mut program = bench.program().await;
        program.say("subscribe\n").await;
        let line = program.line().await;
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        let fields: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(fields, ["entropy", "id", "realtime_ns"]);
        let entropy = line["entropy"].as_str().unwrap();
        assert!(entropy.len() == 128 && entropy.bytes().all(|digit| digit.is_ascii_hexdigit()));
    });
}

#[test]
fn every_subscriber_is_told_before_it_runs_on_and_each_something_else() {
    test(async {
        let bench = Bench::new();
        let mut programs = [bench.program().await, bench.program().await, bench.program().await];
        let mut seen = Vec::new();
        for program in &mut programs {
            program.say("subscribe\r\n").await;
            let who = program.cloned().await;
            assert_eq!(who.id, "template");
            seen.push(who.entropy);
        }
        bench.hook.cloned("clone");
        // No task of the agent's ran since: it is in the socket already.
        for program in &programs {
            let who = program.now().unwrap();
            assert_eq!(who.id, "clone");
            seen.push(who.entropy);
        }
        for (n, entropy) in seen.iter().enumerate() {
            assert!(!seen[n + 1..].contains(entropy));
        }
    });
}

#[test]
fn words_that_were_on_their_way_when_the_room_froze_are_answered_by_the_clone() {
    test(async {
        let mut bench = Bench::new();
        let mut late = bench.program().await;
        // Written, and not read by the agent.
        assert_eq!(late.0.get_ref().try_write(b"subscribe\nready\n").unwrap(), 16);
        bench.hook.cloned("clone");
        assert_eq!(late.cloned().await.id, "clone");
        // It asks to be cloned, and has been.
        assert_eq!(late.cloned().await.id, "clone");
        assert_eq!(bench.told().await, ready());
    });
}

#[test]
fn the_host_hears_of_a_container_once() {
    test(async {
        let mut bench = Bench::new();
        let (mut one, mut other) = (bench.program().await, bench.program().await);
        one.say("ready\nready\n").await;
        other.say("ready\n").await;
        bench.hook.announce();
        assert_eq!(bench.told().await, ready());
        one.say("subscribe\n").await;
        one.cloned().await;
        other.say("subscribe\n").await;
        other.cloned().await;
        assert!(bench.outgoing.try_recv().is_err());
    });
}

#[test]
fn what_is_no_line_of_the_calls_ends_the_connection_and_nothing_else() {
    test(async {
        let mut bench = Bench::new();
        for wrong in ["hello\n", "\n", "READY\n", &"x".repeat(200), "\u{0}\n"] {
            let mut program = bench.program().await;
            program.say(wrong).await;
            let answer = program.line().await;
            assert!(answer.is_empty() || answer.contains("say 'ready' or 'subscribe'"), "{wrong}: {answer}");
            assert_eq!(program.line().await, "");
        }
        let mut program = bench.program().await;
        program.say("ready\n").await;
        assert_eq!(bench.told().await, ready());
    });
}

#[test]
fn who_does_not_read_or_is_gone_is_not_waited_for() {
    test(async {
        let bench = Bench::new();
        let mut deaf = bench.program().await;
        deaf.say("subscribe\n").await;
        let mut gone = bench.program().await;
        gone.say("subscribe\n").await;
        let mut good = bench.program().await;
        good.say("subscribe\n").await;
        good.cloned().await;
        drop(gone);
        for n in 0..3000 {
            bench.hook.cloned(&format!("clone-{n}"));
            assert_eq!(good.cloned().await.id, format!("clone-{n}"));
        }
        tokio::task::yield_now().await;
        assert_eq!(bench.hook.call.listening.borrow().len(), 1);
        // What the deaf one was told before ends with the connection's end.
        while !deaf.line().await.is_empty() {}
    });
}

#[test]
fn connections_without_number_wait_in_the_kernel() {
    test(async {
        let mut bench = Bench::new();
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS {
            silent.push(bench.program().await);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        let mut waiting = bench.program().await;
        waiting.say("ready\n").await;
        let told = tokio::time::timeout(Duration::from_millis(100), bench.told()).await;
        assert!(told.is_err(), "one connection too many is served");
        silent.pop();
        assert_eq!(bench.told().await, ready());
    });
}

/// The managed runtime's module with a runtime client that takes events from its standard input; the interpreter begins with a generator in the same
/// state each time, as clones of one template do.
struct Interpreter {
    _modules: tempfile::TempDir,
    child: std::process::Child,
    said: std::io::BufReader<std::process::ChildStdout>,
}

impl Interpreter {
    fn begin(socket: &Path) -> Self {
        let modules = tempfile::tempdir().unwrap();
        let package = modules.path().join("awslambdaric");
        fs::create_dir(&package).unwrap();
        let write = |name: &str, text: &str| fs::write(package.join(name), text).unwrap();
        write("__init__.py", "");
        write(
            "lambda_runtime_client.py",
            "class LambdaRuntimeClient:\n    def wait_next_invocation(self):\n        return input()\n",
        );
        write(
            "lambda_runtime_hooks_runner.py",
            "def run_before_snapshot():\n    print('before', flush=True)\ndef run_after_restore():\n    print('after', flush=True)\n",
        );
        write(
            "__main__.py",
            "import random, ssl, tempfile\nrandom.seed(1)\ntempfile.gettempdir()\nfrom .lambda_runtime_client import LambdaRuntimeClient\n\
             def main(arguments):\n    assert arguments == ['carrel', 'handler']\n    client = LambdaRuntimeClient()\n    \
             while client.wait_next_invocation() != 'end':\n        print(random.random(), flush=True)\n",
        );
        let runtimes = Path::new(env!("CARGO_MANIFEST_DIR")).join("../rootfs/runtimes");
        let program = format!(
            "import carrel_clone as c; c.SOCKET = {:?}; c.main(['carrel', 'handler'])",
            socket.display().to_string()
        );
        let mut child = std::process::Command::new("python3")
            .args(["-B", "-c", &program])
            .env("PYTHONPATH", format!("{}:{}", modules.path().display(), runtimes.display()))
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let said = std::io::BufReader::new(child.stdout.take().unwrap());
        Self { _modules: modules, child, said }
    }

    /// Its next line; the agent's tasks go on meanwhile.
    async fn line(&mut self) -> String {
        use std::os::fd::AsFd;
        let fd = self.said.get_ref().as_fd().try_clone_to_owned().unwrap();
        let fd = crate::socket::Socket::new(fd).unwrap();
        let (mut line, mut byte) = (Vec::new(), [0]);
        while fd.read(&mut byte).await.unwrap() == 1 && byte != *b"\n" {
            line.push(byte[0]);
        }
        String::from_utf8(line).unwrap()
    }

    async fn event(&mut self) -> String {
        std::io::Write::write_all(self.child.stdin.as_mut().unwrap(), b"event\n").unwrap();
        self.line().await
    }
}

#[test]
fn clones_of_a_python_function_draw_different_numbers_and_call_what_was_registered() {
    test(async {
        let bench = Bench::new();
        let socket = bench.folder.path().join("0/clone.sock");
        let mut clones = [Interpreter::begin(&socket), Interpreter::begin(&socket)];
        let mut drawn = Vec::new();
        for clone in &mut clones {
            assert_eq!(clone.line().await, "before");
            drawn.push(clone.event().await);
        }
        assert_eq!(drawn[0], drawn[1], "they begin alike");
        bench.hook.cloned("clone");
        let mut drawn = Vec::new();
        for clone in &mut clones {
            assert_eq!(clone.event().await, "after", "before the handler sees the event");
            drawn.push(clone.line().await);
            drawn.push(clone.event().await);
        }
        for (n, number) in drawn.iter().enumerate() {
            assert!(number.parse::<f64>().is_ok() && !drawn[n + 1..].contains(number), "{drawn:?}");
        }
        for clone in &mut clones {
            std::io::Write::write_all(clone.child.stdin.as_mut().unwrap(), b"end\n").unwrap();
            assert!(clone.child.wait().unwrap().success());
        }
    });
}

#[test]
fn a_python_function_that_is_not_to_be_cloned_begins_as_ever() {
    test(async {
        let mut alone = Interpreter::begin(Path::new("/nonexistent/clone.sock"));
        assert!(alone.event().await.parse::<f64>().is_ok());
        drop(alone.child.stdin.take());
        alone.child.wait().unwrap();
    });
}
