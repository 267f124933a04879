use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use proptest::prelude::*;
use vm_memory::GuestMemoryMmap;

use super::super::driver::{Driver, Part, memory};
use super::connection::BUF_ALLOC;
use super::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;

const CID: u64 = 3;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// A guest with the device's two queues.
struct Guest {
    vsock: Vsock,
    epoll: Epoll,
    rings: [Ring; 2],
    receive: Driver,
    transmit: Driver,
    /// Packets are built from these: port 50 of the guest, port 1024 of the host.
    buf_alloc: u32,
    fwd_cnt: u32,
}

/// A packet that the guest got.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Got {
    operation: u16,
    host: u32,
    guest: u32,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
    data: Vec<u8>,
}

fn config(socket: Option<OwnedFd>, connections: u16) -> VsockConfig<OwnedFd> {
    VsockConfig { guest_cid: 3, socket, connections }
}

impl Guest {
    fn new() -> Self {
        Self::with(config(None, 4))
    }

    fn with(config: VsockConfig<OwnedFd>) -> Self {
        let memory: GuestMemoryMmap = memory();
        let epoll = Epoll::new().unwrap();
        let vsock = Vsock::new(config, &epoll).unwrap();
        let (receive, receive_ring) = Driver::new(&memory, 0, 256);
        let (transmit, transmit_ring) = Driver::new(&memory, 1, 256);
        let rings = [receive_ring, transmit_ring];
        Self { vsock, epoll, rings, receive, transmit, buf_alloc: 64 << 10, fwd_cnt: 0 }
    }

    /// Gives the device so many buffers, each for a header and 4,052 bytes, as Linux does.
    fn offer(&mut self, buffers: usize) {
        for _ in 0..buffers {
            self.receive.add(&[Part::Writable(4096)]);
        }
    }

    fn header(&self, operation: u16, ports: (u32, u32), flags: u32, length: u32) -> Vec<u8> {
        let (guest, host) = ports;
        [
            &CID.to_le_bytes()[..],
            &2u64.to_le_bytes(),
            &guest.to_le_bytes(),
            &host.to_le_bytes(),
            &length.to_le_bytes(),
            &1u16.to_le_bytes(),
            &operation.to_le_bytes(),
            &flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ]
        .concat()
    }

    fn send_as(&mut self, ports: (u32, u32), operation: u16, flags: u32, data: &[u8]) -> Result<(), Fault> {
        let header = self.header(operation, ports, flags, u32::try_from(data.len()).unwrap());
        if data.is_empty() {
            self.transmit.add(&[Part::Readable(&header)]);
        } else {
            self.transmit.add(&[Part::Readable(&header), Part::Readable(data)]);
        }
        let served = self.vsock.serve(1, &mut self.rings, &self.epoll).map(drop);
        self.transmit.used();
        served
    }

    fn send(&mut self, operation: u16, flags: u32, data: &[u8]) {
        self.send_as((50, 1024), operation, flags, data).unwrap();
    }

    /// What the device has for the guest, after it has looked at its sockets.
    fn got(&mut self) -> Vec<Got> {
        let mut events = Vec::new();
        self.epoll.wait(0, &mut events).unwrap();
        for event in &events {
            self.vsock.handle(event, &mut self.rings, &self.epoll).unwrap();
        }
        self.vsock.pump(&mut self.rings).unwrap();
        self.receive.used().into_iter().map(|(_, bytes)| parse(&bytes)).collect()
    }

    /// Dials port 1024 and takes the answer. The owner's end.
    fn dial(&mut self) -> UnixStream {
        self.offer(32);
        self.send(REQUEST, 0, &[]);
        let got = self.got();
        assert_eq!(got.iter().map(|packet| packet.operation).collect::<Vec<_>>(), [RESPONSE]);
        assert_eq!((got[0].host, got[0].guest, got[0].buf_alloc), (1024, 50, BUF_ALLOC));
        let (port, end) = self.vsock.take_dialled().pop().expect("the owner gets the other end");
        assert_eq!(port, 1024);
        UnixStream::from(end)
    }

    fn operations(&mut self) -> Vec<u16> {
        self.got().iter().map(|packet| packet.operation).collect()
    }
}

fn parse(bytes: &[u8]) -> Got {
    let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!(bytes[..16], [&2u64.to_le_bytes()[..], &CID.to_le_bytes()].concat());
    assert_eq!(bytes.len(), 44 + usize::try_from(u32_at(24)).unwrap(), "the length is the data's");
    Got {
        host: u32_at(16),
        guest: u32_at(20),
        operation: u16_at(30),
        flags: u32_at(32),
        buf_alloc: u32_at(36),
        fwd_cnt: u32_at(40),
        data: bytes[44..].to_vec(),
    }
}

