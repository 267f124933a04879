//! The pool: how a room begins. Whoever wants a room asks here, and gets the cheapest beginning that fits.
//!
//! ```text
//!   waiting ─▶ a room of the same function that waits for an event, if the resident owner keeps one
//!
//!   start ─▶ key ─▶ template there? ──yes──▶ clone
//!                     │ no: this caller makes it, all others wait
//!                     ▼
//!                   a room of its own: boot, unpack, freeze, save ─▶ publish ─▶ clone
//!                     │ that failed                    cold asked for ─▶ cold
//!                     ├─▶ by the host's fault: cold, and the reason is told
//!                     └─▶ by the payload's or the workload's own: refused, for it would end so again
//! ```
//!
//! A template is of what a room is made of; on request, of a workload that runs already and said that it is ready ([`RoomSpec::initialised`]).

use std::fs::File;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use carrel_protocol::agent::Failure;
use carrel_protocol::chain;
use carrel_protocol::vmm::{End, Mark};
use carrel_store::templates::{
    Acquired, Damage, LARGEST_WORKING_SET, Maker, Part, Point, Template, TemplateError, Templates,
};
use rustix::fs::MemfdFlags;
use thiserror::Error;

use crate::function::invocation::Warm;
use crate::home::{Home, HomeError, Room, TemplateFiles};
use crate::outcome::{Outcome, Step, exit_in_words};
use crate::resident;
use crate::session::{Ended, Session, SessionError, Streams};
use crate::spec::{self, RoomName, RoomSpec};
use crate::template::{self, Host, KeyError};
use crate::timestamp::mark;

pub mod ahead;

/// The mark of a template that was made just now.
const MADE: &str = "template made";

/// No room could be begun.
#[derive(Debug, Error)]
pub enum PoolError {
    /// The room itself.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The templates.
    #[error(transparent)]
    Templates(#[from] TemplateError),
    /// The owner of the room that was to become a template.
    #[error("the template could not be made")]
    Maker(#[source] SessionError),
    /// That room ended otherwise.
    #[error("the template could not be made: {0}")]
    Outcome(String),
    /// Somebody else makes it, and has for so long that they may be stopped.
    #[error("another command has been making it for {} s, and may be stopped or hang", .0.as_secs())]
    Busy(Duration),
    /// That room was refused for what it is made of, or for its command: so would any other of its kind be.
    #[error("{}", .0.outcome.sentence().unwrap_or_default())]
    Refused(Box<Ended>),
    /// Its workload never was ready to be cloned.
    #[error("{0}; see \"The call\" in docs/agent.md")]
    Unready(String),
    /// A descriptor can't be had.
    #[error("a template's files can't be handed over")]
    Files(#[source] std::io::Error),
}

/// How rooms begin here.
#[derive(Debug)]
pub struct Pool<'a> {
    home: &'a Home,
    templates: Templates,
    domain: String,
    log: Option<File>,
}

/// How a room began.
#[derive(Clone, Debug)]
pub enum Beginning {
    /// With a boot.
    Cold,
    /// From this template; into the file, if it had no working set, this clone's VMM writes one.
    Clone(Arc<Template>, Option<Arc<File>>),
}

/// Where rooms wait whose functions can stand for one another: with the home's resident owner.
#[derive(Debug)]
pub struct Waiting<'a> {
    home: &'a Home,
    key: String,
}

impl Waiting<'_> {
    /// One that waits, which is nobody else's from now on.
    pub fn wake(&self) -> Option<Warm> {
        resident::wake(self.home.root(), &self.key, self.home.patience())
    }

    /// Has one wait; says whether it does. One that doesn't is the caller's still.
    pub fn keep(&self, room: &Warm) -> bool {
        resident::keep(self.home.root(), &self.key, room, self.home.patience())
    }
}

/// A room that was begun.
#[derive(Debug)]
pub struct Started {
    /// The room.
    pub room: Room,
    /// Its workload's session.
    pub session: Session,
    /// How it began.
    pub beginning: Beginning,
    /// What happened when before that.
    pub timeline: Vec<Mark>,
}

