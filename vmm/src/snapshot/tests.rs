use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::devices::state::{DeviceState, QueueRegisters};
use crate::sealed::HEADER_BYTES;

/// A state with something of everything in it.
fn state() -> MachineState {
    let queue = QueueRegisters {
        max_size: 256,
        size: 128,
        ready: true,
        event_idx: true,
        descriptors: 0x1000,
        available: 0x2000,
        used: 0x3000,
        next_available: 7,
        next_used: 0xfffe,
    };
    let device = |device| TransportState {
        status: 15,
        device_features_select: 1,
        driver_features_select: 1,
        driver_features: 1 << 32 | 1 << 29,
        queue_select: 2,
        generation: 3,
        interrupt_status: 1,
        queues: vec![queue; 2],
        device,
    };
    MachineState {
        layout: Layout {
            memory: vec![(0, 64 << 20)],
            devices: crate::devices::BASE,
            window: crate::devices::WINDOW,
            first_interrupt: crate::devices::FIRST_GSI,
        },
        host_kernel: "6.12.0".into(),
        shape: Shape {
            vcpus: VcpuCount::MIN,
            memory_mib: MemoryMib::MIN,
            vsock: Some((3, 256)),
            blocks: vec![BlockShape {
                id: "room".into(),
                size_bytes: 1 << 30,
                cache: Cache::Unsafe,
                read_only: false,
            }],
            entropy: true,
            balloon: Some(true),
            serial: true,
        },
        vcpus: vec![crate::arch::current::state::tests::sample()],
        clock: kvm_clock_data { clock: 123_456_789, ..Default::default() },
        io_apic: ioapic::tests::sample(),
        devices: vec![
            device(DeviceState::Vsock),
            device(DeviceState::Block),
            device(DeviceState::Entropy),
            device(DeviceState::Balloon { target_pages: 5, actual_pages: 6 }),
        ],
        serial: Some(vm_superio::SerialState::default().into()),
    }
}

/// The form of this version, byte by byte. A change of it is a change of [`VERSION`]: then the new file stands beside the old ones, which are refused.
#[test]
fn the_form_is_pinned_and_older_ones_are_refused() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let path = folder.join(format!("state-v{VERSION}"));
    let now = state().encode().unwrap();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &now).unwrap();
    }
    let golden = std::fs::read(&path).unwrap();
    assert!(
        golden == now,
        "the form has changed: raise VERSION, and write {} with UPDATE_GOLDEN=1",
        path.display()
    );
    assert_eq!(MachineState::decode(&golden).unwrap().encode().unwrap(), golden);
    for version in 1..VERSION {
        let older = std::fs::read(folder.join(format!("state-v{version}"))).unwrap();
        assert!(
            matches!(MachineState::decode(&older), Err(SnapshotError::Version { found }) if found == version)
        );
    }
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = state().encode().unwrap();
    for length in (0..bytes.len()).step_by(7).chain([bytes.len() - 1]) {
        assert!(MachineState::decode(&bytes[..length]).is_err(), "{length}");
    }
    assert!(matches!(MachineState::decode(&[&bytes[..], &[0]].concat()), Err(SnapshotError::Length)));
}

#[test]
fn a_body_with_more_than_a_state_is_an_error_though_its_checksum_is_right() {
    let body = [&state().encode().unwrap()[HEADER_BYTES..], &[0]].concat();
    assert!(matches!(MachineState::decode(&sealed(&body)), Err(SnapshotError::Length)));
}

#[test]
fn a_file_is_read_from_its_beginning_and_no_further_than_the_cap() {
    let mut file = tempfile::tempfile().unwrap();
    assert_eq!(state().write(&file).unwrap(), u64::try_from(state().encode().unwrap().len()).unwrap());
    file.seek(SeekFrom::End(0)).unwrap();
    assert!(MachineState::read(&file).is_ok());
    file.set_len(MAX_BYTES + 1).unwrap();
    assert!(matches!(MachineState::read(&file), Err(SnapshotError::Length)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// At a thousand places: one bit, and what is read is not what was written, so it is an error.
    #[test]
    fn a_flipped_bit_is_an_error(place in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut bytes = state().encode().unwrap();
        let place = place.index(bytes.len());
        bytes[place] ^= 1 << bit;
        prop_assert!(MachineState::decode(&bytes).is_err(), "{place}");
    }

    /// Whatever a body holds whose checksum is right is a state or an error.
    #[test]
    fn any_body_is_a_state_or_an_error(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..20),
        length in any::<prop::sample::Index>(),
    ) {
        let mut body = state().encode().unwrap().split_off(HEADER_BYTES);
        for (place, value) in changes {
            let place = place.index(body.len());
            body[place] = value;
        }
        body.truncate(length.index(body.len()) + 1);
        if let Ok(state) = MachineState::decode(&sealed(&body)) {
            prop_assert!(state.encode().is_ok());
        }
    }
}