#[test]
fn a_guest_dials_and_bytes_go_both_ways() {
    let mut guest = Guest::new();
    let mut owner = guest.dial();
    guest.send(DATA, 0, b"to the owner");
    let mut text = [0; 12];
    owner.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"to the owner");
    owner.write_all(b"to the guest").unwrap();
    let got = guest.got();
    assert_eq!((got.len(), got[0].operation, &got[0].data[..]), (1, DATA, &b"to the guest"[..]));
    assert_eq!(got[0].fwd_cnt, 12, "every packet says what was passed on");
    assert_eq!((guest.vsock.counters.sent_bytes, guest.vsock.counters.received_bytes), (12, 12));
}

#[test]
fn several_buffers_are_filled_by_one_read() {
    let mut guest = Guest::new();
    let mut owner = guest.dial();
    let sent: Vec<u8> = (0..20_000u32).map(|n| n.to_le_bytes()[0]).collect();
    owner.write_all(&sent).unwrap();
    let got = guest.got();
    assert_eq!(got.len(), 20_000usize.div_ceil(4096 - 44));
    assert_eq!(got.concat_data(), sent);
}

#[test]
fn a_buffer_without_room_after_its_header_is_not_the_streams_end() {
    // Alone, before, between and after buffers that take data.
    for sizes in [&[44][..], &[44, 4096], &[100, 44, 4096], &[100, 44, 44]] {
        let mut guest = Guest::new();
        guest.offer(1);
        guest.send(REQUEST, 0, &[]);
        assert_eq!(guest.operations(), [RESPONSE]);
        let mut owner = UnixStream::from(guest.vsock.take_dialled().pop().unwrap().1);
        for size in sizes {
            guest.receive.add(&[Part::Writable(*size)]);
        }
        let sent: Vec<u8> = (0..3000u32).map(|n| n.to_le_bytes()[0]).collect();
        owner.write_all(&sent).unwrap();
        let mut arrived = Vec::new();
        let mut kinds = Vec::new();
        for _ in 0..4 {
            let got = guest.got();
            kinds.extend(got.iter().map(|packet| packet.operation));
            arrived.extend(got.concat_data());
            guest.offer(1);
        }
        assert!(arrived == sent, "{sizes:?}: {} of {} bytes", arrived.len(), sent.len());
        assert!(kinds.iter().all(|kind| [DATA, CREDIT_UPDATE].contains(kind)), "{sizes:?}: {kinds:?}");
    }
}

trait Data {
    fn concat_data(&self) -> Vec<u8>;
}

impl Data for Vec<Got> {
    fn concat_data(&self) -> Vec<u8> {
        self.iter().flat_map(|packet| packet.data.clone()).collect()
    }
}

#[test]
fn the_guests_credit_is_kept() {
    let mut guest = Guest::new();
    guest.buf_alloc = 5000;
    let mut owner = guest.dial();
    owner.write_all(&[7; 12_000]).unwrap();
    assert_eq!(guest.got().concat_data().len(), 5000);
    assert_eq!(guest.got(), []);
    guest.fwd_cnt = 4000;
    guest.send(CREDIT_UPDATE, 0, &[]);
    assert_eq!(guest.got().concat_data().len(), 4000);
    // Taking credit back makes none, not a lot.
    guest.buf_alloc = 10;
    guest.send(CREDIT_UPDATE, 0, &[]);
    assert_eq!(guest.got(), []);
}

#[test]
fn our_credit_is_told_when_half_the_way_is_gone_and_when_asked() {
    let mut guest = Guest::new();
    let mut owner = guest.dial();
    let chunk = vec![1; 16 << 10];
    let mut told = 0;
    let mut sink = vec![0; 16 << 10];
    for _ in 0..32 {
        guest.send(DATA, 0, &chunk);
        owner.read_exact(&mut sink).unwrap();
        told = guest.got().last().map_or(told, |packet| packet.fwd_cnt);
    }
    assert!(told >= ((32 * 16) << 10) - BUF_ALLOC / 2, "{told}");
    guest.send(CREDIT_REQUEST, 0, &[]);
    let got = guest.got();
    assert_eq!((got[0].operation, got[0].fwd_cnt), (CREDIT_UPDATE, (32 * 16) << 10));
}

