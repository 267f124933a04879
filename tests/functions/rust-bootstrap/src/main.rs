//! Answers with what it was given, or fails in the way that the event's `do` asks for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::Instant;

use lambda_runtime::{Error, LambdaEvent, service_fn};
use serde_json::{Value, json};

/// Events of this instance so far.
static COUNT: AtomicU64 = AtomicU64::new(0);
/// Memory that an event took, until another gives it.
static TAKEN: Mutex<Vec<u8>> = Mutex::new(Vec::new());
/// When it had the first.
static BEGUN: LazyLock<Instant> = LazyLock::new(Instant::now);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    lambda_runtime::run(service_fn(answer)).await
}

async fn answer(event: LambdaEvent<Value>) -> Result<Value, Error> {
    let (event, context) = event.into_parts();
    eprintln!("the bootstrap was asked {event}");
    let count = COUNT.fetch_add(1, Ordering::Relaxed) + 1;
    let begun = *BEGUN;
    let taken = match event.get("do").and_then(Value::as_str) {
        // More than malloc ever keeps for itself (mallopt(3), M_MMAP_THRESHOLD).
        Some("take") => Some(vec![1; 34 << 20]),
        Some("give") => Some(Vec::new()),
        _ => None,
    };
    if let (Some(taken), Ok(mut before)) = (taken, TAKEN.lock()) {
        *before = taken;
    }
    match event.get("do").and_then(Value::as_str) {
        Some("error") => Err("the function refuses".into()),
        Some("exit") => std::process::exit(9),
        Some("abort") => std::process::abort(),
        Some("fill memory") => fill_memory(),
        Some("hang") => std::future::pending().await,
        _ => Ok(json!({
            "event": event,
            "request": context.request_id,
            "function": context.env_config.function_name,
            "memory": context.env_config.memory,
            "count": count,
            "now_ms": now_ms(),
            "up_ms": u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            "milliseconds_left": context.deadline.saturating_sub(now_ms()),
        })),
    }
}

/// Touches ever more memory: address space is not refused, so it ends by the kernel's hand.
fn fill_memory() -> ! {
    let mut kept = Vec::new();
    loop {
        kept.push(std::hint::black_box(vec![1_u8; 16 << 20]));
    }
}

fn now_ms() -> u64 {
    let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
