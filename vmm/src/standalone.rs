//! A VMM on its own: `carrel-vmm --config vm.json`, or `--restore vm.json`.
//!
//! ```text
//!  launcher ── opens every path ── clone3 ──▶ the confined VMM
//!     │  maps its user, sends Configure or Restore over a socketpair: it is an owner like any other
//!     └─ puts what the guest dials through to <socket>_<port>; forwards SIGTERM and SIGINT; exits as the VMM does
//! ```

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use carrel_protocol::confinement::Part;
use carrel_protocol::vmm::{
    self, Broken, Configure, Dialled, End, Ended, FromOwner, FromVmm, Mark, Restore, RestoreFile, Stop,
    VmFile,
};
use thiserror::Error;

use crate::cgroup::Cgroup;
use crate::confined;
use crate::event::check;
use crate::jail::Without;
use crate::owner::{Connection, OwnerError};
use crate::resources::{self, ResourceError};
use crate::signal;

/// The standalone launcher failed before or beside its VM.
#[derive(Debug, Error)]
pub enum StandaloneError {
    /// A resource can't be opened.
    #[error(transparent)]
    Resources(#[from] ResourceError),
    /// The confined process can't be made, or not as confined as it should be.
    #[error(
        "the host can't give this part of the confinement: {part}; --unconfined={option} does without it"
    )]
    Part {
        /// What was asked for.
        part: &'static str,
        /// The option's word.
        option: Part,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The VMM can't be talked to.
    #[error(transparent)]
    Owner(#[from] OwnerError),
    /// Something else of the host's.
    #[error("the host failed the VM's launcher")]
    Io(#[from] io::Error),
}

/// How to run it.
#[derive(Debug)]
pub struct Options {
    /// What to do without.
    pub without: Without,
    /// The cgroup v2 directory in which the VMM is born; made if missing and removed at the end if it was made. Without: a new one below this
    /// process's own.
    pub cgroup: Option<PathBuf>,
    /// Print the timeline of the start to stderr.
    pub timeline: bool,
}

/// How it came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The VMM said so.
    Ended(End),
    /// A signal ended the VMM: SIGSYS is a system-call filter's.
    Killed(i32),
}

impl Outcome {
    /// The launcher's own exit status: the VMM's, or 128 + n as a shell has it.
    pub fn status(self) -> u8 {
        match self {
            Self::Ended(end) => end.status(),
            Self::Killed(signal) => u8::try_from(128 + signal).unwrap_or(u8::MAX),
        }
    }
}

/// How the machine begins.
#[derive(Debug)]
pub enum Beginning {
    /// With its kernel.
    Boot(VmFile),
    /// Where a snapshot ends.
    Restore(RestoreFile),
}

impl Beginning {
    /// Paths of the sockets that it makes: vsock's and the control socket's.
    fn sockets(&self) -> [Option<PathBuf>; 2] {
        match self {
            Self::Boot(vm) => [vm.vsock.as_ref().and_then(|vsock| vsock.socket.clone()), vm.control.clone()],
            Self::Restore(vm) => [vm.vsock.clone(), vm.control.clone()],
        }
    }

    /// The first message to the VMM, with the descriptors that it names.
    fn open(self) -> Result<(FromOwner, Vec<OwnedFd>), ResourceError> {
        Ok(match self {
            Self::Boot(vm) => {
                let (vm, descriptors) = resources::from_file(vm)?;
                (Configure { version: vmm::VERSION, vm }.into(), descriptors)
            }
            Self::Restore(vm) => {
                let (vm, descriptors) = resources::restored_from_file(vm)?;
                (Restore { version: vmm::VERSION, vm }.into(), descriptors)
            }
        })
    }
}

/// Runs the machine to its end.
pub fn run(beginning: Beginning, options: &Options) -> Result<Outcome, StandaloneError> {
    let sockets = beginning.sockets();
    let made = SocketFiles::of(&sockets);
    let [dial, _] = sockets;
    let (first, descriptors) = beginning.open()?;
    let cgroup = match &options.cgroup {
        _ if options.without.leaves_out(Part::Cgroup) => None,
        Some(path) => Some(Cgroup::open(path)),
        None => Some(Cgroup::below_own()),
    };
    let cgroup = cgroup.transpose().map_err(|source| StandaloneError::Part {
        part: "a cgroup of its own (cgroup v2)",
        option: Part::Cgroup,
        source,
    })?;
    let (ours, theirs) = Connection::pair()?;
    let child = clone_confined(cgroup.as_ref(), options, theirs)?;
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    ours.send(&first, &borrowed)?;
    drop(borrowed);
    drop(descriptors);
    let last_word = serve(&ours, dial.as_deref(), options.timeline)?;
    let status = child.wait()?;
    drop(cgroup);
    drop(made);
    match last_word {
        Some(end) => Ok(Outcome::Ended(end)),
        None => Ok(wordless(status)),
    }
}

/// What became of a VMM that ended without a word.
fn wordless(status: i32) -> Outcome {
    if !libc::WIFSIGNALED(status) {
        // Another owner has heard the word, or nobody; the status says the same.
        let own = u8::try_from(libc::WEXITSTATUS(status)).ok().and_then(End::from_status);
        return Outcome::Ended(own.unwrap_or(End::Internal));
    }
    match libc::WTERMSIG(status) {
        libc::SIGSYS => {
            eprintln!("carrel-vmm: a system-call filter ended the VMM; the audit log names the call")
        }
        signal => eprintln!("carrel-vmm: the VMM was killed by signal {signal}"),
    }
    Outcome::Killed(libc::WTERMSIG(status))
}

/// Sockets that were bound for this run; removed with it.
struct SocketFiles(Vec<PathBuf>);

impl SocketFiles {
    fn of(sockets: &[Option<PathBuf>]) -> Self {
        // Just those that are not there yet: somebody else's file is not ours to remove.
        Self(sockets.iter().flatten().filter(|path| !path.exists()).cloned().collect())
    }
}

impl Drop for SocketFiles {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

/// The confined process as its parent knows it.
struct Child {
    pid: i32,
}

impl Child {
    /// Waits for the end and returns the status as waitpid(2) has it.
    fn wait(mut self) -> io::Result<i32> {
        let status = wait_for(self.pid)?;
        self.pid = 0;
        Ok(status)
    }
}

fn wait_for(pid: i32) -> io::Result<i32> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is valid for the write.
        match check(unsafe { libc::waitpid(pid, &raw mut status, 0) }) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other.map(|_| status),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.pid > 0 {
            // SAFETY: the process is our child and has not been waited for.
            unsafe { libc::kill(self.pid, libc::SIGKILL) };
            let _ = wait_for(self.pid);
        }
    }
}

