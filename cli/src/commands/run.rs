//! `carrel run` and `carrel exec`: a process in a room, its streams, its terminal, its signals, its status.

use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use carrel_host::image::{self, Overrides};
use carrel_host::pool::Started;
use carrel_host::session::{Beginning as CameUp, Ended, Session, Streams};
use carrel_host::spec::{DEFAULT_DISK_BYTES, Machine, Part, Payload, ProcessSpec};
use carrel_host::timestamp::mark;
use carrel_host::{Home, Room, RoomName, RoomSpec};
use carrel_protocol::agent::{Surroundings, TerminalSize, Tmpfs};
use carrel_protocol::units::{MemoryMib, VcpuCount};
use carrel_store::{Image, Store};

use super::begin::{self, Begun};
use super::signals::Forwarding;
use super::{payload, place, report};
use crate::arguments::rooms::ExecArgs;
use crate::arguments::run::{MachineArgs, ProcessArgs, RunArgs, SourceArgs};
use crate::configuration::Configuration;
use crate::failure;
use crate::terminal::{self, Raw};
use crate::values::{CpuMillis, Without, environment};

const DEFAULT_MEMORY_MIB: u64 = 512;
const DEFAULT_CPU_MILLIS: u32 = 1000;
const DEFAULT_STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// `carrel run`.
pub(crate) fn run(args: &RunArgs, configuration: &Configuration) -> Result<u8> {
    let begun = mark("command begun");
    let terminal = match args.detach {
        // Nobody looks at it, and nobody types.
        true => args.tty.then_some(terminal::FALLBACK),
        false => terminal_for(args.tty, args.interactive)?,
    };
    report::check_file(&args.usage)?;
    let name: Option<RoomName> = args.name.as_deref().map(str::parse).transpose()?;
    let asked = Asked {
        image: args.image(),
        command: args.command(),
        source: &args.source,
        process: &args.process,
        machine: &args.machine,
        interactive: args.interactive,
        terminal,
    };
    let home = place::home(configuration)?;
    let store = place::store(configuration)?;
    let composed = asked.compose(name.as_ref(), &home, &store, configuration)?;
    let spec = RoomSpec {
        name,
        stop_timeout_ms: millis(args.ends.stop_timeout.unwrap_or(DEFAULT_STOP_TIMEOUT)),
        timeout_ms: args.ends.timeout.map(millis),
        detached: args.detach,
        initialised: args.begin.initialised,
        ..composed.spec
    };
    let attached = Attached { terminal: terminal.is_some(), keys: args.interactive };
    let serve = |started: Started| -> Result<(Option<Room>, Option<Ended>)> {
        let Started { room, session, .. } = started;
        let ended = match args.detach {
            false => {
                Some(attach(session, attached, |session, streams, notice| session.run(streams, notice))?)
            }
            true => match session.wait_started()? {
                CameUp::Started => None,
                CameUp::Ended(ended) => Some(*ended),
            },
        };
        Ok((Some(room), ended))
    };
    let (room, ended) =
        match begin::serve(&home, &store, &args.begin, &[begun], (&spec, &composed.blobs), serve)? {
            Begun::Served(room, ended) => (room, ended),
            Begun::Refused(ended) => (None, Some(ended)),
        };
    if let Some(ended) = &ended {
        composed.acquired.settle(&store, &ended.outcome);
    }
    match (room, ended) {
        (Some(room), None) => {
            failure::print(format_args!("{}\n", room.id()))?;
            Ok(0)
        }
        (Some(room), Some(ended)) if args.detach => begun_and_over(&room, &ended),
        (_, Some(ended)) => {
            report::usage(&args.usage, ended.usage.as_ref())?;
            report::ended(&ended.outcome)
        }
        (None, None) => bail!("The room's end was not told."),
    }
}

/// An image's command, as a command line asks for it.
pub(super) struct Asked<'a> {
    pub(super) image: &'a str,
    pub(super) command: &'a [String],
    pub(super) source: &'a SourceArgs,
    pub(super) process: &'a ProcessArgs,
    pub(super) machine: &'a MachineArgs,
    pub(super) interactive: bool,
    pub(super) terminal: Option<TerminalSize>,
}

