use vm_memory::{Bytes, GuestAddress};

use super::super::block::Block;
use super::super::driver::memory;
use super::super::entropy::Entropy;
use super::*;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const STATUS: u64 = 0x70;

fn entropy() -> Transport {
    Transport::new(Device::Entropy(Entropy), memory(), Written::default()).unwrap()
}

fn read(transport: &Transport, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    transport.read(offset, &mut bytes);
    u32::from_le_bytes(bytes)
}

fn write(transport: &Transport, offset: u64, value: u32) {
    transport.write(offset, &value.to_le_bytes());
}

/// As a driver does, up to FEATURES_OK (§3.1.1).
fn negotiate(transport: &Transport) {
    write(transport, STATUS, ACKNOWLEDGE);
    write(transport, STATUS, ACKNOWLEDGE | DRIVER);
    write(transport, 0x24, 1);
    write(transport, 0x20, 1); // VIRTIO_F_VERSION_1
    write(transport, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
}

/// Queue 0 with its parts from `base`.
fn set_queue(transport: &Transport, base: u32, size: u32) {
    write(transport, 0x30, 0);
    write(transport, 0x38, size);
    for (register, part) in
        [(0x80, base), (0x90, base.wrapping_add(0x1000)), (0xa0, base.wrapping_add(0x2000))]
    {
        write(transport, register, part);
        write(transport, register + 4, 0);
    }
    write(transport, 0x44, 1);
}

fn run(transport: &Transport) {
    write(transport, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

/// One request for 64 random bytes at 0x8000.
fn request(memory: &GuestMemoryMmap, base: u64) {
    memory.write_obj(0x8000u64, GuestAddress(base)).unwrap();
    memory.write_obj(64u32, GuestAddress(base + 8)).unwrap();
    memory.write_obj(2u16, GuestAddress(base + 12)).unwrap();
    memory.write_obj(0u16, GuestAddress(base + 0x1004)).unwrap();
    memory.write_obj(1u16, GuestAddress(base + 0x1002)).unwrap();
}

#[test]
fn a_driver_finds_its_device_negotiates_and_is_served() {
    let memory = memory();
    let transport = Transport::new(Device::Entropy(Entropy), memory.clone(), Written::default()).unwrap();
    assert_eq!((read(&transport, 0), read(&transport, 4), read(&transport, 8)), (MAGIC, 2, 4));
    negotiate(&transport);
    assert_eq!(read(&transport, STATUS) & FEATURES_OK, FEATURES_OK);
    assert_eq!(read(&transport, 0x34), 64);
    set_queue(&transport, 0x4000, 16);
    assert_eq!(read(&transport, 0x44), 1);
    run(&transport);
    request(&memory, 0x4000);
    write(&transport, QUEUE_NOTIFY, 0);
    let epoll = Epoll::new().unwrap();
    assert_eq!(transport.serve(0, &epoll), Served::Done);
    let used: u16 = memory.read_obj(GuestAddress(0x6002)).unwrap();
    assert_eq!(used, 1);
    let bytes: [u8; 64] = memory
        .read_obj::<[u8; 32]>(GuestAddress(0x8000))
        .map(|b| [b, b].concat().try_into().unwrap())
        .unwrap();
    assert_ne!(bytes, [0; 64]);
    assert_eq!(read(&transport, 0x60), 1, "a used buffer");
    assert_eq!(transport.interrupt().read().unwrap(), 1);
    write(&transport, 0x64, 1);
    assert_eq!(read(&transport, 0x60), 0);
}

#[test]
fn features_that_were_not_offered_or_are_missing_are_not_agreed_on() {
    for (select, bits) in [(0, 1 << 5), (1, 1 | 1 << 30), (1, 0)] {
        let transport = entropy();
        write(&transport, STATUS, ACKNOWLEDGE | DRIVER);
        write(&transport, 0x24, select);
        write(&transport, 0x20, bits);
        write(&transport, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(read(&transport, STATUS) & FEATURES_OK, 0, "{select} {bits:#x}");
        run(&transport);
        assert_eq!(read(&transport, STATUS) & DRIVER_OK, 0, "{select} {bits:#x}");
    }
}

#[test]
fn a_running_queue_does_not_move() {
    let transport = entropy();
    negotiate(&transport);
    set_queue(&transport, 0x4000, 16);
    run(&transport);
    let before = transport.state();
    set_queue(&transport, 0x10_0000, 8);
    write(&transport, 0x20, u32::MAX);
    assert_eq!(TransportState { queue_select: before.queue_select, ..transport.state() }, before);
}

#[test]
fn queues_that_lie_outside_memory_need_a_reset() {
    for base in [0xffff_0000, (16 << 20) - 0x1000] {
        let transport = entropy();
        negotiate(&transport);
        set_queue(&transport, base, 16);
        run(&transport);
        assert_eq!(read(&transport, STATUS) & NEEDS_RESET, NEEDS_RESET, "{base:#x}");
        let epoll = Epoll::new().unwrap();
        assert_eq!(transport.serve(0, &epoll), Served::Done, "there is nothing to serve");
        write(&transport, STATUS, 0);
        assert_eq!(read(&transport, STATUS), 0);
        negotiate(&transport);
        set_queue(&transport, 0x4000, 16);
        run(&transport);
        assert_eq!(read(&transport, STATUS) & NEEDS_RESET, 0);
    }
}

#[test]
fn a_driver_that_breaks_a_rule_stops_its_device_alone() {
    let memory = memory();
    let transport = Transport::new(Device::Entropy(Entropy), memory.clone(), Written::default()).unwrap();
    negotiate(&transport);
    set_queue(&transport, 0x4000, 16);
    run(&transport);
    request(&memory, 0x4000);
    // The buffer is nowhere.
    memory.write_obj(1u64 << 40, GuestAddress(0x4000)).unwrap();
    let epoll = Epoll::new().unwrap();
    assert_eq!(transport.serve(0, &epoll), Served::Broken);
    assert_eq!(read(&transport, STATUS) & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(read(&transport, 0x60), 2, "the configuration changed (§2.1.2)");
    assert_eq!(transport.serve(0, &epoll), Served::Done, "told once");
}

#[test]
fn a_reset_forgets_the_driver() {
    let transport = entropy();
    let fresh = transport.state();
    negotiate(&transport);
    set_queue(&transport, 0x4000, 16);
    run(&transport);
    assert_ne!(transport.state(), fresh);
    write(&transport, STATUS, 0);
    assert_eq!(transport.state(), fresh);
}

#[test]
fn odd_widths_and_places_are_harmless() {
    let overlay = tempfile::tempfile().unwrap();
    let block = Block::new(carrel_protocol::vmm::BlockConfig {
        id: "disk".into(),
        base: None,
        overlay: Some(overlay.into()),
        size_bytes: 8192,
        cache: carrel_protocol::vmm::Cache::Writeback,
        limit: None,
    });
    let transport = Transport::new(Device::Block(block.unwrap()), memory(), Written::default()).unwrap();
    for offset in (0..0x1000).step_by(3) {
        for width in [1, 2, 4, 8] {
            transport.read(offset, &mut vec![0; width]);
            transport.write(offset, &vec![0xff; width]);
        }
    }
    write(&transport, STATUS, 0);
    let mut capacity = [0; 8];
    transport.read(CONFIG, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 16);
    let mut beyond = [7; 8];
    transport.read(CONFIG + 0x800, &mut beyond);
    assert_eq!(beyond, [0; 8]);
}

#[test]
fn saved_state_is_plain_data() {
    let transport = entropy();
    negotiate(&transport);
    set_queue(&transport, 0x4000, 16);
    run(&transport);
    let state = transport.state();
    let text = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<TransportState>(&text).unwrap(), state);
    assert_eq!(
        (state.queues[0].size, state.queues[0].descriptors, state.queues[0].used),
        (16, 0x4000, 0x6000)
    );
}
