//! A trial: a guest is launched just as a room's is, watched until it has shown what it can or a deadline passes, and cleared away.

use std::fs::File;
use std::io::{self, PipeReader, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use carrel_protocol::Message;
use carrel_protocol::agent::{CONTROL_PORT, FromAgent, Hello, Surroundings};
use carrel_protocol::units::{MemoryMib, VcpuCount};
use carrel_protocol::vmm::{self, Configure, Descriptor, FromVmm, Kernel, SerialConfig, VmConfig};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;

use super::probe;
use crate::home::{Assets, Extras, Order, Task, fresh_id};
use crate::launch::{self, ChildEnd, LaunchError, Launched};
use crate::packet::{Connection, PacketError};
use crate::patience::Patience;
use crate::spec::{Machine, Part, Payload, ProcessSpec, RoomId, RoomSpec};

/// What a probe may write: a few marks.
const SERIAL_BYTES: u64 = 4096;
/// A room's least memory is more than a probe needs.
const PROBE_MEMORY: MemoryMib = MemoryMib::MIN;
const BOOT_DISK_BYTES: u64 = 1 << 30;

/// How a trial ended.
#[derive(Debug)]
pub(super) enum Conclusion {
    /// The VMM said how its guest ended.
    Ended(vmm::End, Option<String>),
    /// The guest left the mark that was waited for.
    Enough,
    /// The agent in the guest said its first word.
    Greeted(Box<Hello>),
    /// There was no VMM.
    NotLaunched(LaunchError),
    /// The VMM was gone without a word.
    Gone(ChildEnd),
    /// The guest did neither end nor greet before the deadline.
    Overdue,
    /// It could not be watched.
    Unwatched(io::Error),
}

/// What a trial showed.
#[derive(Debug)]
pub(super) struct Shown {
    /// The marks on the serial port, each with the time since the launch.
    pub(super) marks: Vec<(u8, Duration)>,
    /// From the launch to the conclusion.
    pub(super) took: Duration,
    pub(super) conclusion: Conclusion,
}

impl Shown {
    /// When a mark was seen.
    pub(super) fn at(&self, mark: u8) -> Option<Duration> {
        self.marks.iter().find(|(seen, _)| *seen == mark).map(|(_, at)| *at)
    }
}

/// Runs the probe until its end, or until it leaves the mark that is `enough`. `kvm` is `/dev/kvm`, or anything else where just the confinement
/// is tried: the VMM then says that KVM refused.
pub(super) fn probe(
    vmm: &Path,
    kvm: File,
    without: &[Part],
    enough: Option<u8>,
    deadline: Duration,
) -> Shown {
    let begun = Instant::now();
    let launched = || -> Result<(Launched, PipeReader), LaunchError> {
        let (serial, output) = io::pipe()?;
        let (vm, descriptors) = probe_config(kvm, output)?;
        let first = Configure { version: vmm::VERSION, vm };
        let launched = launch::start(
            &id()?,
            without,
            vmm,
            launch::limits(&probe_machine()),
            &first.into(),
            &descriptors,
        )?;
        Ok((launched, serial))
    };
    match launched() {
        Ok((launched, serial)) => watch(launched, Some((serial, enough)), begun, deadline),
        Err(error) => not_launched(error, begun),
    }
}

/// Boots the guest's kernel and the agent with all that a room has, its disk without a name in `directory`, until the agent greets.
pub(super) fn boot(assets: &Assets, directory: &Path, without: &[Part], deadline: Duration) -> Shown {
    let begun = Instant::now();
    let launched = || -> Result<Launched, LaunchError> {
        let id = id()?;
        let order = Order {
            spec: boot_spec(id.clone(), without),
            assets: assets.clone(),
            // The deadline here is the doctor's own.
            patience: Patience::default(),
            task: Task::Run,
            extras: Extras::default(),
        };
        launch::launch(&order, &id, directory, false, None)
    };
    match launched() {
        Ok(launched) => watch(launched, None, begun, deadline),
        Err(error) => not_launched(error, begun),
    }
}

fn not_launched(error: LaunchError, begun: Instant) -> Shown {
    Shown { marks: Vec::new(), took: begun.elapsed(), conclusion: Conclusion::NotLaunched(error) }
}

fn id() -> Result<RoomId, LaunchError> {
    Ok(fresh_id()?)
}

fn probe_machine() -> Machine {
    Machine { vcpus: VcpuCount::MIN, memory_mib: PROBE_MEMORY, cpu_millis: 1000, disk_bytes: 0, kernel: None }
}

fn probe_config(
    kvm: File,
    output: io::PipeWriter,
) -> Result<(VmConfig<Descriptor>, [OwnedFd; 3]), LaunchError> {
    let mut image =
        File::from(rustix::fs::memfd_create("probe", MemfdFlags::CLOEXEC).map_err(io::Error::from)?);
    image.write_all(&probe::kernel())?;
    image.rewind()?;
    let config = VmConfig {
        kvm: Descriptor(0),
        vcpus: VcpuCount::MIN,
        memory_mib: PROBE_MEMORY,
        huge_pages: false,
        kernel: Kernel { image: Descriptor(1), command_line: String::new() },
        initramfs: None,
        vsock: None,
        blocks: Vec::new(),
        entropy: None,
        balloon: None,
        serial: Some(SerialConfig { output: Descriptor(2), limit_bytes: SERIAL_BYTES }),
        control: None,
        track_dirty: false,
    };
    Ok((config, [kvm.into(), image.into(), output.into()]))
}

/// A room without a workload.
fn boot_spec(id: RoomId, without: &[Part]) -> RoomSpec {
    RoomSpec {
        id: Some(id),
        name: None,
        image: "none".into(),
        machine: Machine {
            memory_mib: MemoryMib::try_from(128).unwrap_or(MemoryMib::MIN),
            disk_bytes: BOOT_DISK_BYTES,
            ..probe_machine()
        },
        payload: Payload::default(),
        surroundings: Surroundings::default(),
        process: ProcessSpec::default(),
        stop_signal: 15,
        stop_timeout_ms: 0,
        timeout_ms: None,
        detached: false,
        without: without.to_vec(),
        function: None,
        initialised: false,
    }
}

/// Watches until there is a conclusion, then kills what is left of the VMM and removes its cgroup.
fn watch(
    launched: Launched,
    serial: Option<(PipeReader, Option<u8>)>,
    begun: Instant,
    deadline: Duration,
) -> Shown {
    let Launched { connection, child, cgroup, saved: _, record: _ } = launched;
    let mut marks = Vec::new();
    let (serial, enough) = serial.map_or((None, None), |(serial, enough)| (Some(serial), enough));
    let mut watched = Watch { connection: &connection, serial, enough, begun, until: begun + deadline };
    let conclusion = match watched.conclude(&mut marks) {
        Ok(Some(conclusion)) => conclusion,
        Ok(None) => child.wait().map_or_else(Conclusion::Unwatched, Conclusion::Gone),
        Err(error) => Conclusion::Unwatched(error),
    };
    let took = begun.elapsed();
    drop(child);
    if let Some(cgroup) = cgroup {
        cgroup.remove();
    }
    Shown { marks, took, conclusion }
}

struct Watch<'a> {
    connection: &'a Connection,
    serial: Option<PipeReader>,
    enough: Option<u8>,
    begun: Instant,
    until: Instant,
}

