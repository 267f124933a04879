//! The devices: virtio over MMIO, and the serial port.
//!
//! ```text
//!  vCPU thread ── MMIO exit ──▶ Bus ──▶ Transport: registers ─┐
//!  KVM ── ioeventfd ──▶ event thread ──▶ Devices::handle ──▶ Transport::serve ──▶ Device ──▶ Ring ── irqfd ──▶ KVM
//! ```
//!
//! A device is one variant of [`Device`] and one file (vsock: a folder). Adding one: its file, its variant, its field in
//! [`carrel_protocol::vmm::VmConfig`], a test. Device number n has its registers at 0xd000_0000 + n · 4 KiB and interrupt 5 + n.

pub mod balloon;
pub mod block;
mod bucket;
pub mod buffers;
pub mod entropy;
pub mod mmio;
pub mod net;
pub mod ring;
pub mod serial;
pub mod state;
pub mod vsock;

#[cfg(test)]
pub(crate) mod driver;
#[cfg(test)]
mod hostile;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use carrel_protocol::vmm::{
    BalloonConfig, BlockConfig, DeviceStopReason, DeviceStopped, Dialled, End, EntropyConfig, Metrics,
    VsockConfig,
};
use thiserror::Error;
use virtio_bindings::virtio_ids as ids;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::event::{Epoll, Event, Interest, borrow, check};
use crate::memory::Written;
use balloon::Balloon;
use block::{Block, BlockError};
use buffers::Fault;
use entropy::Entropy;
use mmio::{Misfit, QUEUE_NOTIFY, Served, Transport};
use net::Net;
use ring::Ring;
use state::DeviceState;
use vsock::Vsock;

/// Where device 0 has its registers.
pub const BASE: u64 = crate::memory::GAP_START;
/// Bytes of registers a device.
pub const WINDOW: u64 = 0x1000;
/// Device 0's interrupt. Below are the serial port's and what a PC has; the I/O APIC ends at 23.
pub const FIRST_GSI: u32 = 5;
/// Linux numbers CIDs below 3 for itself (virtio §5.10.4).
const FIRST_GUEST_CID: u32 = 3;

/// A device can't be made.
#[derive(Debug, Error)]
pub enum DevicesError {
    /// A disk.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// vsock's address.
    #[error("guest_cid {cid} is reserved; use 3 or more")]
    GuestCid {
        /// What was asked for.
        cid: u32,
    },
    /// vsock's connections.
    #[error("a vsock device has 1 to 1,024 connections, not {connections}")]
    Connections {
        /// What was asked for.
        connections: u16,
    },
    /// The balloon.
    #[error("a balloon of {mib} MiB is larger than the guest's memory")]
    Balloon {
        /// What was asked for.
        mib: u32,
    },
    /// The host.
    #[error("the host refused an eventfd or a place in the event loop")]
    Host(#[from] io::Error),
}

impl DevicesError {
    /// Under which end of the process this falls.
    pub fn end(&self) -> End {
        match self {
            Self::Block(_) | Self::GuestCid { .. } | Self::Connections { .. } | Self::Balloon { .. } => {
                End::BadConfiguration
            }
            Self::Host(_) => End::Host,
        }
    }
}

/// A device behind a transport. Closed: what can be configured is what is here.
#[derive(Debug)]
pub enum Device {
    /// Stream sockets.
    Vsock(Vsock),
    /// A disk.
    Block(Block),
    /// A network interface; none can be configured yet.
    Net(Net),
    /// Random numbers.
    Entropy(Entropy),
    /// Memory given back.
    Balloon(Balloon),
}

impl Device {
    /// Its virtio device id (virtio §5).
    fn id(&self) -> u32 {
        match self {
            Self::Vsock(_) => ids::VIRTIO_ID_VSOCK,
            Self::Block(_) => ids::VIRTIO_ID_BLOCK,
            Self::Net(net) => match *net {},
            Self::Entropy(_) => ids::VIRTIO_ID_RNG,
            Self::Balloon(_) => ids::VIRTIO_ID_BALLOON,
        }
    }

    /// Its name towards the owner.
    fn name(&self) -> String {
        match self {
            Self::Vsock(_) => "vsock".into(),
            Self::Block(block) => format!("block {}", block.id()),
            Self::Net(net) => match *net {},
            Self::Entropy(_) => "entropy".into(),
            Self::Balloon(_) => "balloon".into(),
        }
    }

