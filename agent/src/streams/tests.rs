//! The host is a listener on Unix sockets, the process is whoever holds the pipes' other ends.

use std::fs::File;
use std::future::Future;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use carrel_protocol::agent::{Stream, Token};
use rustix::pty::OpenptFlags;
use tempfile::TempDir;

use super::*;

/// A host that agreed on streams, each with its port and token.
struct Host {
    folder: TempDir,
    listeners: Vec<UnixListener>,
}

impl Host {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let listeners = (0..3)
            .map(|port| UnixListener::bind(folder.path().join(format!("host_{port}"))).unwrap())
            .collect();
        Self { folder, listeners }
    }

    fn dialler(&self) -> Dialler {
        Dialler::Unix(self.folder.path().join("host"))
    }

    /// Takes a connection and its token.
    fn accept(&self, port: usize) -> UnixStream {
        let (mut connection, _) = self.listeners[port].accept().unwrap();
        let mut token = [0; 16];
        connection.read_exact(&mut token).unwrap();
        assert_eq!(token, [u8::try_from(port).unwrap(); 16]);
        connection
    }
}

fn stream(port: u8) -> Option<Stream> {
    Some(Stream { port: port.into(), token: Token([port; 16]) })
}

fn all() -> Stdio {
    Stdio { stdin: stream(0), stdout: stream(1), stderr: stream(2), terminal: None }
}

/// As the agent runs: one thread, tasks that stay on it.
fn on_one_thread(work: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let limited = async { tokio::time::timeout(Duration::from_secs(60), work).await.unwrap() };
    tokio::task::LocalSet::new().block_on(&runtime, limited);
}

/// What blocks, beside the tasks.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || sender.send(work()).is_ok());
    receiver.await.unwrap()
}

fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    (0..length).map(step).collect()
}

/// Connections and pipes for what the request names, and the process's ends of these.
async fn piped(host: &Host, stdio: &Stdio) -> (Pumps, [Option<OwnedFd>; 3]) {
    let (pipes, ends) = Pipes::new(stdio).unwrap();
    let connections = Connections::dial(&host.dialler(), stdio).await.unwrap();
    (connections.through_pipes(pipes).unwrap(), ends)
}

/// Three connections, and the process's ends of their pipes.
async fn joined(host: &Host) -> (Pumps, [UnixStream; 3], [File; 3]) {
    let (pumps, ends) = piped(host, &all()).await;
    let hosts = [0, 1, 2].map(|port| host.accept(port));
    (pumps, hosts, ends.map(|end| File::from(end.unwrap())))
}

#[test]
fn bytes_go_both_ways_unchanged_and_apart() {
    on_one_thread(async {
        let host = Host::new();
        let (pumps, [mut stdin, stdout, stderr], [mut input, mut output, mut errors]) = joined(&host).await;
        let sent = noise(3 << 20);
        let (to_process, to_errors) = (sent.clone(), noise(700_000));
        let expected_errors = to_errors.clone();
        let host_side = std::thread::spawn(move || {
            let writer = std::thread::spawn(move || {
                stdin.write_all(&to_process).unwrap();
                stdin.shutdown(std::net::Shutdown::Write).unwrap();
            });
            let read_all = |mut from: UnixStream| {
                let mut all = Vec::new();
                from.read_to_end(&mut all).unwrap();
                all
            };
            let errors = std::thread::spawn(move || read_all(stderr));
            let output = read_all(stdout);
            writer.join().unwrap();
            (output, errors.join().unwrap())
        });
        // The process copies its input to its output.
        let copied = aside(move || {
            errors.write_all(&to_errors).unwrap();
            std::io::copy(&mut input, &mut output).unwrap()
        })
        .await;
        assert_eq!(copied, 3 << 20);
        pumps.finish().await;
        let (output, errors) = aside(move || host_side.join().unwrap()).await;
        assert!(output == sent && errors == expected_errors);
    });
}

