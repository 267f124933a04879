//! What a template is made of, as its key, and what is written beside it for people.
//!
//! ```text
//!   RoomSpec, Assets, host ─▶ key ─▶ the store's templates
//! ```
//!
//! Two rooms have one key if and only if one's frozen guest is as good as the other's: the same kernel, agent and VMM, the same command line, machine and payload, on the same
//! processor under the same kernel, in the same isolation domain. What a room only learns after its birth (names, its streams' other ends, limits of the host's) is in no
//! key; nor are command, variables, user and limits within the guest, unless the workload is one that runs already in the template.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use carrel_protocol::agent::Surroundings;
use carrel_protocol::units::{MemoryMib, VcpuCount};
use carrel_protocol::{one_line, vmm};
use carrel_store::templates::{CanonicalError, TemplateKey};
use serde::Serialize;
use serde_json::{Value, json};
use thiserror::Error;

use crate::home::Assets;
use crate::launch;
use crate::spec::{FunctionSpec, Machine, Payload, ProcessSpec, RoomSpec};

/// Characters of a command that people are shown.
const COMMAND_CHARACTERS: usize = 200;

/// A key can't be found.
#[derive(Debug, Error)]
pub enum KeyError {
    /// A file that every room needs isn't there.
    #[error("{} can't be looked at", .path.display())]
    Look {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It has no canonical form.
    #[error("the template's key can't be written")]
    Canonical(#[from] CanonicalError),
}

/// All that makes a template what it is.
#[derive(Serialize)]
struct Ingredients<'a> {
    kernel: Asset,
    initramfs: Asset,
    scratch: Asset,
    vmm: Asset,
    vmm_protocol: u32,
    command_line: String,
    vcpus: VcpuCount,
    memory_mib: MemoryMib,
    disk_bytes: u64,
    payload: &'a Payload,
    #[serde(skip_serializing_if = "Option::is_none")]
    workload: Option<Workload<'a>>,
    host: &'a Host,
    domain: &'a str,
}

/// A workload that runs in the template: all that it was told, and so whatever secrets it was given.
#[derive(Serialize)]
struct Workload<'a> {
    arguments: &'a [String],
    environment: &'a [String],
    working_directory: &'a str,
    user: &'a str,
    interactive: bool,
    /// Its size is told anew.
    terminal: bool,
    surroundings: &'a Surroundings,
    function: &'a Option<FunctionSpec>,
}

impl<'a> Workload<'a> {
    fn of(spec: &'a RoomSpec) -> Self {
        let ProcessSpec { arguments, environment, working_directory, user, interactive, terminal } =
            &spec.process;
        Self {
            arguments,
            environment,
            working_directory,
            user,
            interactive: *interactive,
            terminal: terminal.is_some(),
            surroundings: &spec.surroundings,
            function: &spec.function,
        }
    }
}

/// A file that is the same as long as it is not replaced: reading twenty megabytes for a digest would cost each start more than a clone does.
#[derive(Serialize)]
struct Asset {
    device: u64,
    inode: u64,
    bytes: u64,
    modified_s: i64,
    modified_ns: i64,
    changed_s: i64,
    changed_ns: i64,
}

impl Asset {
    fn of(path: &Path) -> Result<Self, KeyError> {
        let found = fs::metadata(path).map_err(|source| KeyError::Look { path: path.to_owned(), source })?;
        Ok(Self {
            device: found.dev(),
            inode: found.ino(),
            bytes: found.len(),
            modified_s: found.mtime(),
            modified_ns: found.mtime_nsec(),
            changed_s: found.ctime(),
            changed_ns: found.ctime_nsec(),
        })
    }
}

/// What a snapshot can't leave: the processor and the kernel beneath it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Host {
    kernel: String,
    /// The lines of /proc/cpuinfo that say which processor it is and what it can do.
    processor: Vec<String>,
}

impl Host {
    /// This host.
    ///
    /// # Errors
    ///
    /// /proc is not there.
    pub fn look() -> Result<Self, KeyError> {
        let path = Path::new("/proc/cpuinfo");
        let text =
            fs::read_to_string(path).map_err(|source| KeyError::Look { path: path.to_owned(), source })?;
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        Ok(Self { kernel, processor: processor(&text) })
    }
}

