//! virtio-vsock (virtio §5.10): stream sockets between the guest and its owner, without any network.
//!
//! ```text
//!  guest dials port P:   REQUEST ─▶ socketpair ─▶ one end kept, the other handed to the owner with P
//!  host dials port P:    connects to the listening socket, says "CONNECT P\n" ─▶ REQUEST ─▶ RESPONSE ─▶ "OK <its port>\n"
//! ```
//!
//! Queues: 0 to the guest, 1 from the guest, 2 events: a clone hears there that its connections are over. Each connection's rules are in [`connection`]; this
//! file finds the connection of a packet, gives connections that have something for the guest their turns, and counts. Several buffers of the
//! guest are filled by one `readv`.
//!
//! What a guest can make us hold is bounded: so many connections, 256 KiB held back for each, and so many resets owed.

mod connection;
mod packet;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use carrel_protocol::vmm::VsockConfig;

use super::buffers::{Buffers, Fault, Ranges};
use super::ring::Ring;
use crate::event::{Epoll, Event, Interest};
use crate::owner::socketpair;
use connection::{Connection, Next};
use packet::{FromGuest, HEADER_BYTES, Operation, Ports, ToGuest};

/// The queue to the guest.
pub(super) const RECEIVE: u32 = 0;
const TRANSMIT: usize = 1;
const EVENTS: usize = 2;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (§5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();
const QUEUE_SIZE: u16 = 256;
/// Chains from the guest taken before others have their turn.
const BATCH: usize = 64;
/// Turns given to connections before other devices have theirs.
const TURNS: usize = 64;
/// Buffers of the guest filled by one system call.
const GATHER: usize = 32;
/// Bytes of a packet at most, whatever its buffers: what Linux sends, too.
const MAX_PACKET: usize = 64 << 10;
/// Resets owed for packets without a connection. A guest that floods us with such loses some answers.
const MAX_RESETS: usize = 256;
/// `CONNECT 4294967295\n`.
const MAX_GREETING: usize = 19;
const GREETING_PATIENCE: Duration = Duration::from_secs(5);
/// Ports that we name host-dialled connections by.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Tokens of the device in the event loop.
const LISTENER: u64 = 1 << 33;
const GREETINGS: u64 = 1 << 34;
const CONNECTIONS: u64 = 1 << 35;
/// A connection's token: its slot, and which of the slot's connections it is. One that ended in this round of events may have a successor
/// already, which must not hear what was meant for it.
const SLOT_BITS: u32 = 11;
const GENERATIONS: u64 = 1 << 22;

/// Counters since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Bytes from the guest.
    pub sent_bytes: u64,
    /// Bytes to the guest.
    pub received_bytes: u64,
    /// Connections refused because there were too many.
    pub refused: u64,
}

/// Somebody at the host who has not said yet which port it wants.
#[derive(Debug)]
struct Greeting {
    socket: OwnedFd,
    said: Vec<u8>,
    deadline: Instant,
}

/// See the module's page.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    listener: Option<OwnedFd>,
    max_connections: usize,
    connections: Vec<Option<Connection>>,
    /// Tokens given out so far.
    generation: u64,
    slots: HashMap<Ports, usize>,
    /// Connections that have something for the guest, in turn.
    ready: VecDeque<usize>,
    resets: VecDeque<Ports>,
    greetings: HashMap<u64, Greeting>,
    next_greeting: u64,
    next_host_port: u32,
    dialled: Vec<(u32, OwnedFd)>,
    /// Counters.
    pub counters: Counters,
}

impl Vsock {
    /// Makes the device; who connects to its listening socket is watched for from now on.
    pub fn new(config: VsockConfig<OwnedFd>, epoll: &Epoll) -> io::Result<Self> {
        if let Some(listener) = &config.socket {
            epoll.add(listener, LISTENER, Interest::READ)?;
        }
        Ok(Self {
            guest_cid: config.guest_cid.into(),
            listener: config.socket,
            max_connections: config.connections.into(),
            connections: Vec::new(),
            generation: 0,
            slots: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            greetings: HashMap::new(),
            next_greeting: 0,
            next_host_port: FIRST_HOST_PORT,
            dialled: Vec::new(),
            counters: Counters::default(),
        })
    }

