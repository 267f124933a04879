//! One connection between a port of the guest and a Unix stream socket at the host.
//!
//! vsock has no packets that get lost and no network beneath: what it needs is flow control. Each side says with every packet how much it can hold
//! for the connection (`buf_alloc`) and how much of what it was sent its application has taken (`fwd_cnt`); the other may have
//! `buf_alloc − (sent − fwd_cnt)` more bytes under way (virtio §5.10.6.3). Counters wrap.
//!
//! ```text
//!   guest dials:  REQUEST ▶ [Open] ─ RESPONSE ▶
//!   host dials:   [Asking] ─ REQUEST ▶ … ◀ RESPONSE [Open];  RST, or no answer in time: gone
//!
//!   Open ──── socket at its end ──────────────▶ SHUTDOWN(send) to the guest; the other direction goes on
//!        ──── socket gone altogether ─────────▶ SHUTDOWN(both)
//!        ◀─── SHUTDOWN(send) ──── what was held back is written, then the socket's write side is shut
//!        ◀─── SHUTDOWN(receive) ─ the socket is no longer read
//!        both directions over ─▶ RST, gone. A guest that does not answer SHUTDOWN(both) in time is reset too.
//! ```
//!
//! To the guest goes what [`Connection::next`] says, one packet at a time, data straight from the socket into its buffers. From the guest,
//! data goes straight from its buffers into the socket; what the socket doesn't take waits in a backlog that is as large as what we promised to
//! hold. A guest that sends more is reset.

use std::collections::VecDeque;
use std::io;
use std::num::Wrapping;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use super::super::buffers::Ranges;
use super::packet::{FromGuest, Operation, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, ToGuest};

/// Bytes that we hold for one connection.
pub(super) const BUF_ALLOC: u32 = 256 << 10;
/// The same, and the greeting.
const BACKLOG: usize = (256 << 10) + 32;
/// How long a guest may take to answer a request, or a shutdown of both directions.
const PATIENCE: Duration = Duration::from_secs(2);

/// The other side broke the rules or the socket broke: reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gone;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// REQUEST must go, or has gone, to the guest.
    Asking { sent: bool },
    /// RESPONSE must go to the guest first.
    Answering,
    /// Data goes to and fro.
    Open,
    /// Both directions are over; the guest has not agreed yet.
    Closing,
}

/// What goes to the guest next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// This packet, without data.
    Packet(ToGuest),
    /// As many bytes as the socket has, this many at most.
    Data(u32),
    /// Nothing, until something happens.
    Nothing,
}

/// See the module's page.
#[derive(Debug)]
pub(super) struct Connection {
    /// Its name.
    pub(super) ports: Ports,
    /// By which the event loop names its socket.
    pub(super) token: u64,
    socket: OwnedFd,
    phase: Phase,
    deadline: Option<Instant>,
    /// Whether the socket may have something to read. Edge-triggered: true until a read says otherwise.
    readable: bool,
    /// Whether the socket may take something.
    writable: bool,
    /// The host sends no more: the socket is at its end.
    host_done: bool,
    /// The host takes no more, either.
    host_gone: bool,
    /// Flags that the guest was told.
    told: u32,
    /// Flags that the guest told us.
    heard: u32,
    /// The socket's write side has been shut.
    write_shut: bool,
    backlog: VecDeque<u8>,
    /// Bytes from the guest that the socket has taken.
    fwd_cnt: Wrapping<u32>,
    /// `fwd_cnt` as the guest last heard it.
    fwd_told: Wrapping<u32>,
    /// The guest asked for, or needs, a credit update.
    credit_due: bool,
    sent: Wrapping<u32>,
    guest_buf_alloc: u32,
    guest_fwd_cnt: Wrapping<u32>,
    /// It stands in the device's queue of connections that have something for the guest.
    pub(super) queued: bool,
}

impl Connection {
    /// A connection that the guest asked for by this packet.
    pub(super) fn dialled(packet: &FromGuest, socket: OwnedFd) -> Self {
        let mut connection = Self::new(packet.ports, socket, Phase::Answering);
        connection.hear_credit(packet);
        connection
    }

    /// A connection that the host asks the guest for.
    pub(super) fn dialling(ports: Ports, socket: OwnedFd, now: Instant) -> Self {
        let mut connection = Self::new(ports, socket, Phase::Asking { sent: false });
        connection.deadline = Some(now + PATIENCE);
        connection
    }

    fn new(ports: Ports, socket: OwnedFd, phase: Phase) -> Self {
        Self {
            ports,
            token: 0,
            socket,
            phase,
            deadline: None,
            readable: true,
            writable: true,
            host_done: false,
            host_gone: false,
            told: 0,
            heard: 0,
            write_shut: false,
            backlog: VecDeque::new(),
            fwd_cnt: Wrapping::default(),
            fwd_told: Wrapping::default(),
            credit_due: false,
            sent: Wrapping::default(),
            guest_buf_alloc: 0,
            guest_fwd_cnt: Wrapping::default(),
            queued: false,
        }
    }