    /// Features beside the transport's.
    fn features(&self) -> u64 {
        match self {
            Self::Vsock(_) | Self::Entropy(_) => 0,
            Self::Block(block) => block.features(),
            Self::Net(net) => match *net {},
            Self::Balloon(balloon) => balloon.features(),
        }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        match self {
            Self::Vsock(_) => Vsock::QUEUE_SIZES,
            Self::Block(_) => Block::QUEUE_SIZES,
            Self::Net(net) => match *net {},
            Self::Entropy(_) => Entropy::QUEUE_SIZES,
            Self::Balloon(balloon) => balloon.queue_sizes(),
        }
    }

    /// Reads from configuration space; beyond its end are zeros.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        match self {
            Self::Vsock(vsock) => copy_config(&vsock.config(), offset, data),
            Self::Block(block) => copy_config(&block.config(), offset, data),
            Self::Net(net) => match *net {},
            Self::Entropy(_) => {}
            Self::Balloon(balloon) => copy_config(&balloon.config(), offset, data),
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        match self {
            Self::Balloon(balloon) => balloon.write_config(offset, data),
            Self::Net(net) => match *net {},
            Self::Vsock(_) | Self::Block(_) | Self::Entropy(_) => {}
        }
    }

    /// Serves a queue. True when there is more to do at once.
    fn serve(&mut self, queue: usize, rings: &mut [Ring], epoll: &Epoll) -> Result<bool, Fault> {
        let ring = rings.get_mut(queue).ok_or(Fault)?;
        match self {
            Self::Vsock(vsock) => vsock.serve(queue, rings, epoll),
            Self::Block(block) => block.serve(ring),
            Self::Net(net) => match *net {},
            Self::Entropy(entropy) => entropy.serve(ring),
            Self::Balloon(balloon) => balloon.serve(queue, ring),
        }
    }

    /// Whether what a queue holds waits for something else than its driver: no notification of it is wanted.
    fn is_waiting(&self, queue: usize) -> bool {
        match self {
            // Buffers for the guest's next packets and events, asked for by the device itself when it runs out.
            Self::Vsock(_) => queue != 1,
            Self::Block(block) => block.resumes_at().is_some(),
            Self::Net(net) => match *net {},
            Self::Entropy(_) | Self::Balloon(_) => false,
        }
    }

    /// The driver starts anew.
    fn reset(&mut self) {
        match self {
            Self::Vsock(vsock) => vsock.reset(),
            Self::Balloon(balloon) => balloon.reset(),
            Self::Net(net) => match *net {},
            Self::Block(_) | Self::Entropy(_) => {}
        }
    }

    /// State to be saved.
    fn state(&self) -> DeviceState {
        match self {
            Self::Vsock(_) => DeviceState::Vsock,
            Self::Block(_) => DeviceState::Block,
            Self::Net(net) => match *net {},
            Self::Entropy(_) => DeviceState::Entropy,
            Self::Balloon(balloon) => balloon.state(),
        }
    }
}

impl Device {
    /// Takes over saved state; false if it is another device's.
    fn restore(&mut self, saved: &DeviceState) -> bool {
        match (self, saved) {
            (Self::Vsock(_), DeviceState::Vsock)
            | (Self::Block(_), DeviceState::Block)
            | (Self::Entropy(_), DeviceState::Entropy) => true,
            (Self::Balloon(balloon), DeviceState::Balloon { target_pages, actual_pages }) => {
                balloon.restore(*target_pages, *actual_pages);
                true
            }
            (Self::Net(net), _) => match *net {},
            (Self::Vsock(_) | Self::Block(_) | Self::Entropy(_) | Self::Balloon(_), _) => false,
        }
    }
}

fn copy_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    for (to, from) in data.iter_mut().zip(from) {
        *to = *from;
    }
}

/// MMIO, as vCPU threads reach it.
#[derive(Clone, Debug)]
pub struct Bus(Arc<Vec<Transport>>);

impl Bus {
    /// The guest reads. Where nothing is, all ones are read, as from an empty bus.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((transport, offset)) => transport.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((transport, offset)) = self.find(address) {
            transport.write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(&Transport, u64)> {
        let offset = address.checked_sub(BASE)?;
        let transport = self.0.get(usize::try_from(offset / WINDOW).ok()?)?;
        Some((transport, offset % WINDOW))
    }
}

