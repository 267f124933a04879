//! A room's sleep and awakening: the host is this test, on Unix sockets; the kernel an invented one; the container a folder for a cgroup and
//! a process that is this test.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream as Blocking;
use std::path::Path;

use carrel_protocol::agent::*;
use carrel_protocol::{Decoder, Message};
use rustix::process::getpid;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

use super::*;
use crate::container::report::{self, Report, Reporter};
use crate::fork::{self, Separate};
use crate::identity::tests::{Calls, Invented, identity};
use crate::socket::Socket;
use crate::streams::{Connections, Pipes};
use crate::usage::Meter;

const PROCESS: ProcessId = ProcessId(0);
const CONTAINER: ContainerId = ContainerId(0);

struct Bench {
    folder: TempDir,
    control: Conn,
    /// Of the control port.
    listener: UnixListener,
    calls: Calls,
    room: Rc<Room>,
    life: JoinHandle<()>,
}

/// The host's end of a control connection.
struct Conn {
    socket: UnixStream,
    decoder: Decoder,
    read: Vec<u8>,
}

impl Conn {
    fn new(socket: UnixStream) -> Self {
        Self { socket, decoder: Decoder::default(), read: Vec::new() }
    }

    async fn say(&mut self, message: impl Into<FromHost>) {
        self.socket.write_all(&message.into().encode().unwrap()).await.unwrap();
    }

    async fn hear(&mut self) -> FromAgent {
        loop {
            let mut rest = self.read.as_slice();
            let message = self.decoder.push(&mut rest).unwrap();
            self.read = rest.to_vec();
            if let Some(message) = message {
                return message;
            }
            if self.read.is_empty() {
                let read = self.socket.read_buf(&mut self.read).await.unwrap();
                assert!(read > 0, "the agent closed the connection");
            }
        }
    }

    async fn silent(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(300), self.hear()).await.is_err()
    }

    async fn freeze(&mut self) {
        self.say(Freeze {}).await;
        assert_eq!(self.hear().await, Frozen {}.into());
    }

    async fn refused(&mut self, request: Request) -> String {
        let FromAgent::Failed(failed) = self.hear().await else { panic!("no refusal") };
        assert_eq!((failed.request, failed.failure), (request, Failure::BadRequest));
        failed.message
    }

    async fn awake(&mut self) -> Awake {
        let said = self.hear().await;
        let FromAgent::Awake(awake) = said else { panic!("{said:?}") };
        awake
    }
}

fn welcome(id: &str, realtime_ns: u64, entropy: u8) -> Welcome {
    Welcome { version: VERSION, identity: identity(id, realtime_ns, entropy) }
}

fn test<F: Future<Output = ()>>(body: impl FnOnce(Bench) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let limited =
        async { tokio::time::timeout(Duration::from_secs(60), async { body(Bench::new()).await }).await };
    tokio::task::LocalSet::new().block_on(&runtime, limited).expect("it hangs");
}

