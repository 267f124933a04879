//! `carrel-vmm` as a process, with guests of a few instructions: how it ends, how it is confined, how large it gets.

mod ends;
mod guest;
mod run;