#[test]
fn what_the_request_leaves_out_is_nothing() {
    on_one_thread(async {
        let host = Host::new();
        let stdio = Stdio { stdout: stream(1), ..Stdio::default() };
        let (pumps, ends) = piped(&host, &stdio).await;
        assert!(matches!(ends, [None, Some(_), None]));
        drop(ends);
        pumps.finish().await;
        let mut all = Vec::new();
        host.accept(1).read_to_end(&mut all).unwrap();
        assert!(all.is_empty());
    });
}

#[test]
fn a_host_that_does_not_answer_is_an_error() {
    on_one_thread(async {
        let nowhere = Dialler::Unix("/nonexistent/host".into());
        assert!(Connections::dial(&nowhere, &all()).await.is_err());
        let none = Connections::dial(&nowhere, &Stdio::default()).await.unwrap();
        assert!(matches!(none, Connections([None, None, None])));
        assert!(matches!(Pipes::new(&Stdio::default()).unwrap().1, [None, None, None]));
    });
}

#[test]
fn a_process_that_closes_its_input_makes_the_hosts_writes_fail() {
    on_one_thread(async {
        let host = Host::new();
        let (_pumps, [mut stdin, _stdout, _stderr], [input, _output, _errors]) = joined(&host).await;
        drop(input);
        let failed = aside(move || {
            loop {
                if let Err(error) = stdin.write_all(&[0; 65536]) {
                    return error.kind();
                }
            }
        })
        .await;
        // Reset, if something was on its way that nobody read.
        assert!(matches!(failed, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{failed}");
    });
}

#[test]
fn a_host_that_closes_the_output_makes_the_processes_writes_fail() {
    on_one_thread(async {
        let host = Host::new();
        let (_pumps, [_stdin, stdout, _stderr], [_input, mut output, _errors]) = joined(&host).await;
        drop(stdout);
        let failed = aside(move || {
            loop {
                // Rust's test programs ignore SIGPIPE.
                if let Err(error) = output.write_all(&[0; 65536]) {
                    return error.kind();
                }
            }
        })
        .await;
        assert_eq!(failed, ErrorKind::BrokenPipe);
    });
}

#[test]
fn output_written_before_the_end_arrives_though_others_hold_the_pipe() {
    on_one_thread(async {
        let host = Host::new();
        let (pumps, [_stdin, mut stdout, _stderr], [_input, mut output, errors]) = joined(&host).await;
        output.write_all(b"last words").unwrap();
        // A grandchild in the background keeps both open.
        let began = std::time::Instant::now();
        pumps.finish().await;
        assert!((GRACE..Duration::from_secs(30)).contains(&began.elapsed()));
        let all = aside(move || {
            let mut all = Vec::new();
            stdout.read_to_end(&mut all).unwrap();
            all
        })
        .await;
        assert_eq!(all, b"last words");
        drop((output, errors));
    });
}

#[test]
fn finishing_waits_for_no_input() {
    on_one_thread(async {
        let host = Host::new();
        let (pumps, [stdin, _stdout, _stderr], ends) = joined(&host).await;
        drop(ends);
        // The host never ends its stdin.
        pumps.finish().await;
        // And finds out that nobody reads it any more.
        let mut stdin = stdin;
        assert!(aside(move || (0..64).any(|_| stdin.write_all(&[0; 65536]).is_err())).await);
    });
}

#[test]
fn a_terminal_stands_between_and_has_the_size_that_it_is_given() {
    on_one_thread(async {
        let host = Host::new();
        let master =
            rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        rustix::pty::grantpt(&master).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let name = rustix::pty::ptsname(&master, Vec::new()).unwrap();
        let terminal = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        let stdio = Stdio { stdin: stream(0), stdout: stream(1), ..Stdio::default() };
        let connections = Connections::dial(&host.dialler(), &stdio).await.unwrap();
        let (mut stdin, mut stdout) = (host.accept(0), host.accept(1));
        let pumps = connections.through_terminal(master).unwrap();

        pumps.resize(TerminalSize { rows: 33, columns: 111 });
        let size = rustix::termios::tcgetwinsize(&terminal).unwrap();
        assert_eq!((size.ws_row, size.ws_col), (33, 111));

        stdin.write_all(b"typed\n").unwrap();
        let terminal = aside(move || {
            let mut line = [0; 6];
            (&terminal).read_exact(&mut line).unwrap();
            assert_eq!(&line, b"typed\n");
            (&terminal).write_all(b"shown\n").unwrap();
            terminal
        })
        .await;
        drop(terminal);
        pumps.finish().await;
        let all = aside(move || {
            let mut all = Vec::new();
            stdout.read_to_end(&mut all).unwrap();
            all
        })
        .await;
        // Its echo, then what the process wrote; a terminal makes CR LF of LF.
        assert_eq!(all, b"typed\r\nshown\r\n");
        // It is gone, which is no trouble.
        pumps.resize(TerminalSize { rows: 1, columns: 1 });
    });
}

/// All that comes until the end.
async fn rest(mut from: UnixStream) -> Vec<u8> {
    aside(move || {
        let mut all = Vec::new();
        from.read_to_end(&mut all).unwrap();
        all
    })
    .await
}

/// New connections for all three streams, as after a freezing.
async fn again(host: &Host, pumps: &Pumps, stdio: &Stdio) -> Vec<UnixStream> {
    let connections = Connections::dial(&host.dialler(), stdio).await.unwrap();
    let wanted = [&stdio.stdin, &stdio.stdout, &stdio.stderr];
    let hosts = (0..3).filter(|port| wanted[*port].is_some()).map(|port| host.accept(port)).collect();
    pumps.join(connections);
    hosts
}

#[test]
fn output_around_a_parting_is_said_once_and_whole() {
    on_one_thread(async {
        let host = Host::new();
        let (pumps, [_stdin, stdout, stderr], [_input, mut output, errors]) = joined(&host).await;
        let before = noise(200_000);
        output.write_all(&before).unwrap();
        let (told, errors_told) = (spawn_local(rest(stdout)), spawn_local(rest(stderr)));
        pumps.still().await;
        pumps.part().await;
        // The template's connections ended with what was said before.
        assert!(told.await.unwrap() == before);
        assert!(errors_told.await.unwrap().is_empty());
        assert!(pumps.is_parted());
        // What is said before anybody asks waits in the pipe.
        output.write_all(b"in the clone").unwrap();
        tokio::time::sleep(Duration::from_millis(30)).await;
        let mut hosts = again(&host, &pumps, &all()).await;
        assert!(!pumps.is_parted());
        output.write_all(b", and later").unwrap();
        drop((output, errors));
        pumps.finish().await;
        assert!(rest(hosts.pop().unwrap()).await.is_empty());
        assert_eq!(rest(hosts.pop().unwrap()).await, b"in the clone, and later");
    });
}

#[test]
fn input_that_the_process_had_not_read_is_read_after_the_parting_and_before_any_other() {
    on_one_thread(async {
        let host = Host::new();
        let (pumps, [mut stdin, _stdout, _stderr], [input, _output, _errors]) = joined(&host).await;
        // Fills the pipe, and a part of a chunk on the agent's side.
        let sent = noise(CHUNK + CHUNK / 2);
        let to_send = sent.clone();
        aside(move || {
            stdin.write_all(&to_send).unwrap();
            stdin
        })
        .await;
        // The connection may end, and what was written is taken all the same.
        tokio::time::sleep(Duration::from_millis(50)).await;
        pumps.still().await;
        pumps.part().await;
        let mut hosts = again(&host, &pumps, &all()).await;
        hosts[0].write_all(b"more").unwrap();
        hosts[0].shutdown(std::net::Shutdown::Write).unwrap();
        let read = aside(move || {
            let mut read = Vec::new();
            let mut input = input;
            input.read_to_end(&mut read).unwrap();
            read
        })
        .await;
        let (first, more) = read.split_at(sent.len());
        assert!(first == sent && more == b"more", "{}", read.len());
    });
}

#[test]
fn a_stopping_that_was_given_up_changes_nothing() {
    on_one_thread(async {
        let host = Host::new();
        let (pumps, [mut stdin, stdout, stderr], [mut input, mut output, mut errors]) = joined(&host).await;
        // More than socket and pipe hold: it can't be sent while nobody reads.
        let long = noise(2 << 20);
        let (to_write, writer) = (long.clone(), output.try_clone().unwrap());
        let written = spawn_local(aside(move || (&writer).write_all(&to_write).unwrap()));
        tokio::time::sleep(Duration::from_millis(50)).await;
        errors.write_all(b"one").unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(50), pumps.still()).await.is_err());
        pumps.go_on();
        // Another try that succeeds for all, and is given up as well.
        let said = spawn_local(rest(stdout));
        written.await.unwrap();
        pumps.still().await;
        pumps.go_on();
        errors.write_all(b", two").unwrap();
        output.write_all(b"end").unwrap();
        stdin.write_all(b"typed").unwrap();
        aside(move || input.read_exact(&mut [0; 5]).unwrap()).await;
        drop((output, errors));
        pumps.finish().await;
        let said = said.await.unwrap();
        assert!(said.strip_suffix(b"end").unwrap() == long);
        assert_eq!(rest(stderr).await, b"one, two");
    });
}

