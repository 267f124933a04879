//! What must be there before any guest can run: the kernel, `/dev/kvm`, the assets, a home and a store with space.

use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::process::Command;

use carrel_protocol::vmm::{self, KvmSupport};

use super::Check;
use super::readings::Readings;
use crate::home::Assets;
use crate::outcome::clean;
use carrel_protocol::chain;

const BUILD: &str = "run scripts/build and set CARREL_ASSETS to what it prints, or set CARREL_VMM";
/// clone3 into a cgroup is of 5.7, close_range of 5.9.
const OLDEST_KERNEL: (u32, u32) = (5, 9);
/// cgroup.kill.
const GOOD_KERNEL: (u32, u32) = (5, 14);
/// Less is not enough for one image and one room's disk.
const LITTLE_SPACE_BYTES: u64 = 4 << 30;
const NO_SPACE_BYTES: u64 = 64 << 20;

/// The host's kernel.
pub(super) fn kernel(readings: &Readings) -> Check {
    const NAME: &str = "host-kernel";
    let release = readings.text("proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let detail = format!("Linux {release}");
    if version < OLDEST_KERNEL {
        return Check::missing(NAME, &format!("{detail} is older than 5.9"), "boot Linux 5.9 or newer");
    }
    if version < GOOD_KERNEL {
        let detail = format!("{detail} has no cgroup.kill: a room's processes are killed one by one");
        return Check::warning(NAME, &detail, "boot Linux 5.14 or newer");
    }
    Check::ok(NAME, &detail)
}

/// `/dev/kvm` as this user may use it.
pub(super) fn kvm_device(readings: &Readings) -> Check {
    const NAME: &str = "kvm-device";
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Check::ok(NAME, "/dev/kvm can be opened"),
        Err(error) => kvm_device_missing(NAME, &error, readings),
    }
}

fn kvm_device_missing(name: &str, error: &io::Error, readings: &Readings) -> Check {
    let detail = format!("/dev/kvm can't be opened: {error}");
    if error.kind() == io::ErrorKind::PermissionDenied {
        return Check::missing(name, &detail, "usermod -aG kvm \"$USER\", then log in again");
    }
    let mend = if readings.has_flag("svm") {
        "modprobe kvm_amd"
    } else if readings.has_flag("vmx") {
        "modprobe kvm_intel"
    } else if readings.has_flag("hypervisor") {
        "let the hypervisor of this virtual machine offer nested virtualisation; from carrel's sources, `scripts/kvm-host carrel …` does without"
    } else {
        "enable virtualisation (VT-x, AMD-V) in the firmware, then modprobe kvm_intel or kvm_amd"
    };
    Check::missing(name, &detail, mend)
}

/// What every room needs, as files.
pub(super) fn assets(assets: &Assets) -> Check {
    const NAME: &str = "assets";
    match assets.check() {
        Ok(()) => {
            let folder = assets.kernel.parent().unwrap_or(Path::new("/"));
            Check::ok(NAME, &format!("kernel, initramfs and empty disk are in {}", folder.display()))
        }
        Err(error) => Check::missing(NAME, &chain(&error), BUILD),
    }
}

/// What KVM says that it can do, asked by the VMM.
pub(super) fn kvm_capabilities(program: &Path) -> Check {
    const NAME: &str = "kvm-capabilities";
    let output = match Command::new(program).arg("--print-kvm").output() {
        Ok(output) => output,
        Err(error) => {
            let detail = format!("{} can't be executed: {error}", program.display());
            return Check::missing(NAME, &detail, BUILD);
        }
    };
    match serde_json::from_slice::<KvmSupport>(&output.stdout) {
        Ok(support) => offered(NAME, &support),
        Err(_) => {
            let said = clean(&String::from_utf8_lossy(&output.stderr));
            let detail = format!("{} does not tell what KVM offers: {said}", program.display());
            Check::missing(NAME, &detail, "mend kvm-device, and install carrel and carrel-vmm from one build")
        }
    }
}

fn offered(name: &str, support: &KvmSupport) -> Check {
    if support.version != vmm::VERSION {
        let detail =
            format!("carrel-vmm speaks version {} and this carrel version {}", support.version, vmm::VERSION);
        return Check::missing(name, &detail, "install carrel and carrel-vmm from one build: scripts/build");
    }
    if support.api_version != 12 {
        let detail = format!("/dev/kvm speaks version {} of KVM's interface, not 12", support.api_version);
        return Check::missing(name, &detail, "boot a kernel with KVM of its own");
    }
    let absent = |required: bool| {
        let those = support.capabilities.iter().filter(|one| one.required == required && !one.present);
        those.map(|one| format!("{} ({})", one.name, one.purpose)).collect::<Vec<_>>().join(", ")
    };
    let (needed, wanted) = (absent(true), absent(false));
    if !needed.is_empty() {
        return Check::missing(
            name,
            &format!("KVM lacks {needed}"),
            "boot a newer kernel, or use another host",
        );
    }
    if !wanted.is_empty() {
        return Check::warning(
            name,
            &format!("KVM lacks {wanted}"),
            "boot a newer kernel, or use another host",
        );
    }
    Check::ok(
        name,
        &format!("KVM offers all that the VMM builds on, and {} vCPUs a room at most", support.vcpus.min(16)),
    )
}