/// Linux 5.7; libc has it in a type that is too small.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const NAMESPACES: i32 = libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS;

/// clone3(2): the child is born in its cgroup and namespaces and goes on as the VMM. This process has one thread, so the child may
/// go on in any code.
fn clone_confined(
    cgroup: Option<&Cgroup>,
    options: &Options,
    theirs: Connection,
) -> Result<Child, StandaloneError> {
    let namespaces = !options.without.leaves_out(Part::Namespaces);
    let (mut mapped_read, mapped_write) = io::pipe()?;
    // SAFETY: clone_args is plain data; zeros mean nothing asked for.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.exit_signal = u64::from(libc::SIGCHLD.unsigned_abs());
    if namespaces {
        arguments.flags |= u64::from(NAMESPACES.unsigned_abs());
    }
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::try_from(cgroup.directory.as_raw_fd()).unwrap_or(u64::MAX);
    }
    // SAFETY: no memory is shared (no CLONE_VM), so the child has its own copy of everything.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
    let pid = match check(i32::try_from(pid).unwrap_or(-1)) {
        Ok(pid) => pid,
        Err(source) => {
            let (part, option) = if namespaces {
                ("new namespaces (user, mount, pid, net, ipc, uts)", Part::Namespaces)
            } else {
                ("birth in its cgroup", Part::Cgroup)
            };
            return Err(StandaloneError::Part { part, option, source });
        }
    };
    if pid == 0 {
        drop(mapped_write);
        // Wait to be somebody, then become it: until then this process is its parent's user.
        let _ = mapped_read.read(&mut [0]);
        if namespaces && let Err(e) = become_user_0() {
            eprintln!("carrel-vmm: the host can't give this part of the confinement: a user of its own: {e}");
            std::process::exit(End::Host.status().into());
        }
        let end = confined::run(theirs, &options.without);
        std::process::exit(end.status().into());
    }
    let child = Child { pid };
    if namespaces {
        map_user(pid).map_err(|source| StandaloneError::Part {
            part: "a user of its own in a user namespace",
            option: Part::Namespaces,
            source,
        })?;
    }
    drop(mapped_write);
    Ok(child)
}

/// User and group 0 of the user namespace, and no other groups.
fn become_user_0() -> io::Result<()> {
    // SAFETY: an empty list needs no pointer. Fails where the map forbids it: then there are none to drop but one's own.
    unsafe { libc::setgroups(0, std::ptr::null()) };
    // SAFETY: no pointers are passed, here and below.
    check(unsafe { libc::setresgid(0, 0, 0) })?;
    // SAFETY: see above.
    check(unsafe { libc::setresuid(0, 0, 0) }).map(drop)
}