impl Bench {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        std::fs::create_dir(folder.path().join("cgroup")).unwrap();
        let write =
            |name: &str, what: &str| std::fs::write(folder.path().join("cgroup").join(name), what).unwrap();
        write("cgroup.events", "populated 1\nfrozen 1\n");
        write("cgroup.freeze", "0");
        write("cpu.stat", "user_usec 20\n");
        let guest = Invented::watching(folder.path().join("cgroup/cgroup.freeze"));
        let calls = Rc::clone(&guest.calls);
        let base = folder.path().join("vsock");
        let host = Host {
            dialler: Dialler::Unix(base.clone()),
            booted_us: 77,
            containers: folder.path().join("containers"),
            hooks: folder.path().join("hooks"),
            cgroups: cgroup::Tree::at(folder.path()),
            guest: Rc::new(guest),
            id: "template".into(),
            hostname: "template".into(),
            disk: None,
        };
        let listener = UnixListener::bind(format!("{}_{CONTROL_PORT}", base.display())).unwrap();
        let (ours, theirs) = Blocking::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let (room, outgoing) = Room::new(host);
        let control = Control::new(Socket::new(theirs.into()).unwrap());
        let living = Rc::clone(&room);
        let life = spawn_local(async move { living.live_on(control, outgoing).await });
        let control = Conn::new(UnixStream::from_std(ours).unwrap());
        Self { folder, control, listener, calls, room, life }
    }

    fn frozen(&self) -> bool {
        match std::fs::read_to_string(self.folder.path().join("cgroup/cgroup.freeze")).unwrap().as_str() {
            "1" => true,
            "0" => false,
            other => panic!("{other}"),
        }
    }

    fn cgroup_file(&self, name: &str) -> PathBuf {
        self.folder.path().join("cgroup").join(name)
    }

    /// A running container that takes the room's name.
    fn container(&self, hook: bool) -> Rc<Container> {
        let cgroup = Cgroup::at(&self.folder.path().join("cgroup"));
        let mut meter = Meter::new(cgroup.clone());
        meter.begin(Instant::now());
        let (guest, outbox) = (Rc::clone(&self.room.host.guest), self.room.outbox.clone());
        let hook = hook.then(|| {
            Rc::new(
                Hook::serve(&self.room.host.hooks.join("0"), PROCESS, "template".into(), guest, outbox)
                    .unwrap(),
            )
        });
        let this = rustix::process::pidfd_open(getpid(), rustix::process::PidfdFlags::empty()).unwrap();
        let container = Rc::new(Container {
            init: Some(this),
            hostname: RefCell::new("template".into()),
            takes_rooms_name: true,
            cgroup,
            meter: meter.into(),
            function: None,
            hook,
        });
        self.room.containers.borrow_mut().insert(CONTAINER, State::Running(Rc::clone(&container)));
        container
    }

    /// Streams from port `first` on, agreed on.
    fn agree(&self, first: u32) -> (Stdio, [std::os::unix::net::UnixListener; 3]) {
        let listen = |port: u32| {
            let path = format!("{}_{port}", self.folder.path().join("vsock").display());
            std::os::unix::net::UnixListener::bind(path).unwrap()
        };
        let stream = |port| Some(Stream { port, token: Token([3; 16]) });
        let stdio = Stdio {
            stdin: stream(first),
            stdout: stream(first + 1),
            stderr: stream(first + 2),
            terminal: None,
        };
        (stdio, [first, first + 1, first + 2].map(listen))
    }

    /// The container's first process, which is in the test's hands: its streams at the host, its own ends of them, and its supervisor's word.
    async fn process(&self, container: &Rc<Container>) -> ([Blocking; 3], [std::fs::File; 3], Reporter) {
        let (stdio, listeners) = self.agree(1);
        let connections = Connections::dial(&self.room.host.dialler, &stdio).await.unwrap();
        let hosts = listeners.map(|listener| accept(&listener));
        let (pipes, ends) = Pipes::new(&stdio).unwrap();
        let pumps = connections.through_pipes(pipes).unwrap();
        let (reports, reporter) = report::pair().unwrap();
        let (room, container) = (Rc::clone(&self.room), Rc::clone(container));
        let supervisor = fork::fork(Separate::default(), || 0).unwrap();
        spawn_local(async move {
            let live = Live::of(reports, pumps);
            let (status, out_of_memory) = room.accompany(PROCESS, &container, supervisor, live).await;
            room.containers.borrow_mut().insert(CONTAINER, State::Ended(container));
            room.tell(Exited { process: PROCESS, status, out_of_memory });
        });
        (hosts, ends.map(|end| end.unwrap().into()), reporter)
    }

    /// The connection is lost, as a clone finds it; the agent dials.
    async fn lose(&mut self) -> Conn {
        let (nowhere, _) = Blocking::pair().unwrap();
        nowhere.set_nonblocking(true).unwrap();
        self.control = Conn::new(UnixStream::from_std(nowhere).unwrap());
        Conn::new(self.listener.accept().await.unwrap().0)
    }

    /// All of a clone's birth.
    async fn born(&mut self, welcome: Welcome) -> Awake {
        self.control = self.lose().await;
        assert!(matches!(self.control.hear().await, FromAgent::Hello(hello) if hello.clone));
        self.control.say(welcome).await;
        self.control.awake().await
    }
}

fn accept(listener: &std::os::unix::net::UnixListener) -> Blocking {
    let (mut connection, _) = listener.accept().unwrap();
    connection.read_exact(&mut [0; 16]).unwrap();
    connection
}

/// What blocks, beside the tasks.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || sender.send(work()).is_ok());
    receiver.await.unwrap()
}

async fn rest(mut from: Blocking) -> String {
    aside(move || {
        let mut all = String::new();
        from.read_to_string(&mut all).unwrap();
        all
    })
    .await
}

