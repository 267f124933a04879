//! The pool: how a room begins. Whoever wants a room asks here, and gets the cheapest beginning that fits.
//!
//! ```text
//!   start ─▶ key ─▶ template there? ──yes──▶ clone
//!                     │ no: this caller makes it, all others wait
//!                     ▼
//!                   a room of its own: boot, unpack, freeze, save ─▶ publish ─▶ clone
//!                     │ that failed                    cold asked for ─▶ cold
//!                     ▼
//!                   cold, and the reason is told
//! ```

use std::os::fd::OwnedFd;
use std::sync::Arc;

use carrel_protocol::vmm::{End, Mark};
use carrel_store::templates::{Acquired, Damage, Maker, Part, Point, Template, TemplateError, Templates};
use thiserror::Error;

use crate::home::{Home, HomeError, Room, TemplateFiles};
use crate::outcome::Outcome;
use crate::session::{Session, SessionError};
use crate::spec::{RoomName, RoomSpec};
use crate::template::{self, Host, KeyError};
use crate::timestamp::mark;

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
}

/// How a room began.
#[derive(Clone, Debug)]
pub enum Beginning {
    /// With a boot.
    Cold,
    /// From this template.
    Clone(Arc<Template>),
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

impl<'a> Pool<'a> {
    /// The pool of this home. Templates are shared within `domain` alone: pages that two rooms share can be probed by timing.
    pub fn new(home: &'a Home, templates: Templates, domain: &str) -> Self {
        Self { home, templates, domain: domain.to_owned() }
    }

    /// Begins a room as a clone, of a template that is made first if there is none. Where none can be made the room begins cold, and `notice` is told why.
    /// `blobs` are the payload's, as for [`Home::create`].
    ///
    /// # Errors
    ///
    /// No room could be begun in either way.
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
                let (room, session) = self.home.create_clone(spec, files(&template)?)?;
                Ok(Started { room, session, beginning: Beginning::Clone(Arc::new(template)), timeline })
            }
            // What is wrong with the room is wrong with it cold too, and is said better there.
            Err(error) => {
                tracing::debug!(error = %carrel_protocol::chain(&error), "no template");
                if let PoolError::Templates(_) | PoolError::Files(_) | PoolError::Key(_) = error {
                    notice(&format!(
                        "The room begins with a boot, for its template can't be had: {}.",
                        carrel_protocol::chain(&error)
                    ));
                }
                self.start_cold(spec, blobs, timeline)
            }
        }
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
        match self.templates.acquire(&key, carrel_store::templates::as_long_as_it_takes)? {
            Acquired::Ready(template) => Ok(*template),
            Acquired::Make(maker) => {
                let template = self.make(spec, copies(blobs)?, maker, &host)?;
                timeline.push(mark("template made"));
                Ok(template)
            }
            // Nobody waits here but as long as it takes.
            Acquired::Busy => Err(PoolError::Outcome("somebody else makes it".into())),
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
        };
        let description = template::description(&spec, host, &self.domain);
        let (_room, session) = self.home.create_template(spec, blobs, files)?;
        let ended = session.wait().map_err(PoolError::Maker)?;
        if let Outcome::Saved { .. } = ended.outcome {
            return Ok(maker.publish(Point::Unpacked, description)?);
        }
        let why = ended.outcome.sentence().unwrap_or_else(|| "its room ended early".into());
        Err(PoolError::Outcome(why))
    }
}

impl Beginning {
    /// Whether a room that ended so never began, for its template is not fit to be cloned here: it is thrown away then, so that another attempt makes it anew.
    ///
    /// # Errors
    ///
    /// It can't be thrown away.
    pub fn was_unfit(&self, outcome: &Outcome) -> Result<bool, TemplateError> {
        match (self, outcome) {
            (Self::Clone(template), Outcome::VmmFailed { end: End::BadSnapshot, message }) => {
                template.discard(&Damage::Refused(message.clone()))?;
                Ok(true)
            }
            (Self::Cold | Self::Clone(_), _) => Ok(false),
        }
    }

    /// `cold` or `clone`.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Clone(_) => "clone",
        }
    }
}

/// Their positions are shared and of no matter: owners read by offset.
fn copies(blobs: &[OwnedFd]) -> Result<Vec<OwnedFd>, PoolError> {
    blobs.iter().map(OwnedFd::try_clone).collect::<Result<_, _>>().map_err(PoolError::Files)
}

fn files(template: &Template) -> Result<TemplateFiles, PoolError> {
    let file = |part| template.file(part).try_clone().map(OwnedFd::from).map_err(PoolError::Files);
    Ok(TemplateFiles { state: file(Part::State)?, memory: file(Part::Memory)?, disk: file(Part::Disk)? })
}
