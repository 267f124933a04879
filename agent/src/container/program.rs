//! The last steps before a workload's own first instruction, in its process: streams, user, limits, `execve`.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use carrel_protocol::agent::Process;
use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::process::{Resource, Rlimit, setrlimit};
use seccompiler::BpfProgram;

use super::{StartError, capabilities, seccomp, user};
use crate::fork;

/// Where programs are looked for if the environment doesn't say (Docker's default).
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Soft and hard limits. Descriptors as containerd's default service gives them; no core files unless asked for.
const LIMITS: [(Resource, u64, Option<u64>); 3] = [
    (Resource::Nofile, 65_536, Some(1 << 20)),
    (Resource::Core, 0, None),
    (Resource::Memlock, 8 << 20, Some(8 << 20)),
];

/// What a process is made of beside the request.
#[derive(Debug)]
pub(crate) struct Program<'a> {
    pub(crate) process: &'a Process,
    /// For `HOSTNAME`.
    pub(crate) hostname: &'a str,
    /// Added to the environment, winning over the request's.
    pub(crate) extra: &'a [(String, String)],
    pub(crate) filters: &'a [BpfProgram],
}

/// A workload's standard streams.
#[derive(Debug)]
pub(crate) enum Streams {
    /// Pipes, or `/dev/null` where there is none.
    Pipes([Option<OwnedFd>; 3]),
    /// All three are this terminal, which becomes the controlling one.
    Terminal(OwnedFd),
}

impl Program<'_> {
    /// Becomes the program. Returns only what prevented it.
    pub(crate) fn execute(&self, streams: &Streams) -> StartError {
        match self.prepare(streams) {
            Ok(image) => image.execute(self.process.arguments.first().map_or("", String::as_str)),
            Err(error) => error,
        }
    }

    fn prepare(&self, streams: &Streams) -> Result<Image, StartError> {
        let who = user::look_up(&self.process.user)?;
        let image = Image::new(self, &who)?;
        rustix::process::setsid().map_err(StartError::step("making a session"))?;
        streams.take(&who).map_err(StartError::step("connecting the standard streams"))?;
        rustix::process::umask(Mode::from_raw_mode(0o022));
        fs::write("/proc/self/oom_score_adj", "0").map_err(StartError::step("resetting the OOM score"))?;
        for (resource, soft, hard) in LIMITS {
            setrlimit(resource, Rlimit { current: Some(soft), maximum: hard })
                .map_err(StartError::step("setting resource limits"))?;
        }
        working_directory(&self.process.working_directory, &who)?;
        capabilities::bound().map_err(StartError::step("dropping capabilities"))?;
        seccomp::apply(self.filters).map_err(StartError::step("filtering system calls"))?;
        become_user(&who).map_err(StartError::step("changing to the user"))?;
        fork::close_all_on_exec();
        Ok(image)
    }
}

impl Streams {
    /// Makes them descriptors 0, 1 and 2, owned by the user so that `/dev/stdout` can be opened.
    fn take(&self, who: &user::Identity) -> io::Result<()> {
        let own = |fd: BorrowedFd<'_>| {
            let _ = rustix::fs::fchown(fd, Some(Uid::from_raw(who.uid)), None);
        };
        match self {
            Self::Terminal(terminal) => {
                own(terminal.as_fd());
                for number in 0..3 {
                    duplicate(terminal.as_fd(), number)?;
                }
                Ok(rustix::process::ioctl_tiocsctty(terminal)?)
            }
            Self::Pipes(pipes) => {
                for (number, pipe) in (0..).zip(pipes) {
                    match pipe {
                        Some(pipe) => {
                            own(pipe.as_fd());
                            duplicate(pipe.as_fd(), number)?;
                        }
                        None => duplicate(
                            fs::OpenOptions::new().read(true).write(true).open("/dev/null")?.as_fd(),
                            number,
                        )?,
                    }
                }
                Ok(())
            }
        }
    }
}