/// Something for the owner to hear.
#[derive(Debug)]
pub enum Notice {
    /// The guest dialled; here is the other end.
    Dialled(Dialled, OwnedFd),
    /// A device stopped.
    Stopped(DeviceStopped),
}

/// All virtio devices of a machine, in the order of their addresses.
#[derive(Debug)]
pub struct Devices {
    transports: Arc<Vec<Transport>>,
    names: Vec<String>,
    notices: Vec<Notice>,
    /// Devices whose driver's fault was told. A driver may reset its device and break it again as often as it likes.
    told_broken: BTreeSet<usize>,
    vsock: Option<usize>,
    blocks: Vec<usize>,
    balloon: Option<usize>,
    memory_mib: u64,
}

/// Queue q of device n.
fn queue_token(device: usize, queue: usize) -> u64 {
    u64::try_from(device << 8 | queue).unwrap_or(0)
}

impl Devices {
    /// Makes what is configured and watches its descriptors.
    pub fn new(
        vsock: Option<VsockConfig<OwnedFd>>,
        blocks: Vec<BlockConfig<OwnedFd>>,
        entropy: Option<EntropyConfig>,
        balloon: Option<BalloonConfig>,
        memory: &GuestMemoryMmap,
        written: &Written,
        epoll: &Epoll,
    ) -> Result<Self, DevicesError> {
        use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
        let memory_mib = memory.iter().map(|region| region.len() >> 20).sum();
        let mut devices = Vec::new();
        if let Some(config) = vsock {
            devices.push(Device::Vsock(new_vsock(config, epoll)?));
        }
        for config in blocks {
            devices.push(Device::Block(Block::new(config)?));
        }
        if let Some(EntropyConfig {}) = entropy {
            devices.push(Device::Entropy(Entropy));
        }
        if let Some(BalloonConfig { size_mib, free_page_reporting }) = balloon {
            if u64::from(size_mib) >= memory_mib {
                return Err(DevicesError::Balloon { mib: size_mib });
            }
            devices.push(Device::Balloon(Balloon::new(size_mib, free_page_reporting)));
        }
        let place = |wanted: fn(&Device) -> bool| devices.iter().position(wanted);
        let vsock = place(|device| matches!(device, Device::Vsock(_)));
        let balloon = place(|device| matches!(device, Device::Balloon(_)));
        let blocks = (0..devices.len())
            .filter(|&n| devices.get(n).is_some_and(|device| matches!(device, Device::Block(_))))
            .collect();
        let names = devices.iter().map(Device::name).collect();
        let transports = devices
            .into_iter()
            .map(|device| Transport::new(device, memory.clone(), written.clone()))
            .collect::<io::Result<Vec<_>>>()?;
        for (n, transport) in transports.iter().enumerate() {
            for (queue, event) in transport.notifications.iter().enumerate() {
                epoll.add(borrow(event), queue_token(n, queue), Interest::READ)?;
            }
        }
        let transports = Arc::new(transports);
        let told_broken = BTreeSet::new();
        Ok(Self { transports, names, notices: Vec::new(), told_broken, vsock, blocks, balloon, memory_mib })
    }

    /// What vCPU threads need of them.
    pub fn bus(&self) -> Bus {
        Bus(self.transports.clone())
    }

    /// What KVM signals instead of leaving the guest: address, queue number as the value to match, eventfd.
    pub fn notifications(&self) -> impl Iterator<Item = (u64, u32, &EventFd)> {
        (BASE..).step_by(4096).zip(self.transports.iter()).flat_map(|(base, transport)| {
            (0..).zip(&transport.notifications).map(move |(queue, event)| (base + QUEUE_NOTIFY, queue, event))
        })
    }

    /// What KVM interrupts the guest for: interrupt number, eventfd.
    pub fn interrupts(&self) -> impl Iterator<Item = (u32, &EventFd)> {
        (FIRST_GSI..).zip(self.transports.iter().map(Transport::interrupt))
    }

    /// How many interrupts there are, the ones below the first device's counted too.
    pub fn interrupt_count(&self) -> u8 {
        let devices = u32::try_from(self.transports.len()).unwrap_or(u32::MAX);
        u8::try_from(FIRST_GSI.saturating_add(devices)).unwrap_or(u8::MAX)
    }

