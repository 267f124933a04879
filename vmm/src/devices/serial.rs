//! The serial port: a 16550A whose output is written to a descriptor, at most so many bytes, never waiting.

use std::fs::File;
use std::io::{self, Write};
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, OwnedFd};

use serde::{Deserialize, Serialize};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// COM1.
pub const SERIAL_PORTS: RangeInclusive<u16> = 0x3f8..=0x3ff;
/// COM1's interrupt.
pub const SERIAL_GSI: u32 = 4;

/// A port's registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor, line and modem registers in the order of vm-superio's state.
    registers: [u8; 9],
    /// What came in and was not read.
    input: Vec<u8>,
}

impl From<vm_superio::SerialState> for SerialState {
    fn from(state: vm_superio::SerialState) -> Self {
        let registers = [
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
        ];
        Self { registers, input: state.in_buffer }
    }
}

impl From<SerialState> for vm_superio::SerialState {
    fn from(saved: SerialState) -> Self {
        let [low, high, enable, identification, line, line_status, modem, modem_status, scratch] =
            saved.registers;
        Self {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: line,
            line_status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: saved.input,
        }
    }
}

/// See the module's page.
#[derive(Debug)]
pub struct SerialPort(Serial<Interrupt, NoEvents, Capped>);

#[derive(Debug)]
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Drops what exceeds the cap, and what can't be written at once.
#[derive(Debug)]
struct Capped {
    /// Without one all is dropped.
    output: Option<File>,
    left: u64,
}

impl Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let allowed = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
        // The driver is told that all went well: a guest must not learn of, or wait for, its reader.
        if let (Some(output), Some(part)) = (&mut self.output, bytes.get(..allowed))
            && !part.is_empty()
            && takes_more(output)
        {
            let written = output.write(part).unwrap_or(0);
            self.left = self.left.saturating_sub(u64::try_from(written).unwrap_or(0));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether a byte can be written now. Asked rather than set as O_NONBLOCK, which would reach everybody who shares the
/// descriptor's file: a terminal's shell, for one.
fn takes_more(output: &File) -> bool {
    let mut poll = libc::pollfd { fd: output.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one valid pollfd is passed, with no time to wait.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    ready == 1 && poll.revents & libc::POLLOUT != 0
}

impl SerialPort {
    /// A port that interrupts through `interrupt` and writes to `output`.
    pub fn new(interrupt: EventFd, output: OwnedFd, limit_bytes: u64) -> Self {
        Self(Serial::new(Interrupt(interrupt), Capped { output: Some(output.into()), left: limit_bytes }))
    }

    /// The guest reads a register.
    pub fn read(&mut self, offset: u8) -> u8 {
        self.0.read(offset)
    }

    /// The guest writes a register.
    pub fn write(&mut self, offset: u8, value: u8) {
        // What can fail here is the interrupt's eventfd, full when the guest does not look: nothing is lost.
        let _ = self.0.write(offset, value);
    }

    /// A port that goes on from saved registers; `None` if they are of no port.
    pub fn restored(
        saved: &SerialState,
        interrupt: EventFd,
        output: Option<OwnedFd>,
        limit_bytes: u64,
    ) -> Option<Self> {
        let output = Capped { output: output.map(File::from), left: limit_bytes };
        Serial::from_state(&saved.clone().into(), Interrupt(interrupt), NoEvents, output).ok().map(Self)
    }

    /// The registers, to be saved.
    pub fn state(&self) -> SerialState {
        self.0.state().into()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn output_stops_at_its_cap_and_never_blocks() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut port = SerialPort::new(EventFd::new(0).unwrap(), writer.into(), 5);
        for byte in *b"hello, world" {
            port.write(0, byte);
        }
        drop(port);
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        assert_eq!(said, "hello");

        let (_reader, writer) = io::pipe().unwrap();
        let mut port = SerialPort::new(EventFd::new(0).unwrap(), writer.into(), u64::MAX);
        // Far more than a pipe holds, and nobody reads.
        (0..200_000).for_each(|_| port.write(0, b'x'));
    }
}