#[test]
fn a_clone_is_itself_before_anything_runs() {
    test(|mut bench| async move {
        bench.container(false);
        bench.control.freeze().await;
        assert!(bench.frozen() && bench.calls.borrow().is_empty());
        bench.control = bench.lose().await;
        let FromAgent::Hello(hello) = bench.control.hear().await else { panic!("no hello") };
        assert_eq!((hello.version, hello.booted_us, hello.clone), (VERSION, 77, true));
        // Nothing happens until it knows who it is.
        assert!(bench.control.silent().await && bench.frozen() && bench.calls.borrow().is_empty());
        // What follows the welcome is carried out after it.
        let mut both = FromHost::from(welcome("clone-1", 5_900, 1)).encode().unwrap();
        both.extend(FromHost::from(ReportUsage { every_ms: None }).encode().unwrap());
        bench.control.socket.write_all(&both).await.unwrap();
        let awake = bench.control.awake().await;
        assert!(matches!(bench.control.hear().await, FromAgent::Usage(_)));
        assert_eq!(awake.behind_ns, -900);
        assert!(!bench.frozen());
        // In this order, and each while all was frozen.
        assert_eq!(
            *bench.calls.borrow(),
            ["credit 1", "reseed 1", "clock 1", "hostname=clone-1 1", "rename=template>clone-1 1"]
        );
    });
}

#[test]
fn the_room_that_goes_on_after_its_snapshot_takes_the_same_steps_without_dialling() {
    test(|mut bench| async move {
        bench.container(false);
        bench.control.freeze().await;
        bench.control.say(welcome("again", 4_000, 1)).await;
        let awake = bench.control.awake().await;
        assert_eq!((awake.behind_ns, bench.frozen()), (1_000, false));
        assert_eq!(bench.calls.borrow().len(), 5);
        // It was no clone: what it used is its own.
        bench.control.say(ReportUsage { every_ms: None }).await;
        let FromAgent::Usage(usage) = bench.control.hear().await else { panic!("no usage") };
        assert_eq!(usage.containers[&0].cpu.user_us, 20);
    });
}

#[test]
fn a_clone_of_a_clone_is_somebody_else_again_and_pays_for_itself() {
    test(|mut bench| async move {
        let container = bench.container(false);
        for (n, entropy) in [(1, 1), (2, 2), (3, 3)] {
            bench.control.freeze().await;
            bench.born(welcome(&format!("clone-{n}"), 6_000, entropy)).await;
            assert_eq!(*container.hostname.borrow(), format!("clone-{n}"));
            assert_eq!(bench.room.named.borrow().id, format!("clone-{n}"));
        }
        assert!(bench.calls.borrow().contains(&"rename=clone-2>clone-3 1".to_owned()));
        std::fs::write(bench.cgroup_file("cpu.stat"), "user_usec 25\n").unwrap();
        bench.control.say(ReportUsage { every_ms: None }).await;
        let FromAgent::Usage(usage) = bench.control.hear().await else { panic!("no usage") };
        assert_eq!(usage.containers[&0].cpu.user_us, 5);
    });
}

#[test]
fn a_template_that_runs_nothing_can_be_cloned_as_well() {
    test(|mut bench| async move {
        bench.room.containers.borrow_mut().insert(CONTAINER, State::Prepared);
        bench.control.freeze().await;
        bench.born(welcome("clone", 5_000, 1)).await;
        assert_eq!(*bench.calls.borrow(), ["credit 0", "reseed 0", "clock 0", "hostname=clone 0"]);
        assert!(matches!(bench.room.containers.borrow()[&CONTAINER], State::Prepared));
        assert_eq!(bench.room.named.borrow().hostname, "clone");
    });
}

#[test]
fn a_container_with_a_name_of_its_own_keeps_it() {
    test(|mut bench| async move {
        let named = bench.container(false);
        let named = Rc::try_unwrap(named).err().unwrap();
        let container = Rc::new(Container {
            init: None,
            hostname: RefCell::new("mine".into()),
            takes_rooms_name: false,
            cgroup: named.cgroup.clone(),
            meter: Meter::new(named.cgroup.clone()).into(),
            function: None,
            hook: None,
        });
        bench.room.containers.borrow_mut().insert(CONTAINER, State::Running(Rc::clone(&container)));
        bench.control.freeze().await;
        bench.born(welcome("clone", 5_000, 1)).await;
        assert_eq!(*container.hostname.borrow(), "mine");
        assert!(!bench.calls.borrow().iter().any(|call| call.starts_with("rename")));
    });
}

