//! Drivers that mean harm, against every device behind its transport: registers written at random, and queues whose descriptors, indices and
//! buffers hold anything at all.
//!
//! Whatever they do, the device goes on or asks for a reset; nothing panics, no file grows beyond its disk, and the event thread comes to rest.

use std::fs::File;
use std::os::unix::fs::FileExt;

use carrel_protocol::vmm::{BlockConfig, Cache, VsockConfig};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::driver::memory;
use super::mmio::Transport;
use super::*;

const MEMORY: u64 = 16 << 20;
const DISK: u64 = 64 << 10;
const CID: u32 = 3;
/// Queue n lies at (n + 1) times this: its table, then the available ring, then the used ring.
const QUEUE: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0xa000;
const ENTRIES: u16 = 16;
/// An indirect table, and buffers.
const TABLE: u64 = 0x20_0000;
const BUFFERS: u64 = 0x30_0000;
/// Turns after which a queue must be at rest, however many chains it pretends to have.
const TURNS: usize = 64;
const STATUS: u64 = 0x70;
const NEEDS_RESET: u32 = 64;

/// A device with what must not be harmed by it.
struct Subject {
    transport: Transport,
    memory: GuestMemoryMmap,
    epoll: Epoll,
    files: Option<(File, File)>,
}

fn subject(kind: usize) -> Subject {
    let (memory, epoll) = (memory(), Epoll::new().unwrap());
    let mut files = None;
    let device = match kind {
        0 => Device::Entropy(Entropy),
        1 => Device::Balloon(Balloon::new(0, true)),
        2 => {
            let vsock = VsockConfig { guest_cid: CID, socket: None, connections: 4 };
            Device::Vsock(Vsock::new(vsock, &epoll).unwrap())
        }
        _ => {
            let (base, overlay) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
            base.write_all_at(&[7; 4096], 0).unwrap();
            files = Some((base.try_clone().unwrap(), overlay.try_clone().unwrap()));
            let (base, overlay) = (Some(base.into()), Some(overlay.into()));
            let config = BlockConfig {
                id: "x".into(),
                base,
                overlay,
                size_bytes: DISK,
                cache: Cache::Writeback,
                limit: None,
            };
            Device::Block(Block::new(config).unwrap())
        }
    };
    Subject {
        transport: Transport::new(device, memory.clone(), Written::default()).unwrap(),
        memory,
        epoll,
        files,
    }
}

impl Subject {
    fn read(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// As a driver does, with every feature that is offered, up to DRIVER_OK.
    fn start(&self) {
        self.write(STATUS, 1);
        self.write(STATUS, 3);
        for half in [0, 1] {
            self.write(0x14, half);
            let offered = self.read(0x10);
            self.write(0x24, half);
            self.write(0x20, offered);
        }
        self.write(STATUS, 11);
        for (queue, base) in (0..self.transport.notifications.len()).zip((1..).map(|n| n * QUEUE)) {
            self.write(0x30, u32::try_from(queue).unwrap());
            self.write(0x38, ENTRIES.into());
            for (register, part) in [(0x80, 0), (0x90, AVAILABLE), (0xa0, USED)] {
                self.write(register, u32::try_from(base + part).unwrap());
                self.write(register + 4, 0);
            }
            self.write(0x44, 1);
        }
        self.write(STATUS, 15);
        assert_eq!(self.read(STATUS), 15);
    }

    /// Serves all queues until none asks for more. False if they never come to rest.
    fn serve(&self) -> bool {
        self.transport.serve_all_soon();
        (0..TURNS).any(|_| {
            let due: Vec<usize> = (0..self.transport.notifications.len())
                .filter(|queue| self.transport.notifications[*queue].read().is_ok())
                .collect();
            for queue in &due {
                self.transport.serve(*queue, &self.epoll);
            }
            due.is_empty()
        })
    }

    fn is_unharmed(&self) -> bool {
        self.files.as_ref().is_none_or(|(base, overlay)| {
            let mut bytes = [0; 4097];
            let read = base.read_at(&mut bytes, 0).unwrap();
            bytes[..read] == [7; 4096] && overlay.metadata().unwrap().len() <= DISK
        })
    }
}

#[derive(Clone, Debug)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        6 => BUFFERS..BUFFERS + 0x1000,
        2 => Just(TABLE),
        1 => QUEUE..3 * QUEUE,
        1 => MEMORY - 64..MEMORY + 1,
        1 => any::<u64>(),
    ];
    let length = prop_oneof![
        4 => 0u32..64,
        2 => prop_oneof![Just(1u32), Just(16), Just(44), Just(512), Just(4096)],
        1 => 0u32..1 << 20,
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![8 => 0u16..8, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0u16..20, 1 => any::<u16>()];
    (address, length, flags, next).prop_map(|(address, length, flags, next)| Descriptor {
        address,
        length,
        flags,
        next,
    })
}

