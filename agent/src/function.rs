//! A function in its room: the Lambda Runtime API of its container (AWS Lambda, *Runtime API*), and its invocations.
//!
//! The workload is hostile, the runtime client in it included. So the API is a server with caps (see [`api`]), what it may
//! say and when is decided in one place ([`exchange`]), and here is what the host asks for.
//!
//! ```text
//!  host ── Invoke ──▶ invoke ─ fetches the event, dials the response
//!                       │ offers                               runtime
//!                       ▼                                         │
//!                   Exchange ◀── next, response, error ── Api ◀───┘ 127.0.0.1:9001
//!                       │ pieces of the answer
//!                       ▼
//!  host ◀─ bytes, then Invoked: answered, failed, timed out (killed), exited
//! ```

mod api;
mod exchange;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use carrel_protocol::agent::{self, ExitStatus, Failure, Invoke, Invoked, Outcome};
use hyper::body::Bytes;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use crate::container::cgroup::Cgroup;
use crate::refusal::Refusal;
use crate::socket::{Dialler, Socket};
use crate::usage::Meter;
use carrel_protocol::chain;
use exchange::{Answer, Before, Boost, Exchange, Offer, Piece, Pieces};

/// Where the API is, as on Lambda.
const ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9001);
/// The largest event: Lambda's 6 MB, in binary, and some.
const EVENT_BYTES: u64 = (6 << 20) + 1024;
/// How long what a runtime posted just before its end may take to be read.
const LAST_POST: Duration = Duration::from_millis(50);
/// How long the end of a runtime waits for the answer that it gave before.
const LAST_ANSWER: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug)]
pub(crate) struct Function {
    address: SocketAddr,
    cgroup: Cgroup,
    init_timeout: Duration,
    exchange: Rc<Exchange>,
    server: AbortHandle,
}

/// How an invocation ended, before the host is told.
struct End {
    outcome: Outcome,
    /// From the event's hand-over; zero if there was none.
    duration: Duration,
    sent: u64,
}

impl Function {
    /// Listens. The first phase begins with [`Function::begin`].
    ///
    /// # Errors
    ///
    /// The port is taken, or loopback is down.
    pub(crate) async fn serve(function: agent::Function, cgroup: Cgroup) -> io::Result<Rc<Self>> {
        Self::serve_at(ADDRESS, &function, cgroup).await
    }

    async fn serve_at(at: SocketAddr, function: &agent::Function, cgroup: Cgroup) -> io::Result<Rc<Self>> {
        let listener = TcpListener::bind(at).await?;
        let address = listener.local_addr()?;
        let exchange = Rc::new(Exchange::new(function.response_bytes));
        let server = spawn_local(api::serve(listener, Rc::clone(&exchange))).abort_handle();
        let init_timeout = Duration::from_millis(function.init_timeout_ms.into());
        Ok(Rc::new(Self { address, cgroup, init_timeout, exchange, server }))
    }

    /// What the runtime is told of this.
    pub(crate) fn environment(&self) -> Vec<(String, String)> {
        vec![("AWS_LAMBDA_RUNTIME_API".into(), self.address.to_string())]
    }

    /// The workload starts now: INIT begins. Until the first event is asked for, all of the room's CPUs are its own, as on Lambda.
    pub(crate) fn begin(&self) {
        self.exchange.begin(Instant::now(), Boost::begin(&self.cgroup));
    }

    /// The runtime ended. Returns when the invocation that this ends was answered, so that its answer comes before the end.
    pub(crate) async fn exited(&self, status: ExitStatus, out_of_memory: bool) {
        self.exchange.exited(status, out_of_memory);
        let _ = timeout(LAST_ANSWER, self.exchange.idle()).await;
    }

    /// Waits until the runtime asks for its first event: it is loaded. `false` if it never will.
    pub(crate) async fn ready(&self) -> bool {
        self.exchange.ready().await
    }

    /// The room is a clone. The runtime's request for an event goes on: its connection is loopback's, which clones keep.
    pub(crate) fn cloned(&self) {
        self.exchange.cloned(Instant::now());
    }

