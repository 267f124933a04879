//! Who is measured: each way of isolation, where its program is found, and how it is set up.

use std::path::PathBuf;
use std::process::Command;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A way to isolate a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Subject {
    /// fork, chroot, exec: isolates nothing
    Plain,
    /// `bwrap`, all namespaces
    Bubblewrap,
    /// `runc run`, all namespaces, no capabilities
    Runc,
    /// `crun run`, the same bundle
    Crun,
    /// QEMU's microvm machine with KVM
    QemuMicrovm,
    /// Firecracker, booting
    Firecracker,
    /// Firecracker, process start and snapshot restored
    FirecrackerSnapshot,
    /// The same, with its API process already up
    FirecrackerResident,
    /// `carrel run --cold`
    Carrel,
    /// `carrel run` of an image that has a template
    CarrelClone,
    /// The same through `carrel pool`
    CarrelPool,
    /// The same, from when the pool had read the request
    CarrelResident,
    /// `carrel exec` in a room that waits
    CarrelWarm,
}

impl Subject {
    /// In the order of tables and plots.
    pub(crate) const ALL: &'static [Self] = &[
        Self::Plain,
        Self::Bubblewrap,
        Self::Runc,
        Self::Crun,
        Self::QemuMicrovm,
        Self::Firecracker,
        Self::FirecrackerSnapshot,
        Self::FirecrackerResident,
        Self::Carrel,
        Self::CarrelClone,
        Self::CarrelPool,
        Self::CarrelResident,
        Self::CarrelWarm,
    ];

    /// Its name in options, tables and results.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Bubblewrap => "bubblewrap",
            Self::Runc => "runc",
            Self::Crun => "crun",
            Self::QemuMicrovm => "qemu-microvm",
            Self::Firecracker => "firecracker",
            Self::FirecrackerSnapshot => "firecracker-snapshot",
            Self::FirecrackerResident => "firecracker-resident",
            Self::Carrel => "carrel",
            Self::CarrelClone => "carrel-clone",
            Self::CarrelPool => "carrel-pool",
            Self::CarrelResident => "carrel-resident",
            Self::CarrelWarm => "carrel-warm",
        }
    }

    /// Whether it is a way to use the `carrel` command.
    pub(crate) fn is_carrel(self) -> bool {
        matches!(
            self,
            Self::Carrel | Self::CarrelClone | Self::CarrelPool | Self::CarrelResident | Self::CarrelWarm
        )
    }

    /// How it is set up here, in a sentence.
    pub(crate) fn setup(self) -> &'static str {
        match self {
            Self::Plain => "fork, chroot into the shared root, exec; as root, no namespace, no limit",
            Self::Bubblewrap => {
                "bwrap --unshare-all --die-with-parent, root file system read-only; no seccomp filter"
            }
            Self::Runc | Self::Crun => {
                "an OCI bundle: new pid, mount, ipc, uts, network and cgroup namespaces, no capabilities, no_new_privs, root file system read-only; no seccomp filter, since a bare bundle has none"
            }
            Self::QemuMicrovm => {
                "-M microvm without ACPI, PIC, PIT, RTC; KVM, -cpu host, 1 vCPU, 128 MiB, virtio-mmio disk, serial console; -sandbox on with everything denied that can be; no further confinement"
            }
            Self::Firecracker => {
                "--no-api --config-file, 1 vCPU, 128 MiB, the kernel, root disk and serial console that QEMU's has; without its jailer; a build for gnu has no seccomp filter"
            }
            Self::FirecrackerSnapshot => {
                "the same machine with vsock, saved before its workload's first instruction; process start, load with File backend, request over vsock, output over vsock"
            }
            Self::FirecrackerResident => {
                "the same, measured from the load request: the API process is there already"
            }
            Self::Carrel => {
                "carrel run --cold, 1 vCPU, 128 MiB: owner, confined VMM, agent, and the OCI image unpacked in the guest"
            }
            Self::CarrelClone => {
                "carrel run, 1 vCPU, 128 MiB, without a pool: the room's own owner, a confined VMM that goes on from the image's template, saved before its workload's first instruction; the first warm-up makes that"
            }
            Self::CarrelPool => {
                "the same command with carrel pool there: its owner is that process, its VMM one that was prepared ahead (8 ready, replaced when no room is starting); the command's own process start is in its time"
            }
            Self::CarrelResident => {
                "the same, by the marks of its --timeline: from when the pool had read the request to when the command had the first byte of output"
            }
            Self::CarrelWarm => {
                "carrel exec in a room of carrel run --detach that is there and idle: one more process in a guest that others were in before"
            }
        }
    }

    /// The program that has to be there.
    pub(crate) fn program(self) -> Option<&'static str> {
        match self {
            Self::Plain => None,
            Self::Bubblewrap => Some("bwrap"),
            Self::Runc => Some("runc"),
            Self::Crun => Some("crun"),
            Self::QemuMicrovm => Some("qemu-system-x86_64"),
            Self::Firecracker | Self::FirecrackerSnapshot | Self::FirecrackerResident => Some("firecracker"),
            Self::Carrel | Self::CarrelClone | Self::CarrelPool | Self::CarrelResident | Self::CarrelWarm => {
                Some("carrel")
            }
        }
    }

    /// Whether it needs a `/dev/kvm` that runs kernels.
    pub(crate) fn needs_kvm(self) -> bool {
        match self {
            Self::Plain | Self::Bubblewrap | Self::Runc | Self::Crun => false,
            Self::QemuMicrovm
            | Self::Firecracker
            | Self::FirecrackerSnapshot
            | Self::FirecrackerResident
            | Self::Carrel
            | Self::CarrelClone
            | Self::CarrelPool
            | Self::CarrelResident
            | Self::CarrelWarm => true,
        }
    }

    /// Host memory that one room may come to take, MiB: guest memory and the VMM, or a process and its runtime.
    pub(crate) fn room_mib(self) -> u64 {
        if self.needs_kvm() { u64::from(super::stage::GUEST_MIB) + 24 } else { 16 }
    }
}