/// A template that was asked for.
#[derive(Debug)]
pub struct Created {
    /// It.
    pub template: Template,
    /// It was made now, and not found.
    pub made: bool,
    /// What happened when.
    pub timeline: Vec<Mark>,
}

impl<'a> Pool<'a> {
    /// The pool of this home. Templates are shared within `domain` alone: pages that two rooms share can be probed by timing.
    pub fn new(home: &'a Home, templates: Templates, domain: &str) -> Self {
        Self { home, templates, domain: domain.to_owned(), log: None }
    }

    /// Where a workload's output goes that is run to make a template of it: once, and in none of its clones. Nowhere unless it is said here.
    pub fn with_log(self, log: File) -> Self {
        Self { log: Some(log), ..self }
    }

    /// Begins a room as a clone, of a template that is made first if there is none. Where none can be made the room begins cold, and `notice` is told why; a function
    /// whose INIT failed in the making is begun anew, from a template of its files, so that its event is answered by what it says itself.
    /// `blobs` are the payload's, as for [`Home::create`].
    ///
    /// # Errors
    ///
    /// No room could be begun in either way, or the payload or the workload is at fault.
    pub fn start(
        &self,
        spec: RoomSpec,
        blobs: &[OwnedFd],
        notice: &mut dyn FnMut(&str),
    ) -> Result<Started, PoolError> {
        let mut timeline = Vec::new();
        match self.template(&spec, blobs, &mut timeline) {
            Ok(template) => {
                timeline.push(mark("template found"));
                if !spec.without.contains(&spec::Part::Cgroup) && self.is_brought_ahead(&template) {
                    timeline.push(mark("template read ahead"));
                }
                let (files, record) = files(&template, spec.detached)?;
                let (room, session) = self.home.create_clone(spec, files)?;
                let beginning = Beginning::Clone(Arc::new(template), record.map(Arc::new));
                Ok(Started { room, session, beginning, timeline })
            }
            Err(PoolError::Unready(why)) if spec.function.is_some() => {
                notice(&format!("The event is handled without an initialised template: {why}."));
                self.start(RoomSpec { initialised: false, ..spec }, blobs, notice)
            }
            Err(error @ (PoolError::Refused(_) | PoolError::Unready(_))) => Err(error),
            // What is wrong with the room is wrong with it cold too, and is said better there.
            Err(error) => {
                tracing::debug!(error = %carrel_protocol::chain(&error), "no template");
                if !matches!(error, PoolError::Home(_)) {
                    notice(&format!(
                        "The room begins with a boot, for its template can't be had: {}.",
                        carrel_protocol::chain(&error)
                    ));
                }
                self.start_cold(spec, blobs, timeline)
            }
        }
    }

    /// Has the pages that clones share read on nobody's account, if they are not there.
    fn is_brought_ahead(&self, template: &Template) -> bool {
        let files = [template.file(Part::Memory), template.file(Part::Disk)];
        ahead::bring(&files, self.home.owner(), self.home.patience().answer()).unwrap_or_else(|error| {
            tracing::debug!(error = %chain(&error), "a template is not read ahead: its first clone pays for it");
            false
        })
    }

