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

/// Three connections, and the process's ends of their pipes.
async fn joined(host: &Host) -> (Pumps, [UnixStream; 3], [File; 3]) {
    let connections = Connections::dial(&host.dialler(), &all()).await.unwrap();
    let hosts = [0, 1, 2].map(|port| host.accept(port));
    let (pumps, ends) = connections.through_pipes().unwrap();
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
        let connections = Connections::dial(&host.dialler(), &stdio).await.unwrap();
        let (pumps, ends) = connections.through_pipes().unwrap();
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
        assert!(matches!(none.through_pipes().unwrap().1, [None, None, None]));
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
