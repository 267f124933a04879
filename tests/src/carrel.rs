//! The command, with a home of its own.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::leftovers::Leftovers;
use crate::{evidence, patience, wait_for};

/// carrel with a home of its own, alone on this machine while it lives.
pub struct Carrel {
    home: TempDir,
    store: PathBuf,
    before: Leftovers,
    cold: bool,
    begun: Instant,
    // Last: the turn ends when all else is gone.
    _turn: File,
}

impl Default for Carrel {
    fn default() -> Self {
        Self::new()
    }
}

impl Carrel {
    /// Waits for its turn and makes the home. Rooms begin as they do for users: as clones, of the templates that this run of tests has made
    /// already; the store is shared by all its tests.
    pub fn new() -> Self {
        Self::with(false, false)
    }

    /// The same, and rooms begin with a boot: for tests of images that nobody begins twice, or of the boot itself.
    pub fn cold() -> Self {
        Self::with(true, false)
    }

    /// With a store of its own, in the home: for tests of what a store holds.
    pub fn with_own_store() -> Self {
        Self::with(false, true)
    }

    fn with(cold: bool, own_store: bool) -> Self {
        let base = base();
        std::fs::create_dir_all(&base).expect("the tests' folder can be made");
        let turn = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(base.join("carrel-tests.turn"))
            .expect("the tests' folder can be written");
        rustix::fs::flock(&turn, FlockOperation::LockExclusive).expect("the turn can be taken");
        let home =
            tempfile::Builder::new().prefix("carrel-test-").tempdir_in(&base).expect("a home can be made");
        let store = if own_store { home.path().join("store") } else { shared_store(&base) };
        let before = Leftovers::now(home.path(), &store);
        let cold = cold || std::env::var_os("CARREL_TEST_COLD").is_some();
        Self { before, home, store, cold, begun: Instant::now(), _turn: turn }
    }

    /// The home.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// The store.
    pub fn store(&self) -> &Path {
        &self.store
    }

    /// A folder for the test's own files, gone with the home.
    pub fn scratch(&self) -> PathBuf {
        let path = self.home().with_extension("scratch");
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    /// The command, ready to be run, with the given arguments.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(arguments).env("CARREL_HOME", self.home()).env("CARREL_STORE", self.store());
        command.env_remove("CARREL_LOG_FORMAT").env("CARREL_COLD", if self.cold { "1" } else { "0" });
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// The same, with another home and its store.
    pub fn command_in(&self, home: &Path, arguments: &[&str]) -> Command {
        let mut command = self.command(arguments);
        command.env("CARREL_HOME", home).env("CARREL_STORE", home.join("store"));
        command
    }

    /// Runs it to its end, with no input.
    pub fn run(&self, arguments: &[&str]) -> Done {
        self.start(arguments).done()
    }

    /// Runs it to its end, with this input.
    pub fn run_with_input(&self, arguments: &[&str], input: &[u8]) -> Done {
        let mut running = Running::spawn(self.command(arguments).stdin(Stdio::piped()));
        let mut stdin = running.stdin();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                // It may end without reading all of it.
                let _ = stdin.write_all(input);
            });
            running.done()
        })
    }

    /// Starts it, with no input.
    pub fn start(&self, arguments: &[&str]) -> Running {
        Running::spawn(&mut self.command(arguments))
    }

    /// Starts a detached room and returns its id.
    pub fn detach(&self, arguments: &[&str]) -> String {
        let line: Vec<&str> = ["run", "-d"].into_iter().chain(arguments.iter().copied()).collect();
        self.run(&line).succeeds().text().trim().to_owned()
    }

    /// What a command with `--json` printed.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let done = self.run(arguments).succeeds();
        serde_json::from_str(done.text())
            .unwrap_or_else(|error| panic!("{arguments:?} printed no JSON: {error}\n{done:?}"))
    }

    /// The rooms that `ps` lists.
    pub fn rooms(&self, all: bool) -> Vec<Value> {
        let line: &[&str] = if all { &["ps", "-a", "--json"] } else { &["ps", "--json"] };
        self.json(line).as_array().expect("ps --json prints an array").clone()
    }

    /// Waits until a room's log contains a line.
    pub fn wait_for_log(&self, room: &str, line: &str) {
        wait_for(&format!("'{line}' in the log of {room}"), || {
            let done = self.run(&["logs", room]);
            (done.status == 0 && (done.text().contains(line) || done.errors().contains(line))).then_some(())
        });
    }

    /// Whether a room that was detached has not ended yet.
    fn has_detached(&self) -> bool {
        let said = |room: &Path, file: &str| -> Value {
            serde_json::from_slice(&std::fs::read(room.join(file)).unwrap_or_default()).unwrap_or_default()
        };
        let rooms = std::fs::read_dir(self.home().join("rooms")).into_iter().flatten().flatten();
        rooms.map(|room| room.path()).any(|room| {
            said(&room, "room.json")["spec"]["detached"] == true
                && said(&room, "state.json")["phase"] != "ended"
        })
    }

    /// Checks, without waiting for the end of the test, that nothing runs or lies about that wasn't there before.
    pub fn expect_nothing_left(&self) {
        let mut left = String::new();
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            left = Leftovers::now(self.home(), self.store()).beyond(&self.before);
            if left.is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        panic!("left behind:\n{left}");
    }
}