#[test]
fn streams_are_said_once_and_go_on_in_the_clone() {
    test(|mut bench| async move {
        let container = bench.container(false);
        let ([_stdin, stdout, stderr], [mut input, mut output, errors], reporter) =
            bench.process(&container).await;
        assert_eq!(bench.control.hear().await, Started { process: PROCESS }.into());
        output.write_all(b"of the template").unwrap();
        bench.control.freeze().await;
        assert_eq!(rest(stdout).await, "of the template");
        assert_eq!(rest(stderr).await, "");
        bench.born(welcome("clone", 5_000, 1)).await;
        // It runs and speaks before anybody asks, and ends before as well.
        output.write_all(b"of the clone").unwrap();
        let (stdio, listeners) = bench.agree(10);
        bench.control.say(Attach { process: PROCESS, stdio }).await;
        let [mut stdin, stdout, stderr] = aside(move || listeners.map(|listener| accept(&listener))).await;
        assert_eq!(bench.control.hear().await, Attached { process: PROCESS }.into());
        stdin.write_all(b"typed").unwrap();
        aside(move || {
            let mut typed = [0; 5];
            input.read_exact(&mut typed).unwrap();
            assert_eq!(&typed, b"typed");
        })
        .await;
        // A second time there is nothing to connect.
        let (stdio, _listeners) = bench.agree(20);
        bench.control.say(Attach { process: PROCESS, stdio }).await;
        assert!(bench.control.refused(Request::Attach(PROCESS)).await.contains("connected"));
        drop((output, errors));
        reporter.tell(&Report::Ended(ExitStatus::Code(7)), None).unwrap();
        drop(reporter);
        let FromAgent::Exited(exited) = bench.control.hear().await else { panic!("no end") };
        assert_eq!((exited.process, exited.status), (PROCESS, ExitStatus::Code(7)));
        assert_eq!((rest(stdout).await.as_str(), rest(stderr).await.as_str()), ("of the clone", ""));
    });
}

#[test]
fn the_end_of_a_process_is_told_after_its_output_was_asked_for() {
    test(|mut bench| async move {
        let container = bench.container(false);
        let (_hosts, [input, mut output, errors], reporter) = bench.process(&container).await;
        bench.control.hear().await;
        bench.control.freeze().await;
        bench.born(welcome("clone", 5_000, 1)).await;
        output.write_all(b"gone").unwrap();
        drop((input, output, errors));
        reporter.tell(&Report::Ended(ExitStatus::Code(0)), None).unwrap();
        drop(reporter);
        assert!(bench.control.silent().await);
        let (stdio, listeners) = bench.agree(10);
        bench.control.say(Attach { process: PROCESS, stdio }).await;
        let [_, stdout, _] = aside(move || listeners.map(|listener| accept(&listener))).await;
        assert_eq!(bench.control.hear().await, Attached { process: PROCESS }.into());
        assert!(matches!(bench.control.hear().await, FromAgent::Exited(_)));
        assert_eq!(rest(stdout).await, "gone");
    });
}

#[test]
fn an_attach_for_nobody_or_with_a_terminal_that_there_is_not_is_refused() {
    test(|mut bench| async move {
        let container = bench.container(false);
        let _process = bench.process(&container).await;
        bench.control.hear().await;
        bench.control.freeze().await;
        bench.born(welcome("clone", 5_000, 1)).await;
        let nobody = ProcessId(9);
        bench.control.say(Attach { process: nobody, stdio: Stdio::default() }).await;
        assert!(bench.control.refused(Request::Attach(nobody)).await.contains("doesn't run"));
        let stdio = Stdio { terminal: Some(TerminalSize { rows: 1, columns: 1 }), ..Stdio::default() };
        bench.control.say(Attach { process: PROCESS, stdio }).await;
        assert!(bench.control.refused(Request::Attach(PROCESS)).await.contains("terminal"));
        // Streams that can't be dialled leave it as it was, for another try.
        let lost = Some(Stream { port: 99, token: Token([0; 16]) });
        bench
            .control
            .say(Attach { process: PROCESS, stdio: Stdio { stdout: lost, ..Stdio::default() } })
            .await;
        assert!(
            matches!(bench.control.hear().await, FromAgent::Failed(failed) if failed.failure == Failure::System)
        );
        bench.control.say(Attach { process: PROCESS, stdio: Stdio::default() }).await;
        assert_eq!(bench.control.hear().await, Attached { process: PROCESS }.into());
    });
}