    /// The host's end.
    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// When the guest's time to answer is over.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The socket became ready.
    pub(super) fn wake(&mut self, readable: bool, writable: bool, closed: bool) -> Result<(), Gone> {
        self.readable |= readable;
        self.host_gone |= closed;
        if writable {
            self.writable = true;
            self.flush()?;
        }
        Ok(())
    }

    // ---- to the guest

    /// What goes to the guest next.
    pub(super) fn next(&self) -> Next {
        match self.phase {
            Phase::Asking { sent: false } => Next::Packet(self.packet(Operation::Request, 0)),
            Phase::Answering => Next::Packet(self.packet(Operation::Response, 0)),
            Phase::Asking { sent: true } => Next::Nothing,
            Phase::Open | Phase::Closing => self.next_of_open(),
        }
    }

    fn next_of_open(&self) -> Next {
        let due = self.shutdown_due();
        if due & !self.told != 0 {
            return Next::Packet(self.packet(Operation::Shutdown, due | self.told));
        }
        if self.credit_due {
            return Next::Packet(self.credit());
        }
        let room = self.guest_room();
        let reads = self.phase == Phase::Open
            && self.readable
            && !self.host_done
            && self.heard & SHUTDOWN_RECEIVE == 0;
        if reads && room > 0 { Next::Data(room) } else { Next::Nothing }
    }

    fn shutdown_due(&self) -> u32 {
        match (self.host_done, self.host_gone) {
            (true, false) => SHUTDOWN_SEND,
            (true, true) => SHUTDOWN_BOTH,
            (false, true) if self.heard & SHUTDOWN_RECEIVE != 0 => SHUTDOWN_BOTH,
            // What the socket still holds comes first.
            (false, _) => 0,
        }
    }

    /// Bytes that the guest can take now.
    fn guest_room(&self) -> u32 {
        // A guest that takes back credit makes this 0, not large.
        self.guest_buf_alloc.saturating_sub((self.sent - self.guest_fwd_cnt).0)
    }

    fn packet(&self, operation: Operation, flags: u32) -> ToGuest {
        let Self { ports, fwd_cnt, .. } = *self;
        ToGuest { ports, operation, flags, length: 0, buf_alloc: BUF_ALLOC, fwd_cnt: fwd_cnt.0 }
    }

    /// How much room there is, as the next packet: true at any time.
    pub(super) fn credit(&self) -> ToGuest {
        self.packet(Operation::CreditUpdate, 0)
    }

    /// A data packet of this length, as the next one.
    pub(super) fn data_packet(&self, length: u32) -> ToGuest {
        ToGuest { length, ..self.packet(Operation::Data, 0) }
    }

    /// A packet that [`Connection::next`] gave is in the guest's hands.
    pub(super) fn sent(&mut self, packet: &ToGuest, now: Instant) {
        self.fwd_told = Wrapping(packet.fwd_cnt);
        self.credit_due = false;
        self.sent += Wrapping(packet.length);
        match packet.operation {
            Operation::Request => self.phase = Phase::Asking { sent: true },
            Operation::Response => self.phase = Phase::Open,
            Operation::Shutdown => {
                self.told |= packet.flags;
                if self.told == SHUTDOWN_BOTH {
                    self.phase = Phase::Closing;
                    self.deadline = Some(now + PATIENCE);
                }
            }
            Operation::Reset | Operation::Data | Operation::CreditUpdate | Operation::CreditRequest => {}
        }
    }

