//! What stands between the Runtime API and the invocations: whose turn it is, and what a runtime may do in it.
//!
//! ```text
//!               next                  offered             response, error
//!   Started ───────────────▶ Ready ───────────▶ Running ──────────────────▶ Responding ──▶ ResponseSent
//!      │ init/error            ▲                   ▲  broken off, nothing sent  │               │ next
//!      ▼                       │                   └────────────────────────────┘               │
//!   InitError                  └────────────────────────────────────────────────────────────────┘
//! ```
//!
//! The names are those that Lambda's own API says in its refusals. All of it happens on one thread: each change is made at
//! once, and [`Exchange::changed`] wakes whoever waits for one.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use carrel_protocol::agent::{ExitStatus, Invoke, Outcome};
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use crate::container::cgroup::Cgroup;

/// Streamed pieces that wait for the host at once.
const PIECES: usize = 4;

/// An answer, or its end.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) outcome: Outcome,
    /// What is still to be sent of it.
    pub(super) body: Bytes,
}

/// What a runtime posts.
#[derive(Debug)]
pub(super) enum Piece {
    /// Streamed.
    Chunk(Bytes),
    /// Nothing comes after it.
    End(Answer),
}

/// Ends without a [`Piece::End`] if what was streamed broke off.
pub(super) type Pieces = mpsc::Receiver<Piece>;

/// An event for the runtime.
#[derive(Debug)]
pub(super) struct Offer {
    id: String,
    timeout: Duration,
    headers: Vec<(HeaderName, HeaderValue)>,
    event: Bytes,
    pieces: mpsc::Sender<Piece>,
}

impl Offer {
    /// `None` if a header can't be sent.
    pub(super) fn new(request: &Invoke) -> Option<(Self, Pieces)> {
        let name = |name: &str| HeaderName::try_from(format!("lambda-runtime-{}", name.to_lowercase())).ok();
        let header =
            |(key, value): (&String, &String)| Some((name(key)?, HeaderValue::try_from(value).ok()?));
        let mut headers: Vec<_> = request.headers.iter().map(header).collect::<Option<_>>()?;
        // In a path it must be one segment, or no answer could name it.
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        if request.id.is_empty() || !request.id.bytes().all(plain) {
            return None;
        }
        let id = HeaderValue::try_from(&request.id).ok()?;
        headers.push((name("Aws-Request-Id")?, id.clone()));
        headers.push((name("Invocation-Id")?, id));
        headers.push((CONTENT_TYPE, HeaderValue::from_static("application/json")));
        let (pieces, receiver) = mpsc::channel(PIECES);
        let timeout = Duration::from_millis(request.timeout_ms.into());
        Some((Self { id: request.id.clone(), timeout, headers, event: Bytes::new(), pieces }, receiver))
    }

    pub(super) fn with(self, event: Bytes) -> Self {
        Self { event, ..self }
    }
}

/// The answer to `next`.
#[derive(Debug)]
pub(super) struct Handover {
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
    pub(super) event: Bytes,
}

/// The runtime has an event.
#[derive(Debug)]
struct Running {
    id: String,
    pieces: mpsc::Sender<Piece>,
}

#[derive(Debug)]
enum Phase {
    Started,
    InitError,
    Ready,
    Running(Running),
    Responding(String),
    ResponseSent(String),
}

impl Phase {
    fn name(&self) -> &'static str {
        match self {
            Self::Started => "Started",
            Self::InitError => "InitError",
            Self::Ready => "Ready",
            Self::Running(_) => "Running",
            Self::Responding(_) => "InvocationResponse",
            Self::ResponseSent(_) => "ResponseSent",
        }
    }
}

/// Why a runtime's request is not carried out.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Denial {
    /// It names no invocation, or an older one.
    UnknownId,
    /// It is not the time for it.
    Transition(&'static str),
}

/// What came first: the event's hand-over, or something that prevents it.
#[derive(Debug)]
pub(super) enum Before {
    HandedOver(Instant),
    InitFailed(Answer),
    Exited(Outcome),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Exchange {
    /// The largest answer, bytes.
    pub(super) response_bytes: u64,
    state: RefCell<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    begun: Option<Instant>,
    boost: Option<Boost>,
    /// How long INIT took, until it is told.
    init: Option<Duration>,
    init_told: bool,
    init_error: Option<Answer>,
    offer: Option<Offer>,
    handed_over: Option<Instant>,
    exited: Option<Outcome>,
    /// There is an invocation.
    busy: bool,
}

impl Exchange {
    pub(super) fn new(response_bytes: u64) -> Self {
        let state = State {
            phase: Phase::Started,
            begun: None,
            boost: None,
            init: None,
            init_told: false,
            init_error: None,
            offer: None,
            handed_over: None,
            exited: None,
            busy: false,
        };
        Self { response_bytes, state: state.into(), changed: Notify::new() }
    }

