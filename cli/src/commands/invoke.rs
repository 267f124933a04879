//! `carrel invoke`: events for one function, in a room that they share, or in a room of each one's own.
//!
//! ```text
//!   zip ─▶ store ─┐                                        stdout ◀── response, or the error
//!   runtime or image ─▶ Function::room ─▶ Session::invoke ─┤
//!   event ─▶ memory file ───────────────────┘              stderr ◀── START, the function's output, END, REPORT
//!
//!   a room that waits for its next event, at a resident owner ⇄ in place of a new room, and where it goes afterwards
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use carrel_host::function::answer::{self, Answer, Class, ErrorPayload};
use carrel_host::function::invocation::{Audience, Call, Called, Warm};
use carrel_host::function::{self, Circumstances, EVENT_BYTES, Engine, Function, FunctionTimeout, Parts};
use carrel_host::pool::{Started, Waiting};
use carrel_host::session::{Ended, Session, SessionError, Streams};
use carrel_host::spec::Part;
use carrel_host::timestamp::{mark, now_ns};
use carrel_host::{Home, RoomSpec};
use carrel_protocol::agent::Invoked;
use carrel_protocol::vmm::Mark;
use carrel_store::{Digest, Store};
use serde::de::IgnoredAny;

use super::begin::{self, Begun};
use super::run::without;
use super::{payload, place, report};
use crate::arguments::invoke::{FunctionArgs, InvokeArgs, Isolation};
use crate::arguments::run::Pull;
use crate::configuration::Configuration;
use crate::failure::{self, WithStatus};
use crate::values::environment;

/// Functions have such a name; here it leads nowhere. Some parse it, so it has all its parts.
const ACCOUNT: &str = "000000000000";
/// All of the events that one command takes, bytes.
const EVENTS_BYTES: u64 = 256 << 20;
const NO_RANDOM: &str = "The kernel gives no random bytes.";

/// `carrel invoke`.
pub(crate) fn invoke(args: &InvokeArgs, configuration: &Configuration) -> Result<u8> {
    let begun = mark("command begun");
    // What is wrong with the request is said before anything is fetched.
    let function = function(&args.function)?;
    report::check_file(&args.usage)?;
    let events = events(args)?;
    let home = place::home(configuration)?;
    home.assets().check()?;
    let store = place::store(configuration)?;
    let composed = Composed::of(function, &args.function, &store, configuration)?;
    let function = &composed.function;
    let mut verdict = Verdict::default();
    let waiting = waiting(args, &home, &store, &composed, configuration)?;
    let mut rest = &events[..];
    while let Some(first) = rest.first() {
        let shared = match args.isolation {
            Isolation::Room => rest,
            Isolation::Event => std::slice::from_ref(first),
        };
        if let Some((called, handled)) =
            woken(args, function, shared, waiting.as_ref(), &begun, &mut verdict)?
        {
            verdict.hear(conclude(function, &called, events.len() > 1));
            rest = rest.get(handled..).unwrap_or_default();
            continue;
        }
        let spec = composed.room(args.begin.initialised, configuration)?;
        let mut handled = 0;
        let serve = |started: Started| -> Result<(Called, Option<Ended>)> {
            // What its VMM did until it ran is told at its end.
            let keep = waiting.as_ref().filter(|_| !args.begin.timeline);
            let new = Instance::New(started.session, started.beginning.is_initialised());
            let (called, count) = instance(function, shared, new, keep, &mut verdict)?;
            handled = count;
            let ended = called.room.clone();
            Ok((called, ended))
        };
        let room = (&spec, &composed.blobs[..]);
        let called =
            match begin::serve(&home, &store, &args.begin, std::slice::from_ref(&begun), room, serve)? {
                Begun::Served(called, _) => called,
                Begun::Refused(room) => {
                    handled = 1;
                    Called { call: call(function, first)?, invoked: None, room: Some(room) }
                }
            };
        if let Some(room) = &called.room {
            composed.acquired.settle(&store, &room.outcome);
        }
        let ended = conclude(function, &called, events.len() > 1);
        report::usage(&args.usage, called.room.as_ref().and_then(|room| room.usage.as_ref()))?;
        verdict.hear(ended);
        if called.invoked.is_none() {
            // The next room would not be better.
            break;
        }
        rest = rest.get(handled..).unwrap_or_default();
    }
    verdict.ended()
}