#[test]
fn what_a_slow_owner_does_not_take_waits_up_to_what_was_promised() {
    let mut guest = Guest::new();
    let mut owner = guest.dial();
    let chunk = vec![9; 32 << 10];
    let mut sent = 0;
    // The socket holds some; behind it, our promise is what limits.
    while guest.vsock.slots.len() == 1 && sent < 4 << 20 {
        guest.send(DATA, 0, &chunk);
        sent += chunk.len();
    }
    assert_eq!(guest.vsock.slots.len(), 0, "a guest that sends more than it may is cut off");
    assert!(guest.operations().contains(&RESET));
    let mut all = Vec::new();
    owner.read_to_end(&mut all).unwrap();
    assert!(all.len() < sent);
}

#[test]
fn a_half_close_lets_the_other_direction_go_on() {
    let mut guest = Guest::new();
    let mut owner = guest.dial();
    guest.send(DATA, 0, b"last");
    guest.send(SHUTDOWN, SHUTDOWN_SEND, &[]);
    let mut text = String::new();
    owner.set_nonblocking(false).unwrap();
    owner.read_to_string(&mut text).unwrap();
    assert_eq!(text, "last", "the end comes after the data");
    owner.write_all(b"answer").unwrap();
    owner.shutdown(std::net::Shutdown::Write).unwrap();
    let got = guest.got();
    assert_eq!(got.concat_data(), b"answer");
    let end = got.last().unwrap();
    // With the guest's own direction over already, this ends both.
    assert_eq!((end.operation, end.flags), (SHUTDOWN, SHUTDOWN_BOTH));
    // Then the guest closes.
    guest.send(SHUTDOWN, SHUTDOWN_BOTH, &[]);
    assert_eq!(guest.operations(), [RESET]);
    assert!(guest.vsock.slots.is_empty());
}

#[test]
fn an_owner_that_leaves_is_told_after_its_data_and_a_silent_guest_is_reset() {
    let mut guest = Guest::new();
    let mut owner = guest.dial();
    owner.write_all(b"bye").unwrap();
    drop(owner);
    let got = guest.got();
    assert_eq!(got.concat_data(), b"bye");
    let end = got.last().unwrap();
    assert_eq!((end.operation, end.flags), (SHUTDOWN, SHUTDOWN_BOTH));
    let late = guest.vsock.next_deadline().expect("the guest has its time to answer");
    guest.vsock.expire(late);
    assert_eq!(guest.operations(), [RESET]);
    assert!(guest.vsock.slots.is_empty() && guest.vsock.next_deadline().is_none());
}

#[test]
fn a_refused_dial_is_an_end_for_the_guest() {
    let mut guest = Guest::new();
    drop(guest.dial());
    assert_eq!(guest.operations(), [SHUTDOWN]);
}

#[test]
fn a_guest_that_takes_no_more_is_not_read_for() {
    let mut guest = Guest::new();
    let mut owner = guest.dial();
    guest.send(SHUTDOWN, SHUTDOWN_RECEIVE, &[]);
    owner.write_all(b"unheard").unwrap();
    assert_eq!(guest.got(), []);
    drop(owner);
    assert_eq!(guest.operations(), [SHUTDOWN]);
}

#[test]
fn too_many_connections_are_reset_and_counted() {
    let mut guest = Guest::new();
    guest.offer(200);
    for port in 0..100 {
        guest.send_as((port, 1024), REQUEST, 0, &[]).unwrap();
    }
    let operations = guest.operations();
    assert_eq!(operations.iter().filter(|operation| **operation == RESPONSE).count(), 4);
    assert_eq!(operations.iter().filter(|operation| **operation == RESET).count(), 96);
    assert_eq!(guest.vsock.counters.refused, 96);
    assert_eq!(guest.vsock.take_dialled().len(), 4);
}

#[test]
fn a_flood_of_strays_costs_bounded_memory() {
    let mut guest = Guest::new();
    for port in 0..5000 {
        guest.send_as((port, port), DATA, 0, b"?").unwrap();
    }
    assert!(guest.vsock.resets.len() <= MAX_RESETS);
}

#[test]
fn a_second_request_ends_the_first_connection() {
    let mut guest = Guest::new();
    let mut owner = guest.dial();
    guest.send(REQUEST, 0, &[]);
    assert_eq!(guest.operations(), [RESET]);
    assert_eq!(owner.read(&mut [0]).unwrap(), 0);
}