    /// Waits for the state to have something.
    async fn until<T>(&self, mut look: impl FnMut(&mut State) -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            if let Some(found) = look(&mut self.state.borrow_mut()) {
                return found;
            }
            changed.await;
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let changed = change(&mut self.state.borrow_mut());
        self.changed.notify_waiters();
        changed
    }

    // The agent's side.

    pub(super) fn begin(&self, now: Instant, boost: Option<Boost>) {
        self.change(|state| {
            state.begun = Some(now);
            state.boost = boost;
        });
    }

    pub(super) fn exited(&self, status: ExitStatus, out_of_memory: bool) {
        self.change(|state| state.exited = Some(Outcome::Exited { status, out_of_memory }));
    }

    /// The one turn that there is; `None` while somebody else has it.
    pub(super) fn turn(self: &Rc<Self>) -> Option<Turn> {
        let mut state = self.state.borrow_mut();
        if state.busy {
            return None;
        }
        state.busy = true;
        state.handed_over = None;
        Some(Turn(Rc::clone(self)))
    }

    /// When the workload began, if it has not asked for an event yet.
    pub(super) fn begun_and_initialising(&self) -> Option<Instant> {
        let state = self.state.borrow();
        matches!(state.phase, Phase::Started | Phase::InitError).then_some(state.begun).flatten()
    }

    /// Waits until the runtime took the event, or never will.
    pub(super) async fn handed_over(&self) -> Before {
        self.until(|state| {
            let handed = state.handed_over.map(Before::HandedOver);
            let failed = || state.init_error.take().map(Before::InitFailed);
            let exited = || state.exited.clone().map(Before::Exited);
            handed.or_else(failed).or_else(exited)
        })
        .await
    }

    /// Waits until the runtime has ended.
    pub(super) async fn gone(&self) -> Outcome {
        self.until(|state| state.exited.clone()).await
    }

    /// Waits until there is no invocation.
    pub(super) async fn idle(&self) {
        self.until(|state| (!state.busy).then_some(())).await;
    }

    /// How long INIT took, or has taken in vain until now; told once.
    pub(super) fn take_init(&self, now: Instant) -> Option<Duration> {
        let mut state = self.state.borrow_mut();
        let so_far = state.begun.map(|begun| now.saturating_duration_since(begun));
        (!std::mem::replace(&mut state.init_told, true)).then(|| state.init.or(so_far)).flatten()
    }

    /// Waits until the runtime asks for its first event; `false` if it has failed or ended before.
    pub(super) async fn ready(&self) -> bool {
        self.until(|state| match state.phase {
            Phase::Started => state.exited.is_some().then_some(false),
            Phase::InitError => Some(false),
            Phase::Ready | Phase::Running(_) | Phase::Responding(_) | Phase::ResponseSent(_) => Some(true),
        })
        .await
    }

    /// The room is a clone: an INIT that is over was the template's, and one that goes on begins now.
    pub(super) fn cloned(&self, now: Instant) {
        self.change(|state| {
            state.init_told |= state.init.is_some();
            state.begun = state.begun.map(|_| now);
        });
    }

    // The runtime's side.

    /// `invocation/next`: waits for an event. The first one ends INIT.
    pub(super) async fn next(&self) -> Result<Handover, Denial> {
        self.change(|state| match state.phase {
            Phase::Started | Phase::Ready | Phase::ResponseSent(_) => {
                state.phase = Phase::Ready;
                state.boost = None;
                state.init = state.init.or_else(|| state.begun.map(|begun| begun.elapsed()));
                Ok(())
            }
            Phase::InitError | Phase::Running(_) | Phase::Responding(_) => {
                Err(Denial::Transition(state.phase.name()))
            }
        })?;
        // Of two that wait at once, the other one goes on waiting.
        let offer = self.until(|state| state.offer.take_if(|_| matches!(state.phase, Phase::Ready))).await;
        let Offer { id, timeout, mut headers, event, pieces } = offer;
        self.change(|state| {
            state.phase = Phase::Running(Running { id, pieces });
            state.handed_over = Some(Instant::now());
        });
        headers.push((HeaderName::from_static("lambda-runtime-deadline-ms"), deadline(timeout)));
        Ok(Handover { headers, event })
    }

