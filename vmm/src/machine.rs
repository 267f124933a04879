//! A machine that runs: [`Machine::serve`] serves its devices and its owner until it ends.

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use carrel_protocol::vmm::{
    Booted, Descriptor, Done, End, Ended, FromOwner, FromVmm, Metrics, RecordWorkingSet, Refused, Snapshot,
    SnapshotKind, Snapshotted,
};
use carrel_protocol::{FrameError, chain};
use kvm_ioctls::Kvm;
use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::arch::current::state::{self, StateError, Wanted};
use crate::devices::{Devices, Notice};
use crate::event::{Epoll, Event, Interest, borrow};
use crate::memory::{self, Selection, Written};
use crate::owner::{Connection, OwnerError, Packet};
use crate::snapshot::{MachineState, Shape, SnapshotError};
use crate::start;
use crate::timeline::{Timeline, now_us};
use crate::vcpu::{self, Shared};
use crate::working_set::WorkingSetError;
use crate::working_set::touched::Pagemap;

/// A paused machine can't be saved; it can go on.
#[derive(Debug, Error)]
enum SaveError {
    #[error("the request names descriptors that did not come with it, or not all of them")]
    Descriptors,
    #[error("the machine is not paused")]
    NotPaused,
    #[error(
        "the machine does not track what it writes, so there is no differential snapshot; see track_dirty"
    )]
    NotTracked,
    #[error(
        "a snapshot before this one failed, and what was written until then is not known any more: make a full one"
    )]
    Incomplete,
    #[error("a disk's overlay can't be completed")]
    Disk(#[source] std::io::Error),
    #[error("the memory file can't be written")]
    Memory(#[source] std::io::Error),
    #[error("KVM refused to tell which pages were written")]
    DirtyLog(#[source] kvm_ioctls::Error),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    File(#[from] SnapshotError),
}

/// There is no working set of this machine.
#[derive(Debug, Error)]
enum RecordError {
    #[error("the request names a descriptor that did not come with it")]
    Descriptor,
    #[error("the machine does not go on from a snapshot, or its host has no /proc/self/pagemap")]
    None,
    #[error("the kernel does not tell which pages were touched")]
    Pagemap(#[source] std::io::Error),
    #[error(transparent)]
    File(#[from] WorkingSetError),
}

/// A machine whose vCPUs run. Made by [`crate::start`].
#[derive(Debug)]
pub struct Machine {
    pub(crate) shared: Arc<Shared>,
    pub(crate) devices: Devices,
    pub(crate) vcpus: Vec<JoinHandle<()>>,
    pub(crate) epoll: Epoll,
    pub(crate) control: Option<OwnedFd>,
    pub(crate) signals: OwnedFd,
    /// For snapshots.
    pub(crate) shape: Shape,
    pub(crate) written: Written,
    /// Since a snapshot failed: what it had taken off `written` is nowhere.
    pub(crate) forgotten: bool,
    pub(crate) host_kernel: String,
    /// Of a machine that goes on from a snapshot, where the host tells.
    pub(crate) pagemap: Option<Pagemap>,
    /// What could not be used.
    pub(crate) notice: Option<String>,
}

/// Tokens of what is not a device; devices' are below.
const OWNER: u64 = u64::MAX;
const CONTROL: u64 = u64::MAX - 1;
const VERDICT: u64 = u64::MAX - 2;
const SIGNALS: u64 = u64::MAX - 3;

impl Machine {
    /// Serves devices and owner until the machine ends. `owner` is told that it booted, and at the end how it ended.
    pub fn serve(mut self, owner: Connection, mut timeline: Timeline) -> (End, Option<String>) {
        let mut owner = Some(owner);
        if let Err(e) = self.watch(owner.as_ref()) {
            return (End::Host, Some(format!("the event loop can't be set up: {e}")));
        }
        tell(&mut owner, &Booted { timeline: timeline.take(), notice: self.notice.take() }.into());
        let mut events: Vec<Event> = Vec::new();
        let (end, detail) = loop {
            if let Some(verdict) = self.shared.verdict.get() {
                break verdict;
            }
            if let Err(e) = self.epoll.wait(self.devices.timeout_ms(), &mut events) {
                break (End::Internal, Some(format!("epoll_wait failed: {e}")));
            }
            if let Some(end) = self.handle(&events, &mut owner) {
                break end;
            }
        };
        tell(&mut owner, &Ended { end, detail: detail.clone() }.into());
        (end, detail)
    }

    fn watch(&self, owner: Option<&Connection>) -> std::io::Result<()> {
        if let Some(owner) = owner {
            self.epoll.add(owner, OWNER, Interest::READ)?;
        }
        if let Some(control) = &self.control {
            self.epoll.add(control, CONTROL, Interest::READ)?;
        }
        self.epoll.add(&self.signals, SIGNALS, Interest::READ)?;
        self.epoll.add(borrow(&self.shared.verdict.reached), VERDICT, Interest::READ)
    }

    fn handle(&mut self, events: &[Event], owner: &mut Option<Connection>) -> Option<(End, Option<String>)> {
        for event in events {
            match event.token {
                VERDICT => return self.shared.verdict.get(),
                SIGNALS => return Some((End::Stopped, Some("a signal asked".into()))),
                OWNER => {
                    if let Some(end) = self.hear(owner) {
                        return Some(end);
                    }
                }
                CONTROL => self.accept_owner(owner),
                _ => self.devices.handle(event, &self.epoll),
            }
        }
        self.devices.tick(&self.epoll);
        for notice in self.devices.take_notices() {
            match notice {
                // Without an owner the descriptor is dropped here: the guest is refused.
                Notice::Dialled(dialled, end) => tell_with(owner, &dialled.into(), &end),
                Notice::Stopped(stopped) => tell(owner, &stopped.into()),
            }
        }
        None
    }

    /// Carries out what the owner asks, until it has no more to say.
    fn hear(&mut self, owner: &mut Option<Connection>) -> Option<(End, Option<String>)> {
        loop {
            let received = owner.as_ref()?.receive::<FromOwner>();
            let answer: FromVmm = match received {
                Ok(None) => return None,
                Ok(Some(Packet { message, descriptors })) => match message {
                    FromOwner::Stop(_) => return Some((End::Stopped, Some("the owner asked".into()))),
                    FromOwner::Configure(_) | FromOwner::Prepare(_) | FromOwner::Restore(_) => {
                        Refused { reason: "the machine is configured already".into() }.into()
                    }
                    FromOwner::Snapshot(request) => match self.snapshot(&request, descriptors) {
                        Ok(snapshotted) => snapshotted.into(),
                        Err(e) => Refused { reason: chain(&e) }.into(),
                    },
                    FromOwner::RecordWorkingSet(request) => match self.record(&request, descriptors) {
                        Ok(()) => Done {}.into(),
                        Err(e) => Refused { reason: chain(&e) }.into(),
                    },
                    FromOwner::Pause(_) => {
                        self.shared.gate.pause(|| self.vcpus.iter().for_each(vcpu::kick));
                        // Devices carry out requests where they take them from their queues, on this thread: none is under way.
                        Done {}.into()
                    }
                    FromOwner::Resume(_) => {
                        self.devices.kick();
                        self.shared.gate.resume();
                        Done {}.into()
                    }
                    FromOwner::SetBalloon(set) => match self.devices.set_balloon(set.size_mib) {
                        Ok(()) => Done {}.into(),
                        Err(reason) => Refused { reason }.into(),
                    },
                    FromOwner::ReadMetrics(_) => self.metrics().into(),
                },
                Err(OwnerError::Frame(FrameError::Body { name, source })) => {
                    Refused { reason: format!("the {name} message is malformed: {source}") }.into()
                }
                Err(e) => return self.lose_owner(owner, &e),
            };
            tell(owner, &answer);
        }
    }

    /// Writes down which pages were touched by now.
    fn record(&self, request: &RecordWorkingSet, descriptors: Vec<OwnedFd>) -> Result<(), RecordError> {
        let Descriptor(index) = request.file;
        let file = descriptors.into_iter().nth(index.into()).ok_or(RecordError::Descriptor)?;
        let pagemap = self.pagemap.as_ref().ok_or(RecordError::None)?;
        let touched = pagemap.touched(&self.shared.memory).map_err(RecordError::Pagemap)?;
        Ok(touched.write(&File::from(file))?)
    }

    /// Saves the paused machine into the files that came with the request.
    fn snapshot(&mut self, request: &Snapshot, descriptors: Vec<OwnedFd>) -> Result<Snapshotted, SaveError> {
        let began_us = now_us();
        let mut files: Vec<Option<OwnedFd>> = descriptors.into_iter().map(Some).collect();
        let mut file = |Descriptor(index): Descriptor| {
            files.get_mut(usize::from(index)).and_then(Option::take).ok_or(SaveError::Descriptors)
        };
        let (device, state, memory) = (file(request.kvm)?, file(request.state)?, file(request.memory)?);
        // A vCPU that is over goes on no errand.
        if self.shared.gate.is_open() || self.shared.verdict.get().is_some() {
            return Err(SaveError::NotPaused);
        }
        if request.kind == SnapshotKind::Differential && !self.written.is_tracked() {
            return Err(SaveError::NotTracked);
        }
        if request.kind == SnapshotKind::Differential && self.forgotten {
            return Err(SaveError::Incomplete);
        }
        // SAFETY: the descriptor is owned; asked for anything but KVM's requests it is refused by whatever it is.
        let device = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
        let vm = self.shared.io_apic.vm();
        state::check_extended_state(vm)?;
        let wanted = Wanted::of(&device, self.shape.vcpus.get())?;
        let vcpus = self.shared.saves.collect(&self.shared.gate, self.vcpus.len(), wanted);
        let vcpus = vcpus.ok_or(SaveError::NotPaused)??;
        self.devices.complete_disks().map_err(SaveError::Disk)?;
        let saved = MachineState {
            layout: start::layout(&self.shape),
            host_kernel: self.host_kernel.clone(),
            shape: self.shape.clone(),
            vcpus,
            clock: state::save_clock(vm)?,
            io_apic: self.shared.io_apic.state(),
            devices: self.devices.state(),
            serial: self.shared.ports.serial_state(),
        };
        self.forgotten = true;
        let memory_bytes = self.save_memory(&File::from(memory), request.kind)?;
        let state_bytes = saved.write(&File::from(state))?;
        self.forgotten = false;
        Ok(Snapshotted { state_bytes, memory_bytes, took_us: now_us().saturating_sub(began_us) })
    }

    /// Writes memory and, where it is tracked, begins to count anew what is written.
    fn save_memory(&self, file: &File, kind: SnapshotKind) -> Result<u64, SaveError> {
        self.devices.mark_used_rings();
        let marked = self.written.take();
        let (mut offset, mut bytes) = (0, 0);
        for (slot, region) in (0u32..).zip(self.shared.memory.iter()) {
            let length =
                usize::try_from(region.len()).map_err(|e| SaveError::Memory(std::io::Error::other(e)))?;
            let mut pages = match self.written.is_tracked() {
                true => self.shared.io_apic.vm().get_dirty_log(slot, length).map_err(SaveError::DirtyLog)?,
                false => Vec::new(),
            };
            let by_devices = usize::try_from(slot).ok().and_then(|slot| marked.get(slot));
            for (page, marked) in pages.iter_mut().zip(by_devices.into_iter().flatten()) {
                *page |= marked;
            }
            let selection = match kind {
                SnapshotKind::Full => Selection::NotZero,
                SnapshotKind::Differential => Selection::These(&pages),
            };
            bytes += memory::save(region, file, offset, selection).map_err(SaveError::Memory)?;
            offset += region.len();
        }
        Ok(bytes)
    }

    /// With a control socket the machine goes on and waits for the next owner; without one nobody could ever reach it.
    fn lose_owner(&self, owner: &mut Option<Connection>, why: &OwnerError) -> Option<(End, Option<String>)> {
        if let Some(owner) = owner.take() {
            let _ = self.epoll.remove(&owner);
        }
        match self.control {
            Some(_) => None,
            None => Some((End::Stopped, Some(why.to_string()))),
        }
    }

    fn accept_owner(&self, owner: &mut Option<Connection>) {
        let Some(control) = &self.control else { return };
        if let Ok(socket) = crate::devices::accept(control.as_fd()) {
            if let Some(old) = owner.take() {
                let _ = self.epoll.remove(&old);
            }
            let new = Connection::new(socket);
            if self.epoll.add(&new, OWNER, Interest::READ).is_ok() {
                *owner = Some(new);
            }
        }
    }

    fn metrics(&self) -> Metrics {
        let exits = &self.shared.exits;
        Metrics {
            exits: exits.all.load(Ordering::Relaxed),
            mmio_exits: exits.mmio.load(Ordering::Relaxed),
            port_exits: exits.ports.load(Ordering::Relaxed),
            ..self.devices.metrics()
        }
    }
}

/// Tells the owner, if there is one. An owner that doesn't read misses it: the guest's room must not depend on it.
fn tell(owner: &mut Option<Connection>, message: &FromVmm) {
    if let Some(owner) = owner {
        let _ = owner.send(message, &[]);
    }
}

fn tell_with(owner: &mut Option<Connection>, message: &FromVmm, descriptor: &OwnedFd) {
    if let Some(owner) = owner {
        let _ = owner.send(message, &[descriptor.as_fd()]);
    }
}
