//! `carrel-vmm` as a process, with guests of a few instructions: how it ends, how it is confined, how large it gets.

#![expect(clippy::unwrap_used, clippy::panic, reason = "what the tests share fails as they do")]

mod confinement;
mod ends;
mod guest;
mod limits;
mod owners;
mod prepared;
mod run;
mod snapshots;
mod working_sets;
