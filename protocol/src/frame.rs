//! Frames: how a message looks as bytes.
//!
//! ```text
//!  0        4       6       8
//!  | length | kind  | zero  | body: `length` bytes of JSON
//!  | u32 LE | u16 LE| u16   |
//! ```
//!
//! `kind` says which variant of the direction's enum follows, and so which cap holds: a length above the
//! cap of its kind is an error before the body is read or memory for it is taken. Unknown kinds and
//! non-zero reserved bits are errors: both ends agreed on a version first.

use std::io::{self, Read, Write};

use thiserror::Error;

/// Bytes before a frame's body.
pub const HEADER_BYTES: usize = 8;

/// Why bytes are not a message.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The kind is not one of this direction's.
    #[error("the peer sent a message of unknown kind {kind}; both ends must be of the same carrel version")]
    UnknownKind {
        /// The kind that was read.
        kind: u16,
    },
    /// The body is longer than its kind allows.
    #[error("the peer announced {length} bytes for a {name} message, which may have {limit} at most")]
    TooLong {
        /// Name of the message.
        name: &'static str,
        /// Announced length, bytes.
        length: u32,
        /// The kind's cap, bytes.
        limit: u32,
    },
    /// Reserved header bits are set.
    #[error("the peer set reserved bits in a frame's header; the stream is out of step or not carrel's")]
    Reserved,
    /// The body is not the JSON that its kind asks for.
    #[error("the body of a {name} message is malformed")]
    Body {
        /// Name of the message.
        name: &'static str,
        /// What the parser says.
        #[source]
        source: serde_json::Error,
    },
    /// The stream ended or failed.
    #[error("the connection to the peer failed")]
    Io(#[from] io::Error),
}

/// A frame's header, already checked against the caps of `M`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which message follows.
    pub kind: u16,
    /// Bytes of body that follow.
    pub length: u32,
}

impl Header {
    /// Reads a header and checks its kind and length against what `M` allows.
    pub fn parse<M: Message>(bytes: [u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let [l0, l1, l2, l3, k0, k1, r0, r1] = bytes;
        let (length, kind) = (u32::from_le_bytes([l0, l1, l2, l3]), u16::from_le_bytes([k0, k1]));
        if (r0, r1) != (0, 0) {
            return Err(FrameError::Reserved);
        }
        let (name, limit) = M::kind_limit(kind).ok_or(FrameError::UnknownKind { kind })?;
        if length > limit {
            return Err(FrameError::TooLong { name, length, limit });
        }
        Ok(Self { kind, length })
    }

    /// Bytes of body that follow, as a size of memory.
    pub fn body_bytes(&self) -> usize {
        // Every cap is far below 4 GiB and carrel runs on 64-bit hosts alone.
        self.length as usize
    }
}

/// One direction's messages: an enum made by [`messages!`](crate::messages).
pub trait Message: Sized {
    /// The name and the cap, in bytes, of a kind; `None` for a kind that does not exist.
    fn kind_limit(kind: u16) -> Option<(&'static str, u32)>;
    /// The kind of this message.
    fn kind(&self) -> u16;
    /// The JSON body.
    fn body(&self) -> Result<Vec<u8>, serde_json::Error>;
    /// The message of `kind` whose body this is.
    fn from_body(kind: u16, body: &[u8]) -> Result<Self, FrameError>;

    /// The whole frame. Fails when the body exceeds its own cap, so that no end can send what the other refuses.
    fn encode(&self) -> Result<Vec<u8>, FrameError> {
        let (name, limit) =
            Self::kind_limit(self.kind()).ok_or(FrameError::UnknownKind { kind: self.kind() })?;
        let body = self.body().map_err(|source| FrameError::Body { name, source })?;
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
        if length > limit {
            return Err(FrameError::TooLong { name, length, limit });
        }
        let mut frame = Vec::with_capacity(HEADER_BYTES + body.len());
        frame.extend_from_slice(&length.to_le_bytes());
        frame.extend_from_slice(&self.kind().to_le_bytes());
        frame.extend_from_slice(&[0, 0]);
        frame.extend_from_slice(&body);
        Ok(frame)
    }

    /// The message that is exactly these bytes (a datagram).
    fn decode(frame: &[u8]) -> Result<Self, FrameError> {
        let (header, body) = frame
            .split_first_chunk::<HEADER_BYTES>()
            .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        let header = Header::parse::<Self>(*header)?;
        if header.body_bytes() != body.len() {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Self::from_body(header.kind, body)
    }

    /// Writes the frame in one call.
    fn write_to(&self, to: &mut impl Write) -> Result<(), FrameError> {
        Ok(to.write_all(&self.encode()?)?)
    }

    /// Reads one frame; blocks until it is whole.
    fn read_from(from: &mut impl Read) -> Result<Self, FrameError> {
        let mut header = [0; HEADER_BYTES];
        from.read_exact(&mut header)?;
        let header = Header::parse::<Self>(header)?;
        let mut body = vec![0; header.body_bytes()];
        from.read_exact(&mut body)?;
        Self::from_body(header.kind, &body)
    }
}

/// Puts messages together from pieces of a stream, for readers that can't block.
///
/// Holds one frame at most: [`Decoder::push`] takes no more than the current frame still needs.
#[derive(Debug, Default)]
pub struct Decoder {
    frame: Vec<u8>,
}

impl Decoder {
    /// Takes bytes from the front of `input`, leaving what belongs to later frames, and returns a message
    /// once one is whole. Call again while `input` is not empty.
    pub fn push<M: Message>(&mut self, input: &mut &[u8]) -> Result<Option<M>, FrameError> {
        self.take(HEADER_BYTES, input);
        let Some(header) = self.frame.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let whole = HEADER_BYTES + Header::parse::<M>(*header)?.body_bytes();
        self.take(whole, input);
        if self.frame.len() < whole {
            return Ok(None);
        }
        let message = M::decode(&self.frame)?;
        self.frame.clear();
        Ok(Some(message))
    }

    fn take(&mut self, up_to: usize, input: &mut &[u8]) {
        let (now, later) = input.split_at(up_to.saturating_sub(self.frame.len()).min(input.len()));
        self.frame.extend_from_slice(now);
        *input = later;
    }
}

/// Makes the enum of one direction's messages from a table: kind, variant (also its body's type), cap in bytes.
#[macro_export]
macro_rules! messages {
    ($(#[$doc:meta])* $direction:ident { $($kind:literal $name:ident $limit:expr;)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq)]
        pub enum $direction {
            $(#[doc = concat!("Kind ", stringify!($kind), ".")] $name($name),)+
        }

        impl $crate::Message for $direction {
            fn kind_limit(kind: u16) -> Option<(&'static str, u32)> {
                match kind {
                    $($kind => Some((stringify!($name), $limit)),)+
                    _ => None,
                }
            }
            fn kind(&self) -> u16 {
                match self { $(Self::$name(_) => $kind,)+ }
            }
            fn body(&self) -> Result<Vec<u8>, serde_json::Error> {
                match self { $(Self::$name(body) => serde_json::to_vec(body),)+ }
            }
            fn from_body(kind: u16, body: &[u8]) -> Result<Self, $crate::FrameError> {
                match kind {
                    $($kind => serde_json::from_slice(body)
                        .map(Self::$name)
                        .map_err(|source| $crate::FrameError::Body { name: stringify!($name), source }),)+
                    _ => Err($crate::FrameError::UnknownKind { kind }),
                }
            }
        }

        $(impl From<$name> for $direction {
            fn from(body: $name) -> Self { Self::$name(body) }
        })+
    };
}
