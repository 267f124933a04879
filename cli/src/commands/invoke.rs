//! `carrel invoke`: one event for one function, in a room of its own.
//!
//! ```text
//!   zip ─▶ store ─┐                                        stdout ◀── response, or the error
//!   runtime or image ─▶ Function::room ─▶ Session::invoke ─┤
//!   event ─▶ memory file ───────────────────┘              stderr ◀── START, the function's output, END, REPORT
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use carrel_host::Outcome;
use carrel_host::function::answer::{self, Answer, Class, ErrorPayload};
use carrel_host::function::invocation::{Audience, Call, Called};
use carrel_host::function::{self, Circumstances, EVENT_BYTES, Engine, Function, FunctionTimeout, Parts};
use carrel_host::pool::Started;
use carrel_host::session::Streams;
use carrel_host::timestamp::{mark, now_ns};
use carrel_protocol::vmm::Mark;
use carrel_store::{Digest, Store};
use serde::de::IgnoredAny;

use super::run::without;
use super::{begin, payload, place, report};
use crate::arguments::invoke::InvokeArgs;
use crate::arguments::run::Pull;
use crate::configuration::Configuration;
use crate::failure::{self, WithStatus};
use crate::values::environment;

/// Functions have such a name; here it leads nowhere. Some parse it, so it has all its parts.
const ACCOUNT: &str = "000000000000";

