//! Port I/O: the few ports that a guest without firmware still touches.
//!
//! | port | what |
//! |---|---|
//! | 0x3f8–0x3ff | the serial port, where configured |
//! | 0x64 | keyboard controller: 0xfe pulses the reset line |
//! | 0x604 | 0x2000 powers off, as QEMU's machines have it |
//! | 0xcf9 | reset control: bit 2 restarts |
//!
//! Everything else reads as all ones and takes writes silently, as an empty bus does.

use std::sync::{Mutex, PoisonError};

use carrel_protocol::vmm::End;

use crate::devices::serial::{SERIAL_PORTS, SerialPort, SerialState};

const KEYBOARD_COMMAND: u16 = 0x64;
const RESET_PULSE: u8 = 0xfe;
const POWER: u16 = 0x604;
const POWER_OFF: [u8; 2] = 0x2000u16.to_le_bytes();
const RESET_CONTROL: u16 = 0xcf9;
const RESET_NOW: u8 = 1 << 2;

/// The port I/O bus, shared by all vCPUs.
#[derive(Debug, Default)]
pub struct Ports {
    serial: Option<Mutex<SerialPort>>,
}

impl Ports {
    /// A bus with or without a serial port.
    pub fn new(serial: Option<SerialPort>) -> Self {
        Self { serial: serial.map(Mutex::new) }
    }

    /// The serial port's registers, to be saved.
    pub fn serial_state(&self) -> Option<SerialState> {
        // No code panics while it holds this; a poisoned lock's content is still right.
        self.serial.as_ref().map(|serial| serial.lock().unwrap_or_else(PoisonError::into_inner).state())
    }

    /// The guest reads from a port.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let (Some(serial), Some(offset), [byte]) = (&self.serial, serial_offset(port), data)
            && let Ok(mut serial) = serial.lock()
        {
            *byte = serial.read(offset);
        }
    }

    /// The guest writes to a port; some writes end it.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<End> {
        match (port, data) {
            (KEYBOARD_COMMAND, &[RESET_PULSE]) => Some(End::Reset),
            (RESET_CONTROL, &[value]) if value & RESET_NOW != 0 => Some(End::Reset),
            (POWER, value) if value == POWER_OFF => Some(End::Shutdown),
            (_, bytes) => {
                if let (Some(serial), Some(offset)) = (&self.serial, serial_offset(port))
                    && let Ok(mut serial) = serial.lock()
                {
                    // `outsb` with a repeat count comes as one exit with many bytes for one port.
                    bytes.iter().for_each(|&byte| serial.write(offset, byte));
                }
                None
            }
        }
    }
}

fn serial_offset(port: u16) -> Option<u8> {
    SERIAL_PORTS.contains(&port).then(|| u8::try_from(port - SERIAL_PORTS.start()).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_ports_end_the_machine_and_no_other() {
        let ports = Ports::default();
        assert_eq!(ports.write(0x64, &[0xfe]), Some(End::Reset));
        assert_eq!(ports.write(0xcf9, &[6]), Some(End::Reset));
        assert_eq!(ports.write(0x604, &[0, 0x20]), Some(End::Shutdown));
        for (port, data) in
            [(0x64, &[0xd1][..]), (0xcf9, &[0]), (0x604, &[0x20]), (0x80, &[0]), (0x3f8, b"x")]
        {
            assert_eq!(ports.write(port, data), None, "{port:#x}");
        }
    }

    #[test]
    fn an_absent_device_reads_as_ones() {
        let mut data = [0; 4];
        Ports::default().read(0x3fd, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}