    /// Sizes of its queues.
    pub const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE; 3];

    /// Configuration space: `guest_cid`.
    pub fn config(&self) -> [u8; 8] {
        self.guest_cid.to_le_bytes()
    }

    /// Whether a token belongs to this device's sockets.
    pub fn owns(token: u64) -> bool {
        (LISTENER..CONNECTIONS << 1).contains(&token)
    }

    /// A new driver knows of no connection.
    pub fn reset(&mut self) {
        self.connections.clear();
        self.slots.clear();
        self.ready.clear();
        self.resets.clear();
        self.dialled.clear();
    }

    /// Tells the guest of a restored machine that its connections are over: those were its template's. Its sockets fail, its listeners stay, and it reads its
    /// address anew (§5.10.6.7). A driver that gave no buffer for events finds out by resets, packet by packet.
    ///
    /// # Errors
    ///
    /// The driver broke a rule.
    pub fn announce_reset(&mut self, rings: &mut [Ring]) -> Result<(), Fault> {
        let Some(events) = rings.get_mut(EVENTS) else { return Ok(()) };
        if let Some(buffer) = events.pop()? {
            buffer.writable.write(&TRANSPORT_RESET)?;
            events.push(buffer.head, TRANSPORT_RESET.len())?;
            events.notify()?;
        }
        Ok(())
    }

    /// What the guest dialled since the last time: ports, and the other ends of their sockets.
    pub fn take_dialled(&mut self) -> Vec<(u32, OwnedFd)> {
        std::mem::take(&mut self.dialled)
    }

    /// When somebody's time is over next.
    pub fn next_deadline(&self) -> Option<Instant> {
        let greetings = self.greetings.values().map(|greeting| greeting.deadline);
        let connections = self.connections.iter().flatten().filter_map(Connection::deadline);
        greetings.chain(connections).min()
    }

    /// Serves a queue. True when there is more to do at once.
    pub fn serve(&mut self, queue: usize, rings: &mut [Ring], epoll: &Epoll) -> Result<bool, Fault> {
        let [to_guest, from_guest, ..] = rings else { return Err(Fault) };
        let more_from = match queue {
            TRANSMIT => self.serve_transmit(from_guest, epoll)?,
            _ => false,
        };
        // Whatever the driver notified: what is left for the guest must not wait for the next event.
        let more_to = self.serve_receive(to_guest)?;
        Ok(more_from || more_to)
    }

    /// A socket of this device became ready. True when there is more to do at once.
    pub fn handle(&mut self, event: &Event, rings: &mut [Ring], epoll: &Epoll) -> Result<bool, Fault> {
        match event.token {
            LISTENER => self.accept(epoll),
            token if token & CONNECTIONS != 0 => self.wake(event),
            token => self.hear_greeting(token & !GREETINGS, epoll),
        }
        self.pump(rings)
    }

    /// Gives the guest what is due, after a time or an event that came from elsewhere. True when there is more to do at once.
    pub fn pump(&mut self, rings: &mut [Ring]) -> Result<bool, Fault> {
        let Some(to_guest) = rings.first_mut() else { return Ok(false) };
        self.serve_receive(to_guest)
    }

    /// Ends what has run out of time.
    pub fn expire(&mut self, now: Instant) {
        self.greetings.retain(|_, greeting| greeting.deadline > now);
        for slot in 0..self.connections.len() {
            let late = |connection: &Connection| connection.deadline().is_some_and(|at| at <= now);
            if self.connection(slot).is_some_and(|connection| late(connection)) {
                self.reset_connection(slot);
            }
        }
    }

    // ---- from the guest

    fn serve_transmit(&mut self, ring: &mut Ring, epoll: &Epoll) -> Result<bool, Fault> {
        for _ in 0..BATCH {
            let Some(buffers) = ring.pop()? else {
                ring.notify()?;
                return Ok(false);
            };
            self.packet_from_guest(&buffers.readable, epoll)?;
            ring.push(buffers.head, 0)?;
        }
        ring.notify()?;
        Ok(ring.has_available())
    }

    fn packet_from_guest(&mut self, chain: &Ranges, epoll: &Epoll) -> Result<(), Fault> {
        let Some(packet) = FromGuest::read(chain, self.guest_cid)? else { return Ok(()) };
        let length = usize::try_from(packet.length).map_err(|_| Fault)?;
        let data = chain.part(HEADER_BYTES, length);
        if data.len() != length {
            return Err(Fault);
        }
        match self.slots.get(&packet.ports).copied() {
            Some(slot) => self.packet_of(slot, &packet, &data),
            None if packet.operation == Some(Operation::Request) => self.guest_dials(&packet, epoll),
            None if packet.operation == Some(Operation::Reset) => {}
            None => self.owe_reset(packet.ports),
        }
        Ok(())
    }

    fn packet_of(&mut self, slot: usize, packet: &FromGuest, data: &Ranges) {
        if packet.operation == Some(Operation::Reset) {
            self.forget(slot);
            return;
        }
        let Some(connection) = self.connection(slot) else { return };
        match connection.receive(packet, data) {
            Ok(()) => {
                self.counters.sent_bytes += u64::try_from(data.len()).unwrap_or(0);
                self.look(slot);
            }
            Err(connection::Gone) => self.reset_connection(slot),
        }
    }

    fn guest_dials(&mut self, packet: &FromGuest, epoll: &Epoll) {
        if self.slots.len() >= self.max_connections {
            self.counters.refused += 1;
            return self.owe_reset(packet.ports);
        }
        let Ok((ours, theirs)) = socketpair(libc::SOCK_STREAM | libc::SOCK_NONBLOCK) else {
            self.counters.refused += 1;
            return self.owe_reset(packet.ports);
        };
        if self.add(Connection::dialled(packet, ours), epoll).is_ok() {
            self.dialled.push((packet.ports.host, theirs));
        } else {
            self.owe_reset(packet.ports);
        }
    }

    // ---- to the guest

    /// Gives connections their turns. True when some have more to say and the guest has room for it.
    fn serve_receive(&mut self, ring: &mut Ring) -> Result<bool, Fault> {
        let now = Instant::now();
        for _ in 0..TURNS {
            if self.resets.is_empty() && self.ready.is_empty() {
                ring.notify()?;
                return Ok(false);
            }
            let Some(first) = ring.pop()? else {
                // Buffers may have come between the look and the wish to be told.
                if ring.listen()? {
                    continue;
                }
                ring.notify()?;
                return Ok(false);
            };
            if first.writable.len() < HEADER_BYTES {
                return Err(Fault);
            }
            if let Some(ports) = self.resets.pop_front() {
                ToGuest::reset(ports).write(&first.writable, self.guest_cid)?;
                ring.push(first.head, HEADER_BYTES)?;
                continue;
            }
            if let Some(slot) = self.ready.pop_front() {
                self.turn(slot, first, ring, now)?;
            }
        }
        ring.notify()?;
        // Even where no buffer is left just now: it is the next turn that asks to be told of more.
        Ok(!(self.resets.is_empty() && self.ready.is_empty()))
    }

    /// One connection's turn: a packet without data, or as much data as the guest and the socket agree on.
    fn turn(&mut self, slot: usize, first: Buffers, ring: &mut Ring, now: Instant) -> Result<(), Fault> {
        let guest_cid = self.guest_cid;
        let Some(connection) = self.connection(slot) else {
            ring.unpop(1);
            return Ok(());
        };
        connection.queued = false;
        match connection.next() {
            Next::Nothing => ring.unpop(1),
            Next::Packet(packet) => {
                packet.write(&first.writable, guest_cid)?;
                connection.sent(&packet, now);
                ring.push(first.head, HEADER_BYTES)?;
            }
            // A buffer that ends with its header: data has no room in it, and a read into nothing would look like the socket's end. It is used up
            // by what a header alone can say.
            Next::Data(_) if first.writable.len() == HEADER_BYTES => {
                let packet = connection.credit();
                packet.write(&first.writable, guest_cid)?;
                connection.sent(&packet, now);
                ring.push(first.head, HEADER_BYTES)?;
            }
            Next::Data(room) => {
                let chains = gather(first, ring, room)?;
                match connection.read_into(&data_parts(&chains, room)) {
                    Ok(bytes) => {
                        give(connection, &chains, bytes, ring, guest_cid, now)?;
                        self.counters.received_bytes += u64::try_from(bytes).unwrap_or(0);
                    }
                    Err(connection::Gone) => {
                        ring.unpop(u16::try_from(chains.len()).unwrap_or(0));
                        self.reset_connection(slot);
                        return Ok(());
                    }
                }
            }
        }
        self.look(slot);
        Ok(())
    }

    // ---- the host's side

    fn accept(&mut self, epoll: &Epoll) {
        let Some(listener) = &self.listener else { return };
        // One an event: the listener is level-triggered, and others have their turn between.
        let Ok(socket) = super::accept(listener.as_fd()) else { return };
        if self.greetings.len() + self.slots.len() >= self.max_connections {
            self.counters.refused += 1;
            return;
        }
        let id = self.next_greeting & (GREETINGS - 1) & !LISTENER;
        self.next_greeting = self.next_greeting.wrapping_add(1);
        if epoll.add(&socket, GREETINGS | id, Interest::READ).is_ok() {
            let deadline = Instant::now() + GREETING_PATIENCE;
            self.greetings.insert(id, Greeting { socket, said: Vec::new(), deadline });
        }
    }

    /// Reads up to the end of the greeting's line and no further: what follows belongs to the guest.
    fn hear_greeting(&mut self, id: u64, epoll: &Epoll) {
        let Some(greeting) = self.greetings.get_mut(&id) else { return };
        loop {
            match read_byte(&greeting.socket) {
                Ok(Some(b'\n')) => break,
                Ok(Some(byte)) if greeting.said.len() < MAX_GREETING => greeting.said.push(byte),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                // Too long, at its end, or broken.
                Ok(_) | Err(_) => {
                    self.greetings.remove(&id);
                    return;
                }
            }
        }
        if let Some(Greeting { socket, said, .. }) = self.greetings.remove(&id)
            && let Some(guest) = asked_port(&said)
            && epoll.remove(&socket).is_ok()
            && self.slots.len() < self.max_connections
            && let Some(host) = self.free_host_port(guest)
        {
            let ports = Ports { host, guest };
            // Nothing is owed to a guest that has not heard of it.
            let _ = self.add(Connection::dialling(ports, socket, Instant::now()), epoll);
        }
    }

    fn free_host_port(&mut self, guest: u32) -> Option<u32> {
        (0..=self.max_connections).find_map(|_| {
            let host = self.next_host_port;
            self.next_host_port = host.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            (!self.slots.contains_key(&Ports { host, guest })).then_some(host)
        })
    }

    fn wake(&mut self, event: &Event) {
        let Ok(slot) = usize::try_from(event.token & ((1 << SLOT_BITS) - 1)) else { return };
        let Some(connection) = self.connection(slot).filter(|known| known.token == event.token) else {
            return;
        };
        match connection.wake(event.readable, event.writable, event.closed) {
            Ok(()) => self.look(slot),
            Err(connection::Gone) => self.reset_connection(slot),
        }
    }

    // ---- the table

    fn connection(&mut self, slot: usize) -> Option<&mut Connection> {
        self.connections.get_mut(slot)?.as_mut()
    }

    fn add(&mut self, mut connection: Connection, epoll: &Epoll) -> io::Result<()> {
        let slot = match self.connections.iter().position(Option::is_none) {
            Some(slot) => slot,
            None => {
                self.connections.push(None);
                self.connections.len() - 1
            }
        };
        self.generation = (self.generation + 1) % GENERATIONS;
        connection.token = CONNECTIONS | self.generation << SLOT_BITS | u64::try_from(slot).unwrap_or(0);
        epoll.add(connection.socket(), connection.token, Interest::EDGES)?;
        self.slots.insert(connection.ports, slot);
        if let Some(place) = self.connections.get_mut(slot) {
            *place = Some(connection);
        }
        self.look(slot);
        Ok(())
    }

    /// Queues a connection that has something for the guest.
    fn look(&mut self, slot: usize) {
        let Some(connection) = self.connection(slot) else { return };
        if !connection.queued && connection.next() != Next::Nothing {
            connection.queued = true;
            self.ready.push_back(slot);
        }
    }

    /// Ends a connection and tells the guest.
    fn reset_connection(&mut self, slot: usize) {
        if let Some(connection) = self.connection(slot) {
            let ports = connection.ports;
            self.forget(slot);
            self.owe_reset(ports);
        }
    }

    /// Ends a connection; closing its socket takes it out of the event loop.
    fn forget(&mut self, slot: usize) {
        if let Some(connection) = self.connections.get_mut(slot).and_then(Option::take) {
            self.slots.remove(&connection.ports);
            self.ready.retain(|queued| *queued != slot);
        }
    }

    fn owe_reset(&mut self, ports: Ports) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(ports);
        }
    }
}