/// A call, how its room began, and when what happened before.
type Begun = (Called, &'static str, Vec<Mark>);

/// `carrel invoke`.
pub(crate) fn invoke(args: &InvokeArgs, configuration: &Configuration) -> Result<u8> {
    let begun = mark("command begun");
    // What is wrong with the request is said before anything is fetched.
    let function = function(args)?;
    report::check_file(&args.usage)?;
    let event = event(&args.event)?;
    let image = image(args, configuration)?;
    let home = place::home(configuration)?;
    home.assets().check()?;
    let store = place::store(configuration)?;
    let wanted = payload::Wanted {
        image: &image,
        pull: Pull::Missing,
        platform: None,
        insecure: args.insecure,
        without: without(args.unconfined.as_ref()),
        patience: configuration.patience,
    };
    let (mut acquired, lease) = payload::Acquired::find(&store, &wanted)?;
    let (layers, mut blobs) = payload::layers(&store, &acquired.image)?;
    let mut parts = Parts {
        defaults: payload::defaults(&acquired.image),
        layers,
        zip: None,
        image: function.name.clone(),
    };
    if let Some(path) = &args.zip {
        let (digest, size, file) = add_zip(&store, path)?;
        parts.zip = Some((digest.to_string(), size));
        acquired.zip = Some(digest);
        blobs.push(file.into());
    }
    let around = Circumstances::now(configuration.patience).context("The kernel gives no random bytes.")?;
    let mut spec = function.room(parts, &around)?;
    let kernel = args.kernel.as_ref().map(std::path::absolute).transpose()?;
    function::adjust(&mut spec, without(args.unconfined.as_ref()), kernel);
    let call = call(&function, &event)?;
    // The rooms have its blobs open: nobody can take them away any more.
    drop(lease);
    let stderr = || Ok::<_, io::Error>(File::from(io::stderr().as_fd().try_clone_to_owned()?));
    let serve = |started: Started| -> Result<(Begun, Option<Outcome>)> {
        let Started { session, beginning, timeline: mut marks, .. } = started;
        marks.insert(0, begun.clone());
        let audience = Audience {
            log: Streams { stdin: None, stdout: stderr()?, stderr: stderr()? },
            response: io::stdout().as_fd().try_clone_to_owned()?.into(),
            started: &mut || {
                if let Engine::Managed(runtime) = &function.engine {
                    log(&answer::init_start(runtime));
                }
                log(&answer::start(&call.id));
            },
            notice: &mut |text| tracing::warn!("{text}"),
        };
        let called = session.invoke(&call, audience)?;
        let outcome = called.room.outcome.clone();
        Ok(((called, beginning.word(), marks), Some(outcome)))
    };
    let (called, beginning, mut marks) = begin::serve(&home, &store, &args.begin, (&spec, &blobs), serve)?;
    acquired.settle(&store, &called.room.outcome);
    if args.begin.timeline {
        marks.extend(called.room.timeline.clone());
        begin::print_timeline(beginning, &marks);
    }
    let ended = conclude(&function, &call.id, &called);
    report::usage(&args.usage, called.room.usage.as_ref())?;
    ended
}

fn function(args: &InvokeArgs) -> Result<Function> {
    let own = |name: &str| std::env::var(name).ok();
    Ok(Function {
        name: args.name.clone(),
        engine: match &args.image {
            Some(_) => Engine::Image,
            None => Engine::Managed(args.runtime.clone()),
        },
        handler: args.handler.clone(),
        memory: args.memory,
        timeout: FunctionTimeout::try_from(args.timeout)?,
        environment: environment::collect(&args.env_file, &args.env, &own)?,
    })
}

/// The event's bytes, which must be JSON: `{}`, `@FILE`, or `-` for standard input.
fn event(given: &str) -> Result<Vec<u8>> {
    let (bytes, from) = match given {
        "-" => (read_event(io::stdin().lock(), "standard input")?, "standard input"),
        given => match given.strip_prefix('@') {
            Some(path) => {
                let cannot = || format!("The event file {path} can't be read.");
                (read_event(File::open(path).with_context(cannot)?, path)?, path)
            }
            None => (given.as_bytes().to_vec(), "--event"),
        },
    };
    serde_json::from_slice::<IgnoredAny>(&bytes)
        .with_context(|| format!("The event from {from} is no JSON."))?;
    ensure!(length(&bytes) <= EVENT_BYTES, "The event from {from} is larger than {EVENT_BYTES} bytes.");
    Ok(bytes)
}

fn read_event(from: impl Read, name: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = from.take(EVENT_BYTES + 1).read_to_end(&mut bytes);
    read.with_context(|| format!("The event can't be read from {name}."))?;
    ensure!(length(&bytes) <= EVENT_BYTES, "The event from {name} is larger than {EVENT_BYTES} bytes.");
    Ok(bytes)
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

/// The function's own image, or the managed runtime's.
fn image(args: &InvokeArgs, configuration: &Configuration) -> Result<String> {
    if let Some(image) = &args.image {
        return Ok(image.clone());
    }
    let Some(layout) = place::runtime(configuration, &args.runtime)? else {
        let known = place::runtimes(configuration)?;
        let known = if known.is_empty() { "none; run scripts/build".to_owned() } else { known.join(", ") };
        bail!("There is no runtime '{}'; those that are there: {known}.", args.runtime);
    };
    let layout = layout.to_str().ok_or_else(|| anyhow!("The runtime's path is not UTF-8."))?;
    Ok(format!("oci:{layout}:latest"))
}

fn add_zip(store: &Store, path: &Path) -> Result<(Digest, u64, File)> {
    let cannot = || format!("The zip {} can't be taken into the store.", path.display());
    let mut file = File::open(path).with_context(|| format!("The zip {} can't be read.", path.display()))?;
    let bytes = file.metadata().with_context(cannot)?.len();
    if bytes > function::ZIP_BYTES {
        return Err(function::FunctionError::Zip(bytes).into());
    }
    let (digest, size) = store.add_file(&mut file).with_context(cannot)?;
    let blob = store.blob(&digest).with_context(cannot)?;
    Ok((digest, size, blob))
}

fn call(function: &Function, event: &[u8]) -> Result<Call> {
    let kept = "The event can't be kept in memory.";
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::memfd_create("event", flags).context(kept)?);
    file.write_all(event).context(kept)?;
    let region = function.environment.iter().rev().find_map(|one| one.strip_prefix("AWS_REGION="));
    let region = region.unwrap_or(function::DEFAULT_REGION);
    let arn = format!("arn:aws:lambda:{region}:{ACCOUNT}:function:{}", function.name);
    let random = "The kernel gives no random bytes.";
    let trace = function::trace_id(now_ns()).context(random)?;
    Ok(Call {
        id: function::request_id().context(random)?,
        event: file,
        event_bytes: length(event),
        timeout_ms: function.timeout.millis(),
        headers: BTreeMap::from([("Invoked-Function-Arn".to_owned(), arn), ("Trace-Id".to_owned(), trace)]),
    })
}

/// Prints what is still to be said, and decides the status.
fn conclude(function: &Function, id: &str, called: &Called) -> Result<u8> {
    let Some(invoked) = &called.invoked else {
        let Some(error) = answer::unstartable(id, &called.room.outcome) else {
            return report::ended(&called.room.outcome);
        };
        print_error(&error)?;
        log(&answer::not_started(id, function.memory, &error));
        let sentence = called.room.outcome.sentence().unwrap_or_default();
        return Err(WithStatus::new(failure::RUNTIME_FAILED, sentence).into());
    };
    let answer = Answer { id, memory: function.memory, timeout: function.timeout, invoked };
    match answer.error() {
        Some(error) => print_error(&error)?,
        None if io::stdout().is_terminal() => failure::print("\n")?,
        None => {}
    }
    log(&answer.end(now_ns()));
    let status = match answer.class() {
        Class::Answered => 0,
        Class::FunctionError => failure::FAILED,
        Class::RuntimeFailed => failure::RUNTIME_FAILED,
        Class::TooLarge => failure::TOO_LARGE,
        Class::TimedOut => failure::TIMED_OUT,
    };
    match answer.sentence() {
        None => Ok(status),
        Some(sentence) => Err(WithStatus::new(status, sentence).into()),
    }
}

/// Where the response would stand. That nobody reads it there doesn't make it a success.
fn print_error(error: &ErrorPayload) -> Result<()> {
    let text = serde_json::to_string(error)?;
    match failure::print(format_args!("{text}\n")) {
        Err(error) if error.downcast_ref::<failure::OutputGone>().is_some() => Ok(()),
        other => other,
    }
}

/// If nobody reads stderr, the status alone must do.
fn log(lines: &str) {
    let _ = io::stderr().write_all(lines.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_taken_as_it_stands_and_must_be_json() {
        assert_eq!(event(r#"{ "n": 1 }"#).unwrap(), br#"{ "n": 1 }"#);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("event.json");
        std::fs::write(&file, "[1, 2]\n").unwrap();
        assert_eq!(event(&format!("@{}", file.display())).unwrap(), b"[1, 2]\n");
        for wrong in ["", "{", "{} {}", "nonsense"] {
            let error = event(wrong).unwrap_err().to_string();
            assert!(error.contains("event") && error.contains("JSON"), "{error}");
        }
        assert!(event("@/no/such/file").unwrap_err().to_string().contains("/no/such/file"));
    }

    #[test]
    fn an_event_has_a_largest_size_wherever_it_comes_from() {
        let size = usize::try_from(EVENT_BYTES).unwrap();
        let largest = format!("\"{}\"", "x".repeat(size - 2));
        assert_eq!(event(&largest).unwrap().len(), size);
        assert!(event(&format!("{largest} ")).unwrap_err().to_string().contains("larger"));
        let error = read_event(io::repeat(b'1'), "standard input").unwrap_err();
        assert!(error.to_string().contains("larger than 6291456 bytes"), "{error}");
    }
}
