//! The Runtime API as HTTP (AWS Lambda, *Using the Lambda runtime API*, version 2018-06-01).
//!
//! | request | answers |
//! |---|---|
//! | `GET runtime/invocation/next` | 200 with the event, when there is one; 403 while one is being handled |
//! | `POST runtime/invocation/ID/response` | 202; 400 for another ID, 403 if it was answered; 413 |
//! | `POST runtime/invocation/ID/error` | the same |
//! | `POST runtime/init/error` | 202; 403 after the first `next` |
//!
//! Its only client is the workload, which can't be trusted: connections, headers and bodies have caps, and whatever exceeds
//! them costs the workload its own answer and no more. There are no timeouts: a connection that is kept idle takes one of its
//! own, and a function may run for fifteen minutes between two requests on one connection.

use std::convert::Infallible;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use carrel_protocol::agent::Outcome;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::spawn_local;

use super::exchange::{Answer, Claim, Denial, Exchange, Handover};

/// Connections at once; further ones wait in the kernel, which has its own cap.
const CONNECTIONS: usize = 16;
/// Bytes of a request's headers. An X-Ray cause alone may have 64 KiB.
const HEADER_BYTES: usize = 128 << 10;
/// Headers of a request.
const HEADERS: usize = 64;
/// A streamed answer's bytes (Lambda's 200 MB).
const STREAMED_BYTES: u64 = 200 << 20;
/// Bytes of a refused body that are read to their end.
const DISCARDED_BYTES: u64 = 64 << 20;
/// Bytes of an error type or content type that are kept.
const WORD_BYTES: usize = 256;
/// Below it is all that there is.
const ROOT: &str = "/2018-06-01/";

const ERROR_TYPE: &str = "lambda-runtime-function-error-type";
const ERROR_BODY: &str = "lambda-runtime-function-error-body";
const RESPONSE_MODE: &str = "lambda-runtime-function-response-mode";

type Reply = Response<Full<Bytes>>;

/// Serves until it is aborted.
pub(super) async fn serve(listener: TcpListener, exchange: Rc<Exchange>) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    // The semaphore is never closed.
    while let Ok(permit) = Arc::clone(&connections).acquire_owned().await {
        let Ok((stream, _)) = listener.accept().await else {
            // No descriptors: some will be free in a moment.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        // Small answers to a client that waits for each.
        let _ = stream.set_nodelay(true);
        let exchange = Rc::clone(&exchange);
        spawn_local(async move {
            let service = service_fn(move |request| {
                let exchange = Rc::clone(&exchange);
                async move { Ok::<_, Infallible>(answer(&exchange, request).await) }
            });
            // A client that breaks the rules, or goes, ends its own connection.
            let _ = http1::Builder::new()
                .max_buf_size(HEADER_BYTES)
                .max_headers(HEADERS)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            drop(permit);
        });
    }
}

/// What is asked for.
enum Route<'a> {
    Ping,
    Next,
    Response(&'a str),
    Error(&'a str),
    InitError,
}

impl<'a> Route<'a> {
    fn of(path: &'a str) -> Option<Self> {
        let segments: Vec<&str> = path.strip_prefix(ROOT)?.split('/').collect();
        Some(match *segments {
            ["ping"] => Self::Ping,
            ["runtime", "init", "error"] => Self::InitError,
            ["runtime", "invocation", "next"] => Self::Next,
            ["runtime", "invocation", id, "response"] => Self::Response(id),
            ["runtime", "invocation", id, "error"] => Self::Error(id),
            _ => return None,
        })
    }

    fn method(&self) -> &'static str {
        match self {
            Self::Ping | Self::Next => "GET",
            Self::Response(_) | Self::Error(_) | Self::InitError => "POST",
        }
    }
}

