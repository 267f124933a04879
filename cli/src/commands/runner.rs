//! `carrel runner`: a program of this host's in a room, as if it ran here.

use std::io::IsTerminal;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use carrel_host::pool::Started;
use carrel_host::program::returned::{self, Destination, Limits, Received, ReturnError};
use carrel_host::program::{self, Account, Program, With};
use carrel_host::session::{Ended, Taking};
use carrel_host::spec::{MOST_ENTRIES, Payload, ProcessSpec};
use carrel_host::timestamp::mark;
use carrel_host::{Outcome, Patience, RoomSpec};
use carrel_protocol::agent::{ExitStatus, Surroundings};
use carrel_store::Store;
use rustix::process::{Resource, Rlimit, Signal};

use super::begin::{self, Begun};
use super::run::{Attached, attach, machine, millis, surroundings_tmpfs, without};
use super::{place, report};
use crate::arguments::run::{BeginArgs, MachineArgs};
use crate::arguments::runner::{RunnerArgs, RunnerOptions};
use crate::configuration::Configuration;
use crate::failure::{OURS, WithStatus};
use crate::terminal;
use crate::values::{CpuMillis, size, span};

const RETURN_LIMIT: u64 = 1 << 30;
const SIGTERM: u8 = 15;
/// From the first TERM of a timeout to KILL.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// What nobody ran for so long is built no more.
const RETIRED: Duration = Duration::from_secs(14 * 24 * 3600);

/// `carrel runner`.
pub(crate) fn runner(args: &RunnerArgs, configuration: &Configuration) -> Result<u8> {
    let mut marks = vec![mark("command begun")];
    let options = args.options.clone().over(configuration.runner.clone());
    let arguments = args.program_and_arguments.clone();
    let word = arguments.first().filter(|word| !word.is_empty()).context("Name a program to run.")?;
    report::check_file(&args.usage)?;
    let here = std::env::current_dir().context("The working directory is gone.")?;
    let directory = options.dir.as_ref().map_or_else(|| here.clone(), |dir| here.join(dir));
    let mut variables = variables(&options)?;
    let account = account(options.user.as_deref(), &variables)?;
    if options.user.is_some() {
        become_known(&account, &options, &mut variables);
    }
    let with = options.with.iter().map(|text| with(text)).collect::<Result<Vec<_>>>()?;
    let returns = returns(&options.returns, &directory, &here)?;
    let limit = one("return_limit", options.return_limit.as_deref(), size::bytes)?.unwrap_or(RETURN_LIMIT);
    let timeout = one("timeout", options.timeout.as_deref(), span::positive)?;
    let machine_args = machine_args(&options)?;

    let machine = machine(&machine_args)?;
    let home = place::home(configuration)?;
    home.foresee(None, &machine)?;
    let store = place::store(configuration)?;
    let lease = store.lease()?;
    let program = Program {
        word,
        directory: &directory,
        variables: &variables,
        account: &account,
        with: &with,
        whole_workspace: options.workspace,
    };
    let packed = program.pack(&store).map_err(missing)?;
    if !options.quiet {
        packed.notices.iter().for_each(|notice| tracing::warn!("{notice}"));
    }
    let keys = !terminal::stdin_is_directory();
    let terminal = has_terminal().then(terminal::size);
    let text = |path: &Path| path.to_str().map(str::to_owned).context("The working directory is not UTF-8.");
    let spec = RoomSpec {
        id: None,
        name: None,
        image: title(word),
        machine,
        payload: Payload { layers: packed.layers, zips: Vec::new(), unpacked_bytes: None },
        surroundings: Surroundings {
            tmpfs: surroundings_tmpfs(&machine_args),
            cpu_millis: machine_args.cpus.map(CpuMillis::get).filter(|millis| !millis.is_multiple_of(1000)),
            ..Surroundings::default()
        },
        process: ProcessSpec {
            arguments: arguments.clone(),
            environment: variables.iter().map(|(name, value)| format!("{name}={value}")).collect(),
            working_directory: text(&directory)?,
            user: format!("{}:{}", account.uid, account.gid),
            interactive: keys,
            terminal,
        },
        stop_signal: SIGTERM,
        stop_timeout_ms: millis(STOP_TIMEOUT),
        timeout_ms: timeout.map(millis),
        detached: false,
        without: without(machine_args.unconfined.as_ref()),
        function: None,
        initialised: options.initialised,
    };
    // The rooms have its blobs open: nobody can take them away any more.
    drop(lease);
    let paths: Vec<String> = returns.iter().map(|destination| destination.in_room.clone()).collect();
    let mut taken = None;
    let attached = Attached { terminal: terminal.is_some(), keys };
    let begin = BeginArgs {
        cold: options.cold,
        initialised: options.initialised,
        domain: options.domain.clone(),
        timeline: options.timeline,
    };
    marks.extend(packed.timeline);
    let serve = |started: Started| {
        let ended = attach(started.session, attached, |session, streams, notice| {
            if paths.is_empty() {
                return session.run(streams, notice);
            }
            let limits = Limits { bytes: limit, entries: MOST_ENTRIES };
            let take =
                Box::new(|stream| taken = Some(take(stream, &returns, limits, configuration.patience)));
            session.run_and_take(streams, Taking { paths: &paths, take }, notice)
        })?;
        Ok(((), Some(ended)))
    };
    let ended = match begin::serve(&home, &store, &begin, &marks, (&spec, &packed.blobs), serve)? {
        Begun::Served((), ended) => ended.context("The room's end was not told.")?,
        Begun::Refused(ended) => ended,
    };
    report::usage(&args.usage, ended.usage.as_ref())?;
    retire(&store);
    let ran = matches!(ended.outcome, Outcome::Exited { .. } | Outcome::TimedOut { .. });
    ensure!(paths.is_empty() || taken.is_some() || !ran, "The room ended before it sent its files.");
    told(taken, options.quiet)?;
    end(&ended)
}

