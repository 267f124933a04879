//! What is said of a request that is not carried out.

use carrel_protocol::agent::Failure;

/// Why a request was refused, as the host is told.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) failure: Failure,
    pub(crate) message: String,
}

impl Refusal {
    pub(crate) fn new(failure: Failure, message: impl Into<String>) -> Self {
        Self { failure, message: message.into() }
    }
}