    /// A kernel command line that names every device (Linux, *kernel-parameters*, `virtio_mmio.device`).
    pub fn command_line(&self, base: &str) -> String {
        let mut line = base.to_owned();
        for (address, gsi) in (BASE..).step_by(4096).zip(FIRST_GSI..).take(self.transports.len()) {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(&format!("virtio_mmio.device=4K@{address:#x}:{gsi}"));
        }
        line
    }

    /// Something happened on a descriptor that a device watches.
    pub fn handle(&mut self, event: &Event, epoll: &Epoll) {
        if Vsock::owns(event.token) {
            self.with_vsock(|vsock, rings| vsock.handle(event, rings, epoll));
        } else if let (Ok(n), Ok(queue)) =
            (usize::try_from(event.token >> 8), usize::try_from(event.token & 0xff))
            && let Some(transport) = self.transports.get(n)
            && transport.serve(queue, epoll) == Served::Broken
        {
            self.broken(n);
        }
    }

    /// Does what time or earlier events have made due.
    pub fn tick(&mut self, epoll: &Epoll) {
        let now = Instant::now();
        for n in self.blocks.clone() {
            self.tick_block(n, now, epoll);
        }
        let mut dialled = Vec::new();
        self.with_vsock(|vsock, rings| {
            let late = vsock.next_deadline().is_some_and(|at| at <= now);
            if late {
                vsock.expire(now);
            }
            let more = late && vsock.pump(rings)?;
            dialled = vsock.take_dialled();
            Ok(more)
        });
        self.notices.extend(dialled.into_iter().map(|(port, end)| Notice::Dialled(Dialled { port }, end)));
    }

    fn tick_block(&mut self, n: usize, now: Instant, epoll: &Epoll) {
        let Some(transport) = self.transports.get(n) else { return };
        let looked = transport.with(|device, _| match device {
            Device::Block(block) => {
                Ok((block.resumes_at().is_some_and(|at| at <= now), block.take_trouble()))
            }
            Device::Vsock(_) | Device::Entropy(_) | Device::Balloon(_) => Ok((false, None)),
            Device::Net(net) => match *net {},
        });
        let Ok((resumes, trouble)) = looked else { return };
        if let Some(reason) = trouble {
            self.stopped(n, reason);
        }
        if resumes && transport_serves(&self.transports, n, epoll) == Served::Broken {
            self.broken(n);
        }
    }

    /// How long the event loop may sleep, ms; -1: until something happens.
    pub fn timeout_ms(&self) -> i32 {
        let of = |n: usize| {
            let look = |device: &mut Device, _: &mut [Ring]| {
                Ok(match device {
                    Device::Block(block) => block.resumes_at(),
                    Device::Vsock(vsock) => vsock.next_deadline(),
                    Device::Entropy(_) | Device::Balloon(_) => None,
                    Device::Net(net) => match *net {},
                })
            };
            self.transports.get(n)?.with(look).ok().flatten()
        };
        match self.blocks.iter().copied().chain(self.vsock).filter_map(of).min() {
            None => -1,
            Some(at) => {
                let wait = at.saturating_duration_since(Instant::now()).as_millis() + 1;
                i32::try_from(wait).unwrap_or(i32::MAX)
            }
        }
    }

    /// What the owner has not heard yet.
    pub fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// Looks at every queue again, after a pause.
    pub fn kick(&self) {
        self.transports.iter().for_each(Transport::serve_all_soon);
    }

    /// Asks the guest for another balloon.
    pub fn set_balloon(&self, size_mib: u32) -> Result<(), String> {
        let Some(transport) = self.balloon.and_then(|n| self.transports.get(n)) else {
            return Err("the machine has no balloon".into());
        };
        if u64::from(size_mib) >= self.memory_mib {
            return Err(DevicesError::Balloon { mib: size_mib }.to_string());
        }
        let set = transport.with(|device, _| {
            if let Device::Balloon(balloon) = device {
                balloon.set_target(size_mib);
            }
            Ok(())
        });
        transport.config_changed();
        set.map_err(|_| "the balloon's driver is broken".into())
    }