    /// Reads from the socket into guest memory. 0: nothing there now, or its end.
    pub(super) fn read_into(&mut self, parts: &Ranges) -> Result<usize, Gone> {
        let read = parts.with(|parts, count| {
            // SAFETY: the parts are ranges of guest memory, mapped and writable as long as the device lives.
            unsafe { libc::readv(self.socket.as_raw_fd(), parts, count) }
        });
        match read {
            Ok(0) => {
                self.host_done = true;
                Ok(0)
            }
            Ok(n) => Ok(n),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(0)
            }
            Err(_) => Err(Gone),
        }
    }

    // ---- from the guest

    /// A packet of this connection came; `data` is what follows its header.
    pub(super) fn receive(&mut self, packet: &FromGuest, data: &Ranges) -> Result<(), Gone> {
        self.hear_credit(packet);
        match (packet.operation, self.phase) {
            (Some(Operation::Response), Phase::Asking { sent: true }) => {
                self.phase = Phase::Open;
                self.deadline = None;
                self.greet()
            }
            (Some(Operation::Data), Phase::Open | Phase::Closing) => self.take(data),
            (Some(Operation::CreditUpdate), Phase::Open | Phase::Closing) => Ok(()),
            (Some(Operation::CreditRequest), Phase::Open | Phase::Closing) => {
                self.credit_due = true;
                Ok(())
            }
            (Some(Operation::Shutdown), Phase::Open | Phase::Closing) => {
                self.heard |= packet.flags & SHUTDOWN_BOTH;
                self.flush()
            }
            // A reset, a second request, an answer to nothing, and what isn't known.
            _ => Err(Gone),
        }
    }

    fn hear_credit(&mut self, packet: &FromGuest) {
        self.guest_buf_alloc = packet.buf_alloc;
        self.guest_fwd_cnt = Wrapping(packet.fwd_cnt);
    }

    /// The host's `CONNECT` has succeeded.
    fn greet(&mut self) -> Result<(), Gone> {
        let line = format!("OK {}\n", self.ports.host);
        self.backlog.extend(line.as_bytes());
        // The greeting is not the guest's: it does not count as forwarded.
        let greeting = u32::try_from(line.len()).unwrap_or(0);
        self.fwd_cnt -= Wrapping(greeting);
        self.flush()
    }

    fn take(&mut self, data: &Ranges) -> Result<(), Gone> {
        if self.heard & SHUTDOWN_SEND != 0 || data.len() > self.room() {
            return Err(Gone);
        }
        let mut done = 0;
        while self.backlog.is_empty() && self.writable && done < data.len() {
            match self.write(&data.part(done, usize::MAX))? {
                0 => self.writable = false,
                n => done += n,
            }
        }
        self.forwarded(done);
        let rest = data.part(done, usize::MAX);
        if !rest.is_empty() {
            let mut bytes = vec![0; rest.len()];
            rest.read(&mut bytes).map_err(|_| Gone)?;
            // All that it will ever hold, once: growing as it likes it would take up to twice as much.
            self.backlog.reserve_exact(BACKLOG.saturating_sub(self.backlog.len()));
            self.backlog.extend(bytes);
        }
        Ok(())
    }

    /// Bytes that the guest may send beyond what is held back.
    fn room(&self) -> usize {
        usize::try_from(BUF_ALLOC).unwrap_or(0).saturating_sub(self.backlog.len())
    }

    /// Writes what was held back, then passes on that the guest sends no more.
    fn flush(&mut self) -> Result<(), Gone> {
        while self.writable && !self.backlog.is_empty() {
            let (bytes, _) = self.backlog.as_slices();
            let part = Ranges::of_ours(bytes);
            match self.write(&part)? {
                0 => self.writable = false,
                n => {
                    self.backlog.drain(..n);
                    self.forwarded(n);
                }
            }
        }
        if self.backlog.is_empty() {
            if self.heard == SHUTDOWN_BOTH {
                return Err(Gone);
            }
            if self.heard & SHUTDOWN_SEND != 0 && !self.write_shut {
                self.write_shut = true;
                // SAFETY: no pointers are passed.
                unsafe { libc::shutdown(self.socket.as_raw_fd(), libc::SHUT_WR) };
            }
        }
        Ok(())
    }

    /// sendmsg(2) rather than write(2): a socket whose reader is gone must not become a signal. 0: it takes nothing now.
    fn write(&self, parts: &Ranges) -> Result<usize, Gone> {
        let written = parts.with(|parts, count| {
            // SAFETY: a msghdr is plain data; zeros mean neither address nor control message.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = parts.cast_mut();
            message.msg_iovlen = usize::try_from(count).unwrap_or(0);
            // SAFETY: the message points to `count` ranges that are mapped during the call.
            unsafe {
                libc::sendmsg(
                    self.socket.as_raw_fd(),
                    &raw const message,
                    libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
                )
            }
        });
        match written {
            Ok(n) => Ok(n),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(0),
            // The host takes no more. What it has sent may still be read, but a stream that lost bytes is no stream.
            Err(_) => Err(Gone),
        }
    }

    fn forwarded(&mut self, bytes: usize) {
        self.fwd_cnt += Wrapping(u32::try_from(bytes).unwrap_or(0));
        // Tell before the guest has to stop, but not with every packet.
        self.credit_due |= (self.fwd_cnt - self.fwd_told).0 >= BUF_ALLOC / 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::owner::socketpair;

    #[test]
    fn what_is_held_back_takes_no_more_memory_than_was_promised() {
        let (socket, _nobody_reads) = socketpair(libc::SOCK_STREAM).unwrap();
        let ports = Ports { host: 1, guest: 2 };
        let packet = FromGuest {
            ports,
            operation: Some(Operation::Request),
            flags: 0,
            length: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        };
        let mut connection = Connection::dialled(&packet, socket);
        let bytes = [0; 3000];
        let mut held = 0;
        while connection.take(&Ranges::of_ours(&bytes)).is_ok() {
            held = connection.backlog.len();
        }
        assert!(held > connection.room(), "{held}");
        assert!(connection.backlog.capacity() <= BACKLOG, "{}", connection.backlog.capacity());
    }
}