impl Watch<'_> {
    /// `None` if the VMM closed its socket and said nothing before.
    fn conclude(&mut self, marks: &mut Vec<(u8, Duration)>) -> io::Result<Option<Conclusion>> {
        loop {
            let left = self.until.saturating_duration_since(Instant::now());
            let (spoke, marked) = self.wait(left)?;
            if marked {
                self.read_marks(marks)?;
                if self.enough.is_some_and(|enough| marks.iter().any(|(mark, _)| *mark == enough)) {
                    return Ok(Some(Conclusion::Enough));
                }
            }
            if spoke {
                match self.connection.receive::<FromVmm>() {
                    Ok(packet) => {
                        if let Some(conclusion) = self.hear(packet.message, packet.descriptors)? {
                            // The guest wrote its marks before it ended, and this is the later look.
                            while self.wait(Duration::ZERO)?.1 {
                                self.read_marks(marks)?;
                            }
                            return Ok(Some(conclusion));
                        }
                    }
                    Err(PacketError::Closed) => return Ok(None),
                    Err(error) => return Err(io::Error::other(error)),
                }
            } else if left.is_zero() {
                return Ok(Some(Conclusion::Overdue));
            }
        }
    }

    /// Whether the VMM spoke, and whether the guest left marks.
    fn wait(&self, time: Duration) -> io::Result<(bool, bool)> {
        let mut fds = vec![PollFd::new(self.connection, PollFlags::IN)];
        fds.extend(self.serial.as_ref().map(|serial| PollFd::new(serial, PollFlags::IN)));
        let time = Timespec::try_from(time).map_err(io::Error::other)?;
        match poll(&mut fds, Some(&time)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
        Ok((ready(0), ready(1)))
    }

    fn read_marks(&mut self, marks: &mut Vec<(u8, Duration)>) -> io::Result<()> {
        let Some(serial) = &mut self.serial else { return Ok(()) };
        let mut bytes = [0; 64];
        let read = serial.read(&mut bytes)?;
        if read == 0 {
            // Closed: there is nothing to wait for any more.
            self.serial = None;
        }
        let now = self.begun.elapsed();
        marks.extend(bytes.iter().take(read).map(|&mark| (mark, now)));
        Ok(())
    }

    fn hear(&self, message: FromVmm, descriptors: Vec<OwnedFd>) -> io::Result<Option<Conclusion>> {
        Ok(match message {
            FromVmm::Ended(ended) => Some(Conclusion::Ended(ended.end, ended.detail)),
            FromVmm::Broken(broken) => Some(Conclusion::Ended(broken.end, Some(broken.message))),
            FromVmm::Dialled(dialled) if dialled.port == CONTROL_PORT => match descriptors.into_iter().next()
            {
                Some(control) => Some(self.greeting(control.into())?),
                None => None,
            },
            FromVmm::Prepared(_)
            | FromVmm::Booted(_)
            | FromVmm::Dialled(_)
            | FromVmm::Done(_)
            | FromVmm::Refused(_)
            | FromVmm::Metrics(_)
            | FromVmm::Snapshotted(_)
            | FromVmm::DeviceStopped(_) => None,
        })
    }

    fn greeting(&self, mut control: UnixStream) -> io::Result<Conclusion> {
        let left = self.until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        control.set_nonblocking(false)?;
        control.set_read_timeout(Some(left))?;
        match FromAgent::read_from(&mut control) {
            Ok(FromAgent::Hello(hello)) => Ok(Conclusion::Greeted(Box::new(hello))),
            Ok(_) => Err(io::Error::other("the agent spoke out of turn")),
            Err(error) => Err(io::Error::other(error)),
        }
    }
}