#[test]
fn what_is_at_work_cannot_be_frozen() {
    test(|mut bench| async move {
        bench.container(false);
        for (work, says) in [
            (Work::Preparing, "being prepared"),
            (Work::Starting, "being started"),
            (Work::Executing, "an exec runs"),
            (Work::Invoking, "handles an event"),
            (Work::Attaching, "connected with its streams"),
            (Work::Collecting, "files"),
        ] {
            let work = bench.room.begin(work);
            bench.control.say(Freeze {}).await;
            assert!(bench.control.refused(Request::Freeze).await.contains(says));
            assert!(!bench.frozen());
            drop(work);
        }
        bench.control.freeze().await;
    });
}

#[test]
fn a_request_that_comes_right_before_the_freezing_hinders_it_too() {
    test(|mut bench| async move {
        // Dials a blob that this host doesn't serve yet.
        let (stdio, listeners) = bench.agree(1);
        let blob =
            Blob { digest: format!("sha256:{}", "00".repeat(32)), size: 1, stream: stdio.stdin.unwrap() };
        let layers = vec![Layer { compression: Compression::None, blob, diff_id: "sha256:00".into() }];
        let limits = UnpackLimits { bytes: 1, entries: 1 };
        let mut both =
            FromHost::from(Prepare { container: CONTAINER, layers, zips: vec![], limits }).encode().unwrap();
        both.extend(FromHost::from(Freeze {}).encode().unwrap());
        bench.control.socket.write_all(&both).await.unwrap();
        assert!(bench.control.refused(Request::Freeze).await.contains("being prepared"));
        drop(listeners);
        assert!(
            matches!(bench.control.hear().await, FromAgent::Failed(failed) if failed.request == Request::Prepare(CONTAINER))
        );
        bench.control.freeze().await;
    });
}

#[test]
fn asleep_nothing_is_said_by_itself_and_nothing_is_carried_out() {
    test(|mut bench| async move {
        bench.container(false);
        bench.control.say(ReportUsage { every_ms: Some(100) }).await;
        assert!(matches!(bench.control.hear().await, FromAgent::Usage(_)));
        assert!(matches!(bench.control.hear().await, FromAgent::Usage(_)));
        bench.control.say(Freeze {}).await;
        while !matches!(bench.control.hear().await, FromAgent::Frozen(_)) {}
        assert!(bench.control.silent().await);
        bench.control.say(Signal { process: PROCESS, signal: 9 }).await;
        bench.control.say(Attach { process: PROCESS, stdio: Stdio::default() }).await;
        bench.control.refused(Request::Attach(PROCESS)).await;
        // Asked, it answers.
        bench.control.freeze().await;
        bench.control.say(ReportUsage { every_ms: Some(100) }).await;
        assert!(matches!(bench.control.hear().await, FromAgent::Usage(_)));
        assert!(bench.control.silent().await);
        // Nor does a clone report before its own host asks.
        bench.born(welcome("clone", 5_000, 1)).await;
        assert!(bench.control.silent().await);
    });
}

#[test]
fn a_frozen_room_ends_when_it_is_asked_to() {
    test(|mut bench| async move {
        let container = bench.container(false);
        let (_hosts, ends, reporter) = bench.process(&container).await;
        bench.control.hear().await;
        bench.control.freeze().await;
        bench.control.say(Shutdown {}).await;
        // Killed, which the kernel does to the frozen as well.
        drop((ends, reporter));
        assert!(matches!(bench.control.hear().await, FromAgent::Exited(_)));
        assert!(matches!(bench.control.hear().await, FromAgent::Usage(usage) if usage.last));
        assert!(matches!(bench.control.hear().await, FromAgent::Ending(_)));
        assert_eq!(std::fs::read_to_string(bench.cgroup_file("cgroup.kill")).unwrap(), "1");
    });
}

