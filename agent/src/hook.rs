//! The documented call ([`CLONE_SOCKET`]): programs say that they are ready to be cloned, and hear in each clone who they are now.
//!
//! ```text
//!  program                                agent                                  host
//!    │ ── subscribe ────────────────────▶  │
//!    │ ◀─────── {id, realtime_ns, entropy} │
//!    │ ── ready ────────────────────────▶  │ ── Ready (once a container) ────────▶ │
//!    ╎                                     ╎      Freeze, snapshot; a clone        ╎
//!    │ ◀─────── {id, realtime_ns, entropy} │  to every connection, before the thaw
//! ```
//!
//! A line says who the program is at that moment, so one that is late is no worse: a `subscribe` that was on its way when the room froze is answered in the clone, with
//! the clone's identity. From before the first process is stopped nobody is answered until the room knows who it is: a clone's generator is its template's until then, and a
//! stopped program's line would be read in each clone. (A program that was answered before, and had not read it, reads that first: the newest line is its identity.) What is
//! written before the thaw is found by a program that looks without waiting.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use carrel_protocol::agent::{CLONE_SOCKET, Cloned, Entropy, FromAgent, ProcessId, Ready};
use rustix::net::{SendFlags, Shutdown, send, shutdown};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{AbortHandle, spawn_local};

use crate::identity::{Guest, SEED};

/// Connections at once; further ones wait in the kernel, which has its own cap.
const CONNECTIONS: usize = 64;
/// Bytes of a line of a program's.
const LINE_BYTES: usize = 64;

/// A container's end of the call.
#[derive(Debug)]
pub(crate) struct Hook {
    call: Rc<Call>,
    folder: PathBuf,
    server: AbortHandle,
}

#[derive(Debug)]
struct Call {
    /// The container's first.
    process: ProcessId,
    outbox: mpsc::UnboundedSender<FromAgent>,
    guest: Rc<dyn Guest>,
    /// The room's id.
    id: RefCell<String>,
    /// Those that said something.
    listening: RefCell<BTreeMap<u64, Rc<UnixStream>>>,
    announced: Cell<bool>,
    cloned: Cell<bool>,
    /// The room is being frozen, is frozen, or is a clone that wasn't told yet who it is.
    asleep: Cell<bool>,
    /// Those that asked meanwhile.
    owed: RefCell<BTreeSet<u64>>,
}

impl Hook {
    /// Listens in `folder`, which is made: the container gets to see it.
    ///
    /// # Errors
    ///
    /// It exists, or can't be made.
    pub(crate) fn serve(
        folder: &Path,
        process: ProcessId,
        id: String,
        guest: Rc<dyn Guest>,
        outbox: mpsc::UnboundedSender<FromAgent>,
    ) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let path = folder.join(Path::new(CLONE_SOCKET).file_name().unwrap_or_default());
        let listener = UnixListener::bind(&path)?;
        // Whoever the workload runs as.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666))?;
        let call = Rc::new(Call {
            process,
            outbox,
            guest,
            id: id.into(),
            listening: RefCell::default(),
            announced: false.into(),
            cloned: false.into(),
            asleep: false.into(),
            owed: RefCell::default(),
        });
        let server = spawn_local(accept(listener, Rc::clone(&call))).abort_handle();
        Ok(Self { call, folder: folder.to_owned(), server })
    }

    /// The directory with the socket.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Tells the host that the container wants to be cloned; once.
    pub(crate) fn announce(&self) {
        self.call.announce();
    }

    /// The room is about to be frozen: whoever asks now is answered by [`Hook::cloned`], or by [`Hook::stay`].
    pub(crate) fn sleep(&self) {
        self.call.asleep.set(true);
    }

    /// It was not frozen after all.
    pub(crate) fn stay(&self) {
        self.call.asleep.set(false);
        for number in self.call.owed.take() {
            self.call.tell(number);
        }
    }

    /// The room is another one now: tells all that listen.
    pub(crate) fn cloned(&self, id: &str) {
        self.call.asleep.set(false);
        self.call.owed.take();
        self.call.cloned.set(true);
        self.call.id.replace(id.to_owned());
        let all: Vec<u64> = self.call.listening.borrow().keys().copied().collect();
        for number in all {
            self.call.tell(number);
        }
    }
}

impl Drop for Hook {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Call {
    fn announce(&self) {
        if !self.announced.replace(true) {
            // The receiver is gone only when the room is.
            let _ = self.outbox.send(Ready { process: self.process }.into());
        }
    }

    /// Tells one who it is. Who doesn't read what was said before isn't spoken to any more.
    fn tell(&self, number: u64) {
        let Some(program) = self.listening.borrow().get(&number).cloned() else { return };
        // Not the runtime's own way of writing, which looks at what it knew when it last looked.
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let told =
            self.line().is_ok_and(|line| send(&program, &line, flags).is_ok_and(|sent| sent == line.len()));
        if !told {
            self.listening.borrow_mut().remove(&number);
            // Ends its task, too.
            let _ = shutdown(&program, Shutdown::Both);
        }
    }

    fn line(&self) -> io::Result<Vec<u8>> {
        let mut entropy = [0; SEED];
        self.guest.random(&mut entropy)?;
        let who = Cloned {
            id: self.id.borrow().clone(),
            realtime_ns: self.guest.realtime_ns(),
            entropy: Entropy(entropy),
        };
        let mut line = serde_json::to_vec(&who)?;
        line.push(b'\n');
        Ok(line)
    }

    /// Does what a line says; `false` if it says nothing.
    fn hear(&self, number: u64, program: &Rc<UnixStream>, line: &[u8]) -> bool {
        let (listens, answer) = match line.trim_ascii_end() {
            b"subscribe" => (true, true),
            b"ready" => {
                self.announce();
                // Nobody will clone it a first time any more.
                (true, self.cloned.get())
            }
            _ => (false, false),
        };
        if listens {
            self.listening.borrow_mut().insert(number, Rc::clone(program));
        }
        match (answer, self.asleep.get()) {
            (true, true) => drop(self.owed.borrow_mut().insert(number)),
            (true, false) => self.tell(number),
            (false, _) => {}
        }
        listens
    }
}

async fn accept(listener: UnixListener, call: Rc<Call>) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    let mut number = 0;
    // The semaphore is never closed.
    while let Ok(permit) = Arc::clone(&connections).acquire_owned().await {
        let Ok((program, _)) = listener.accept().await else {
            // No descriptors: some will be free in a moment.
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            continue;
        };
        number += 1;
        let call = Rc::clone(&call);
        spawn_local(async move {
            converse(&call, number, &Rc::new(program)).await;
            call.listening.borrow_mut().remove(&number);
            drop(permit);
        });
    }
}

/// Until the program closes the connection, or says what isn't a line of the call's.
async fn converse(call: &Call, number: u64, program: &Rc<UnixStream>) {
    let mut line = [0; LINE_BYTES];
    let mut length = 0;
    loop {
        let Ok(()) = program.readable().await else { return };
        match program.try_read(line.get_mut(length..).unwrap_or_default()) {
            // The end, or a line that is too long.
            Ok(0) => return,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => return,
        }
        while let Some(end) = line.get(..length).and_then(|said| said.iter().position(|&byte| byte == b'\n'))
        {
            if !call.hear(number, program, line.get(..end).unwrap_or_default()) {
                let _ = program.try_write(b"{\"error\":\"say 'ready' or 'subscribe'\"}\n");
                return;
            }
            line.copy_within(end + 1..length, 0);
            length -= end + 1;
        }
        tokio::task::consume_budget().await;
    }
}

#[cfg(test)]
mod tests;