    /// Where rooms of such a function wait for another event, if somebody keeps them. `spec` is that of an initialised instance, which has all that makes one as good as
    /// another; whether they began so is said beside it.
    ///
    /// # Errors
    ///
    /// Its key can't be found.
    pub fn waiting(&self, spec: &RoomSpec, initialised: bool) -> Result<Option<Waiting<'a>>, PoolError> {
        if !self.home.may_have_resident() {
            return Ok(None);
        }
        let host = Host::look()?;
        let key = template::warm_key(spec, initialised, self.home.assets(), &host, &self.domain)?;
        Ok(Some(Waiting { home: self.home, key }))
    }

    /// Begins a room with a boot.
    ///
    /// # Errors
    ///
    /// The room can't be made.
    pub fn start_cold(
        &self,
        spec: RoomSpec,
        blobs: &[OwnedFd],
        timeline: Vec<Mark>,
    ) -> Result<Started, PoolError> {
        let (room, session) = self.home.create(spec, copies(blobs)?)?;
        Ok(Started { room, session, beginning: Beginning::Cold, timeline })
    }

    /// Makes the template of such rooms, unless it is there.
    ///
    /// # Errors
    ///
    /// As [`Pool::template`].
    pub fn create_template(&self, spec: &RoomSpec, blobs: &[OwnedFd]) -> Result<Created, PoolError> {
        let mut timeline = Vec::new();
        let template = self.template(spec, blobs, &mut timeline)?;
        let made = timeline.iter().any(|mark| mark.done == MADE);
        Ok(Created { template, made, timeline })
    }

    /// The template of such rooms, made now if there is none.
    ///
    /// # Errors
    ///
    /// It can't be made, or not be opened.
    pub fn template(
        &self,
        spec: &RoomSpec,
        blobs: &[OwnedFd],
        timeline: &mut Vec<Mark>,
    ) -> Result<Template, PoolError> {
        let host = Host::look()?;
        let key = template::key(spec, self.home.assets(), &host, &self.domain)?;
        timeline.push(mark("key"));
        let patience = self.home.patience();
        let most = if spec.initialised { patience.initialise() } else { patience.template() };
        match self.templates.acquire(&key, wait(most))? {
            Acquired::Ready(template) => Ok(*template),
            Acquired::Make(maker) => {
                let template = self.make(spec, copies(blobs)?, maker, &host)?;
                timeline.push(mark(MADE));
                Ok(template)
            }
            Acquired::Busy => Err(PoolError::Busy(most)),
        }
    }

    fn make(
        &self,
        spec: &RoomSpec,
        blobs: Vec<OwnedFd>,
        mut maker: Maker,
        host: &Host,
    ) -> Result<Template, PoolError> {
        let spec =
            RoomSpec { id: None, name: None::<RoomName>, detached: false, timeout_ms: None, ..spec.clone() };
        let files = TemplateFiles {
            state: maker.state()?.into(),
            memory: maker.memory(spec.machine.memory_mib.bytes())?.into(),
            disk: maker.disk(spec.machine.disk_bytes.next_multiple_of(4096))?.into(),
            working_set: None,
            record: None,
        };
        let description = template::description(&spec, host, &self.domain);
        let initialised = spec.initialised;
        let (_room, session) = self.home.create_template(spec, blobs, files)?;
        let ended = match initialised {
            true => self.accompany(session)?,
            false => session.wait().map_err(PoolError::Maker)?,
        };
        if let Outcome::Saved { .. } = ended.outcome {
            let point = if initialised { Point::Initialised } else { Point::Unpacked };
            return Ok(maker.publish(point, description)?);
        }
        Err(unmade(ended, initialised))
    }

    /// Serves the streams of a workload that is to be saved while it runs. Its input, if it has one, is open and empty: what its end was in the template would be its end
    /// in every clone.
    fn accompany(&self, session: Session) -> Result<Ended, PoolError> {
        let log = || match &self.log {
            Some(log) => log.try_clone(),
            None => File::options().write(true).open("/dev/null"),
        };
        let (input, open) = std::io::pipe().map_err(PoolError::Files)?;
        let streams = Streams {
            stdin: Some(OwnedFd::from(input).into()),
            stdout: log().map_err(PoolError::Files)?,
            stderr: log().map_err(PoolError::Files)?,
        };
        let ended = session.run(streams, &mut |notice| tracing::warn!("{notice}"));
        drop(open);
        ended.map_err(PoolError::Maker)
    }
}