/// Of the first processor; the others of a host are as it is.
fn processor(cpuinfo: &str) -> Vec<String> {
    const LINES: [&str; 6] = ["vendor_id", "cpu family", "model", "stepping", "microcode", "flags"];
    let first = cpuinfo.split("\n\n").next().unwrap_or_default();
    let wanted = |line: &&str| line.split(':').next().is_some_and(|name| LINES.contains(&name.trim()));
    first.lines().filter(wanted).map(str::to_owned).collect()
}

/// The key of the template that such a room is a clone of.
///
/// # Errors
///
/// The assets can't be looked at.
pub fn key(spec: &RoomSpec, assets: &Assets, host: &Host, domain: &str) -> Result<TemplateKey, KeyError> {
    let Machine { vcpus, memory_mib, disk_bytes, kernel, cpu_millis: _ } = &spec.machine;
    let ingredients = Ingredients {
        kernel: Asset::of(kernel.as_ref().unwrap_or(&assets.kernel))?,
        initramfs: Asset::of(&assets.initramfs)?,
        scratch: Asset::of(&assets.scratch)?,
        vmm: Asset::of(&assets.vmm)?,
        vmm_protocol: vmm::VERSION,
        command_line: launch::command_line(false),
        vcpus: *vcpus,
        memory_mib: *memory_mib,
        disk_bytes: *disk_bytes,
        payload: &spec.payload,
        workload: spec.initialised.then(|| Workload::of(spec)),
        host,
        domain,
    };
    Ok(TemplateKey::of(&ingredients)?)
}

/// What rooms are asked for by that wait for another event: one can stand for another if this is the same. `spec` is that of an initialised room, whose key has all that its
/// function was told.
///
/// # Errors
///
/// The assets can't be looked at.
pub(crate) fn warm_key(
    spec: &RoomSpec,
    initialised: bool,
    assets: &Assets,
    host: &Host,
    domain: &str,
) -> Result<String, KeyError> {
    let key = key(spec, assets, host, domain)?;
    let began = if initialised { "initialised" } else { "unpacked" };
    let without: Vec<String> = spec.without.iter().map(ToString::to_string).collect();
    Ok(format!("{key} {began} {} {}", spec.machine.cpu_millis, without.join(",")))
}