/// More buffers of the guest beside the first, for one read.
fn gather(first: Buffers, ring: &mut Ring, room: u32) -> Result<Vec<Buffers>, Fault> {
    let room = usize::try_from(room).unwrap_or(usize::MAX).min(MAX_PACKET);
    let mut bytes = first.writable.len() - HEADER_BYTES;
    let mut chains = vec![first];
    while bytes < room && chains.len() < GATHER {
        let Some(next) = ring.pop()? else { break };
        match next.writable.len().checked_sub(HEADER_BYTES).ok_or(Fault)? {
            // It takes no data: the next turn's.
            0 => {
                ring.unpop(1);
                break;
            }
            more => bytes += more,
        }
        chains.push(next);
    }
    Ok(chains)
}

/// Where the data of these buffers goes, `room` bytes at most.
fn data_parts(chains: &[Buffers], room: u32) -> Ranges {
    let mut left = usize::try_from(room).unwrap_or(usize::MAX).min(MAX_PACKET);
    let mut parts = Ranges::default();
    for chain in chains {
        let part = chain.writable.part(HEADER_BYTES, left);
        left -= part.len();
        parts.append(part);
    }
    parts
}

/// Puts headers before what was read and gives the buffers to the guest; those that stayed empty go back.
fn give(
    connection: &mut Connection,
    chains: &[Buffers],
    bytes: usize,
    ring: &mut Ring,
    guest_cid: u64,
    now: Instant,
) -> Result<(), Fault> {
    let mut left = bytes;
    for (index, chain) in chains.iter().enumerate() {
        let here = left.min(chain.writable.len() - HEADER_BYTES);
        if here == 0 {
            ring.unpop(u16::try_from(chains.len() - index).unwrap_or(0));
            break;
        }
        let packet = connection.data_packet(u32::try_from(here).unwrap_or(0));
        packet.write(&chain.writable, guest_cid)?;
        connection.sent(&packet, now);
        ring.push(chain.head, HEADER_BYTES + here)?;
        left -= here;
    }
    Ok(())
}

/// The port in `CONNECT <port>`.
fn asked_port(said: &[u8]) -> Option<u32> {
    std::str::from_utf8(said).ok()?.strip_prefix("CONNECT ")?.parse().ok()
}

fn read_byte(socket: &OwnedFd) -> io::Result<Option<u8>> {
    let mut byte = 0u8;
    // SAFETY: one byte is valid for the write.
    match unsafe { libc::read(socket.as_raw_fd(), (&raw mut byte).cast(), 1) } {
        0 => Ok(None),
        1 => Ok(Some(byte)),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests;
