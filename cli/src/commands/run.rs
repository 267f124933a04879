//! `carrel run` and `carrel exec`: a process in a room, its streams, its terminal, its signals, its status.

use std::time::Duration;

use anyhow::{Result, ensure};
use carrel_host::image::{self, Overrides};
use carrel_host::session::{Beginning, Ended, Session, Streams};
use carrel_host::spec::{DEFAULT_DISK_BYTES, Machine, Part, Payload, ProcessSpec};
use carrel_host::{RoomName, RoomSpec};
use carrel_protocol::agent::{Surroundings, TerminalSize, Tmpfs};
use carrel_protocol::units::{MemoryMib, VcpuCount};
use carrel_store::Image;

use super::signals::Forwarding;
use super::{payload, place, report};
use crate::arguments::rooms::ExecArgs;
use crate::arguments::run::{MachineArgs, RunArgs};
use crate::configuration::Configuration;
use crate::failure;
use crate::terminal::{self, Raw};
use crate::values::{CpuMillis, Without, environment};

const DEFAULT_MEMORY_MIB: u64 = 512;
const DEFAULT_CPU_MILLIS: u32 = 1000;
const DEFAULT_STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// `carrel run`.
pub(crate) fn run(args: &RunArgs, configuration: &Configuration) -> Result<u8> {
    let terminal = terminal_for(args.tty && !args.detach, args.tty)?;
    let own = |name: &str| std::env::var(name).ok();
    let environment = environment::collect(&args.process.env_file, &args.process.env, &own)?;
    let name: Option<RoomName> = args.name.as_deref().map(str::parse).transpose()?;
    let home = place::home(configuration)?;
    let store = place::store(configuration)?;
    let lease = store.lease()?;
    let wanted = payload::Wanted {
        image: args.image(),
        pull: args.pull,
        platform: args.platform.as_deref(),
        insecure: false,
        without: without(args.machine.unconfined.as_ref()),
    };
    let image = payload::acquire(&store, &wanted)?;
    let overrides = Overrides {
        entrypoint: args.process.entrypoint.clone(),
        command: args.command().to_vec(),
        environment,
        working_directory: args.process.workdir.clone(),
        user: args.process.user.clone(),
        interactive: args.interactive,
        terminal,
    };
    let process = image::compose(&payload::defaults(&image), &overrides)?;
    let (layers, blobs) = payload::layers(&store, &image)?;
    let spec = RoomSpec {
        id: None,
        name,
        image: image.name.clone(),
        machine: machine(&args.machine)?,
        payload: Payload { layers, zips: Vec::new(), unpacked_bytes: None },
        surroundings: surroundings(args, &image),
        process,
        stop_signal: image::stop_signal(image.config.stop_signal.as_deref())?,
        stop_timeout_ms: millis(args.ends.stop_timeout.unwrap_or(DEFAULT_STOP_TIMEOUT)),
        timeout_ms: args.ends.timeout.map(millis),
        detached: args.detach,
        without: without(args.machine.unconfined.as_ref()),
        function: None,
    };
    let (room, session) = home.create(spec, blobs)?;
    // The room has its blobs open: nobody can take them away any more.
    drop(lease);
    if args.detach {
        return match session.wait_started()? {
            Beginning::Started => {
                failure::print(format_args!("{}\n", room.id()))?;
                Ok(0)
            }
            Beginning::Ended(ended) => begun_and_over(&room, &ended),
        };
    }
    let ended = attach(session, terminal.is_some(), |session, streams, notice| session.run(streams, notice))?;
    report::usage(&args.usage, ended.usage.as_ref())?;
    report::ended(&ended.outcome)
}

/// A detached room that was over before anybody looked: one that ran is as good as any, one that didn't is a failure.
fn begun_and_over(room: &carrel_host::Room, ended: &Ended) -> Result<u8> {
    report::ended(&ended.outcome)?;
    failure::print(format_args!("{}\n", room.id()))?;
    Ok(0)
}

/// `carrel exec`.
pub(crate) fn exec(args: &ExecArgs, configuration: &Configuration) -> Result<u8> {
    let terminal = terminal_for(args.tty, args.tty)?;
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
    let ended = attach(session, terminal.is_some(), |session, streams, notice| {
        session.exec(&process, streams, notice)
    })?;
    report::ended(&ended.outcome)
}

/// The size of the user's terminal, if one is wanted; it must then be there.
fn terminal_for(attached: bool, wanted: bool) -> Result<Option<TerminalSize>> {
    ensure!(
        !attached || terminal::stdin_is_terminal(),
        "The input is not a terminal: leave out -t, or run carrel in one."
    );
    Ok(wanted.then(terminal::size))
}

/// Serves a session with this process's own streams; the terminal is raw and signals are forwarded meanwhile.
fn attach(
    session: Session,
    has_terminal: bool,
    serve: impl FnOnce(Session, Streams, &mut dyn FnMut(&str)) -> Result<Ended, carrel_host::SessionError>,
) -> Result<Ended> {
    let forwarding = Forwarding::begin(session.remote(), has_terminal)?;
    let raw = if has_terminal { Some(Raw::enter()?) } else { None };
    let mut notice = |text: &str| tracing::warn!("{text}");
    let ended = serve(session, Streams::standard()?, &mut notice);
    drop(raw);
    drop(forwarding);
    Ok(ended?)
}

pub(super) fn machine(args: &MachineArgs) -> Result<Machine> {
    let cpu_millis = args.cpus.map_or(DEFAULT_CPU_MILLIS, CpuMillis::get);
    Ok(Machine {
        vcpus: VcpuCount::try_from(u64::from(cpu_millis.div_ceil(1000)))?,
        memory_mib: match args.memory {
            Some(memory) => memory,
            None => MemoryMib::try_from(DEFAULT_MEMORY_MIB)?,
        },
        cpu_millis,
        disk_bytes: args.disk.unwrap_or(DEFAULT_DISK_BYTES),
        kernel: args.kernel.as_ref().map(std::path::absolute).transpose()?,
    })
}

fn surroundings(args: &RunArgs, image: &Image) -> Surroundings {
    let tmpfs =
        |tmpfs: &crate::values::Tmpfs| Tmpfs { path: tmpfs.path.clone(), options: tmpfs.options.clone() };
    Surroundings {
        read_only_root: args.machine.read_only,
        tmpfs: args.machine.tmpfs.iter().map(tmpfs).collect(),
        volumes: image.config.volumes.iter().cloned().collect(),
        // A whole number of CPUs is as many vCPUs. The host's own quota has some for the VMM beside it.
        cpu_millis: args.machine.cpus.map(CpuMillis::get).filter(|millis| !millis.is_multiple_of(1000)),
        ..Surroundings::default()
    }
}

/// What `--unconfined` names.
pub(super) fn without(unconfined: Option<&Without>) -> Vec<Part> {
    unconfined.map(|parts| parts.0.clone()).unwrap_or_default()
}

pub(super) fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