/// A subject that is there.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Present {
    /// Who.
    #[serde(rename = "name")]
    pub(crate) subject: Subject,
    /// What it says of its version.
    pub(crate) version: String,
    /// How it is set up.
    pub(crate) setup: &'static str,
    /// Its program.
    #[serde(skip)]
    pub(crate) program: PathBuf,
}

/// Finds a subject's program, the one that was named first of all; or says why it is skipped.
pub(crate) fn look(subject: Subject, named: Option<&PathBuf>) -> Result<Present, String> {
    let present = |program: PathBuf, version| Present { subject, version, setup: subject.setup(), program };
    let Some(name) = subject.program() else {
        return Ok(present(PathBuf::new(), "this host's kernel".into()));
    };
    if subject.needs_kvm() && std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return Err("this host has no /dev/kvm that may be opened".into());
    }
    let program = match named {
        Some(path) if path.is_file() => path.clone(),
        Some(path) => return Err(format!("{} is not there", path.display())),
        None => on_path(name).ok_or_else(|| format!("there is no {name} on the PATH"))?,
    };
    let output = Command::new(&program)
        .arg(if subject == Subject::Carrel { "version" } else { "--version" })
        .output()
        .map_err(|error| format!("{} can't be started: {error}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.lines().next().unwrap_or_default().trim().to_owned();
    if !output.status.success() || version.is_empty() {
        return Err(format!("{} does not say its version: {}", program.display(), output.status));
    }
    Ok(present(program, version))
}

/// The first executable of that name on the PATH.
pub(crate) fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|program| program.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_options_and_results_are_the_same() {
        for subject in Subject::ALL {
            assert_eq!(subject.to_possible_value().unwrap().get_name(), subject.name());
            assert_eq!(serde_json::to_value(subject).unwrap(), subject.name());
        }
        assert_eq!(Subject::ALL.len(), Subject::value_variants().len());
    }

    #[test]
    fn what_is_missing_is_skipped_with_its_name() {
        let missing = PathBuf::from("/nonexistent/bwrap");
        let reason = look(Subject::Bubblewrap, Some(&missing)).unwrap_err();
        assert!(reason.contains("/nonexistent/bwrap"), "{reason}");
    }

    #[test]
    fn a_plain_process_is_always_there() {
        assert!(look(Subject::Plain, None).is_ok());
    }
}