async fn answer(exchange: &Rc<Exchange>, request: Request<Incoming>) -> Reply {
    let path = request.uri().path().to_owned();
    let Some(route) = Route::of(&path) else {
        return fail(StatusCode::NOT_FOUND, "NotFound", "There is no such path");
    };
    let allowed = route.method();
    if request.method().as_str() != allowed {
        let message = format!("This path takes {allowed}");
        let mut reply = fail(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", &message);
        reply.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
        return reply;
    }
    match route {
        Route::Ping => Response::new(Full::from("pong")),
        Route::Next => next(exchange).await,
        Route::Response(id) => respond(exchange, id, request).await,
        Route::Error(id) => report_error(exchange, id, request).await,
        Route::InitError => report_init_error(exchange, request).await,
    }
}

async fn next(exchange: &Exchange) -> Reply {
    match exchange.next().await {
        Ok(Handover { headers, event }) => {
            let mut reply = Response::new(Full::new(event));
            reply.headers_mut().extend(headers);
            reply
        }
        Err(denial) => deny(&denial, "Ready"),
    }
}

async fn respond(exchange: &Rc<Exchange>, id: &str, request: Request<Incoming>) -> Reply {
    let streaming = match request.headers().get(RESPONSE_MODE).map(HeaderValue::as_bytes) {
        None => false,
        Some(mode) if mode.eq_ignore_ascii_case(b"streaming") => true,
        Some(mode) if mode.is_empty() || mode.eq_ignore_ascii_case(b"buffered") => false,
        Some(_) => {
            let message = "Invalid function response mode";
            return fail(StatusCode::BAD_REQUEST, "InvalidFunctionResponseMode", message);
        }
    };
    let claim = match exchange.claim(id) {
        Ok(claim) => claim,
        Err(denial) => return deny(&denial, "InvocationResponse"),
    };
    let content_type = word(request.headers(), CONTENT_TYPE.as_str()).unwrap_or_default();
    let success = Outcome::Response { content_type };
    if streaming {
        stream(claim, success, request.into_body()).await
    } else {
        buffer(claim, success, exchange.response_bytes, request.into_body()).await
    }
}

async fn report_error(exchange: &Rc<Exchange>, id: &str, request: Request<Incoming>) -> Reply {
    let error_type = error_type(request.headers());
    match exchange.claim(id) {
        Ok(claim) => {
            let outcome = Outcome::Error { error_type };
            buffer(claim, outcome, exchange.response_bytes, request.into_body()).await
        }
        Err(denial) => deny(&denial, "InvocationErrorResponse"),
    }
}

async fn report_init_error(exchange: &Exchange, request: Request<Incoming>) -> Reply {
    let error_type = error_type(request.headers());
    if let Err(denial) = exchange.claim_init_error() {
        return deny(&denial, "InitError");
    }
    // What can't be read whole is an error all the same.
    let (body, reply) = match collect(&mut request.into_body(), exchange.response_bytes).await {
        Collected::Whole(body) => (body, accepted()),
        Collected::TooLarge(_) => (Bytes::new(), too_large(exchange.response_bytes)),
        Collected::BrokenOff => (Bytes::new(), broken_off()),
    };
    exchange.init_failed(Answer { outcome: Outcome::InitError { error_type }, body });
    reply
}

/// Takes the answer whole.
async fn buffer(claim: Claim, outcome: Outcome, limit: u64, mut body: Incoming) -> Reply {
    match collect(&mut body, limit).await {
        Collected::Whole(body) => {
            claim.finish(outcome, body).await;
            accepted()
        }
        Collected::TooLarge(bytes) => {
            claim.finish(Outcome::ResponseTooLarge { bytes }, Bytes::new()).await;
            discard(body).await;
            too_large(limit)
        }
        // The claim ends, so it may be posted again.
        Collected::BrokenOff => broken_off(),
    }
}

/// Passes the answer on as it comes; an error after it stands in the trailers.
async fn stream(mut claim: Claim, success: Outcome, mut body: Incoming) -> Reply {
    let mut total = 0_u64;
    let mut failure = None;
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else { return broken_off() };
        match frame.into_data() {
            Ok(chunk) => {
                total = total.saturating_add(length(&chunk));
                if total > STREAMED_BYTES {
                    claim.finish(Outcome::ResponseTooLarge { bytes: total }, Bytes::new()).await;
                    discard(body).await;
                    return too_large(STREAMED_BYTES);
                }
                claim.send(chunk).await;
            }
            Err(other) => {
                let trailers = other.into_trailers().unwrap_or_default();
                if trailers.contains_key(ERROR_TYPE) {
                    let text = trailers.get(ERROR_BODY).map_or(&b""[..], HeaderValue::as_bytes);
                    // Base64, by the book; a client that didn't look there sends it bare.
                    let text = BASE64.decode(text).unwrap_or_else(|_| text.to_vec());
                    failure = Some((error_type(&trailers), Bytes::from(text)));
                }
            }
        }
    }
    match failure {
        Some((error_type, text)) => claim.finish(Outcome::Error { error_type }, text).await,
        None => claim.finish(success, Bytes::new()).await,
    }
    accepted()
}

enum Collected {
    Whole(Bytes),
    /// How many there would be, or were when it was given up.
    TooLarge(u64),
    BrokenOff,
}

async fn collect(body: &mut Incoming, limit: u64) -> Collected {
    let announced = body.size_hint().lower();
    if announced > limit {
        return Collected::TooLarge(announced);
    }
    let mut all = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else { return Collected::BrokenOff };
        let Ok(chunk) = frame.into_data() else { continue };
        let total = length(&all).saturating_add(length(&chunk));
        if total > limit {
            return Collected::TooLarge(total);
        }
        all.extend_from_slice(&chunk);
    }
    Collected::Whole(all.into())
}

/// A client that is still sending would lose the answer to a reset: lets it end.
async fn discard(mut body: Incoming) {
    let mut total = 0_u64;
    while let Some(Ok(frame)) = body.frame().await {
        total = total.saturating_add(frame.data_ref().map_or(0, |chunk| length(chunk)));
        if total > DISCARDED_BYTES {
            return;
        }
    }
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

/// A header as one short word or phrase.
fn word(headers: &HeaderMap, name: &str) -> Option<String> {
    let text = headers.get(name)?.to_str().ok()?;
    Some(text.chars().filter(char::is_ascii).take(WORD_BYTES).collect())
}

fn error_type(headers: &HeaderMap) -> String {
    word(headers, ERROR_TYPE).unwrap_or_default()
}

fn accepted() -> Reply {
    reply(StatusCode::ACCEPTED, &json!({ "status": "OK" }))
}

fn broken_off() -> Reply {
    fail(StatusCode::BAD_REQUEST, "TruncatedHTTPRequest", "HTTP request detected as truncated")
}

fn too_large(limit: u64) -> Reply {
    let message = format!("Exceeded maximum allowed payload size ({limit} bytes).");
    fail(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge", &message)
}

fn deny(denial: &Denial, wanted: &str) -> Reply {
    match denial {
        Denial::UnknownId => fail(StatusCode::BAD_REQUEST, "InvalidRequestID", "Invalid request ID"),
        Denial::Transition(from) => {
            let message = format!(
                "State transition from {from} to {wanted} failed for runtime. Error: State transition is not allowed"
            );
            fail(StatusCode::FORBIDDEN, "InvalidStateTransition", &message)
        }
    }
}

fn fail(status: StatusCode, kind: &str, message: &str) -> Reply {
    reply(status, &json!({ "errorMessage": message, "errorType": kind }))
}

fn reply(status: StatusCode, body: &serde_json::Value) -> Reply {
    let mut reply = Response::new(Full::from(body.to_string()));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    reply
}