#[test]
fn a_handshake_that_is_lost_is_begun_again() {
    test(|mut bench| async move {
        bench.container(false);
        bench.control.freeze().await;
        let first = bench.lose().await;
        drop(first);
        let mut second = Conn::new(bench.listener.accept().await.unwrap().0);
        assert!(matches!(second.hear().await, FromAgent::Hello(hello) if hello.clone));
        drop(second);
        bench.control = Conn::new(bench.listener.accept().await.unwrap().0);
        bench.control.hear().await;
        bench.control.say(welcome("clone", 5_000, 1)).await;
        bench.control.awake().await;
        assert_eq!(bench.calls.borrow().iter().filter(|call| call.starts_with("credit")).count(), 1);
    });
}

#[test]
fn a_clone_that_is_refused_or_can_not_become_itself_ends_frozen() {
    let ended = |bench: &Bench| {
        assert!(bench.frozen());
        assert_eq!(std::fs::read_to_string(bench.cgroup_file("cgroup.kill")).unwrap(), "1");
    };
    test(|mut bench| async move {
        bench.container(false);
        bench.control.freeze().await;
        bench.control = bench.lose().await;
        bench.control.hear().await;
        bench.control.say(Refused { reason: "full".into() }).await;
        let FromAgent::Ending(Ending { reason: EndingReason::Broken { message } }) =
            bench.control.hear().await
        else {
            panic!("it goes on")
        };
        assert!(message.contains("full"), "{message}");
        ended(&bench);
    });
    test(|mut bench| async move {
        // An init that is gone can't be renamed.
        let container = bench.container(false);
        let broken = Container {
            init: None,
            hostname: RefCell::new("template".into()),
            takes_rooms_name: true,
            cgroup: container.cgroup.clone(),
            meter: Meter::new(container.cgroup.clone()).into(),
            function: None,
            hook: None,
        };
        bench.room.containers.borrow_mut().insert(CONTAINER, State::Running(Rc::new(broken)));
        bench.control.freeze().await;
        bench.control = bench.lose().await;
        bench.control.hear().await;
        bench.control.say(welcome("clone", 5_000, 1)).await;
        assert!(matches!(bench.control.hear().await, FromAgent::Ending(_)));
        ended(&bench);
        bench.life.await.unwrap();
    });
}

#[test]
fn awake_the_loss_of_the_host_is_the_end() {
    test(|mut bench| async move {
        bench.container(false);
        bench.control.freeze().await;
        bench.born(welcome("clone", 5_000, 1)).await;
        let (nowhere, _) = Blocking::pair().unwrap();
        nowhere.set_nonblocking(true).unwrap();
        drop(std::mem::replace(&mut bench.control, Conn::new(UnixStream::from_std(nowhere).unwrap())));
        (&mut bench.life).await.unwrap();
        let dialled = tokio::time::timeout(Duration::from_millis(50), bench.listener.accept()).await;
        assert!(dialled.is_err(), "it dialled again");
    });
}

#[test]
fn what_cannot_be_stopped_runs_on() {
    test(|mut bench| async move {
        bench.container(false);
        std::fs::remove_file(bench.cgroup_file("cgroup.freeze")).unwrap();
        std::fs::create_dir(bench.cgroup_file("cgroup.freeze")).unwrap();
        bench.control.say(Freeze {}).await;
        assert!(
            matches!(bench.control.hear().await, FromAgent::Failed(failed) if failed.request == Request::Freeze)
        );
        bench.control.say(ReportUsage { every_ms: None }).await;
        assert!(matches!(bench.control.hear().await, FromAgent::Usage(_)));
    });
}

#[test]
fn a_program_that_is_ready_is_cloned_and_hears_of_it_before_it_runs_on() {
    test(|mut bench| async move {
        bench.container(true);
        let socket = bench.folder.path().join("hooks/0").join(Path::new(CLONE_SOCKET).file_name().unwrap());
        let mut program = UnixStream::connect(socket).await.unwrap();
        program.write_all(b"ready\n").await.unwrap();
        assert_eq!(bench.control.hear().await, Ready { process: PROCESS }.into());
        bench.control.freeze().await;
        bench.control = bench.lose().await;
        bench.control.hear().await;
        assert!(program.try_read(&mut [0]).is_err(), "it was told before the clone knew");
        bench.control.say(welcome("clone", 5_900, 1)).await;
        bench.control.awake().await;
        let mut line = [0; 1024];
        let read = program.read(&mut line).await.unwrap();
        let told: Cloned = serde_json::from_slice(&line[..read]).unwrap();
        assert_eq!((told.id.as_str(), told.realtime_ns), ("clone", 5_900));
    });
}