/// User 0 inside is a user of this VMM's own outside for root (who launches from other programs too, hence by process id and far from theirs), and
/// oneself for anybody else.
fn map_user(pid: i32) -> io::Result<()> {
    /// Above it is room for the largest process id, 2^22.
    const FIRST_USER: u32 = 0x6000_0000;
    // SAFETY: these calls can't fail.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    let outside = |own: u32| if uid == 0 { FIRST_USER + pid.unsigned_abs() } else { own };
    if uid != 0 {
        // An ordinary user may map itself only without the power to drop groups (user_namespaces(7)).
        fs::write(format!("/proc/{pid}/setgroups"), "deny")?;
    }
    fs::write(format!("/proc/{pid}/uid_map"), format!("0 {} 1", outside(uid)))?;
    fs::write(format!("/proc/{pid}/gid_map"), format!("0 {} 1", outside(gid)))
}

/// The owner's part until the VMM says how it ended, or is gone without a word.
fn serve(
    connection: &Connection,
    dial: Option<&Path>,
    timeline: bool,
) -> Result<Option<End>, StandaloneError> {
    // The VMM watches these signals itself, but its PID namespace hides it from whoever sends them: they become a Stop.
    let signals = signal::watch()?;
    loop {
        if signal::came_before_readable(&signals, connection)? {
            // It may have ended meanwhile; what it said last is read below.
            let _ = connection.send(&FromOwner::from(Stop {}), &[]);
        }
        match connection.receive_first::<FromVmm>() {
            Ok(packet) => match packet.message {
                FromVmm::Booted(booted) => {
                    if timeline {
                        print_timeline(&booted.timeline);
                    }
                }
                FromVmm::Dialled(Dialled { port }) => {
                    for end in packet.descriptors {
                        put_through(end, dial, port);
                    }
                }
                FromVmm::Broken(Broken { end, message }) => {
                    eprintln!("carrel-vmm: {message}");
                    return Ok(Some(end));
                }
                FromVmm::Ended(Ended { end, detail }) => {
                    match (end, detail) {
                        (End::BadSnapshot | End::Kvm | End::Host | End::Internal, Some(detail)) => {
                            eprintln!("carrel-vmm: {detail}");
                        }
                        (End::Panic, Some(words)) => {
                            eprint!("carrel-vmm: the guest's kernel panicked; its last words:\n{words}");
                        }
                        (
                            End::Shutdown
                            | End::Reset
                            | End::TripleFault
                            | End::Stopped
                            | End::BadConfiguration,
                            _,
                        )
                        | (_, None) => {}
                    }
                    return Ok(Some(end));
                }
                FromVmm::DeviceStopped(stopped) => {
                    eprintln!("carrel-vmm: {} stopped: {:?}", stopped.device, stopped.reason);
                }
                FromVmm::Prepared(_)
                | FromVmm::Done(_)
                | FromVmm::Refused(_)
                | FromVmm::Metrics(_)
                | FromVmm::Snapshotted(_) => {}
            },
            Err(OwnerError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => {}
            // It ended before it read our Stop (unix(7)); its last words come with the next packet.
            Err(OwnerError::Io(e)) if e.kind() == io::ErrorKind::ConnectionReset => {}
            Err(OwnerError::Closed) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
    }
}

fn print_timeline(marks: &[Mark]) {
    let mut before = marks.first().map_or(0, |mark| mark.at_us);
    for mark in marks {
        eprintln!("{:>8} µs  {}", mark.at_us - before, mark.done);
        before = mark.at_us;
    }
}

/// Joins a dialled connection with whoever listens at `<socket>_<port>`, on two threads. Nobody there: the guest is refused.
fn put_through(end: OwnedFd, dial: Option<&Path>, port: u32) {
    let Some(path) = dial else { return };
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{port}"));
    let Ok(listener) = UnixStream::connect(&name) else { return };
    let guest = UnixStream::from(end);
    if guest.set_nonblocking(false).is_err() {
        return;
    }
    for (from, to) in [(guest.try_clone(), listener.try_clone()), (Ok(listener), Ok(guest))] {
        if let (Ok(from), Ok(to)) = (from, to) {
            std::thread::spawn(move || copy(from, to));
        }
    }
}

fn copy(mut from: UnixStream, mut to: UnixStream) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(n) = from.read(&mut buffer) {
        let Some(bytes) = buffer.get(..n).filter(|bytes| !bytes.is_empty()) else { break };
        if to.write_all(bytes).is_err() {
            // Whoever reads no more: stop the other end from writing into nothing.
            let _ = from.shutdown(Shutdown::Read);
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