/// What was asked for, with all that it is made of.
pub(super) struct Composed {
    pub(super) acquired: payload::Acquired,
    /// It has no name, no end set, and is attached.
    pub(super) spec: RoomSpec,
    pub(super) blobs: Vec<OwnedFd>,
}

impl Asked<'_> {
    /// Fetches the image if need be. What is wrong with the request is said before.
    ///
    /// # Errors
    ///
    /// The request is wrong, or the image can't be had.
    pub(super) fn compose(
        &self,
        name: Option<&RoomName>,
        home: &Home,
        store: &Store,
        configuration: &Configuration,
    ) -> Result<Composed> {
        let own = |name: &str| std::env::var(name).ok();
        let overrides = Overrides {
            entrypoint: self.process.entrypoint.clone(),
            command: self.command.to_vec(),
            environment: environment::collect(&self.process.env_file, &self.process.env, &own)?,
            working_directory: self.process.workdir.clone(),
            user: self.process.user.clone(),
            interactive: self.interactive,
            terminal: self.terminal,
        };
        let machine = machine(self.machine)?;
        overrides.check()?;
        home.foresee(name, &machine)?;
        let without = without(self.machine.unconfined.as_ref());
        let wanted = payload::Wanted {
            image: self.image,
            pull: self.source.pull,
            platform: self.source.platform.as_deref(),
            insecure: self.source.insecure,
            without: without.clone(),
            patience: configuration.patience,
        };
        // The rooms have its blobs open: once they are, nobody can take them away any more.
        let (acquired, _lease) = payload::Acquired::find(store, &wanted)?;
        let image = &acquired.image;
        let process = image::compose(&payload::defaults(image), &overrides)?;
        let (layers, blobs) = payload::layers(store, image)?;
        let spec = RoomSpec {
            id: None,
            name: None,
            image: image.name.clone(),
            machine,
            payload: Payload { layers, zips: Vec::new(), unpacked_bytes: None },
            surroundings: surroundings(self.machine, image),
            process,
            stop_signal: image::stop_signal(image.config.stop_signal.as_deref())?,
            stop_timeout_ms: millis(DEFAULT_STOP_TIMEOUT),
            timeout_ms: None,
            detached: false,
            without,
            function: None,
            initialised: false,
        };
        Ok(Composed { acquired, spec, blobs })
    }
}

/// A detached room that was over before anybody looked: one that ran is as good as any, one that didn't is a failure.
fn begun_and_over(room: &Room, ended: &Ended) -> Result<u8> {
    report::ended(&ended.outcome)?;
    failure::print(format_args!("{}\n", room.id()))?;
    Ok(0)
}

/// `carrel exec`.
pub(crate) fn exec(args: &ExecArgs, configuration: &Configuration) -> Result<u8> {
    let terminal = terminal_for(args.tty, args.interactive)?;
    let own = |name: &str| std::env::var(name).ok();
    let environment = environment::collect(&args.env_file, &args.env, &own)?;
    let room = place::home(configuration)?.find(args.room())?;
    ensure!(!room.has_ended(), "The room {} has ended; nothing can be run in it.", room.title());
    let process = ProcessSpec {
        arguments: args.command().to_vec(),
        environment,
        working_directory: args.workdir.clone().unwrap_or_default(),
        user: args.user.clone().unwrap_or_default(),
        interactive: args.interactive,
        terminal,
    };
    let session = room.connect()?;
    let attached = Attached { terminal: terminal.is_some(), keys: args.interactive };
    let ended =
        attach(session, attached, |session, streams, notice| session.exec(&process, streams, notice))?;
    report::ended(&ended.outcome)
}

/// The size of the user's terminal, if one is wanted. It must be there if its keys are; and standard input must be something to read.
fn terminal_for(wanted: bool, interactive: bool) -> Result<Option<TerminalSize>> {
    ensure!(
        !interactive || !terminal::stdin_is_directory(),
        "The input is a directory, which can't be read: give a file or a pipe, or leave out -i."
    );
    ensure!(
        !wanted || !interactive || terminal::stdin_is_terminal(),
        "The input is not a terminal: leave out -t, or run carrel in one."
    );
    Ok(wanted.then(terminal::size))
}

