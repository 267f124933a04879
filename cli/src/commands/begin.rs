//! How rooms of commands begin: by the pool, and what of it is shown.

use std::io::Write;
use std::os::fd::OwnedFd;

use anyhow::Result;
use carrel_host::pool::{Pool, Started};
use carrel_host::{Home, Outcome, RoomSpec};
use carrel_protocol::vmm::Mark;
use carrel_store::Store;

use crate::arguments::run::BeginArgs;
use crate::table::{Align, Table};

/// Attempts at a clone: a template that turns out unfit is made anew once.
const ATTEMPTS: usize = 2;

/// Begins a room of this kind and serves it, which tells how it ended, if it has; once more if its template was not fit for it: nothing of it has run then.
///
/// # Errors
///
/// No room can be begun, or it can't be served.
pub(crate) fn serve<T>(
    home: &Home,
    store: &Store,
    args: &BeginArgs,
    room: (&RoomSpec, &[OwnedFd]),
    mut serve: impl FnMut(Started) -> Result<(T, Option<Outcome>)>,
) -> Result<T> {
    let (spec, blobs) = room;
    let domain = match &args.domain {
        Some(domain) => domain.clone(),
        None => format!("user {}", rustix::process::geteuid().as_raw()),
    };
    let pool = Pool::new(home, store.templates().clone(), &domain);
    // A guest's console has to be there from its boot on.
    let verbose = tracing::enabled!(tracing::Level::DEBUG);
    let mut attempt = 1;
    loop {
        let started = match args.cold || verbose {
            true => pool.start_cold(spec.clone(), blobs, Vec::new())?,
            false => pool.start(spec.clone(), blobs, &mut |text| tracing::warn!("{text}"))?,
        };
        let beginning = started.beginning.clone();
        let (served, outcome) = serve(started)?;
        let unfit = outcome.map(|outcome| beginning.was_unfit(&outcome)).transpose()?.unwrap_or(false);
        if !unfit || attempt == ATTEMPTS {
            return Ok(served);
        }
        attempt += 1;
    }
}

/// Prints when what happened, from the first mark on, to standard error.
pub(crate) fn print_timeline(beginning: &str, marks: &[Mark]) {
    let mut marks: Vec<&Mark> = marks.iter().collect();
    marks.sort_by_key(|mark| mark.at_us);
    let Some(first) = marks.first().map(|mark| mark.at_us) else { return };
    let mut table = Table::new(&[("AT", Align::Right), ("TOOK", Align::Right), ("DONE", Align::Left)]);
    let mut before = first;
    let ms = |us: u64| format!("{}.{:03} ms", us / 1000, us % 1000);
    for mark in marks {
        table.row([ms(mark.at_us - first), ms(mark.at_us - before), mark.done.clone()]);
        before = mark.at_us;
    }
    // If nobody reads stderr, the status alone must do.
    let _ = std::io::stderr().write_all(format!("start: {beginning}\n{table}").as_bytes());
}
