//! A command on a pseudo-terminal, as a user's shell runs it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::carrel::Running;
use crate::wait_for;

/// The user's end of a terminal on which a command runs.
pub struct Terminal {
    user: File,
    /// Kept open, so that the terminal's settings can be looked at after the command has gone.
    command: File,
    screen: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    /// Runs a command on a terminal of this size. All three standard streams are the terminal.
    pub fn run(command: &Command, rows: u16, columns: u16) -> (Self, Running) {
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&user).unwrap();
        unlockpt(&user).unwrap();
        let name = ptsname(&user, Vec::new()).unwrap();
        let end = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        let terminal = Self { user: File::from(user), command: end, screen: Arc::default() };
        terminal.resize(rows, columns);
        // setsid makes it the session's controlling terminal, which is what delivers SIGWINCH.
        let mut on_terminal = Command::new("setsid");
        on_terminal.arg("--ctty").arg("--wait").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => on_terminal.env(name, value),
                None => on_terminal.env_remove(name),
            };
        }
        let stream = || Stdio::from(OwnedFd::from(terminal.command.try_clone().unwrap()));
        on_terminal.stdin(stream()).stdout(stream()).stderr(stream());
        let running = Running::spawn(&mut on_terminal);
        let screen = Arc::clone(&terminal.screen);
        let mut from = terminal.user.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = from.read(&mut buffer) {
                screen.lock().unwrap().extend_from_slice(&buffer[..read]);
            }
        });
        (terminal, running)
    }

    /// Types.
    pub fn type_in(&self, keys: &str) {
        (&self.user).write_all(keys.as_bytes()).unwrap();
    }

    /// Changes the window's size.
    pub fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.user, size).unwrap();
    }

    /// All that was shown so far.
    pub fn shown(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap()).into_owned()
    }

    /// Waits until this is shown.
    pub fn wait_for(&self, text: &str) {
        let mut last = String::new();
        let what = format!("'{text}' on the terminal");
        wait_for(&what, || {
            last = self.shown();
            last.contains(text).then_some(())
        });
    }

    /// Whether the terminal is in raw mode: keys reach the command unread by the line discipline.
    pub fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.command).unwrap().local_modes;
        !modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }
}