/// The home or the store, and the space that is left where it is. `variable` says where it is to be.
pub(super) fn place(name: &str, variable: &str, path: &Path) -> Check {
    let elsewhere = format!("set {variable} to a directory that you may write to");
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    if let Err(error) = made {
        let detail = format!("the {name} {} can't be made: {error}", path.display());
        return Check::missing(name, &detail, &elsewhere);
    }
    if let Err(error) = rustix::fs::access(path, rustix::fs::Access::WRITE_OK) {
        let detail = format!("the {name} {} can't be written to: {}", path.display(), io::Error::from(error));
        return Check::missing(name, &detail, &elsewhere);
    }
    match rustix::fs::statvfs(path) {
        Ok(found) => space(name, variable, path, found.f_bavail.saturating_mul(found.f_frsize)),
        Err(error) => {
            let detail =
                format!("the space below {} is not known: {}", path.display(), io::Error::from(error));
            Check::warning(name, &detail, "see that there is some")
        }
    }
}

fn space(name: &str, variable: &str, path: &Path, free: u64) -> Check {
    let detail = format!("{} MiB are free below {}", free >> 20, path.display());
    let mend = format!("carrel prune --all, a bigger disk, or {variable} elsewhere");
    match free {
        0..NO_SPACE_BYTES => Check::missing(name, &detail, &mend),
        NO_SPACE_BYTES..LITTLE_SPACE_BYTES => Check::warning(name, &detail, &mend),
        _ => Check::ok(name, &detail),
    }
}

#[cfg(test)]
mod tests {
    use carrel_protocol::vmm::KvmCapability;

    use super::super::Status;
    use super::*;

    fn status(release: &str) -> Status {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("proc/sys/kernel")).unwrap();
        std::fs::write(root.path().join("proc/sys/kernel/osrelease"), release).unwrap();
        kernel(&Readings::below(root.path())).status
    }

    #[test]
    fn a_kernel_that_is_too_old_is_told_from_one_that_is_just_old() {
        assert_eq!(status("6.12.48+deb13-amd64\n"), Status::Ok);
        assert_eq!(status("5.14.0"), Status::Ok);
        assert_eq!(status("5.10.0-30-amd64"), Status::Warning);
        assert_eq!(status("5.4.0-150-generic"), Status::Missing);
        assert_eq!(status("nonsense"), Status::Missing);
    }

    #[test]
    fn the_missing_module_is_the_processors() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("proc")).unwrap();
        let not_there = io::Error::from(io::ErrorKind::NotFound);
        let mend = |flags: &str| {
            std::fs::write(root.path().join("proc/cpuinfo"), format!("flags\t\t: fpu {flags}\n")).unwrap();
            kvm_device_missing("x", &not_there, &Readings::below(root.path())).mend.unwrap()
        };
        assert_eq!(mend("svm hypervisor"), "modprobe kvm_amd");
        assert_eq!(mend("vmx"), "modprobe kvm_intel");
        assert!(mend("hypervisor").contains("nested"));
        assert!(mend("sse2").contains("firmware"));
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let check = kvm_device_missing("x", &denied, &Readings::below(root.path()));
        assert!(check.mend.unwrap().contains("-aG kvm"));
    }

    #[test]
    fn a_capability_that_is_wanted_warns_and_one_that_is_needed_is_missing() {
        let with = |required, present, version| KvmSupport {
            version,
            api_version: 12,
            vcpus: 288,
            capabilities: vec![KvmCapability {
                name: "KVM_CAP_X".into(),
                purpose: "x".into(),
                required,
                present,
            }],
        };
        assert_eq!(offered("x", &with(true, true, vmm::VERSION)).status, Status::Ok);
        assert_eq!(offered("x", &with(false, false, vmm::VERSION)).status, Status::Warning);
        let missing = offered("x", &with(true, false, vmm::VERSION));
        assert_eq!(missing.status, Status::Missing);
        assert!(missing.detail.contains("KVM_CAP_X (x)"), "{}", missing.detail);
        assert_eq!(offered("x", &with(true, true, vmm::VERSION + 1)).status, Status::Missing);
    }

    #[test]
    fn a_program_that_is_no_vmm_is_no_vmm() {
        assert_eq!(kvm_capabilities("/bin/true".as_ref()).status, Status::Missing);
        assert_eq!(kvm_capabilities("/nowhere/carrel-vmm".as_ref()).status, Status::Missing);
    }

    #[test]
    fn space_is_judged_by_what_a_room_needs() {
        let of = |free| space("x", "X", "/h".as_ref(), free).status;
        assert_eq!([of(10 << 30), of(1 << 30), of(1 << 20)], [Status::Ok, Status::Warning, Status::Missing]);
    }
}
