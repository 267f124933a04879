//! The `carrel-vmm` command.

use std::fs;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use carrel_protocol::vmm::End;
use carrel_vmm::capabilities;
use carrel_vmm::confined;
use carrel_vmm::jail::Without;
use carrel_vmm::owner::Connection;
use carrel_vmm::standalone::{self, Beginning, Options};
use serde::de::DeserializeOwned;

const HELP: &str = "\
Runs one microVM in this process.

Usage:
  carrel-vmm --config FILE | --restore FILE [--cgroup DIR] [--unconfined[=PARTS]] [--timeline]
  carrel-vmm --owner-fd N [--unconfined[=PARTS]]
  carrel-vmm --print-kvm

Options:
  --config FILE         a machine's configuration as JSON; what it names is opened, then everything is confined
  --restore FILE        the same for a machine that goes on from a snapshot (docs/snapshots.md)
  --owner-fd N          receive the configuration, with open descriptors, over the packet socket N
  --cgroup DIR          with --config, --restore: be born in this cgroup v2 directory, made if missing; without: in a new one below one's own
  --unconfined[=PARTS]  do without parts of the confinement: cgroup, namespaces, capabilities, seccomp; without PARTS: all; may be repeated
  --timeline            print to stderr how long each step of the start took
  --print-config        read the configuration, print it with its defaults, and exit
  --print-kvm           print what /dev/kvm offers of what this program builds on, as JSON, and exit
  --help, --version

Exit status:
   0  the guest powered itself off         12  the guest's kernel panicked
  10  the guest restarted                  13  stopped: by the owner, SIGTERM or SIGINT
  11  the guest triple-faulted
   2  wrong command line or configuration  20  KVM failed
   3  the snapshot is damaged, or of       21  the host lacks something, a part of the confinement for one
      another host or version              22  an inner error of the VMM
  128 + n  signal n ended the VMM; 159 (SIGSYS): a system-call filter did

Example:
  carrel-vmm --config vm.json, with vm.json:
  {\"kvm\": \"/dev/kvm\", \"vcpus\": 1, \"memory_mib\": 128,
   \"kernel\": {\"image\": \"vmlinux\", \"command_line\": \"console=ttyS0 reboot=t panic=-1\"},
   \"initramfs\": \"initramfs.cpio\",
   \"serial\": {\"output\": \"/dev/stdout\", \"limit_bytes\": 1048576}}
";

#[derive(Default)]
struct Arguments {
    config: Option<PathBuf>,
    restore: Option<PathBuf>,
    owner: Option<RawFd>,
    cgroup: Option<PathBuf>,
    without: Without,
    timeline: bool,
    print_config: bool,
    print_kvm: bool,
}

fn main() -> ExitCode {
    carrel_protocol::abort_on_panic();
    let arguments = match parse() {
        Ok(Some(arguments)) => arguments,
        Ok(None) => return ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("carrel-vmm: {message}; see carrel-vmm --help");
            return ExitCode::from(End::BadConfiguration.status());
        }
    };
    ExitCode::from(run(&arguments))
}

fn parse() -> Result<Option<Arguments>, String> {
    let mut arguments = Arguments::default();
    let mut given = std::env::args_os().skip(1);
    while let Some(argument) = given.next() {
        let argument = argument.into_string().map_err(|a| format!("{a:?} is not UTF-8"))?;
        let mut value = || given.next().ok_or_else(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--help" | "-h" => {
                print!("{HELP}");
                return Ok(None);
            }
            "--version" | "-V" => {
                println!("carrel-vmm {}", env!("CARGO_PKG_VERSION"));
                return Ok(None);
            }
            "--print-kvm" => arguments.print_kvm = true,
            "--config" => arguments.config = Some(value()?.into()),
            "--restore" => arguments.restore = Some(value()?.into()),
            "--cgroup" => arguments.cgroup = Some(value()?.into()),
            "--owner-fd" => {
                let number = value()?.into_string().ok().and_then(|n| n.parse().ok()).filter(|n| *n > 2);
                arguments.owner = Some(number.ok_or("--owner-fd needs a descriptor's number above 2")?);
            }
            "--unconfined" => arguments.without = Without::everything(),
            "--timeline" => arguments.timeline = true,
            "--print-config" => arguments.print_config = true,
            other => match other.strip_prefix("--unconfined=") {
                Some(list) => arguments.without.add(&list.parse()?),
                None => return Err(format!("{other:?} is no option")),
            },
        }
    }
    match (&arguments.config, &arguments.restore, arguments.owner) {
        (Some(_), None, None) | (None, Some(_), None) | (None, None, Some(_)) => Ok(Some(arguments)),
        (None, None, None) if arguments.print_kvm => Ok(Some(arguments)),
        _ => Err("one of --config, --restore, --owner-fd and --print-kvm is needed".into()),
    }
}