impl Drop for Carrel {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("\n{}", evidence::of_rooms(self.home()));
        }
        if !std::thread::panicking() && !self.has_detached() {
            // Before any command, which would sweep up.
            self.expect_nothing_left();
        }
        let rooms = self.run(&["ps", "-q"]);
        for room in rooms.text().lines() {
            self.run(&["kill", room]);
        }
        let _ = std::fs::remove_dir_all(self.home().with_extension("scratch"));
        if !std::thread::panicking() {
            self.expect_nothing_left();
        }
        note_time(self.begun.elapsed());
    }
}

/// Adds what this test took to the file that `CARREL_TEST_TIMES` names, without the wait for its turn.
fn note_time(took: Duration) {
    let Some(file) = std::env::var_os("CARREL_TEST_TIMES") else { return };
    let thread = std::thread::current();
    let line = format!("{:.1} {}\n", took.as_secs_f64(), thread.name().unwrap_or("?"));
    // Not worth a failure.
    let _ = OpenOptions::new()
        .create(true)
        .append(true)
        .open(file)
        .and_then(|mut f| f.write_all(line.as_bytes()));
}

/// The store of this run: of the one that `CARREL_TEST_RUN` names, else of this program. What is left of another run's is removed first, with the turn taken.
fn shared_store(base: &Path) -> PathBuf {
    let store = base.join("carrel-tests.store");
    let run = std::env::var("CARREL_TEST_RUN").unwrap_or_else(|_| format!("process {}", std::process::id()));
    let note = base.join("carrel-tests.run");
    if std::fs::read_to_string(&note).ok().as_deref() != Some(&run) {
        match std::fs::remove_dir_all(&store) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                panic!("{}: {error}", store.display())
            }
            Ok(()) | Err(_) => {}
        }
        std::fs::write(&note, &run).expect("the tests' folder can be written");
    }
    store
}

/// Where homes are made. The emulated host has a disk for the store; its temporary folder is memory.
fn base() -> PathBuf {
    let store = Path::new("/var/lib/carrel");
    match std::env::var_os("CARREL_TEST_DIR") {
        Some(folder) => folder.into(),
        None if store.is_dir() && rustix::process::geteuid().is_root() => store.join("tests"),
        None => std::env::temp_dir(),
    }
}

/// The command's program.
pub fn binary() -> PathBuf {
    std::env::var_os("CARREL_BIN").map_or_else(|| PathBuf::from("carrel"), PathBuf::from)
}

/// A command that runs.
pub struct Running {
    child: Child,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
    line: String,
    home: Option<PathBuf>,
}

