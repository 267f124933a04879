//! The packet header (virtio §5.10.6), 44 bytes, little-endian.

use super::super::buffers::{Fault, Ranges};

/// Bytes of a header.
pub(super) const HEADER_BYTES: usize = 44;
const TYPE_STREAM: u16 = 1;

/// The receiver takes no more (flag of [`Operation::Shutdown`]).
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// The sender sends no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub(super) const SHUTDOWN_BOTH: u32 = 3;

/// What a packet is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Asks for a connection.
    Request,
    /// Grants it.
    Response,
    /// Refuses or ends it at once.
    Reset,
    /// Says that one direction, or both, are over.
    Shutdown,
    /// Carries data.
    Data,
    /// Says how much room there is.
    CreditUpdate,
    /// Asks how much room there is.
    CreditRequest,
}

impl Operation {
    const ALL: [(u16, Self); 7] = [
        (1, Self::Request),
        (2, Self::Response),
        (3, Self::Reset),
        (4, Self::Shutdown),
        (5, Self::Data),
        (6, Self::CreditUpdate),
        (7, Self::CreditRequest),
    ];

    fn from_number(number: u16) -> Option<Self> {
        Self::ALL.iter().find(|(n, _)| *n == number).map(|(_, operation)| *operation)
    }

    fn number(self) -> u16 {
        Self::ALL.iter().find(|(_, operation)| *operation == self).map_or(0, |(n, _)| *n)
    }
}

/// The ports that name a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    /// At the host.
    pub(super) host: u32,
    /// In the guest.
    pub(super) guest: u32,
}

/// A packet from the guest, all but its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FromGuest {
    /// Its connection.
    pub(super) ports: Ports,
    /// What it is; `None` for what this device doesn't know.
    pub(super) operation: Option<Operation>,
    /// Flags of a shutdown.
    pub(super) flags: u32,
    /// Bytes of data that follow.
    pub(super) length: u32,
    /// Room that the guest has for one connection.
    pub(super) buf_alloc: u32,
    /// Bytes that the guest's application has taken from it so far.
    pub(super) fwd_cnt: u32,
}

impl FromGuest {
    /// Reads a header from a chain. `None`: it pretends to come from or go to somebody else, and is dropped.
    pub(super) fn read(from: &Ranges, guest_cid: u64) -> Result<Option<Self>, Fault> {
        let mut bytes = [0; HEADER_BYTES];
        from.read(&mut bytes)?;
        let (source, destination) = (u64_at(&bytes, 0), u64_at(&bytes, 8));
        if source != guest_cid || destination != u64::from(carrel_protocol::agent::HOST_CID) {
            return Ok(None);
        }
        let stream = u16_at(&bytes, 28) == TYPE_STREAM;
        Ok(Some(Self {
            ports: Ports { guest: u32_at(&bytes, 16), host: u32_at(&bytes, 20) },
            operation: Operation::from_number(u16_at(&bytes, 30)).filter(|_| stream),
            length: u32_at(&bytes, 24),
            flags: u32_at(&bytes, 32),
            buf_alloc: u32_at(&bytes, 36),
            fwd_cnt: u32_at(&bytes, 40),
        }))
    }
}

/// A packet to the guest, all but its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ToGuest {
    /// Its connection.
    pub(super) ports: Ports,
    /// What it is.
    pub(super) operation: Operation,
    /// Flags of a shutdown.
    pub(super) flags: u32,
    /// Bytes of data that follow.
    pub(super) length: u32,
    /// Room that we have for this connection.
    pub(super) buf_alloc: u32,
    /// Bytes that we have passed on from it so far.
    pub(super) fwd_cnt: u32,
}

impl ToGuest {
    /// A reset of a connection that isn't.
    pub(super) fn reset(ports: Ports) -> Self {
        Self { ports, operation: Operation::Reset, flags: 0, length: 0, buf_alloc: 0, fwd_cnt: 0 }
    }

    /// Writes the header to the beginning of a chain.
    pub(super) fn write(&self, to: &Ranges, guest_cid: u64) -> Result<(), Fault> {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, field: &[u8]| {
            if let Some(place) = bytes.get_mut(at..at + field.len()) {
                place.copy_from_slice(field);
            }
        };
        put(0, &u64::from(carrel_protocol::agent::HOST_CID).to_le_bytes());
        put(8, &guest_cid.to_le_bytes());
        put(16, &self.ports.host.to_le_bytes());
        put(20, &self.ports.guest.to_le_bytes());
        put(24, &self.length.to_le_bytes());
        put(28, &TYPE_STREAM.to_le_bytes());
        put(30, &self.operation.number().to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        to.write(&bytes)
    }
}

fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    bytes.get(at..at + N).and_then(|field| field.try_into().ok()).unwrap_or([0; N])
}

fn u16_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u16 {
    u16::from_le_bytes(field(bytes, at))
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

fn u64_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}