/// dup2(2), without close-on-exec.
fn duplicate(from: BorrowedFd<'_>, to: i32) -> io::Result<()> {
    // SAFETY: descriptors 0 to 2 are nobody's in this process, which is about to execute a program.
    let done = unsafe { libc::dup2(from.as_raw_fd(), to) };
    if done == to { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Changes to the directory; makes it, for the user, if it is missing.
fn working_directory(path: &str, who: &user::Identity) -> Result<(), StartError> {
    let path = if path.is_empty() { "/" } else { path };
    if !path.starts_with('/') {
        return Err(StartError::Request(format!("the working directory '{path}' is not absolute")));
    }
    let enter = || std::env::set_current_dir(path);
    let entered = match enter() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make_directories(Path::new(path), who).and_then(|()| enter())
        }
        other => other,
    };
    entered.map_err(StartError::step(format!("changing to the working directory '{path}'")))
}

fn make_directories(path: &Path, who: &user::Identity) -> io::Result<()> {
    let missing: Vec<PathBuf> =
        path.ancestors().take_while(|path| !path.exists()).map(Path::to_owned).collect();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    for path in missing.iter().rev() {
        fs::create_dir(path)?;
        // Not by its path: beside an exec a workload runs, which may have put a link there.
        let made = rustix::fs::open(path, flags, Mode::empty())?;
        rustix::fs::fchown(made, Some(Uid::from_raw(who.uid)), Some(Gid::from_raw(who.gid)))?;
    }
    Ok(())
}

fn become_user(who: &user::Identity) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(who.uid), Gid::from_raw(who.gid));
    // The primary one among them, as after login: a set-group-ID program can't be used to lose it (moby, CVE-2022-36109).
    let further = who.groups.iter().filter(|group| **group != who.gid);
    let groups: Vec<Gid> = [gid].into_iter().chain(further.map(|&group| Gid::from_raw(group))).collect();
    rustix::thread::set_thread_groups(&groups)?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    capabilities::keep(uid.is_root())
}

/// What execve(2) takes.
struct Image {
    /// Candidates, in order.
    paths: Vec<CString>,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Image {
    fn new(program: &Program<'_>, who: &user::Identity) -> Result<Self, StartError> {
        let process = program.process;
        let text = |text: &str| {
            CString::new(text).map_err(|_| {
                StartError::Request(format!("'{}' holds a zero byte", text.replace('\0', "\\0")))
            })
        };
        let name = process.arguments.first().filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| StartError::Request("the container has no command to run".into()))?;
        let environment = environment(program, &who.home);
        let path = environment.get("PATH").map_or(PATH, String::as_str);
        let paths = if name.contains('/') {
            vec![text(name)?]
        } else {
            let at = |folder: &str| text(&format!("{}/{name}", if folder.is_empty() { "." } else { folder }));
            path.split(':').map(at).collect::<Result<_, _>>()?
        };
        Ok(Self {
            paths,
            arguments: process.arguments.iter().map(|one| text(one)).collect::<Result<_, _>>()?,
            environment: environment
                .iter()
                .map(|(name, value)| text(&format!("{name}={value}")))
                .collect::<Result<_, _>>()?,
        })
    }

    /// As execvp(3): the first that can be executed; one that exists but may not be is remembered. No shell is tried for what
    /// has no known format.
    fn execute(&self, name: &str) -> StartError {
        let pointers = |texts: &[CString]| -> Vec<*const libc::c_char> {
            texts.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect()
        };
        let (arguments, environment) = (pointers(&self.arguments), pointers(&self.environment));
        let mut denied = None;
        for path in &self.paths {
            // SAFETY: both arrays end in a null pointer, and the strings that they point to are alive.
            unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP | libc::ENAMETOOLONG) => {}
                Some(libc::EACCES) => denied = denied.or(Some(explain(path, error))),
                Some(libc::E2BIG) => return StartError::TooLong(name.to_owned()),
                _ => return StartError::NotExecutable { program: name.to_owned(), source: error },
            }
        }
        match denied {
            Some(source) => StartError::NotExecutable { program: name.to_owned(), source },
            None => StartError::NotFound(name.to_owned()),
        }
    }
}

/// A directory is "permission denied" to execve(2).
fn explain(path: &CStr, error: io::Error) -> io::Error {
    let path = Path::new(std::ffi::OsStr::from_bytes(path.to_bytes()));
    if path.is_dir() { io::Error::from_raw_os_error(libc::EISDIR) } else { error }
}