impl From<Child> for Running {
    fn from(mut child: Child) -> Self {
        let stdout = child.stdout.take().map(collect);
        let stderr = child.stderr.take().map(collect);
        let line = format!("process {}", child.id());
        Self { child, stdout, stderr, line, home: None }
    }
}

impl Running {
    /// Starts a command; what it writes to pipes is collected.
    pub fn spawn(command: &mut Command) -> Self {
        let line = format!("{command:?}");
        let mut variables = command.get_envs();
        let home =
            variables.find_map(|(name, value)| (name == "CARREL_HOME").then(|| value.map(PathBuf::from))?);
        let child = command.spawn().unwrap_or_else(|error| panic!("{line}: {error}"));
        Self { line, home, ..Self::from(child) }
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Its standard input.
    pub fn stdin(&mut self) -> ChildStdin {
        self.child.stdin.take().expect("standard input is piped")
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("the command still runs");
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("it can be waited for").is_some()
    }

    /// Waits for its end.
    pub fn done(mut self) -> Done {
        drop(self.child.stdin.take());
        let begun = Instant::now();
        let mut early = String::new();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("it can be waited for") {
                break status;
            }
            if early.is_empty() && begun.elapsed() >= patience() / 2 {
                // At the deadline carrel's own may have passed, and all that hung be gone.
                early = evidence::gathered(self.home.as_deref());
                continue;
            }
            if begun.elapsed() >= patience() {
                // While all of it is as it hangs.
                let evidence = evidence::gathered(self.home.as_deref());
                let _ = self.child.kill();
                let _ = self.child.wait();
                let [stdout, stderr] = self.output();
                let [stdout, stderr] =
                    [&stdout, &stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
                panic!(
                    "{} did not end.\nstdout: {stdout}\nstderr: {stderr}\n{evidence}\nHalf way: {early}",
                    self.line
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        let [stdout, stderr] = self.output();
        Done { status: shell_status(status), stdout, stderr, line: self.line.clone() }
    }

    fn output(&mut self) -> [Vec<u8>; 2] {
        [self.stdout.take(), self.stderr.take()]
            .map(|reader| reader.map(|reader| reader.join().unwrap()).unwrap_or_default())
    }
}

fn collect(mut from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        let _ = from.read_to_end(&mut all);
        all
    })
}

/// The status that a shell would show.
fn shell_status(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).expect("it ended")
}

/// A command that has ended.
pub struct Done {
    /// Exit status, 128 + n after signal n.
    pub status: i32,
    /// What it wrote to stdout.
    pub stdout: Vec<u8>,
    /// What it wrote to stderr.
    pub stderr: Vec<u8>,
    line: String,
}

impl Done {
    /// Its stdout as text.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("stdout is text")
    }

    /// Its stderr as text.
    pub fn errors(&self) -> &str {
        std::str::from_utf8(&self.stderr).expect("stderr is text")
    }

    /// It ended with this status.
    #[track_caller]
    pub fn ends_with(self, status: i32) -> Self {
        assert_eq!(self.status, status, "{self:?}");
        self
    }

    /// It ended well.
    #[track_caller]
    pub fn succeeds(self) -> Self {
        self.ends_with(0)
    }

    /// It failed with this status and one clear sentence on stderr, in which all these words occur.
    #[track_caller]
    pub fn complains(self, status: i32, words: &[&str]) -> Self {
        let done = self.ends_with(status);
        let errors = done.errors().to_lowercase();
        let sentences = errors.lines().filter(|line| line.starts_with("carrel: ")).count();
        assert_eq!(sentences, 1, "one sentence: {done:?}");
        for word in words {
            assert!(errors.contains(&word.to_lowercase()), "no '{word}': {done:?}");
        }
        // A thread of carrel's own, that is; a guest's kernel may.
        assert!(!errors.contains("panicked at"), "{done:?}");
        done
    }
}

impl std::fmt::Debug for Done {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let show = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(4000)]).into_owned();
        let (stdout, stderr) = (show(&self.stdout), show(&self.stderr));
        write!(f, "{}\nstatus: {}\nstdout: {stdout}\nstderr: {stderr}", self.line, self.status)
    }
}
