//! The one program that every subject of a benchmark runs, static, so that all run the same code.
//!
//! ```text
//!  /bench/work WORK [DIR]      in a container: does WORK and ends
//!  /init or /bench/work        as a guest's first process: `work=WORK` on the kernel's command line is in its environment;
//!                              mounts what WORK needs, does it, restarts the machine, which ends it
//!  /init, nothing else said    serves the vsock benchmark
//! ```
//!
//! Whatever the work is, [`READY`] on standard output says that its result is out: that is what start times are measured to.

mod serve;
mod work;

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

/// The byte that says: it is out.
const READY: u8 = 0xa5;
/// Where a guest's scratch disk is mounted.
const SCRATCH: &str = "/scratch";

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let done = match words.next() {
        Some(name) => work::run(&name, &words.next().unwrap_or_else(|| SCRATCH.into())),
        None => first_process(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench guest: {error}");
            ExitCode::FAILURE
        }
    }
}

/// As PID 1 of a guest. Does not return before the machine restarts, unless it can't.
fn first_process() -> io::Result<()> {
    let Ok(name) = std::env::var("work") else { return serve::listen_for_ever() };
    let none: Option<&str> = None;
    mount(Some("devtmpfs"), "/dev", Some("devtmpfs"), MsFlags::empty(), none)?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none)?;
    if Path::new("/dev/vdb").exists() {
        mount(Some("/dev/vdb"), SCRATCH, Some("ext4"), MsFlags::empty(), none)?;
    }
    let done = work::run(&name, SCRATCH);
    if let Err(error) = &done {
        eprintln!("bench guest: {error}");
    }
    // What the serial port has not sent yet would be lost.
    nix::sys::termios::tcdrain(File::options().write(true).open("/dev/console")?)?;
    reboot(RebootMode::RB_AUTOBOOT)?;
    done
}