/// Later entries win; what is no `NAME=value` is left out.
fn environment(program: &Program<'_>, home: &str) -> BTreeMap<String, String> {
    let mut all: BTreeMap<String, String> = BTreeMap::new();
    for entry in &program.process.environment {
        if let Some((name, value)) = entry.split_once('=').filter(|(name, _)| !name.is_empty()) {
            all.insert(name.to_owned(), value.to_owned());
        }
    }
    let mut default = |name: &str, value: &str| {
        all.entry(name.to_owned()).or_insert_with(|| value.to_owned());
    };
    default("PATH", PATH);
    default("HOSTNAME", program.hostname);
    if program.process.stdio.terminal.is_some() {
        default("TERM", "xterm");
    }
    if all.get("HOME").is_none_or(String::is_empty) {
        all.insert("HOME".into(), home.to_owned());
    }
    all.extend(program.extra.iter().cloned());
    all
}

#[cfg(test)]
mod tests {
    use carrel_protocol::agent::{Failure, ProcessId, Stdio, TerminalSize};

    use super::*;

    fn process(environment: &[&str], terminal: bool) -> Process {
        let terminal = terminal.then_some(TerminalSize { rows: 24, columns: 80 });
        Process {
            id: ProcessId(0),
            arguments: vec!["true".into()],
            environment: environment.iter().map(|&one| one.to_owned()).collect(),
            working_directory: "/".into(),
            user: String::new(),
            stdio: Stdio { terminal, ..Stdio::default() },
        }
    }

    fn environment_of(
        given: &[&str],
        terminal: bool,
        extra: &[(String, String)],
    ) -> BTreeMap<String, String> {
        let process = process(given, terminal);
        let program = Program { process: &process, hostname: "room", extra, filters: &[] };
        environment(&program, "/root")
    }