/// What of the user's terminal a process has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attached {
    /// It has one of its own, of the same size.
    pub(super) terminal: bool,
    /// It reads standard input.
    pub(super) keys: bool,
}

impl Attached {
    /// Whether every key is the process's. Where it reads none, Ctrl-C must stay a signal, or nothing at the terminal could end it.
    fn is_raw(self) -> bool {
        self.terminal && self.keys
    }
}

/// Serves a session with this process's own streams; signals are forwarded meanwhile, and a terminal whose keys are the process's is raw.
pub(super) fn attach(
    session: Session,
    attached: Attached,
    serve: impl FnOnce(Session, Streams, &mut dyn FnMut(&str)) -> Result<Ended, carrel_host::SessionError>,
) -> Result<Ended> {
    let forwarding = Forwarding::begin(session.remote(), attached.terminal)?;
    let raw = if attached.is_raw() { Some(Raw::enter()?) } else { None };
    let mut notice = |text: &str| tracing::warn!("{text}");
    let ended = serve(session, Streams::standard()?, &mut notice);
    drop(raw);
    drop(forwarding);
    Ok(ended?)
}

/// A room's memory where nobody says otherwise.
pub(super) fn usual_memory() -> Result<MemoryMib> {
    Ok(MemoryMib::try_from(DEFAULT_MEMORY_MIB)?)
}

pub(super) fn machine(args: &MachineArgs) -> Result<Machine> {
    let cpu_millis = args.cpus.map_or(DEFAULT_CPU_MILLIS, CpuMillis::get);
    Ok(Machine {
        vcpus: VcpuCount::try_from(u64::from(cpu_millis.div_ceil(1000)))?,
        memory_mib: match args.memory {
            Some(memory) => memory,
            None => usual_memory()?,
        },
        cpu_millis,
        disk_bytes: args.disk.unwrap_or(DEFAULT_DISK_BYTES),
        kernel: args.kernel.as_ref().map(std::path::absolute).transpose()?,
    })
}

fn surroundings(args: &MachineArgs, image: &Image) -> Surroundings {
    Surroundings {
        read_only_root: args.read_only,
        tmpfs: surroundings_tmpfs(args),
        volumes: image.config.volumes.iter().cloned().collect(),
        // A whole number of CPUs is as many vCPUs. The host's own quota has some for the VMM beside it.
        cpu_millis: args.cpus.map(CpuMillis::get).filter(|millis| !millis.is_multiple_of(1000)),
        ..Surroundings::default()
    }
}

/// What `--tmpfs` asks for.
pub(super) fn surroundings_tmpfs(args: &MachineArgs) -> Vec<Tmpfs> {
    let tmpfs =
        |tmpfs: &crate::values::Tmpfs| Tmpfs { path: tmpfs.path.clone(), options: tmpfs.options.clone() };
    args.tmpfs.iter().map(tmpfs).collect()
}

/// What `--unconfined` names.
pub(super) fn without(unconfined: Option<&Without>) -> Vec<Part> {
    unconfined.map(|parts| parts.0.clone()).unwrap_or_default()
}

pub(super) fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_whose_keys_nobody_reads_stays_as_it_is() {
        for (terminal, keys, raw) in [(true, true, true), (true, false, false), (false, true, false)] {
            assert_eq!(Attached { terminal, keys }.is_raw(), raw, "-t {terminal}, -i {keys}");
        }
    }

    #[test]
    fn a_terminal_must_be_there_only_where_its_keys_are_wanted() {
        // A test runner's input is no terminal; in one that is, both are well.
        assert!(terminal_for(true, false).unwrap().is_some());
        assert!(terminal_for(false, true).unwrap().is_none());
        assert_eq!(terminal_for(true, true).is_ok(), terminal::stdin_is_terminal());
    }
}