#[test]
fn packets_of_others_are_dropped_and_unknown_kinds_reset() {
    let mut guest = Guest::new();
    guest.offer(8);
    let mut forged = guest.header(REQUEST, (50, 1024), 0, 0);
    forged[0] = 9;
    guest.transmit.add(&[Part::Readable(&forged)]);
    guest.vsock.serve(1, &mut guest.rings, &guest.epoll).unwrap();
    assert_eq!(guest.got(), []);
    // SOCK_SEQPACKET, which is not offered, and an operation from the future.
    let mut other = guest.header(REQUEST, (50, 1024), 0, 0);
    other[28] = 2;
    guest.transmit.add(&[Part::Readable(&other)]);
    guest.vsock.serve(1, &mut guest.rings, &guest.epoll).unwrap();
    assert_eq!(guest.operations(), [RESET]);
    guest.send(99, 0, &[]);
    assert_eq!(guest.operations(), [RESET]);
}

#[test]
fn lengths_that_lie_are_faults() {
    let mut guest = Guest::new();
    let header = guest.header(DATA, (50, 1024), 0, 1000);
    guest.transmit.add(&[Part::Readable(&header), Part::Readable(b"short")]);
    assert_eq!(guest.vsock.serve(1, &mut guest.rings, &guest.epoll), Err(Fault));
    let mut guest = Guest::new();
    guest.transmit.add(&[Part::Readable(&header[..40])]);
    assert_eq!(guest.vsock.serve(1, &mut guest.rings, &guest.epoll), Err(Fault));
    // A buffer too small for a header.
    let mut guest = Guest::new();
    guest.receive.add(&[Part::Writable(20)]);
    guest.transmit.add(&[Part::Readable(&guest.header(REQUEST, (50, 1024), 0, 0))]);
    assert_eq!(guest.vsock.serve(1, &mut guest.rings, &guest.epoll), Err(Fault));
}

/// A device that listens at a path of its own.
fn listening() -> (Guest, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("v.sock")).unwrap();
    (Guest::with(config(Some(listener.into()), 4)), folder)
}

#[test]
fn the_host_dials_by_a_line_and_is_answered_by_one() {
    let (mut guest, folder) = listening();
    guest.offer(8);
    let mut host = UnixStream::connect(folder.path().join("v.sock")).unwrap();
    host.write_all(b"CONNECT 52\nfirst words").unwrap();
    let mut request = Vec::new();
    // One look to accept, one to read the line.
    while request.is_empty() {
        request = guest.got();
    }
    assert_eq!((request[0].operation, request[0].guest), (REQUEST, 52));
    let host_port = request[0].host;
    guest.send_as((52, host_port), RESPONSE, 0, &[]).unwrap();
    let mut line = vec![0; format!("OK {host_port}\n").len()];
    host.read_exact(&mut line).unwrap();
    assert_eq!(line, format!("OK {host_port}\n").as_bytes());
    let got = guest.got();
    assert_eq!(got.concat_data(), b"first words");
    assert_eq!(got[0].fwd_cnt, 0, "the greeting is not the guest's");
}

#[test]
fn a_guest_that_does_not_listen_or_answer_ends_the_hosts_dial() {
    for answers in [true, false] {
        let (mut guest, folder) = listening();
        guest.offer(8);
        let mut host = UnixStream::connect(folder.path().join("v.sock")).unwrap();
        host.write_all(b"CONNECT 52\n").unwrap();
        let mut request = Vec::new();
        while request.is_empty() {
            request = guest.got();
        }
        if answers {
            guest.send_as((52, request[0].host), RESET, 0, &[]).unwrap();
        } else {
            let late = guest.vsock.next_deadline().unwrap();
            guest.vsock.expire(late);
        }
        assert_eq!(host.read(&mut [0]).unwrap(), 0);
        assert!(guest.vsock.slots.is_empty());
    }
}

#[test]
fn greetings_that_are_none_are_hung_up_on() {
    for line in ["CONNECT x\n", "GET / HTTP/1.0\n", "CONNECT 4294967296\n", &"C".repeat(40), "\n"] {
        let (mut guest, folder) = listening();
        let mut host = UnixStream::connect(folder.path().join("v.sock")).unwrap();
        host.write_all(line.as_bytes()).unwrap();
        guest.got();
        guest.got();
        assert!(matches!(host.read(&mut [0]), Ok(0) | Err(_)), "{line:?}");
        assert!(guest.vsock.greetings.is_empty(), "{line:?}");
    }
    // One who says nothing has its time.
    let (mut guest, folder) = listening();
    let _host = UnixStream::connect(folder.path().join("v.sock")).unwrap();
    guest.got();
    let late = guest.vsock.next_deadline().unwrap();
    guest.vsock.expire(late);
    assert!(guest.vsock.greetings.is_empty());
}