/// What `carrel template ls` shows of it. Variables are secrets more often than not, so they are not in it.
pub fn description(spec: &RoomSpec, host: &Host, domain: &str) -> Value {
    let machine = &spec.machine;
    let mut described = json!({
        "image": spec.image,
        "domain": domain,
        "vcpus": machine.vcpus.get(),
        "memory_mib": machine.memory_mib.get(),
        "disk_bytes": machine.disk_bytes,
        "layers": spec.payload.layers.iter().map(|layer| &layer.digest).collect::<Vec<_>>(),
        "zips": spec.payload.zips.iter().map(|zip| &zip.digest).collect::<Vec<_>>(),
        "host_kernel": host.kernel,
    });
    if let (true, Some(described)) = (spec.initialised, described.as_object_mut()) {
        let command = one_line(&spec.process.arguments.join(" "), COMMAND_CHARACTERS);
        described.insert("command".into(), command.into());
    }
    described
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{ProcessSpec, testing};

    fn assets(folder: &Path) -> Assets {
        let file = |name: &str| {
            let path = folder.join(name);
            if !path.exists() {
                fs::write(&path, name).unwrap();
            }
            path
        };
        Assets {
            kernel: file("kernel"),
            initramfs: file("initramfs"),
            scratch: file("scratch"),
            vmm: file("vmm"),
        }
    }

    #[test]
    fn a_key_is_of_what_the_frozen_guest_holds_and_of_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let assets = assets(folder.path());
        let host = Host { kernel: "6".into(), processor: vec!["model : 1".into()] };
        let of = |spec: &RoomSpec| key(spec, &assets, &host, "d").unwrap();
        let spec = testing::room();
        let first = of(&spec);
        let later = RoomSpec {
            id: Some("0123456789ab".parse().unwrap()),
            name: Some("name".parse().unwrap()),
            image: "another name".into(),
            process: ProcessSpec { arguments: vec!["true".into()], ..ProcessSpec::default() },
            timeout_ms: Some(5),
            detached: true,
            ..spec.clone()
        };
        assert_eq!(of(&later), first);
        let mut machine = spec.clone();
        machine.machine.memory_mib = MemoryMib::try_from(256).unwrap();
        let mut payload = spec.clone();
        payload.payload.unpacked_bytes = Some(1);
        for other in [machine, payload] {
            assert_ne!(of(&other), first);
        }
        assert_ne!(key(&spec, &assets, &host, "e").unwrap(), first, "another domain");
        let newer = Host { kernel: "7".into(), ..host.clone() };
        assert_ne!(key(&spec, &assets, &newer, "d").unwrap(), first, "another kernel");
        fs::remove_file(&assets.vmm).unwrap();
        fs::write(folder.path().join("other"), "vmm").unwrap();
        fs::rename(folder.path().join("other"), &assets.vmm).unwrap();
        assert_ne!(of(&spec), first, "another VMM");
    }

    #[test]
    fn the_key_of_a_running_workload_is_of_all_that_it_was_told() {
        let folder = tempfile::tempdir().unwrap();
        let assets = assets(folder.path());
        let host = Host { kernel: "6".into(), processor: Vec::new() };
        let of = |spec: &RoomSpec| key(spec, &assets, &host, "d").unwrap();
        let size = |rows| Some(carrel_protocol::agent::TerminalSize { rows, columns: 80 });
        let process = ProcessSpec { terminal: size(24), ..ProcessSpec::default() };
        let spec = RoomSpec { initialised: true, process: process.clone(), ..testing::room() };
        let first = of(&spec);
        let other_window = ProcessSpec { terminal: size(50), ..process.clone() };
        let later = RoomSpec {
            id: Some("0123456789ab".parse().unwrap()),
            name: Some("name".parse().unwrap()),
            process: other_window,
            timeout_ms: Some(5),
            detached: true,
            ..spec.clone()
        };
        assert_eq!(of(&later), first);
        let processes = [
            ProcessSpec { arguments: vec!["x".into()], ..process.clone() },
            ProcessSpec { environment: vec!["AWS_SECRET_ACCESS_KEY=x".into()], ..process.clone() },
            ProcessSpec { working_directory: "/x".into(), ..process.clone() },
            ProcessSpec { user: "1".into(), ..process.clone() },
            ProcessSpec { interactive: true, ..process.clone() },
            ProcessSpec { terminal: None, ..process },
        ];
        let mut others: Vec<RoomSpec> =
            processes.into_iter().map(|process| RoomSpec { process, ..spec.clone() }).collect();
        others.push(RoomSpec { initialised: false, ..spec.clone() });
        let surroundings = Surroundings { hostname: Some("desk".into()), ..Surroundings::default() };
        others.push(RoomSpec { surroundings, ..spec.clone() });
        let function = FunctionSpec {
            name: "f".into(),
            memory_mb: 128,
            timeout_ms: 3000,
            init_timeout_ms: 13_000,
            response_bytes: 100,
        };
        others.push(RoomSpec { function: Some(function), ..spec });
        let keys: std::collections::BTreeSet<TemplateKey> = others.iter().map(of).collect();
        assert_eq!(keys.len(), others.len());
        assert!(!keys.contains(&first));
    }

    #[test]
    fn a_description_names_the_command_and_no_variable() {
        let host = Host { kernel: "6".into(), processor: Vec::new() };
        let process = ProcessSpec {
            arguments: vec!["python3".into(), "-c".into(), "x\n".repeat(10_000)],
            environment: vec!["TOKEN=secret".into()],
            ..ProcessSpec::default()
        };
        let spec = RoomSpec { process, ..testing::room() };
        assert_eq!(description(&spec, &host, "d").get("command"), None);
        let described = description(&RoomSpec { initialised: true, ..spec }, &host, "d");
        assert!(described["command"].as_str().unwrap().starts_with("python3 -c x"), "{described}");
        assert!(described.to_string().len() < 1000 && !described.to_string().contains("secret"));
    }

    #[test]
    fn a_processor_is_told_by_what_it_is_and_not_by_how_fast_it_runs_now() {
        let text = "processor\t: 0\nvendor_id\t: A\nmodel\t\t: 1\nmodel name\t: x\ncpu MHz\t\t: 1.5\nflags\t\t: a b\n\nprocessor\t: 1\n";
        assert_eq!(processor(text), ["vendor_id\t: A", "model\t\t: 1", "flags\t\t: a b"]);
        assert!(!Host::look().unwrap().processor.is_empty());
    }
}