    /// Has the runtime handle one event, to whatever end.
    ///
    /// # Errors
    ///
    /// There is another one at work, the request is wrong, or the host can't be dialled.
    pub(crate) async fn invoke(&self, dialler: &Dialler, request: Invoke) -> Result<Invoked, Refusal> {
        let turn = self.exchange.turn().ok_or_else(|| {
            Refusal::new(Failure::BadRequest, "the function handles an event already; it takes one at a time")
        })?;
        let (offer, pieces) = Offer::new(&request).ok_or_else(|| {
            Refusal::new(Failure::BadRequest, "the invocation's id or a header of it can't be sent over HTTP")
        })?;
        let event = fetch(dialler, &request).await?;
        let response = dialler.open(&request.response).await.map_err(lost)?;
        let called = Instant::now();
        turn.offer(offer.with(event));
        let limit = Duration::from_millis(request.timeout_ms.into());
        let End { outcome, duration, sent } = self.accompany(limit, called, pieces, &response).await;
        // The host sees the end of the bytes before it is told what they were.
        response.finish();
        Ok(Invoked {
            id: request.id,
            outcome,
            init_us: self.exchange.take_init(Instant::now()).map(micros),
            duration_us: micros(duration),
            memory_peak_bytes: Meter::new(self.cgroup.clone()).memory_peak(),
            response_bytes: sent,
        })
    }

    /// From the offer to the end.
    async fn accompany(&self, limit: Duration, called: Instant, pieces: Pieces, response: &Socket) -> End {
        // During INIT its own deadline counts; later, a runtime that doesn't come back for the next event is late.
        let initialising = self.exchange.begun_and_initialising();
        let deadline = initialising.map_or(called + limit, |begun| begun + self.init_timeout);
        let before = tokio::select! {
            biased;
            before = self.exchange.handed_over() => before,
            () = sleep_until(deadline) => {
                self.cgroup.kill();
                let outcome = if initialising.is_some() { Outcome::InitTimedOut } else { Outcome::TimedOut };
                return End { outcome, duration: Duration::ZERO, sent: 0 };
            }
        };
        match before {
            Before::HandedOver(at) => self.collect(at, at + limit, pieces, response).await,
            Before::InitFailed(Answer { outcome, body }) => {
                let sent = send(response, &body).await;
                End { outcome, duration: Duration::ZERO, sent }
            }
            Before::Exited(outcome) => End { outcome, duration: Duration::ZERO, sent: 0 },
        }
    }

    /// From the hand-over to the end: the answer's bytes go to the host as they come.
    async fn collect(&self, began: Instant, deadline: Instant, mut pieces: Pieces, response: &Socket) -> End {
        let mut sent = 0;
        let end = |outcome, sent| End { outcome, duration: began.elapsed(), sent };
        loop {
            let piece = tokio::select! {
                biased;
                piece = pieces.recv() => piece,
                outcome = self.exchange.gone() => match timeout(LAST_POST, pieces.recv()).await {
                    Ok(Some(piece)) => Some(piece),
                    Ok(None) | Err(_) => return end(outcome, sent),
                },
                () = sleep_until(deadline) => {
                    self.cgroup.kill();
                    return end(Outcome::TimedOut, sent);
                }
            };
            match piece {
                Some(Piece::Chunk(bytes)) => match timeout_at(deadline, send(response, &bytes)).await {
                    Ok(written) => sent += written,
                    Err(_) => {
                        self.cgroup.kill();
                        return end(Outcome::TimedOut, sent);
                    }
                },
                Some(Piece::End(Answer { outcome, body })) => {
                    let mut end = end(outcome, sent);
                    end.sent += send(response, &body).await;
                    return end;
                }
                // What was streamed broke off.
                None => {
                    let outcome = Outcome::Error { error_type: "Runtime.TruncatedResponse".into() };
                    return end(outcome, sent);
                }
            }
        }
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// The event's bytes.
async fn fetch(dialler: &Dialler, request: &Invoke) -> Result<Bytes, Refusal> {
    let size = request.event_bytes;
    if size > EVENT_BYTES {
        let message = format!("an event of {size} bytes is too large; {EVENT_BYTES} are allowed");
        return Err(Refusal::new(Failure::BadRequest, message));
    }
    let mut event = Vec::new();
    let stream = dialler.open(&request.event).await.map_err(lost)?;
    stream.take(size + 1).read_to_end(&mut event).await.map_err(lost)?;
    if u64::try_from(event.len()).ok() != Some(size) {
        let message = format!("the event has {} bytes where {size} were announced", event.len());
        return Err(Refusal::new(Failure::BadRequest, message));
    }
    Ok(event.into())
}

fn lost(error: impl std::error::Error + 'static) -> Refusal {
    Refusal::new(Failure::System, format!("the host's stream failed: {}", chain(&error)))
}

/// How much of it was sent: all, unless the host doesn't want any more.
async fn send(response: &Socket, bytes: &Bytes) -> u64 {
    match response.write(bytes).await {
        Ok(()) => u64::try_from(bytes.len()).unwrap_or(u64::MAX),
        Err(_) => 0,
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
