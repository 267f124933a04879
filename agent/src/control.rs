//! The control connection: the handshake, then messages both ways.

use std::io;
use std::time::Duration;

use carrel_protocol::agent::{
    CONTROL_PORT, Ending, EndingReason, FromAgent, FromHost, Hello, Identity, VERSION, Welcome,
};
use carrel_protocol::{Decoder, FrameError, Message};
use thiserror::Error;

use crate::socket::{Dialler, Socket};

/// Why the connection is of no use any more.
#[derive(Debug, Error)]
pub(crate) enum ControlError {
    /// The host said no.
    #[error("the host refuses this agent ({reason}); host and agent must be of the same carrel version")]
    Refused {
        /// The host's sentence.
        reason: String,
    },
    /// The host speaks another version.
    #[error(
        "the host speaks version {theirs} of the protocol, this agent {VERSION}; use the agent that came with carrel"
    )]
    Version {
        /// The host's.
        theirs: u32,
    },
    /// The host began with something else than a welcome.
    #[error("the host's first message is no welcome; host and agent must be of the same carrel version")]
    NoWelcome,
    /// The connection ended.
    #[error("the host closed the control connection")]
    Closed,
    /// The bytes are no messages.
    #[error("the control connection failed")]
    Frame(#[from] FrameError),
}

impl ControlError {
    /// Whether the connection is gone, rather than misused.
    pub(crate) fn is_loss(&self) -> bool {
        match self {
            Self::Closed | Self::Frame(FrameError::Io(_)) => true,
            Self::Refused { .. } | Self::Version { .. } | Self::NoWelcome | Self::Frame(_) => false,
        }
    }
}

/// Who a welcome says that this room is.
///
/// # Errors
///
/// The host speaks another version.
pub(crate) fn identity(welcome: Welcome) -> Result<Identity, ControlError> {
    match welcome {
        Welcome { version: VERSION, identity } => Ok(identity),
        Welcome { version, .. } => Err(ControlError::Version { theirs: version }),
    }
}

/// How long the host may take to accept.
const PATIENCE: Duration = Duration::from_secs(1);

/// The connection.
#[derive(Debug)]
pub(crate) struct Control {
    socket: Socket,
    decoder: Decoder,
    buffer: Box<[u8]>,
    /// What of the buffer has not been decoded.
    pending: std::ops::Range<usize>,
}

impl Control {
    /// Dials the host. The VMM listens before it starts the guest, but its owner may accept late: some attempts over a second.
    ///
    /// # Errors
    ///
    /// What connect(2) says at last.
    pub(crate) async fn dial(dialler: &Dialler) -> io::Result<Self> {
        let mut pause = Duration::from_millis(1);
        let mut waited = Duration::ZERO;
        loop {
            match dialler.dial(CONTROL_PORT).await {
                Ok(socket) => return Ok(Self::new(socket)),
                Err(_) if waited < PATIENCE => tokio::time::sleep(pause).await,
                Err(error) => return Err(error),
            }
            waited += pause;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    pub(crate) fn new(socket: Socket) -> Self {
        Self { socket, decoder: Decoder::default(), buffer: vec![0; 16 << 10].into(), pending: 0..0 }
    }

    /// The agent's first words.
    ///
    /// # Errors
    ///
    /// The connection failed.
    pub(crate) async fn hello(&self, booted_us: u64, clone: bool) -> Result<(), ControlError> {
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        let agent = env!("CARGO_PKG_VERSION").to_owned();
        self.send(&Hello { version: VERSION, agent, kernel, booted_us, clone }.into()).await
    }

    /// The host's first words: who this room is.
    ///
    /// # Errors
    ///
    /// Anything but a welcome of our version.
    pub(crate) async fn welcome(&mut self) -> Result<Identity, ControlError> {
        match self.receive().await? {
            FromHost::Welcome(welcome) => identity(welcome),
            FromHost::Refused(refused) => Err(ControlError::Refused { reason: refused.reason }),
            FromHost::Prepare(_)
            | FromHost::Start(_)
            | FromHost::Exec(_)
            | FromHost::Signal(_)
            | FromHost::Resize(_)
            | FromHost::Invoke(_)
            | FromHost::Collect(_)
            | FromHost::ReportUsage(_)
            | FromHost::Freeze(_)
            | FromHost::Attach(_)
            | FromHost::Shutdown(_) => Err(ControlError::NoWelcome),
        }
    }

    /// Says why the agent can't go on. Errors are of no interest: it ends anyway.
    pub(crate) async fn broken(&self, message: &str) {
        let reason = EndingReason::Broken { message: message.to_owned() };
        let _ = self.send(&Ending { reason }.into()).await;
    }

    /// Sends a message.
    ///
    /// # Errors
    ///
    /// It exceeds its own cap, or the connection failed.
    pub(crate) async fn send(&self, message: &FromAgent) -> Result<(), ControlError> {
        self.socket.write(&message.encode()?).await.map_err(|error| FrameError::Io(error).into())
    }

    /// The next message. Safe to cancel: what was read stays.
    ///
    /// # Errors
    ///
    /// The connection ended or isn't well-formed.
    pub(crate) async fn receive(&mut self) -> Result<FromHost, ControlError> {
        loop {
            let mut pending = self.buffer.get(self.pending.clone()).unwrap_or_default();
            let message = self.decoder.push(&mut pending)?;
            self.pending.start = self.pending.end - pending.len();
            if let Some(message) = message {
                return Ok(message);
            }
            if self.pending.is_empty() {
                let read = self.socket.read(&mut self.buffer).await.map_err(FrameError::Io)?;
                if read == 0 {
                    return Err(ControlError::Closed);
                }
                self.pending = 0..read;
            }
        }
    }

    /// Says that nothing more comes, and waits for the host to have read it, or half a second.
    pub(crate) async fn close(self) -> io::Result<()> {
        self.socket.finish();
        let mut rest = [0; 512];
        let drained = async {
            while self.socket.read(&mut rest).await? > 0 {}
            Ok(())
        };
        tokio::time::timeout(Duration::from_millis(500), drained).await.unwrap_or(Ok(()))
    }
}