#[test]
fn a_process_that_ends_before_its_streams_are_asked_for_has_said_what_it_said() {
    on_one_thread(async {
        let host = Host::new();
        let (pumps, _hosts, [input, mut output, errors]) = joined(&host).await;
        pumps.still().await;
        pumps.part().await;
        output.write_all(b"last words").unwrap();
        drop((input, output, errors));
        let pumps = Rc::new(pumps);
        let ending = Rc::clone(&pumps);
        let finished = spawn_local(async move { ending.finish().await });
        tokio::time::sleep(GRACE + Duration::from_millis(50)).await;
        assert!(!finished.is_finished(), "nobody has been told yet");
        let mut hosts = again(&host, &pumps, &all()).await;
        finished.await.unwrap();
        assert_eq!(rest(hosts.remove(1)).await, b"last words");
    });
}

#[test]
fn what_is_not_asked_for_again_goes_nowhere_and_input_ends() {
    on_one_thread(async {
        let host = Host::new();
        let (pumps, _hosts, [mut input, mut output, mut errors]) = joined(&host).await;
        pumps.still().await;
        pumps.part().await;
        // Twice frozen, never asked for.
        pumps.still().await;
        pumps.part().await;
        let asked = Stdio { stderr: stream(2), ..Stdio::default() };
        let mut hosts = again(&host, &pumps, &asked).await;
        let long = noise(1 << 20);
        aside(move || {
            assert_eq!(input.read(&mut [0]).unwrap(), 0);
            output.write_all(&long).unwrap();
        })
        .await;
        errors.write_all(b"heard").unwrap();
        drop(errors);
        pumps.finish().await;
        assert_eq!(rest(hosts.remove(0)).await, b"heard");
    });
}

#[test]
fn streams_that_are_over_or_never_were_are_ended_at_once() {
    on_one_thread(async {
        let host = Host::new();
        let stdio = Stdio { stdout: stream(1), ..Stdio::default() };
        let (pumps, [_, output, _]) = piped(&host, &stdio).await;
        let first = host.accept(1);
        // The process closes its output; later it is frozen.
        drop(output);
        assert!(rest(first).await.is_empty());
        pumps.still().await;
        pumps.part().await;
        let hosts = again(&host, &pumps, &all()).await;
        for host in hosts {
            assert!(rest(host).await.is_empty());
        }
    });
}
