//! What carrel's programs do when one of their threads panics.

use std::panic;
use std::process;

/// Makes a panic on any thread the end of the whole process, by SIGABRT, after it was said where. Called first in `main`.
///
/// No part of a program goes on beside one that broke off halfway. Release builds are made so that a panic aborts; others unwind,
/// as tests must, and then share their build with the tests'.
pub fn abort_on_panic() {
    let say = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        say(panic);
        process::abort();
    }));
}
