//! What a template is made of, as its key, and what is written beside it for people.
//!
//! ```text
//!   RoomSpec, Assets, host ─▶ key ─▶ the store's templates
//! ```
//!
//! Two rooms have one key if and only if one's frozen guest is as good as the other's: the same kernel, agent and VMM, the same command line, machine and payload, on the same
//! processor under the same kernel, in the same isolation domain. What a room only learns after its birth (command, variables, user, names, limits within the
//! guest) is in no key.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use carrel_protocol::units::{MemoryMib, VcpuCount};
use carrel_protocol::vmm;
use carrel_store::templates::{CanonicalError, TemplateKey};
use serde::Serialize;
use serde_json::{Value, json};
use thiserror::Error;

use crate::home::Assets;
use crate::launch;
use crate::spec::{Machine, Payload, RoomSpec};

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
    host: &'a Host,
    domain: &'a str,
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
        host,
        domain,
    };
    Ok(TemplateKey::of(&ingredients)?)
}

/// What `carrel template ls` shows of it.
pub fn description(spec: &RoomSpec, host: &Host, domain: &str) -> Value {
    let machine = &spec.machine;
    json!({
        "image": spec.image,
        "domain": domain,
        "vcpus": machine.vcpus.get(),
        "memory_mib": machine.memory_mib.get(),
        "disk_bytes": machine.disk_bytes,
        "layers": spec.payload.layers.iter().map(|layer| &layer.digest).collect::<Vec<_>>(),
        "zips": spec.payload.zips.iter().map(|zip| &zip.digest).collect::<Vec<_>>(),
        "host_kernel": host.kernel,
    })
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
    fn a_processor_is_told_by_what_it_is_and_not_by_how_fast_it_runs_now() {
        let text = "processor\t: 0\nvendor_id\t: A\nmodel\t\t: 1\nmodel name\t: x\ncpu MHz\t\t: 1.5\nflags\t\t: a b\n\nprocessor\t: 1\n";
        assert_eq!(processor(text), ["vendor_id\t: A", "model\t\t: 1", "flags\t\t: a b"]);
        assert!(!Host::look().unwrap().processor.is_empty());
    }
}