/// What a driver may have left in memory for one queue.
#[derive(Clone, Debug)]
struct Laid {
    table: Vec<Descriptor>,
    heads: Vec<u16>,
    index: u16,
}

fn laid() -> impl Strategy<Value = Laid> {
    let entries = usize::from(ENTRIES);
    let heads = prop::collection::vec(prop_oneof![8 => 0u16..ENTRIES, 1 => any::<u16>()], entries);
    let index = prop_oneof![6 => 0u16..=ENTRIES, 1 => any::<u16>()];
    (prop::collection::vec(descriptor(), entries), heads, index).prop_map(|(table, heads, index)| Laid {
        table,
        heads,
        index,
    })
}

/// The beginning of a buffer: nothing but bytes, or a request that is nearly right.
fn content() -> impl Strategy<Value = Vec<u8>> {
    let disk = (0u32..16, any::<u32>(), 0u64..200).prop_map(|(kind, rest, sector)| {
        [&kind.to_le_bytes()[..], &rest.to_le_bytes(), &sector.to_le_bytes()].concat()
    });
    let packet = (any::<[u8; 28]>(), 0u16..9, 0u32..5000).prop_map(|(rest, operation, length)| {
        let (ports, credit) = rest.split_at(8);
        let ids = [&u64::from(CID).to_le_bytes()[..], &2u64.to_le_bytes()].concat();
        let kind = [&length.to_le_bytes()[..], &[1, 0], &operation.to_le_bytes()].concat();
        [&ids[..], ports, &kind, credit].concat()
    });
    prop_oneof![prop::collection::vec(any::<u8>(), 64), disk, packet]
}

fn lay(memory: &GuestMemoryMmap, at: u64, table: &[Descriptor]) {
    for (place, descriptor) in (at..).step_by(16).zip(table) {
        memory.write_obj(descriptor.address, GuestAddress(place)).unwrap();
        memory.write_obj(descriptor.length, GuestAddress(place + 8)).unwrap();
        memory.write_obj(descriptor.flags, GuestAddress(place + 12)).unwrap();
        memory.write_obj(descriptor.next, GuestAddress(place + 14)).unwrap();
    }
}

/// An access to the registers, or a turn of the event thread.
#[derive(Clone, Debug)]
enum Access {
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Serve,
}

fn access() -> impl Strategy<Value = Access> {
    let offset = || prop_oneof![6 => (0u64..0x42).prop_map(|word| word * 4), 1 => 0u64..0x1000];
    let value = prop_oneof![
        4 => prop_oneof![Just(0u32), Just(1), Just(3), Just(11), Just(15), Just(0x1_0000), Just(0x1_8000), Just(64)],
        2 => 0u32..300,
        1 => any::<u32>(),
    ];
    let bytes = prop_oneof![
        6 => value.prop_map(|value| value.to_le_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..9),
    ];
    prop_oneof![
        6 => (offset(), bytes).prop_map(|(offset, bytes)| Access::Write(offset, bytes)),
        2 => (offset(), 0usize..9).prop_map(|(offset, width)| Access::Read(offset, width)),
        1 => Just(Access::Serve),
    ]
}

