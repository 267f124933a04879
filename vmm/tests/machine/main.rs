//! `carrel-vmm` as a process, with guests of a few instructions: how it ends, how it is confined, how large it gets.

mod confinement;
mod ends;
mod guest;
mod limits;
mod run;
