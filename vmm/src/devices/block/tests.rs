use std::io::Write;

use carrel_protocol::vmm::IoLimit;
use proptest::prelude::*;

use super::super::driver::{Driver, Part, memory};
use super::*;

const DISK: usize = 64 << 10;

/// A file without a name.
fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

fn config(base: Option<File>, overlay: Option<File>) -> BlockConfig<OwnedFd> {
    let size_bytes = u64::try_from(DISK).unwrap();
    BlockConfig {
        id: "scratch".into(),
        base: base.map(Into::into),
        overlay: overlay.map(Into::into),
        size_bytes,
        cache: Cache::Writeback,
        limit: None,
    }
}

fn disk(base: Option<&[u8]>, overlay: Option<&[u8]>) -> Block {
    Block::new(config(base.map(file), overlay.map(file))).unwrap()
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// One request as Linux lays it out. The device's status, and what it wrote before that.
fn request(disk: &mut Block, kind: u32, sector: u64, from: &[u8], into: u32) -> (u8, Vec<u8>) {
    let memory = memory();
    let (mut driver, mut ring) = Driver::new(&memory, 0, 128);
    let header = header(kind, sector);
    let mut parts = vec![Part::Readable(&header)];
    if !from.is_empty() {
        parts.push(Part::Readable(from));
    }
    // Data and status in one buffer, so that the test sees both.
    parts.push(Part::Writable(into + 1));
    driver.add(&parts);
    assert!(!disk.serve(&mut ring).unwrap());
    let (_, mut written) = driver.used().pop().expect("the request comes back");
    if written.len() == 1 && into > 0 {
        // The status stands behind the room for data even when there was none.
        let mut status = [0xff];
        let address = BUFFER
            + u64::try_from(header.len().next_multiple_of(16) + from.len().next_multiple_of(16)).unwrap();
        use vm_memory::{Bytes, GuestAddress};
        memory.read_slice(&mut status, GuestAddress(address + u64::from(into))).unwrap();
        return (status[0], Vec::new());
    }
    (written.pop().unwrap(), written)
}

const BUFFER: u64 = 1 << 20;
const IN: u32 = wire::VIRTIO_BLK_T_IN;
const OUT: u32 = wire::VIRTIO_BLK_T_OUT;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn a_base_is_read_and_ends_in_zeros() {
    let mut disk = disk(Some(&[7; 5000]), None);
    assert_eq!(request(&mut disk, IN, 0, &[], 512), (OK, vec![7; 512]));
    let (status, bytes) = request(&mut disk, IN, 9, &[], 1024);
    assert_eq!(status, OK);
    assert_eq!(bytes, [vec![7; 5000 - 9 * 512], vec![0; 1024 - (5000 - 9 * 512)]].concat());
}

#[test]
fn a_disk_without_an_overlay_takes_no_writes() {
    let mut disk = disk(Some(&[7; DISK]), None);
    assert_eq!(request(&mut disk, OUT, 0, &[1; 512], 0).0, IOERR);
    assert_eq!(request(&mut disk, wire::VIRTIO_BLK_T_DISCARD, 0, &segment(0, 8, 0), 0).0, IOERR);
    assert_eq!(request(&mut disk, IN, 0, &[], 512), (OK, vec![7; 512]));
    assert_eq!(disk.features() & 1 << wire::VIRTIO_BLK_F_RO, 1 << wire::VIRTIO_BLK_F_RO);
}

#[test]
fn a_write_of_part_of_a_block_keeps_the_rest_of_the_base() {
    let base = vec![7; DISK];
    let mut disk = disk(Some(&base), Some(&[]));
    assert_eq!(request(&mut disk, OUT, 3, &[1; 512], 0).0, OK);
    let (_, block) = request(&mut disk, IN, 0, &[], 8192);
    assert_eq!(block, [vec![7; 1536], vec![1; 512], vec![7; 6144]].concat());
    assert_eq!((disk.counters.writes, disk.counters.written_bytes), (1, 512));
}

#[test]
fn discarded_blocks_read_as_zeros_and_give_room_back() {
    let mut disk = disk(Some(&[7; DISK]), Some(&[]));
    request(&mut disk, OUT, 0, &[1; 16384], 0);
    let status = request(&mut disk, wire::VIRTIO_BLK_T_DISCARD, 0, &segment(8, 16, 0), 0).0;
    assert_eq!(status, OK);
    let (_, bytes) = request(&mut disk, IN, 0, &[], 16384);
    assert_eq!(bytes, [vec![1; 4096], vec![0; 8192], vec![1; 4096]].concat());
    use std::os::unix::fs::MetadataExt;
    assert!(disk.overlay.as_ref().unwrap().metadata().unwrap().blocks() * 512 <= 8192 + 4096);
    let zeroed = request(&mut disk, wire::VIRTIO_BLK_T_WRITE_ZEROES, 0, &segment(0, 8, 1), 0).0;
    assert_eq!(zeroed, OK);
    assert_eq!(request(&mut disk, IN, 0, &[], 4096), (OK, vec![0; 4096]));
    let unknown = request(&mut disk, wire::VIRTIO_BLK_T_WRITE_ZEROES, 0, &segment(0, 8, 2), 0).0;
    assert_eq!(unknown, UNSUPP);
}

#[test]
fn id_flush_and_unknown_requests_are_answered() {
    let mut disk = disk(None, Some(&[0; DISK]));
    let (status, id) = request(&mut disk, wire::VIRTIO_BLK_T_GET_ID, 0, &[], 20);
    assert_eq!((status, &id[..8]), (OK, &b"scratch\0"[..]));
    assert_eq!(request(&mut disk, wire::VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, OK);
    assert_eq!(request(&mut disk, 99, 0, &[], 0).0, UNSUPP);
}

#[test]
fn a_disk_that_ends_with_its_machine_offers_no_flush() {
    let offers = |cache| {
        let disk = Block::new(BlockConfig { cache, ..config(None, Some(file(&[0; DISK]))) }).unwrap();
        disk.features() & 1 << wire::VIRTIO_BLK_F_FLUSH != 0
    };
    assert!(offers(Cache::Writeback) && !offers(Cache::Unsafe));
    let mut disk =
        Block::new(BlockConfig { cache: Cache::Unsafe, ..config(None, Some(file(&[0; DISK]))) }).unwrap();
    assert_eq!(request(&mut disk, wire::VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, UNSUPP);
}

#[test]
fn what_lies_beyond_the_disk_is_an_error_however_it_is_reached() {
    let mut disk = disk(None, Some(&[0; DISK]));
    let sectors = u64::try_from(DISK / 512).unwrap();
    for sector in [sectors, sectors - 1, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(request(&mut disk, IN, sector, &[], 1024).0, IOERR, "{sector}");
        assert_eq!(request(&mut disk, OUT, sector, &[1; 1024], 0).0, IOERR, "{sector}");
        let clear = segment(sector, 16, 0);
        assert_eq!(request(&mut disk, wire::VIRTIO_BLK_T_DISCARD, 0, &clear, 0).0, IOERR, "{sector}");
    }
    assert_eq!(request(&mut disk, OUT, 0, &[1; 100], 0).0, IOERR, "half a sector");
}

/// A read whose data parts all name the same pages; its status.
fn read_into_the_same_pages(disk: &mut Block, parts: u32, each: u32) -> u8 {
    use vm_memory::{Bytes, GuestAddress};
    const STATUS: u64 = 0x10_0000;
    let memory = memory();
    let (mut driver, mut ring) = Driver::new(&memory, 0, 128);
    let header = header(IN, 0);
    let mut chain = vec![Part::Readable(&header)];
    chain.extend((0..parts).map(|_| Part::Raw(0x20_0000, each, 2)));
    chain.push(Part::Raw(STATUS, 1, 2));
    memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
    driver.add(&chain);
    disk.serve(&mut ring).unwrap();
    memory.read_obj(GuestAddress(STATUS)).unwrap()
}

#[test]
fn a_request_is_no_larger_than_was_promised_however_it_is_described() {
    let large = BlockConfig { size_bytes: 1 << 30, ..config(None, Some(file(&[]))) };
    let mut disk = Block::new(large).unwrap();
    let config = disk.config();
    let promised = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(read_into_the_same_pages(&mut disk, promised(12), promised(8)), OK);
    assert_eq!(read_into_the_same_pages(&mut disk, promised(12), promised(8) + 512), IOERR);
    assert_eq!(read_into_the_same_pages(&mut disk, 64, 8 << 20), IOERR, "512 MiB with one request");
}

#[test]
fn a_turn_ends_after_so_many_bytes_or_a_flush_and_goes_on_where_it_was() {
    let large = BlockConfig { size_bytes: 1 << 30, ..config(None, Some(file(&[]))) };
    let mut disk = Block::new(large).unwrap();
    let memory = memory();
    let (mut driver, mut ring) = Driver::new(&memory, 0, 128);
    let (read, flush) = (header(IN, 0), header(wire::VIRTIO_BLK_T_FLUSH, 0));
    for _ in 0..5 {
        driver.add(&[Part::Readable(&read), Part::Raw(0x20_0000, 2 << 20, 2), Part::Raw(0x10_0000, 1, 2)]);
    }
    for _ in 0..2 {
        driver.add(&[Part::Readable(&flush), Part::Raw(0x10_0000, 1, 2)]);
    }
    let mut turns = Vec::new();
    loop {
        let before = driver.outstanding();
        let more = disk.serve(&mut ring).unwrap();
        driver.skip_used();
        turns.push(before - driver.outstanding());
        if !more {
            break;
        }
    }
    assert_eq!(turns, [2, 2, 2, 1], "4 MiB, 4 MiB, 2 MiB and a flush, a flush");
}

#[test]
fn a_limit_counts_flushes_and_clearings_as_operations() {
    let limit = IoLimit { bytes_per_second: None, operations_per_second: Some(1) };
    for (kind, data) in [
        (wire::VIRTIO_BLK_T_FLUSH, Vec::new()),
        (wire::VIRTIO_BLK_T_DISCARD, segment(0, 8, 0)),
        (wire::VIRTIO_BLK_T_WRITE_ZEROES, segment(0, 8, 0)),
    ] {
        let limited = BlockConfig { limit: Some(limit), ..config(None, Some(file(&[]))) };
        let mut disk = Block::new(limited).unwrap();
        assert_eq!(request(&mut disk, kind, 0, &data, 0).0, OK);
        let memory = memory();
        let (mut driver, mut ring) = Driver::new(&memory, 0, 128);
        driver.add(&[Part::Readable(&header(IN, 0)), Part::Writable(513)]);
        disk.serve(&mut ring).unwrap();
        assert_eq!(driver.outstanding(), 1, "the next request of kind {kind} waits");
        assert!(disk.resumes_at().is_some());
    }
}

#[test]
fn zeroing_is_as_large_as_was_promised() {
    let large = BlockConfig { size_bytes: 1 << 30, ..config(None, Some(file(&[]))) };
    let mut disk = Block::new(large).unwrap();
    let zeroes = wire::VIRTIO_BLK_T_WRITE_ZEROES;
    let config = disk.config();
    let sectors = u32::from_le_bytes(config[48..52].try_into().unwrap());
    assert_eq!(request(&mut disk, zeroes, 0, &segment(0, sectors, 0), 0).0, OK);
    assert_eq!(request(&mut disk, zeroes, 0, &segment(0, sectors + 8, 0), 0).0, IOERR);
    let two = [segment(0, 8, 0), segment(8, 8, 0)].concat();
    assert_eq!(request(&mut disk, zeroes, 0, &two, 0).0, IOERR, "one segment was promised");
    assert_eq!(request(&mut disk, wire::VIRTIO_BLK_T_DISCARD, 0, &two, 0).0, OK);
}

#[test]
fn chains_that_break_the_rules_are_faults() {
    let header = header(IN, 0);
    let broken: [&[Part<'_>]; 7] = [
        &[Part::Readable(&header)],
        &[Part::Readable(&header[..15]), Part::Writable(513)],
        &[Part::Writable(513)],
        &[Part::Writable(513), Part::Readable(&header)],
        &[Part::Readable(&header), Part::Raw(1 << 40, 513, 2)],
        &[Part::Readable(&header), Part::Raw((16 << 20) - 100, 513, 2)],
        &[Part::Readable(&header), Part::Raw(u64::MAX - 5, u32::MAX, 2)],
    ];
    for (i, parts) in broken.iter().enumerate() {
        let memory = memory();
        let (mut driver, mut ring) = Driver::new(&memory, 0, 128);
        driver.add(parts);
        assert_eq!(disk(None, Some(&[0; DISK])).serve(&mut ring), Err(Fault), "{i}");
    }
}

#[test]
fn a_chain_that_runs_in_a_circle_ends() {
    let memory = memory();
    let (mut driver, mut ring) = Driver::new(&memory, 0, 128);
    driver.descriptor(0, BUFFER, 16, 1, 1);
    driver.descriptor(1, BUFFER + 512, 512, 3, 1);
    driver.offer(0);
    // Served or refused, but over.
    let _ = disk(None, Some(&[0; DISK])).serve(&mut ring);
}

#[test]
fn a_limit_holds_requests_back_and_lets_them_through_later() {
    let mut config = config(None, Some(file(&[0; DISK])));
    config.limit = Some(IoLimit { bytes_per_second: None, operations_per_second: Some(20) });
    let mut disk = Block::new(config).unwrap();
    let memory = memory();
    let (mut driver, mut ring) = Driver::new(&memory, 0, 128);
    let header = header(IN, 0);
    for _ in 0..25 {
        driver.add(&[Part::Readable(&header), Part::Writable(513)]);
    }
    disk.serve(&mut ring).unwrap();
    let at_once = driver.used().len();
    assert!((20..=21).contains(&at_once), "{at_once}");
    let opens = disk.resumes_at().expect("it waits");
    std::thread::sleep(opens.saturating_duration_since(Instant::now()));
    disk.serve(&mut ring).unwrap();
    assert!(!driver.used().is_empty());
}

#[test]
fn a_full_host_is_an_io_error_and_told_once() {
    // /dev/full takes no byte.
    let full = std::fs::OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
    let mut disk = Block::new(config(None, Some(full))).unwrap();
    for expected in [Some(DeviceStopReason::HostDiskFull), None] {
        assert_eq!(request(&mut disk, OUT, 0, &[1; 512], 0).0, IOERR);
        assert_eq!(disk.take_trouble(), expected);
    }
    assert_eq!(disk.counters.errors, 2);
}

#[test]
fn wrong_disks_are_refused_in_words() {
    let wrong = |change: fn(&mut BlockConfig<OwnedFd>)| {
        let mut config = config(None, Some(file(&[])));
        change(&mut config);
        Block::new(config).unwrap_err().to_string()
    };
    assert!(wrong(|c| c.size_bytes = 4097).contains("multiple of 4,096"));
    assert!(wrong(|c| c.size_bytes = 0).contains("at least one block"));
    assert!(wrong(|c| c.size_bytes = 4 << 40).contains("up to 2 TiB"));
    assert!(wrong(|c| c.id = "a b".into()).contains("\"a b\""));
    assert!(wrong(|c| c.overlay = None).contains("neither"));
}

#[test]
fn a_completed_overlay_is_the_whole_disk_and_another_ones_base() {
    let (base, overlay) = (file(&[7; DISK / 2]), file(&[]));
    let clone = |file: &File| Some(file.try_clone().unwrap());
    let mut before = Block::new(config(clone(&base), clone(&overlay))).unwrap();
    request(&mut before, OUT, 9, &[1; 512], 0);
    // Left by a write that failed half-way: no block of the disk.
    overlay.write_all_at(&[9; 4096], 4096 * 5).unwrap();
    before.complete().unwrap();
    before.complete().unwrap();
    request(&mut before, OUT, 32, &[2; 512], 0);
    let mut expected = [[7; DISK / 2], [0; DISK / 2]].concat();
    expected[9 * 512..10 * 512].fill(1);
    expected[32 * 512..33 * 512].fill(2);
    // The old base is not needed any more, by itself or beneath a fresh overlay.
    let mut alone = Block::new(config(None, clone(&overlay))).unwrap();
    let mut above = Block::new(config(clone(&overlay), Some(file(&[])))).unwrap();
    for disk in [&mut before, &mut alone, &mut above] {
        for sector in (0..DISK / 512).step_by(8) {
            let read = request(disk, IN, u64::try_from(sector).unwrap(), &[], 4096);
            assert_eq!(read, (OK, expected[sector * 512..][..4096].to_vec()), "{sector}");
        }
    }
}

#[test]
fn completing_leaves_holes_where_the_base_has_zeros() {
    use std::os::unix::fs::MetadataExt;
    let mut content = vec![0; DISK];
    content[..4096].fill(1);
    let overlay = file(&[]);
    overlay.set_len(u64::try_from(DISK).unwrap()).unwrap();
    let mut disk = Block::new(config(Some(file(&content)), Some(overlay.try_clone().unwrap()))).unwrap();
    disk.complete().unwrap();
    assert!(overlay.metadata().unwrap().blocks() * 512 < 16384, "one block of it is data");
}

#[derive(Clone, Debug)]
enum Step {
    Read(u64, u32),
    Write(u64, u32, u8),
    Clear(u64, u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let place = || (0u64..128, 1u32..40);
    let step = prop_oneof![
        place().prop_map(|(at, n)| Step::Read(at, n)),
        (place(), any::<u8>()).prop_map(|((at, n), byte)| Step::Write(at, n, byte)),
        place().prop_map(|(at, n)| Step::Clear(at, n)),
    ];
    proptest::collection::vec(step, 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is done to it, it is the disk that a plain array would be.
    #[test]
    fn it_behaves_as_an_array(steps in steps(), base_length in 0usize..DISK) {
        let mut model: Vec<u8> = (0..DISK).map(|i| if i < base_length { u8::try_from(i % 251).unwrap() + 1 } else { 0 }).collect();
        let mut disk = disk(Some(&model[..base_length]), Some(&[]));
        for step in steps {
            match step {
                Step::Read(at, n) => {
                    let (status, bytes) = request(&mut disk, IN, at, &[], n * 512);
                    let start = usize::try_from(at).unwrap() * 512;
                    match model.get(start..start + usize::try_from(n).unwrap() * 512) {
                        Some(expected) => prop_assert!(status == OK && bytes == expected),
                        None => prop_assert_eq!(status, IOERR),
                    }
                }
                Step::Write(at, n, byte) => {
                    let data = vec![byte; usize::try_from(n).unwrap() * 512];
                    let (status, _) = request(&mut disk, OUT, at, &data, 0);
                    let start = usize::try_from(at).unwrap() * 512;
                    match model.get_mut(start..start + data.len()) {
                        Some(place) => { prop_assert_eq!(status, OK); place.copy_from_slice(&data) }
                        None => prop_assert_eq!(status, IOERR),
                    }
                }
                Step::Clear(at, n) => {
                    let (status, _) = request(&mut disk, wire::VIRTIO_BLK_T_DISCARD, 0, &segment(at, n, 0), 0);
                    let start = usize::try_from(at).unwrap() * 512;
                    match model.get_mut(start..start + usize::try_from(n).unwrap() * 512) {
                        Some(place) => { prop_assert_eq!(status, OK); place.fill(0) }
                        None => prop_assert_eq!(status, IOERR),
                    }
                }
            }
        }
    }
}