/// What a driver does to its device reaches the owner's log: it must not be able to fill it.
#[test]
fn a_driver_that_breaks_its_device_again_and_again_is_told_of_once() {
    let (memory, epoll) = (memory(), Epoll::new().unwrap());
    let mut devices =
        Devices::new(None, Vec::new(), Some(EntropyConfig {}), None, &memory, &Written::default(), &epoll)
            .unwrap();
    let bus = devices.bus();
    let write = |offset: u64, value: u32| bus.write(BASE + offset, &value.to_le_bytes());
    // More available than the queue holds.
    memory.write_obj(ENTRIES + 1, GuestAddress(QUEUE + AVAILABLE + 2)).unwrap();
    let mut notices = 0;
    for _ in 0..10 {
        for (offset, value) in [(STATUS, 0), (STATUS, 3), (0x24, 1), (0x20, 1), (STATUS, 11)] {
            write(offset, value);
        }
        write(0x38, ENTRIES.into());
        for (register, part) in [(0x80, 0), (0x90, AVAILABLE), (0xa0, USED)] {
            write(register, u32::try_from(QUEUE + part).unwrap());
        }
        write(0x44, 1);
        write(STATUS, 15);
        devices.handle(
            &Event { token: queue_token(0, 0), readable: true, writable: false, closed: false },
            &epoll,
        );
        let mut status = [0; 4];
        bus.read(BASE + STATUS, &mut status);
        assert_eq!(u32::from_le_bytes(status), 15 | NEEDS_RESET);
        notices += devices.take_notices().len();
    }
    assert_eq!(notices, 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_chain_breaks_a_device(
        kind in 0usize..4,
        queues in prop::collection::vec(laid(), 3),
        indirect in prop::collection::vec(descriptor(), 16),
        contents in prop::collection::vec(content(), 16),
        later in any::<u16>(),
    ) {
        let subject = subject(kind);
        subject.start();
        for (place, content) in (BUFFERS..).step_by(256).zip(&contents) {
            subject.memory.write_slice(content, GuestAddress(place)).unwrap();
        }
        lay(&subject.memory, TABLE, &indirect);
        for (base, laid) in (1..).map(|n| n * QUEUE).zip(&queues) {
            lay(&subject.memory, base, &laid.table);
            for (place, head) in (base + AVAILABLE + 4..).step_by(2).zip(&laid.heads) {
                subject.memory.write_obj(*head, GuestAddress(place)).unwrap();
            }
            subject.memory.write_obj(laid.index, GuestAddress(base + AVAILABLE + 2)).unwrap();
        }
        prop_assert!(subject.serve(), "the event thread does not come to rest");
        // Once more with indices that went on meanwhile, by as much as they like.
        for base in (1..=3).map(|n| n * QUEUE) {
            subject.memory.write_obj(later, GuestAddress(base + AVAILABLE + 2)).unwrap();
        }
        prop_assert!(subject.serve(), "the event thread does not come to rest");
        prop_assert!(subject.is_unharmed());
        prop_assert!(matches!(subject.read(STATUS) & !NEEDS_RESET, 15));
        subject.write(STATUS, 0);
        prop_assert_eq!(subject.read(STATUS), 0);
        subject.start();
    }

    #[test]
    fn no_access_breaks_a_transport(kind in 0usize..4, accesses in prop::collection::vec(access(), 1..120)) {
        let subject = subject(kind);
        let mut status = 0;
        for access in accesses {
            let is_reset = matches!(&access, Access::Write(STATUS, bytes) if *bytes == [0; 4]);
            match access {
                Access::Write(offset, bytes) => subject.transport.write(offset, &bytes),
                Access::Read(offset, width) => subject.transport.read(offset, &mut vec![0; width]),
                Access::Serve => prop_assert!(subject.serve(), "the event thread does not come to rest"),
            }
            let now = subject.read(STATUS);
            prop_assert!(is_reset || now & status == status, "status bits went from {status:#x} to {now:#x}");
            status = now;
        }
        prop_assert_eq!(subject.read(0), u32::from_le_bytes(*b"virt"));
        prop_assert!(subject.is_unharmed());
    }
}