/// A function and all that its rooms begin with.
pub(crate) struct Composed {
    function: Function,
    parts: Parts,
    /// Open, so that nobody can take them away.
    pub(crate) blobs: Vec<OwnedFd>,
    pub(crate) acquired: payload::Acquired,
    kernel: Option<PathBuf>,
    without: Vec<Part>,
}

impl Composed {
    /// Brings the function's code and its runtime into the store.
    pub(crate) fn of(
        function: Function,
        args: &FunctionArgs,
        store: &Store,
        configuration: &Configuration,
    ) -> Result<Self> {
        let image = image(args, configuration)?;
        let without = without(args.unconfined.as_ref());
        let wanted = payload::Wanted {
            image: &image,
            pull: Pull::Missing,
            platform: None,
            insecure: args.insecure,
            without: without.clone(),
            patience: configuration.patience,
        };
        let (mut acquired, _lease) = payload::Acquired::find(store, &wanted)?;
        let (layers, mut blobs) = payload::layers(store, &acquired.image)?;
        let defaults = payload::defaults(&acquired.image);
        let mut parts = Parts { defaults, layers, zip: None, image: function.name.clone() };
        if let Some(path) = &args.zip {
            let (digest, size, file) = add_zip(store, path)?;
            parts.zip = Some((digest.to_string(), size));
            acquired.zip = Some(digest);
            blobs.push(file.into());
        }
        let kernel = args.kernel.as_ref().map(std::path::absolute).transpose()?;
        Ok(Self { function, parts, blobs, acquired, kernel, without })
    }

    /// Its next room.
    pub(crate) fn room(&self, initialised: bool, configuration: &Configuration) -> Result<RoomSpec> {
        let around = match initialised {
            true => Circumstances::initialised(configuration.patience),
            false => Circumstances::now(configuration.patience).context(NO_RANDOM)?,
        };
        let mut spec = self.function.room(self.parts.clone(), &around)?;
        function::adjust(&mut spec, self.without.clone(), self.kernel.clone());
        Ok(spec)
    }
}

/// The first event that was not answered decides.
#[derive(Debug, Default)]
struct Verdict(Option<Result<u8>>);

impl Verdict {
    fn hear(&mut self, ended: Result<u8>) {
        match (&self.0, ended) {
            (_, Ok(0)) => {}
            (None, ended) => self.0 = Some(ended),
            (Some(_), Ok(_)) => {}
            (Some(_), Err(error)) => tracing::error!("{error:#}"),
        }
    }

    fn ended(self) -> Result<u8> {
        self.0.unwrap_or(Ok(0))
    }
}

/// Where rooms of this function wait, unless its events are to have a new one, or what its room used is asked for: that is told at a room's end.
fn waiting<'a>(
    args: &InvokeArgs,
    home: &'a Home,
    store: &Store,
    composed: &Composed,
    configuration: &Configuration,
) -> Result<Option<Waiting<'a>>> {
    let is_new = args.isolation == Isolation::Event || args.begin.cold;
    if is_new || args.usage.usage.is_some() || args.usage.usage_file.is_some() {
        return Ok(None);
    }
    let pool = begin::pool(home, store, args.begin.domain.as_deref())?;
    Ok(pool.waiting(&composed.room(true, configuration)?, args.begin.initialised)?)
}

/// Has a room that waits handle these events, if there is one.
fn woken(
    args: &InvokeArgs,
    function: &Function,
    events: &[Vec<u8>],
    waiting: Option<&Waiting<'_>>,
    since: &Mark,
    verdict: &mut Verdict,
) -> Result<Option<(Called, usize)>> {
    while let Some(warm) = waiting.and_then(Waiting::wake) {
        let woken = mark("room woken");
        match instance(function, events, Instance::Waits(warm), waiting, verdict) {
            Err(error) if matches!(error.downcast_ref(), Some(SessionError::Over(_))) => {}
            Err(error) => return Err(error),
            Ok(handled) => {
                if args.begin.timeline {
                    begin::print_timeline("warm", vec![since.clone(), woken, mark("ended")]);
                }
                return Ok(Some(handled));
            }
        }
    }
    Ok(None)
}