/// Does what the arguments ask for and returns the exit status.
fn run(arguments: &Arguments) -> u8 {
    if let Some(fd) = arguments.owner {
        // Who is started by a descriptor is called by its number.
        // SAFETY: the name is a C string.
        unsafe { libc::prctl(libc::PR_SET_NAME, c"carrel-vmm".as_ptr()) };
        // SAFETY: the descriptor was passed to this process for this use; nobody else here knows of it.
        let owner = unsafe { OwnedFd::from_raw_fd(fd) };
        return confined::run(Connection::new(owner), &arguments.without).status();
    }
    if arguments.print_kvm {
        return print_kvm().status();
    }
    match beginning(arguments) {
        Ok(beginning) if arguments.print_config => print_config(&beginning).status(),
        Ok(beginning) => run_alone(beginning, arguments),
        Err(message) => {
            eprintln!("carrel-vmm: {message}");
            End::BadConfiguration.status()
        }
    }
}

/// Reads the file that says how the machine begins.
fn beginning(arguments: &Arguments) -> Result<Beginning, String> {
    match (&arguments.config, &arguments.restore) {
        (Some(path), _) => read(path).map(Beginning::Boot),
        (None, Some(path)) => read(path).map(Beginning::Restore),
        (None, None) => Err("a configuration is needed".into()),
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, String> {
    fs::read(path)
        .map_err(|e| e.to_string())
        .and_then(|text| serde_json::from_slice(&text).map_err(|e| e.to_string()))
        .map_err(|why| format!("{} is no usable configuration: {why}", path.display()))
}

fn run_alone(beginning: Beginning, arguments: &Arguments) -> u8 {
    for part in arguments.without.parts() {
        eprintln!("carrel-vmm: running without this part of the confinement: {part}");
    }
    let options = Options {
        without: arguments.without.clone(),
        cgroup: arguments.cgroup.clone(),
        timeline: arguments.timeline,
    };
    match standalone::run(beginning, &options) {
        Ok(outcome) => outcome.status(),
        Err(e) => {
            eprintln!("carrel-vmm: {}", carrel_protocol::chain(&e));
            match e {
                standalone::StandaloneError::Resources(e) => e.end().status(),
                standalone::StandaloneError::Part { .. }
                | standalone::StandaloneError::Owner(_)
                | standalone::StandaloneError::Io(_) => End::Host.status(),
            }
        }
    }
}

fn print_config(beginning: &Beginning) -> End {
    let text = match beginning {
        Beginning::Boot(vm) => serde_json::to_string_pretty(vm),
        Beginning::Restore(vm) => serde_json::to_string_pretty(vm),
    };
    match text {
        Ok(text) => {
            println!("{text}");
            End::Shutdown
        }
        Err(e) => {
            eprintln!("carrel-vmm: the configuration can't be printed: {e}");
            End::Internal
        }
    }
}

fn print_kvm() -> End {
    let support = capabilities::of_this_host().map_err(|e| carrel_protocol::chain(&e));
    match support.and_then(|support| serde_json::to_string(&support).map_err(|e| e.to_string())) {
        Ok(text) => {
            println!("{text}");
            End::Shutdown
        }
        Err(why) => {
            eprintln!("carrel-vmm: {why}");
            End::Kvm
        }
    }
}