    #[test]
    fn the_later_entry_wins_and_what_is_missing_is_added() {
        let all = environment_of(&["A=1", "A=2=3", "=no", "neither", "HOME="], true, &[]);
        let expected =
            [("A", "2=3"), ("HOME", "/root"), ("HOSTNAME", "room"), ("PATH", PATH), ("TERM", "xterm")];
        assert_eq!(all, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    }

    #[test]
    fn what_is_given_stays() {
        let all = environment_of(&["HOME=/h", "HOSTNAME=h", "PATH=/p"], false, &[("X".into(), "y".into())]);
        let expected = [("HOME", "/h"), ("HOSTNAME", "h"), ("PATH", "/p"), ("X", "y")];
        assert_eq!(all, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    }

    #[test]
    fn a_command_is_looked_for_in_every_folder_of_path() {
        let process = process(&["PATH=/a::/b"], false);
        let program = Program { process: &process, hostname: "room", extra: &[], filters: &[] };
        let who = user::Identity { uid: 0, gid: 0, groups: vec![], home: "/".into() };
        let image = Image::new(&program, &who).unwrap();
        assert_eq!(image.paths, [c"/a/true", c"./true", c"/b/true"].map(CStr::to_owned));
    }

    fn image_of(arguments: &[&str], environment: &[&str]) -> Result<Image, StartError> {
        let mut process = process(environment, false);
        process.arguments = arguments.iter().map(|&one| one.to_owned()).collect();
        let program = Program { process: &process, hostname: "room", extra: &[], filters: &[] };
        Image::new(&program, &root())
    }

    fn root() -> user::Identity {
        user::Identity { uid: 0, gid: 0, groups: vec![], home: "/".into() }
    }

    #[test]
    fn what_the_agent_adds_wins() {
        let extra = [("A".to_owned(), "agent".to_owned()), ("PATH".to_owned(), "/x".to_owned())];
        let all = environment_of(&["A=image", "PATH=/image"], false, &extra);
        assert_eq!((&*all["A"], &*all["PATH"]), ("agent", "/x"));
    }

    #[test]
    fn a_name_with_a_slash_is_looked_for_nowhere_else() {
        assert_eq!(image_of(&["./a"], &["PATH=/p"]).unwrap().paths, [c"./a".to_owned()]);
        assert_eq!(image_of(&["/bin/a"], &[]).unwrap().paths, [c"/bin/a".to_owned()]);
        let default = image_of(&["a"], &[]).unwrap().paths;
        assert_eq!(default.len(), 6);
        assert_eq!(default[0].as_c_str(), c"/usr/local/sbin/a");
        // An empty PATH is the working directory, as to execvp(3).
        assert_eq!(image_of(&["a"], &["PATH="]).unwrap().paths, [c"./a".to_owned()]);
    }

    #[test]
    fn a_request_that_no_process_can_be_made_of_is_the_callers_fault() {
        for (arguments, environment) in [
            (&[][..], &[][..]),
            (&[""], &[]),
            (&["a\0b"], &[]),
            (&["a", "\0"], &[]),
            (&["a"], &["B=\0"]),
            (&["a"], &["PATH=\0"]),
        ] {
            let error = image_of(arguments, environment).err().unwrap();
            assert_eq!(error.failure(), Failure::BadRequest, "{arguments:?} {environment:?}");
        }
    }

    /// What prevents a program from being executed: execve(2) comes back only then.
    fn prevented(arguments: &[&str], path: &str) -> StartError {
        image_of(arguments, &[&format!("PATH={path}")]).unwrap().execute(arguments[0])
    }

    #[test]
    fn commands_that_are_missing_and_such_that_are_no_programs_are_told_apart() {
        let folder = tempfile::TempDir::new().unwrap();
        let write = |name: &str, text: &str, mode: u32| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            rustix::fs::chmod(&path, Mode::from_raw_mode(mode)).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let plain = write("plain", "#!/bin/sh", 0o644);
        let text = write("text", "no format", 0o755);
        let script = write("script", "#!/missing/interpreter\n", 0o755);
        let at = folder.path().to_str().unwrap();
        let below_file = format!("{plain}/x");
        for missing in ["/missing", &script, &below_file] {
            assert!(matches!(prevented(&[missing], "/"), StartError::NotFound(name) if name == missing));
        }
        for not_executable in [&*plain, &text, at] {
            let error = prevented(&[not_executable], "/");
            assert_eq!(error.failure(), Failure::CommandNotExecutable, "{not_executable}");
        }
        // By name: what may not be executed is passed over, and remembered if nothing else is found.
        assert_eq!(prevented(&["plain"], &format!("/missing:{at}")).failure(), Failure::CommandNotExecutable);
        assert_eq!(prevented(&["nothing"], &format!("/missing:{at}")).failure(), Failure::CommandNotFound);
        let folders = format!("{}:{at}", folder.path().parent().unwrap().display());
        let name = folder.path().file_name().unwrap().to_str().unwrap();
        assert_eq!(prevented(&[name], &folders).failure(), Failure::CommandNotExecutable);
    }

    #[test]
    fn what_is_too_long_is_not_called_a_bad_program() {
        // MAX_ARG_STRLEN: 32 pages, its last zero byte included.
        let long = "x".repeat(128 << 10);
        let error = prevented(&["/bin/true", &long], "/");
        assert!(matches!(&error, StartError::TooLong(name) if name == "/bin/true"), "{error}");
        assert_eq!(error.failure(), Failure::CommandNotExecutable);
        let error = image_of(&["/bin/true"], &[&format!("A={long}")]).unwrap().execute("/bin/true");
        assert!(matches!(error, StartError::TooLong(_)), "{error}");
    }

    #[test]
    fn a_working_directory_is_made_for_its_user_from_the_first_missing_parent_on() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::TempDir::new().unwrap();
        let who = user::Identity { uid: 1234, gid: 5678, groups: vec![], home: "/".into() };
        fs::create_dir(folder.path().join("there")).unwrap();
        make_directories(&folder.path().join("there/new/deep"), &who).unwrap();
        for (path, owner) in [("there", 0), ("there/new", 1234), ("there/new/deep", 1234)] {
            assert_eq!(fs::metadata(folder.path().join(path)).unwrap().uid(), owner, "{path}");
        }
        for wrong in ["relative", "./here", "../up"] {
            assert_eq!(working_directory(wrong, &who).unwrap_err().failure(), Failure::BadRequest);
        }
        fs::write(folder.path().join("file"), "").unwrap();
        let at_file = folder.path().join("file");
        assert_eq!(
            working_directory(at_file.to_str().unwrap(), &who).unwrap_err().failure(),
            Failure::System
        );
    }
}