/// Both what is read and what is shown are the user's terminal: else each stream is its own, and what is a terminal here is a pipe there.
fn has_terminal() -> bool {
    terminal::stdin_is_terminal() && std::io::stdout().is_terminal() && std::io::stderr().is_terminal()
}

fn title(word: &str) -> String {
    Path::new(word).file_name().and_then(|name| name.to_str()).unwrap_or(word).to_owned()
}

/// One that isn't there, or is none, has the status that a shell gives.
fn missing(error: program::ProgramError) -> anyhow::Error {
    const NOT_EXECUTABLE: u8 = 126;
    const NOT_FOUND: u8 = 127;
    let status = match &error {
        program::ProgramError::NotFound(_) => NOT_FOUND,
        program::ProgramError::Directory(_) => NOT_EXECUTABLE,
        program::ProgramError::Unreadable { .. }
        | program::ProgramError::Place(_)
        | program::ProgramError::Store(_) => return error.into(),
    };
    WithStatus::new(status, error.to_string()).into()
}

/// An option's text, whoever gave it.
fn one<T>(name: &str, text: Option<&str>, parse: impl Fn(&str) -> Result<T>) -> Result<Option<T>> {
    text.map(|text| parse(text).with_context(|| format!("The runner's {name} '{text}' is wrong.")))
        .transpose()
}

fn machine_args(options: &RunnerOptions) -> Result<MachineArgs> {
    let tmpfs = |text: &String| {
        text.parse()
            .map_err(|error: anyhow::Error| error.context(format!("The runner's tmpfs '{text}' is wrong.")))
    };
    Ok(MachineArgs {
        memory: one("memory", options.memory.as_deref(), size::memory)?,
        cpus: one("cpus", options.cpus.as_deref(), str::parse)?,
        disk: one("disk", options.disk.as_deref(), size::bytes)?,
        read_only: false,
        tmpfs: options.tmpfs.iter().map(tmpfs).collect::<Result<_>>()?,
        kernel: options.kernel.clone(),
        unconfined: one("unconfined", options.unconfined.as_deref(), str::parse)?,
    })
}