/// Waits for a template that another command makes, and says so when that takes long, but not for ever: whoever makes it may be stopped.
fn wait(most: Duration) -> impl FnMut(Duration) -> ControlFlow<()> {
    let mut told = false;
    move |waited| {
        if waited >= most / 4 && !std::mem::replace(&mut told, true) {
            let seconds = waited.as_secs();
            tracing::warn!(
                "another command has been making this room's template for {seconds} s: waiting for it"
            );
        }
        if waited < most { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }
}

/// Why a room that ended so is no template.
fn unmade(ended: Ended, initialised: bool) -> PoolError {
    let outcome = &ended.outcome;
    if let Outcome::Exited { status, out_of_memory } = outcome {
        let memory = if *out_of_memory { " for want of memory" } else { "" };
        let how = exit_in_words(*status);
        return PoolError::Unready(format!(
            "the workload ended{memory} before it was ready to be cloned ({how})"
        ));
    }
    if let Outcome::Overdue { step: Step::Initialise, seconds, .. } = outcome {
        return PoolError::Unready(format!("the workload was not ready to be cloned within {seconds} s"));
    }
    // The host has no more for the room itself than for its template.
    if let Outcome::NoCapacity { .. } = outcome {
        return PoolError::Refused(Box::new(ended));
    }
    if let Outcome::Refused { failure, .. } = outcome
        && (initialised
            || matches!(failure, Failure::BadPayload | Failure::PayloadTooLarge | Failure::DiskFull))
    {
        return PoolError::Refused(Box::new(ended));
    }
    PoolError::Outcome(outcome.sentence().unwrap_or_else(|| "its room ended early".into()))
}

impl Beginning {
    /// Does what is to be done when the room has ended so: what it has learnt is added to its template.
    ///
    /// Says whether its workload never started, for its template is not fit to be cloned here: that is thrown away then, so that another attempt makes it anew. A template whose guest
    /// fails before its workload starts is read whole, which takes a second or so for each GiB that it holds.
    ///
    /// # Errors
    ///
    /// It can't be thrown away.
    pub fn conclude(&self, ended: &Ended) -> Result<bool, TemplateError> {
        let Self::Clone(template, _) = self else { return Ok(false) };
        let damage = if let Outcome::VmmFailed { end: End::BadSnapshot, message } = &ended.outcome {
            Some(Damage::Refused(message.clone()))
        } else if !ended.started && is_the_guests(&ended.outcome) {
            template.verify()
        } else {
            None
        };
        match damage {
            Some(damage) => template.discard(&damage).map(|_| true),
            None => {
                self.learn();
                Ok(false)
            }
        }
    }

    /// Adds to its template what it has learnt so far: a hint, without which rooms begin too.
    pub fn learn(&self) {
        let Self::Clone(template, Some(record)) = self else { return };
        match recorded(record).map(|bytes| bytes.map(|bytes| template.add_working_set(&bytes))) {
            Ok(None | Some(Ok(_))) => {}
            Ok(Some(Err(error))) => tracing::debug!(error = %chain(&error), "no working set is kept"),
            Err(error) => tracing::debug!(%error, "no working set is kept"),
        }
    }

    /// Whether its workload ran already.
    pub fn is_initialised(&self) -> bool {
        matches!(self, Self::Clone(template, _) if template.record().point == Point::Initialised)
    }

    /// `cold` or `clone`.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Clone(..) => "clone",
        }
    }
}

/// Whether a guest that ended so may have had other memory, or another disk, than was saved.
fn is_the_guests(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::GuestPanicked { .. }
        | Outcome::GuestEnded { .. }
        | Outcome::AgentFailed { .. }
        | Outcome::Refused { failure: Failure::System, .. }
        | Outcome::VmmFailed { end: End::Kvm, .. }
        | Outcome::Overdue { step: Step::Boot | Step::Start | Step::Prepare, .. } => true,
        Outcome::Exited { .. }
        | Outcome::TimedOut { .. }
        | Outcome::Stopped { .. }
        | Outcome::Refused { .. }
        | Outcome::VmmFailed { .. }
        | Outcome::Saved { .. }
        | Outcome::VmmKilled { .. }
        | Outcome::Overdue { .. }
        | Outcome::NoCapacity { .. }
        | Outcome::OwnerFailed { .. }
        | Outcome::Lost => false,
    }
}

