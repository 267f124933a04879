//! How rooms of commands begin: by the pool, and what of it is shown.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use carrel_host::pool::{Pool, PoolError, Started};
use carrel_host::session::Ended;
use carrel_host::timestamp::mark;
use carrel_host::{Home, RoomSpec};
use carrel_protocol::vmm::Mark;
use carrel_store::Store;

use crate::arguments::run::BeginArgs;
use crate::table::{Align, Table};

/// Attempts at a clone: a template that turns out unfit is made anew once.
const ATTEMPTS: usize = 2;

/// What became of a room that was asked for.
pub(crate) enum Begun<T> {
    /// It was served, to its end if that is told.
    Served(T, Option<Ended>),
    /// There is none: that of its template ended so, and any other of its kind would.
    Refused(Ended),
}

/// The pool as commands ask it: a domain is a user's unless it is named. What a workload says on its way to a template is for who looks at standard error.
///
/// # Errors
///
/// There is no descriptor left.
pub(crate) fn pool<'a>(home: &'a Home, store: &Store, domain: Option<&str>) -> Result<Pool<'a>> {
    let own = || format!("user {}", rustix::process::geteuid().as_raw());
    // So that no name is a user's.
    let domain = domain.map_or_else(own, |name| format!("domain {name}"));
    let log = std::io::stderr().as_fd().try_clone_to_owned();
    let log = File::from(log.context("Standard error can't be handed on.")?);
    Ok(Pool::new(home, store.templates().clone(), &domain).with_log(log))
}

/// Begins a room of this kind and serves it; once more if its template was not fit for it: nothing of it has run then. The timeline, if it is wanted, begins with
/// `since`.
///
/// # Errors
///
/// No room can be begun, or it can't be served.
pub(crate) fn serve<T>(
    home: &Home,
    store: &Store,
    args: &BeginArgs,
    since: &[Mark],
    room: (&RoomSpec, &[OwnedFd]),
    mut serve: impl FnMut(Started) -> Result<(T, Option<Ended>)>,
) -> Result<Begun<T>> {
    let (spec, blobs) = room;
    ensure!(
        !(args.cold && args.initialised),
        "A room that begins with a boot has no template: use either --cold or --initialised."
    );
    let pool = pool(home, store, args.domain.as_deref())?;
    // A guest's console has to be there from its boot on.
    let verbose = tracing::enabled!(tracing::Level::DEBUG);
    let mut attempt = 1;
    loop {
        let started = match args.cold || verbose {
            true => pool.start_cold(spec.clone(), blobs, Vec::new()),
            false => pool.start(spec.clone(), blobs, &mut |text| tracing::warn!("{text}")),
        };
        let mut started = match started {
            Err(PoolError::Refused(ended)) => return Ok(Begun::Refused(*ended)),
            started => started?,
        };
        let (beginning, mut marks) = (started.beginning.clone(), std::mem::take(&mut started.timeline));
        let room = started.room.clone();
        let (served, ended) = serve(started)?;
        let unfit = match &ended {
            Some(ended) => beginning.conclude(ended)?,
            None => {
                beginning.learn();
                false
            }
        };
        if unfit && attempt < ATTEMPTS {
            attempt += 1;
            if spec.detached {
                // Its record would stay, with the name that the next one is to have.
                room.remove()?;
            }
            continue;
        }
        if args.timeline {
            marks.extend_from_slice(since);
            marks.extend(ended.iter().flat_map(|ended| ended.timeline.clone()));
            marks.push(mark("ended"));
            print_timeline(beginning.word(), marks);
        }
        return Ok(Begun::Served(served, ended));
    }
}

/// Prints when what happened, from the first mark on, to standard error.
pub(super) fn print_timeline(beginning: &str, mut marks: Vec<Mark>) {
    marks.sort_by_key(|mark| mark.at_us);
    let Some(first) = marks.first().map(|mark| mark.at_us) else { return };
    let mut table = Table::new(&[("AT", Align::Right), ("TOOK", Align::Right), ("DONE", Align::Left)]);
    let mut before = first;
    let ms = |us: u64| format!("{}.{:03} ms", us / 1000, us % 1000);
    for mark in marks {
        table.row([ms(mark.at_us - first), ms(mark.at_us - before), mark.done]);
        before = mark.at_us;
    }
    // If nobody reads stderr, the status alone must do.
    let text = format!("start: {beginning}\n{table}");
    let _ = std::io::stderr().write_all(text.as_bytes());
}