/// The variables that go along, and those that are set.
fn variables(options: &RunnerOptions) -> Result<Vec<(String, String)>> {
    let mut patterns = Vec::new();
    let mut set = Vec::new();
    for option in &options.env {
        match option.split_once('=') {
            Some(("", _)) => bail!("'{option}' names no variable: write NAME=value."),
            Some((name, value)) => set.push((name.to_owned(), value.to_owned())),
            None => patterns.push(option.clone()),
        }
    }
    let all: Vec<_> = std::env::vars_os().collect();
    let (mut kept, left_out) =
        program::variables(all.iter().map(|(name, value)| (name.as_os_str(), value.as_os_str())), &patterns);
    for name in left_out.iter().filter(|_| !options.quiet) {
        tracing::warn!("The variable {name} is left out: it is not UTF-8.");
    }
    kept.retain(|(name, _)| !options.unset_env.iter().any(|pattern| is_meant(pattern, name)));
    for (name, value) in set {
        kept.retain(|(known, _)| *known != name);
        kept.push((name, value));
    }
    Ok(kept)
}

fn is_meant(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == name, |beginning| name.starts_with(beginning))
}

/// Oneself, unless another is named.
fn account(user: Option<&str>, variables: &[(String, String)]) -> Result<Account> {
    let home = variables.iter().find(|(name, _)| name == "HOME").map(|(_, value)| Path::new(value));
    let Some(user) = user else {
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        return Ok(Account::of(uid.as_raw(), gid.as_raw(), home));
    };
    let (name, group) = user.split_once(':').unwrap_or((user, ""));
    let wrong = || {
        anyhow!(
            "The user '{user}' is wrong: give a name of this host's, or a number, and perhaps a group's number."
        )
    };
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let fields = |line: &str| -> Option<(String, u32, u32)> {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        Some((name, fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    let known =
        passwd.lines().filter_map(fields).find(|(known, uid, _)| known == name || *name == uid.to_string());
    let (uid, own) = match known {
        Some((_, uid, gid)) => (uid, gid),
        None => name.parse().map(|uid| (uid, uid)).map_err(|_| wrong())?,
    };
    let gid = if group.is_empty() { own } else { group.parse().map_err(|_| wrong())? };
    Ok(Account::of(uid, gid, None))
}

/// The variables that say who one is are another user's now, but for those that were set.
fn become_known(account: &Account, options: &RunnerOptions, variables: &mut Vec<(String, String)>) {
    let home = account.home.to_string_lossy();
    for (name, value) in [("HOME", &*home), ("USER", &account.name), ("LOGNAME", &account.name)] {
        let is_set =
            options.env.iter().any(|option| option.split_once('=').is_some_and(|(set, _)| set == name));
        if !is_set {
            variables.retain(|(known, _)| known != name);
            variables.push((name.to_owned(), value.to_owned()));
        }
    }
}

fn with(text: &str) -> Result<With> {
    let (path, at) = match text.split_once(':') {
        Some((path, at)) => (path, Some(PathBuf::from(at))),
        None => (text, None),
    };
    ensure!(!path.is_empty(), "'{text}' names no file to take along: write PATH, or PATH:AT.");
    Ok(With { path: path.into(), at })
}

/// Paths in the room are below its working directory, those here below ours.
fn returns(texts: &[String], directory: &Path, here: &Path) -> Result<Vec<Destination>> {
    let destination = |text: &String| {
        let (path, to) = text.split_once(':').unwrap_or((text, ""));
        ensure!(!path.is_empty(), "'{text}' names no file to bring back: write PATH, or PATH:TO.");
        let in_room = directory.join(path);
        let on_host = if to.is_empty() { in_room.clone() } else { here.join(to) };
        let in_room = in_room.to_str().map(str::to_owned);
        Ok(Destination {
            in_room: in_room.with_context(|| format!("The path '{path}' is not UTF-8."))?,
            on_host,
        })
    };
    texts.iter().map(destination).collect()
}

fn take(
    stream: Result<UnixStream, String>,
    returns: &[Destination],
    limits: Limits,
    patience: Patience,
) -> Result<Received, ReturnError> {
    let stream = stream.map_err(ReturnError::Refused)?;
    returned::receive(stream, returns, limits, patience.returned())
}

/// Files that did not come back are a failure of carrel's; one that the program never wrote is none.
fn told(taken: Option<Result<Received, ReturnError>>, quiet: bool) -> Result<()> {
    let Some(taken) = taken else { return Ok(()) };
    let received = taken.map_err(|error| {
        anyhow::Error::new(error).context(WithStatus::new(OURS, "Files did not come back."))
    })?;
    tracing::debug!(?received, "files came back");
    if !quiet {
        for path in &received.missing {
            tracing::warn!("{path} did not come back: the program left no such file.");
        }
        if received.left_out > 0 {
            tracing::warn!("{} links, pipes or odd names stayed in the room.", received.left_out);
        }
    }
    Ok(())
}

/// Layers of builds that are gone would fill the disk. Not worth a failure.
fn retire(store: &Store) {
    if let Err(error) = store.tend_made(RETIRED) {
        tracing::debug!(%error, "old layers stay");
    }
}

/// Ends as the program did: whoever waits for us sees its signal.
fn end(ended: &Ended) -> Result<u8> {
    let Outcome::Exited { status: ExitStatus::Signal(signal), .. } = ended.outcome else {
        return report::ended(&ended.outcome);
    };
    if let Some(sentence) = ended.outcome.sentence() {
        tracing::warn!("{sentence}");
    }
    // The core of this process would be of no use to anybody.
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    let _ = rustix::process::setrlimit(Resource::Core, none);
    let number = i32::from(signal);
    if number == Signal::KILL.as_raw() {
        let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
    } else {
        // It does not come back from a signal that ends. Those that the library doesn't know end in the status below.
        let _ = signal_hook::low_level::emulate_default_handler(number);
    }
    Ok(ended.outcome.exit_status())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(env: &[&str], unset: &[&str]) -> RunnerOptions {
        let list = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        RunnerOptions { env: list(env), unset_env: list(unset), ..RunnerOptions::default() }
    }

    #[test]
    fn variables_are_set_taken_along_and_left_out() {
        let kept = variables(&options(&["A=1", "A=2", "CARGO*"], &["CARGO_PKG_*", "PATH"])).unwrap();
        let value =
            |name: &str| kept.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
        assert_eq!(value("A"), Some("2"));
        assert_eq!(value("PATH"), None);
        // A test's own, by Cargo or nextest.
        assert_eq!(value("CARGO_PKG_NAME"), None);
        assert_eq!(value("CARGO_MANIFEST_DIR"), std::env::var("CARGO_MANIFEST_DIR").ok().as_deref());
        assert!(variables(&options(&["=x"], &[])).is_err());
    }

    #[test]
    fn files_come_back_to_where_they_were_unless_told_otherwise() {
        let texts = ["report.xml".to_owned(), "/abs/out:here".to_owned()];
        let found = returns(&texts, Path::new("/work/pkg"), Path::new("/work")).unwrap();
        assert_eq!(found[0].in_room, "/work/pkg/report.xml");
        assert_eq!(found[0].on_host, Path::new("/work/pkg/report.xml"));
        assert_eq!(
            (found[1].in_room.as_str(), found[1].on_host.as_path()),
            ("/abs/out", Path::new("/work/here"))
        );
        assert!(returns(&[":x".to_owned()], Path::new("/"), Path::new("/")).is_err());
    }

    #[test]
    fn users_are_this_hosts() {
        let root = account(Some("root"), &[]).unwrap();
        assert_eq!((root.uid, root.gid), (0, 0));
        let number = account(Some("54321:99"), &[]).unwrap();
        assert_eq!((number.uid, number.gid), (54321, 99));
        let mut variables = vec![("HOME".to_owned(), "/root".to_owned())];
        become_known(&number, &options(&["USER=me"], &[]), &mut variables);
        let expected = [("HOME", "/home/user54321"), ("LOGNAME", "user54321")];
        assert_eq!(variables, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert!(account(Some("nobody-is-called-so"), &[]).is_err());
        let own = account(None, &[("HOME".to_owned(), "/data/me".to_owned())]).unwrap();
        assert_eq!(
            (own.uid, own.home.as_path()),
            (rustix::process::geteuid().as_raw(), Path::new("/data/me"))
        );
    }
}
