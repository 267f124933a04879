//! `/init` of a guest whose agent dies at a random moment: it becomes the agent, which lies beside it as `/real`, and leaves a child that ends the agent.
//!
//! The child draws from the kernel's generator every 20 ms, so that clones of one template, too, end at moments of their own. A first process is spared
//! every signal that it doesn't take, so it is traced, and sent on at an address where there is nothing. Its kernel panics then, as it would whatever
//! the agent died of.

use std::convert::Infallible;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use nix::sys::ptrace::{Options, detach, getregs, interrupt, seize, setregs};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use rustix::rand::{GetRandomFlags, getrandom};

const AGENT: Pid = Pid::from_raw(1);
const TURN: Duration = Duration::from_millis(20);
/// The agent lives for as many turns on average: 4 s.
const TURNS: u16 = 200;

fn main() -> io::Result<Infallible> {
    if std::process::id() == 1 {
        Command::new("/init").spawn()?;
        return Err(Command::new("/real").exec());
    }
    loop {
        sleep(TURN);
        let mut drawn = [0; 2];
        // Without waiting for a generator that has just been born.
        getrandom(&mut drawn, GetRandomFlags::INSECURE)?;
        if u16::from_ne_bytes(drawn) < u16::MAX / TURNS {
            kill()?;
        }
    }
}

fn kill() -> nix::Result<()> {
    seize(AGENT, Options::empty())?;
    interrupt(AGENT)?;
    waitpid(AGENT, None)?;
    let mut registers = getregs(AGENT)?;
    registers.rip = 0;
    setregs(AGENT, registers)?;
    detach(AGENT, None)
}