/// What handles events.
enum Instance {
    /// A room that was begun for them; whether its function is loaded already.
    New(Session, bool),
    /// One that has handled others.
    Waits(Warm),
}

/// Has one room handle these events, as many as its runtime lives for; how many that were. All but the last are concluded.
fn instance(
    function: &Function,
    events: &[Vec<u8>],
    instance: Instance,
    keep: Option<&Waiting<'_>>,
    verdict: &mut Verdict,
) -> Result<(Called, usize)> {
    let stderr = || Ok::<_, io::Error>(File::from(io::stderr().as_fd().try_clone_to_owned()?));
    let mut calls = events.iter().map(|event| call(function, event));
    let first = calls.next().context("There is no event.")??;
    let mut begun = 0;
    let several = events.len() > 1;
    let starts = match &instance {
        Instance::New(_, initialised) => Some(*initialised),
        Instance::Waits(_) => None,
    };
    let mut keep = keep.map(|waiting| |room: &Warm| waiting.keep(room));
    let audience = Audience {
        log: Streams { stdin: None, stdout: stderr()?, stderr: stderr()? },
        response: io::stdout().as_fd().try_clone_to_owned()?.into(),
        started: &mut |call| {
            if let (0, Some(initialised), Engine::Managed(runtime)) = (begun, starts, &function.engine) {
                log(&answer::runtime_start(runtime, initialised));
            }
            begun += 1;
            log(&answer::start(&call.id));
        },
        answered: &mut |call, invoked| verdict.hear(answered(function, &call.id, invoked, several)),
        notice: &mut |text| tracing::warn!("{text}"),
        keep: keep.as_mut().map(|keep| keep as &mut dyn FnMut(&Warm) -> bool),
    };
    let mut next = || calls.next().transpose();
    let called = match instance {
        Instance::New(session, _) => session.invoke(first, &mut next, audience)?,
        Instance::Waits(warm) => warm.invoke(first, &mut next, audience)?,
    };
    // One that ended before its start had its event all the same.
    Ok((called, begun.max(1)))
}

/// What was asked for, without a look at its code.
pub(crate) fn function(args: &FunctionArgs) -> Result<Function> {
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

/// All events, before the first is handled: what is wrong with one is said before.
fn events(args: &InvokeArgs) -> Result<Vec<Vec<u8>>> {
    let Some(path) = &args.events else {
        return args.event.iter().map(|given| event(given)).collect();
    };
    let all = match path.to_str() {
        Some("-") => lines(io::stdin().lock(), "standard input")?,
        _ => {
            let name = path.display().to_string();
            let file = File::open(path).with_context(|| format!("The events' file {name} can't be read."))?;
            lines(io::BufReader::new(file), &name)?
        }
    };
    ensure!(!all.is_empty(), "There is no event in {}.", path.display());
    Ok(all)
}

fn lines(mut from: impl BufRead, name: &str) -> Result<Vec<Vec<u8>>> {
    let (mut all, mut bytes) = (Vec::new(), 0);
    for number in 1_u64.. {
        let mut line = Vec::new();
        // One byte more for the new line, and one that is too many.
        let read = from.by_ref().take(EVENT_BYTES + 2).read_until(b'\n', &mut line);
        if read.with_context(|| format!("The events can't be read from {name}."))? == 0 {
            break;
        }
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        check_event(line, &format!("line {number} of {name}"))?;
        bytes += length(line);
        ensure!(bytes <= EVENTS_BYTES, "The events of {name} are larger than {EVENTS_BYTES} bytes together.");
        all.push(line.to_owned());
    }
    Ok(all)
}

/// An event's bytes, which must be JSON: `{}`, `@FILE`, or `-` for standard input.
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
    check_event(&bytes, from)?;
    Ok(bytes)
}