#[test]
fn an_event_of_a_connection_that_is_over_does_not_reach_its_successor() {
    let mut guest = Guest::new();
    let _first = guest.dial();
    let stale = guest.vsock.connections[0].as_ref().unwrap().token;
    guest.send(RESET, 0, &[]);
    let second = guest.dial();
    assert!(guest.vsock.connections[0].is_some(), "it has the same slot");
    let event = Event { token: stale, readable: true, writable: true, closed: true };
    guest.vsock.handle(&event, &mut guest.rings, &guest.epoll).unwrap();
    second.shutdown(std::net::Shutdown::Write).unwrap();
    let got = guest.got();
    assert_eq!((got[0].operation, got[0].flags), (SHUTDOWN, SHUTDOWN_SEND), "the guest may go on");
}

#[test]
fn what_is_due_is_given_in_turns_and_nothing_is_left_waiting() {
    for by_pump in [true, false] {
        let mut guest = Guest::new();
        // Nobody listens, and there are no buffers for the answers yet.
        for port in 0..100 {
            guest.send_as((port, 9), DATA, 0, &[]).unwrap();
        }
        guest.offer(200);
        let mut turns = Vec::new();
        loop {
            let more = match by_pump {
                true => guest.vsock.pump(&mut guest.rings),
                false => guest.vsock.serve(1, &mut guest.rings, &guest.epoll),
            }
            .unwrap();
            turns.push(guest.receive.used().len());
            if !more {
                break;
            }
        }
        assert_eq!(turns, [TURNS, 100 - TURNS]);
    }
}

#[test]
fn buffers_that_end_with_a_turn_are_asked_for_all_the_same() {
    let mut guest = Guest::new();
    for port in 0..100 {
        guest.send_as((port, 9), DATA, 0, &[]).unwrap();
    }
    guest.offer(TURNS);
    assert!(guest.vsock.pump(&mut guest.rings).unwrap(), "nobody has asked for more buffers yet");
    assert!(!guest.vsock.pump(&mut guest.rings).unwrap(), "now it has");
    assert_eq!(guest.receive.used().len(), TURNS);
}

#[test]
fn a_host_that_was_slow_to_say_its_port_takes_no_connection_beyond_the_cap() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut guest = Guest::with(config(Some(listener.into()), 1));
    let mut host = UnixStream::connect(&path).unwrap();
    guest.got();
    let _owner = guest.dial();
    host.write_all(b"CONNECT 52\n").unwrap();
    guest.got();
    assert_eq!(guest.vsock.slots.len(), 1);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever a guest sends, the device goes on or says that the driver is broken; it holds no more than it promised.
    #[test]
    fn no_packet_breaks_it(packets in proptest::collection::vec((any::<[u8; 44]>(), 0u16..9, 0u32..6, 0usize..200), 1..40)) {
        let mut guest = Guest::new();
        guest.offer(64);
        for (mut header, operation, port, data) in packets {
            header[..16].copy_from_slice(&[&CID.to_le_bytes()[..], &2u64.to_le_bytes()].concat());
            header[16..20].copy_from_slice(&port.to_le_bytes());
            header[20..24].copy_from_slice(&1024u32.to_le_bytes());
            header[24..28].copy_from_slice(&u32::try_from(data).unwrap().to_le_bytes());
            header[28..32].copy_from_slice(&[1, 0, operation.to_le_bytes()[0], 0]);
            let bytes = vec![0; data];
            guest.transmit.add(&[Part::Readable(&header), Part::Readable(&bytes)]);
            if guest.vsock.serve(1, &mut guest.rings, &guest.epoll).is_err() {
                break;
            }
            guest.transmit.used();
            prop_assert!(guest.vsock.slots.len() <= 4);
            prop_assert!(guest.vsock.resets.len() <= MAX_RESETS);
        }
    }

    /// Bytes arrive whole and in order, however the owner writes and the guest reads them.
    #[test]
    fn streams_arrive_whole(writes in proptest::collection::vec(1usize..9000, 1..20), room in 500u32..20_000) {
        let mut guest = Guest::new();
        guest.buf_alloc = room;
        let mut owner = guest.dial();
        let (mut sent, mut arrived) = (Vec::new(), Vec::new());
        for length in writes {
            let bytes: Vec<u8> = (0..length).map(|n| (n % 251).to_le_bytes()[0]).collect();
            owner.write_all(&bytes).unwrap();
            sent.extend(bytes);
            while arrived.len() < sent.len() {
                guest.offer(16usize.saturating_sub(guest.receive.outstanding()));
                let got = guest.got().concat_data();
                arrived.extend(got);
                guest.fwd_cnt = u32::try_from(arrived.len()).unwrap();
                guest.send(CREDIT_UPDATE, 0, &[]);
            }
        }
        prop_assert_eq!(arrived, sent);
    }
}