    /// They go on as saved: each transport as it was; who was connected over vsock is told that the connection is over.
    ///
    /// # Errors
    ///
    /// The state is not of these devices.
    pub fn restore(&mut self, saved: &[state::TransportState]) -> Result<(), Misfit> {
        if saved.len() != self.transports.len() {
            return Err(Misfit);
        }
        for (transport, saved) in self.transports.iter().zip(saved) {
            transport.restore(saved)?;
        }
        self.with_vsock(|vsock, rings| {
            vsock.announce_reset(rings)?;
            Ok(false)
        });
        Ok(())
    }

    /// Completes every disk's overlay, for a snapshot.
    ///
    /// # Errors
    ///
    /// A file's.
    pub fn complete_disks(&mut self) -> io::Result<()> {
        let mut result = Ok(());
        for transport in self.blocks.iter().filter_map(|n| self.transports.get(*n)) {
            let _ = transport.with(|device, _| {
                if let (Device::Block(block), Ok(())) = (device, &result) {
                    result = block.complete();
                }
                Ok(())
            });
        }
        result
    }

    /// Marks what running devices write at all times.
    pub fn mark_used_rings(&self) {
        self.transports.iter().for_each(Transport::mark_used_rings);
    }

    /// What has to be saved of them, in order.
    pub fn state(&self) -> Vec<state::TransportState> {
        self.transports.iter().map(Transport::state).collect()
    }

    /// The devices' counters.
    pub fn metrics(&self) -> Metrics {
        let mut metrics = Metrics::default();
        for transport in self.transports.iter() {
            let _ = transport.with(|device, _| {
                match device {
                    Device::Vsock(vsock) => {
                        metrics.vsock_sent_bytes = vsock.counters.sent_bytes;
                        metrics.vsock_received_bytes = vsock.counters.received_bytes;
                        metrics.vsock_refused = vsock.counters.refused;
                    }
                    Device::Block(block) => {
                        metrics.block_read_bytes += block.counters.read_bytes;
                        metrics.block_written_bytes += block.counters.written_bytes;
                        metrics.block_reads += block.counters.reads;
                        metrics.block_writes += block.counters.writes;
                        metrics.block_errors += block.counters.errors;
                    }
                    Device::Net(net) => match *net {},
                    Device::Entropy(_) => {}
                    Device::Balloon(balloon) => {
                        metrics.reclaimed_bytes += balloon.reclaimed_bytes;
                        metrics.balloon_bytes += balloon.held_bytes();
                    }
                }
                Ok(())
            });
        }
        metrics
    }

    /// Gives vsock a turn. What says that there is more to do has another one soon, after everybody else.
    fn with_vsock(&mut self, act: impl FnOnce(&mut Vsock, &mut [Ring]) -> Result<bool, Fault>) {
        let Some(n) = self.vsock else { return };
        let Some(transport) = self.transports.get(n) else { return };
        let done = transport.with(|device, rings| match device {
            Device::Vsock(vsock) => act(vsock, rings),
            Device::Block(_) | Device::Entropy(_) | Device::Balloon(_) => Ok(false),
            Device::Net(net) => match *net {},
        });
        match done {
            Ok(true) => transport.notify(vsock::RECEIVE),
            Ok(false) => {}
            Err(_) => self.broken(n),
        }
    }

    fn broken(&mut self, n: usize) {
        if self.told_broken.insert(n) {
            self.stopped(n, DeviceStopReason::DriverFault);
        }
    }

    fn stopped(&mut self, n: usize, reason: DeviceStopReason) {
        let device = self.names.get(n).cloned().unwrap_or_default();
        self.notices.push(Notice::Stopped(DeviceStopped { device, reason }));
    }
}

fn transport_serves(transports: &[Transport], n: usize, epoll: &Epoll) -> Served {
    transports.get(n).map_or(Served::Done, |transport| transport.serve(0, epoll))
}

fn new_vsock(config: VsockConfig<OwnedFd>, epoll: &Epoll) -> Result<Vsock, DevicesError> {
    if config.guest_cid < FIRST_GUEST_CID || config.guest_cid == u32::MAX {
        return Err(DevicesError::GuestCid { cid: config.guest_cid });
    }
    if !(1..=1024).contains(&config.connections) {
        return Err(DevicesError::Connections { connections: config.connections });
    }
    Ok(Vsock::new(config, epoll)?)
}

/// Accepts a connection, non-blocking.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no address is asked for, so both pointers may be null.
    let fd = check(unsafe {
        libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags)
    })?;
    // SAFETY: the descriptor was just made and is owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