fn check_event(bytes: &[u8], from: &str) -> Result<()> {
    ensure!(length(bytes) <= EVENT_BYTES, "The event from {from} is larger than {EVENT_BYTES} bytes.");
    let json = serde_json::from_slice::<IgnoredAny>(bytes);
    json.map(drop).with_context(|| format!("The event from {from} is no JSON."))
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
fn image(args: &FunctionArgs, configuration: &Configuration) -> Result<String> {
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

fn call(function: &Function, event: &[u8]) -> io::Result<Call> {
    let mut file = File::from(rustix::fs::memfd_create("event", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.write_all(event)?;
    let region = function.environment.iter().rev().find_map(|one| one.strip_prefix("AWS_REGION="));
    let region = region.unwrap_or(function::DEFAULT_REGION);
    let arn = format!("arn:aws:lambda:{region}:{ACCOUNT}:function:{}", function.name);
    let trace = function::trace_id(now_ns())?;
    Ok(Call {
        id: function::request_id()?,
        event: file,
        event_bytes: length(event),
        timeout_ms: function.timeout.millis(),
        headers: BTreeMap::from([("Invoked-Function-Arn".to_owned(), arn), ("Trace-Id".to_owned(), trace)]),
    })
}

/// Prints what is still to be said when the room is over, and decides the status.
fn conclude(function: &Function, called: &Called, several: bool) -> Result<u8> {
    let id = &called.call.id;
    if let Some(invoked) = &called.invoked {
        return answered(function, id, invoked, several);
    }
    let outcome = called.room.as_ref().map(|room| &room.outcome);
    let outcome = outcome.context("The room is kept, and its function did not answer.")?;
    let Some(error) = answer::unstartable(id, outcome) else {
        return report::ended(outcome);
    };
    print_error(&error)?;
    log(&answer::not_started(id, function.memory, &error));
    let sentence = outcome.sentence().unwrap_or_default();
    Err(WithStatus::new(failure::RUNTIME_FAILED, sentence).into())
}

/// The same of one event. Of several each ends its line.
fn answered(function: &Function, id: &str, invoked: &Invoked, several: bool) -> Result<u8> {
    let answer = Answer { id, memory: function.memory, timeout: function.timeout, invoked };
    match answer.error() {
        Some(error) => print_error(&error)?,
        None if several || io::stdout().is_terminal() => failure::print("\n")?,
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
    fn every_line_is_an_event_and_a_wrong_one_is_named() {
        let of = |text: &str| lines(text.as_bytes(), "events.jsonl");
        assert_eq!(of("{\"n\": 1}\n\n  [2]\r\n3").unwrap(), [&b"{\"n\": 1}"[..], b"[2]", b"3"]);
        assert!(of("\n\n").unwrap().is_empty());
        let error = of("1\n\nnonsense\n").unwrap_err().to_string();
        assert!(error.contains("line 3 of events.jsonl"), "{error}");
        let size = usize::try_from(EVENT_BYTES).unwrap();
        let largest = format!("\"{}\"", "x".repeat(size - 2));
        assert_eq!(of(&format!("{largest}\n1\n")).unwrap().len(), 2);
        assert!(of(&format!("{largest} x\n")).unwrap_err().to_string().contains("larger"));
    }

    #[test]
    fn the_first_event_that_was_not_answered_decides() {
        let of = |all: Vec<Result<u8>>| {
            let mut verdict = Verdict::default();
            all.into_iter().for_each(|ended| verdict.hear(ended));
            verdict.ended()
        };
        assert_eq!(of(vec![Ok(0), Ok(0)]).unwrap(), 0);
        assert_eq!(of(vec![Ok(0), Ok(4), Ok(1)]).unwrap(), 4);
        let error = of(vec![
            Ok(0),
            Err(WithStatus::new(1, "first").into()),
            Err(WithStatus::new(3, "second").into()),
        ]);
        assert_eq!(error.unwrap_err().to_string(), "first");
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