    /// `invocation/ID/response` and `…/error`: the right to answer.
    pub(super) fn claim(self: &Rc<Self>, id: &str) -> Result<Claim, Denial> {
        let mut state = self.state.borrow_mut();
        let current = match &state.phase {
            Phase::Running(running) => &running.id,
            Phase::Responding(id) | Phase::ResponseSent(id) => id,
            Phase::Started | Phase::InitError | Phase::Ready => return Err(Denial::UnknownId),
        };
        if current != id {
            return Err(Denial::UnknownId);
        }
        let before = std::mem::replace(&mut state.phase, Phase::Responding(id.to_owned()));
        if let Phase::Running(running) = before {
            return Ok(Claim { exchange: Rc::clone(self), running: Some(running), began: false });
        }
        let denial = Denial::Transition(before.name());
        state.phase = before;
        Err(denial)
    }

    /// `init/error`: the right to say why INIT failed.
    pub(super) fn claim_init_error(&self) -> Result<(), Denial> {
        self.change(|state| match state.phase {
            Phase::Started => {
                state.phase = Phase::InitError;
                Ok(())
            }
            Phase::InitError
            | Phase::Ready
            | Phase::Running(_)
            | Phase::Responding(_)
            | Phase::ResponseSent(_) => Err(Denial::Transition(state.phase.name())),
        })
    }

    /// Why INIT failed.
    pub(super) fn init_failed(&self, answer: Answer) {
        self.change(|state| state.init_error = Some(answer));
    }
}

/// An invocation's turn. Dropped, the next one may come.
#[derive(Debug)]
pub(super) struct Turn(Rc<Exchange>);

impl Turn {
    pub(super) fn offer(&self, offer: Offer) {
        self.0.change(|state| state.offer = Some(offer));
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.change(|state| {
            state.busy = false;
            state.offer = None;
        });
    }
}

/// A runtime's right to answer. Dropped before anything was sent, it may try again; later, its answer broke off.
#[derive(Debug)]
pub(super) struct Claim {
    exchange: Rc<Exchange>,
    running: Option<Running>,
    began: bool,
}

impl Claim {
    /// Sends a piece of a streamed answer. That nobody takes it any more is no matter to the runtime, which is late.
    pub(super) async fn send(&mut self, chunk: Bytes) {
        self.began = true;
        if let Some(running) = &self.running {
            let _ = running.pieces.send(Piece::Chunk(chunk)).await;
        }
    }

    /// Ends the answer.
    pub(super) async fn finish(mut self, outcome: Outcome, body: Bytes) {
        self.began = true;
        if let Some(running) = &self.running {
            let _ = running.pieces.send(Piece::End(Answer { outcome, body })).await;
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let Some(running) = self.running.take() else { return };
        self.exchange.change(|state| {
            state.phase = if self.began { Phase::ResponseSent(running.id) } else { Phase::Running(running) };
        });
    }
}

/// A container without its CPU quota, for as long as this lives.
#[derive(Debug)]
pub(super) struct Boost {
    cgroup: Cgroup,
    quota: String,
}

impl Boost {
    /// `None` if there is no quota.
    pub(super) fn begin(cgroup: &Cgroup) -> Option<Self> {
        let quota = cgroup.read("cpu.max").trim().to_owned();
        let limited = quota.split(' ').next().is_some_and(|first| first.parse::<u64>().is_ok());
        (limited && cgroup.set_cpu("max").is_ok()).then(|| Self { cgroup: cgroup.clone(), quota })
    }
}

impl Drop for Boost {
    fn drop(&mut self) {
        // It was there before, so it can be written; a cgroup that is gone needs none.
        let _ = self.cgroup.set_cpu(&self.quota);
    }
}

/// `Lambda-Runtime-Deadline-Ms`: by this guest's clock, which is the one that the runtime reads.
fn deadline(timeout: Duration) -> HeaderValue {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    HeaderValue::from(u64::try_from((now + timeout).as_millis()).unwrap_or(u64::MAX))
}