/// Their positions are shared and of no matter: owners read by offset.
fn copies(blobs: &[OwnedFd]) -> Result<Vec<OwnedFd>, PoolError> {
    blobs.iter().map(OwnedFd::try_clone).collect::<Result<_, _>>().map_err(PoolError::Files)
}

/// A template's files for a clone, and the one that it writes, which outlives it. A detached room has nobody who would keep what it wrote.
fn files(template: &Template, detached: bool) -> Result<(TemplateFiles, Option<File>), PoolError> {
    let file = |part| template.file(part).try_clone().map(OwnedFd::from).map_err(PoolError::Files);
    let working_set = template.working_set();
    let record = match working_set.is_none() && !detached {
        true => Some(nameless().map_err(PoolError::Files)?),
        false => None,
    };
    let files = TemplateFiles {
        state: file(Part::State)?,
        memory: file(Part::Memory)?,
        disk: file(Part::Disk)?,
        working_set: working_set.map(OwnedFd::from),
        record: record
            .as_ref()
            .map(|file| file.try_clone().map(OwnedFd::from))
            .transpose()
            .map_err(PoolError::Files)?,
    };
    Ok((files, record))
}

/// A file in memory.
fn nameless() -> std::io::Result<File> {
    Ok(rustix::fs::memfd_create("working-set", MemfdFlags::CLOEXEC)?.into())
}

/// What a VMM has written, if it has, and no more than can be right. Its process is gone: nobody changes it any more.
fn recorded(file: &File) -> std::io::Result<Option<Vec<u8>>> {
    let length = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
    if length == 0 || length > LARGEST_WORKING_SET {
        return Ok(None);
    }
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use carrel_protocol::agent::ExitStatus;

    use super::*;

    fn of(outcome: Outcome, initialised: bool) -> PoolError {
        unmade(Ended { outcome, usage: None, started: false, timeline: Vec::new() }, initialised)
    }

    #[test]
    fn what_is_the_payloads_or_the_workloads_fault_is_not_tried_again_with_a_boot() {
        let refused = |failure| Outcome::Refused { failure, message: "so".into() };
        for failure in [Failure::BadPayload, Failure::PayloadTooLarge, Failure::DiskFull] {
            let error = of(refused(failure), false);
            assert!(matches!(&error, PoolError::Refused(_)), "{error:?}");
            assert!(error.to_string().contains("so"), "{error}");
        }
        // Such as a guest that can't be frozen.
        assert!(matches!(of(refused(Failure::System), false), PoolError::Outcome(_)));
        assert!(matches!(of(refused(Failure::CommandNotFound), true), PoolError::Refused(_)));
        assert!(matches!(of(Outcome::GuestPanicked { last_words: None }, true), PoolError::Outcome(_)));
    }

    #[test]
    fn a_maker_is_not_waited_for_without_end() {
        let mut wait = wait(Duration::from_secs(40));
        let mut goes_on = |seconds| wait(Duration::from_secs(seconds)).is_continue();
        assert!(goes_on(0) && goes_on(10) && goes_on(11) && goes_on(39) && !goes_on(40));
    }

    #[test]
    fn a_workload_that_never_was_ready_is_told_with_its_end() {
        let ended = of(Outcome::Exited { status: ExitStatus::Code(3), out_of_memory: false }, true);
        let late =
            of(Outcome::Overdue { step: Step::Initialise, seconds: 9, cpu_ms: 1, threads: Vec::new() }, true);
        for (error, word) in [(ended, "exit status 3"), (late, "within 9 s")] {
            assert!(matches!(&error, PoolError::Unready(why) if why.contains(word)), "{error}");
        }
    }
}
