//! What a machine is made of, as open descriptors: the form into which both ways to start bring a configuration.
//!
//! - From an owner: indices into the descriptors of one packet; each is used once, none may be left over.
//! - From a file: paths, opened by the launcher before anything is confined, then sent as the same packet.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use carrel_protocol::vmm::{
    BlockConfig, Descriptor, End, Kernel, MAX_BLOCKS, RestoreConfig, RestoreFile, RestoredBlock,
    SerialConfig, VmConfig, VmFile, VsockConfig,
};
use thiserror::Error;

/// A configuration can't be used.
#[derive(Debug, Error)]
pub enum ResourceError {
    /// A file can't be opened.
    #[error("{} ({what}) can't be opened", path.display())]
    Open {
        /// The field.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An index names no descriptor, or one that is taken.
    #[error("the configuration names descriptor {index} for {what}, which was not passed or is used twice")]
    NoDescriptor {
        /// The field.
        what: &'static str,
        /// The index.
        index: u8,
    },
    /// More descriptors than the configuration names.
    #[error("{count} descriptors were passed that the configuration does not name")]
    LeftOver {
        /// How many.
        count: usize,
    },
    /// Too many disks.
    #[error("the configuration has {count} disks; {MAX_BLOCKS} are possible")]
    TooManyBlocks {
        /// How many.
        count: usize,
    },
}

impl ResourceError {
    /// Under which end of the process this falls: a host without KVM is not the configuration's fault.
    pub fn end(&self) -> End {
        match self {
            Self::Open { what, .. } if *what == KVM => End::Host,
            Self::Open { .. }
            | Self::NoDescriptor { .. }
            | Self::LeftOver { .. }
            | Self::TooManyBlocks { .. } => End::BadConfiguration,
        }
    }
}

/// Gives each index's descriptor to its field.
pub fn from_owner(
    vm: VmConfig<Descriptor>,
    descriptors: Vec<OwnedFd>,
) -> Result<VmConfig<OwnedFd>, ResourceError> {
    hand_out(descriptors, |each| convert(vm, each))
}

/// The same for a machine that goes on from a snapshot.
pub fn restored_from_owner(
    vm: RestoreConfig<Descriptor>,
    descriptors: Vec<OwnedFd>,
) -> Result<RestoreConfig<OwnedFd>, ResourceError> {
    hand_out(descriptors, |each| convert_restored(vm, each))
}

/// The same for a machine that is prepared: `/dev/kvm` is all that it gets.
pub fn prepared_from_owner(kvm: Descriptor, descriptors: Vec<OwnedFd>) -> Result<OwnedFd, ResourceError> {
    hand_out(descriptors, |each| each(KVM, kvm))
}

/// Opens each path for its field, with the access that the field needs and no more.
pub fn from_file(vm: VmFile) -> Result<(VmConfig<Descriptor>, Vec<OwnedFd>), ResourceError> {
    open_all(|each| convert(vm, each))
}

/// The same for a machine that goes on from a snapshot.
pub fn restored_from_file(
    vm: RestoreFile,
) -> Result<(RestoreConfig<Descriptor>, Vec<OwnedFd>), ResourceError> {
    open_all(|each| convert_restored(vm, each))
}

/// What a resource becomes: its field, and itself.
type Each<'a, A, B> = &'a mut dyn FnMut(&'static str, A) -> Result<B, ResourceError>;

fn hand_out<T>(
    descriptors: Vec<OwnedFd>,
    convert: impl FnOnce(Each<'_, Descriptor, OwnedFd>) -> Result<T, ResourceError>,
) -> Result<T, ResourceError> {
    let mut slots: Vec<Option<OwnedFd>> = descriptors.into_iter().map(Some).collect();
    let converted = convert(&mut |what, Descriptor(index)| {
        slots
            .get_mut(usize::from(index))
            .and_then(Option::take)
            .ok_or(ResourceError::NoDescriptor { what, index })
    })?;
    match slots.iter().flatten().count() {
        0 => Ok(converted),
        count => Err(ResourceError::LeftOver { count }),
    }
}

fn open_all<T>(
    convert: impl FnOnce(Each<'_, PathBuf, Descriptor>) -> Result<T, ResourceError>,
) -> Result<(T, Vec<OwnedFd>), ResourceError> {
    let mut opened = Vec::new();
    let converted = convert(&mut |what, path: PathBuf| {
        let fd = open(what, &path).map_err(|source| ResourceError::Open { what, path, source })?;
        opened.push(fd);
        Ok(Descriptor(u8::try_from(opened.len() - 1).unwrap_or(u8::MAX)))
    })?;
    Ok((converted, opened))
}

const KVM: &str = "kvm";
const SERIAL: &str = "serial output";
const OVERLAY: &str = "disk overlay";
const VSOCK: &str = "vsock socket";
const CONTROL: &str = "control socket";

fn open(what: &'static str, path: &Path) -> io::Result<OwnedFd> {
    Ok(match what {
        KVM | OVERLAY => OpenOptions::new().read(true).write(true).open(path)?.into(),
        SERIAL if path == Path::new("/dev/stdout") => {
            use std::os::fd::AsFd;
            io::stdout().as_fd().try_clone_to_owned()?
        }
        SERIAL => {
            OpenOptions::new().append(true).create(true).custom_flags(libc::O_NOCTTY).open(path)?.into()
        }
        VSOCK => UnixListener::bind(path)?.into(),
        CONTROL => listen_for_packets(path)?,
        _ => File::open(path)?.into(),
    })
}

fn listen_for_packets(path: &Path) -> io::Result<OwnedFd> {
    use std::os::fd::{AsRawFd, FromRawFd};

    use std::os::unix::ffi::OsStrExt;

    use crate::event::check;
    // SAFETY: no pointers are passed.
    let raw = check(unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor was just made and is owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: a sockaddr_un is plain data.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = 1; // AF_UNIX
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    let size = libc::socklen_t::try_from(size_of::<libc::sockaddr_un>()).unwrap_or(0);
    // SAFETY: the address is a whole sockaddr_un.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) })?;
    // SAFETY: no pointers are passed.
    check(unsafe { libc::listen(socket.as_raw_fd(), 1) })?;
    Ok(socket)
}

fn count_blocks(count: usize) -> Result<(), ResourceError> {
    if count > MAX_BLOCKS { Err(ResourceError::TooManyBlocks { count }) } else { Ok(()) }
}

/// The one walk over every resource of a snapshot's machine.
fn convert_restored<A, B>(
    vm: RestoreConfig<A>,
    each: Each<'_, A, B>,
) -> Result<RestoreConfig<B>, ResourceError> {
    count_blocks(vm.blocks.len())?;
    let mut maybe = |what, resource: Option<A>| resource.map(|r| each(what, r)).transpose();
    let mut blocks = Vec::new();
    for RestoredBlock { id, base, overlay, limit } in vm.blocks {
        let (base, overlay) = (maybe("disk base", base)?, maybe(OVERLAY, overlay)?);
        blocks.push(RestoredBlock { id, base, overlay, limit });
    }
    let serial = match vm.serial {
        Some(SerialConfig { output, limit_bytes }) => {
            maybe(SERIAL, Some(output))?.map(|output| SerialConfig { output, limit_bytes })
        }
        None => None,
    };
    let (kvm, vsock, control) = (maybe(KVM, vm.kvm)?, maybe(VSOCK, vm.vsock)?, maybe(CONTROL, vm.control)?);
    let working_set = maybe("working set", vm.working_set)?;
    Ok(RestoreConfig {
        kvm,
        state: each("state file", vm.state)?,
        memory: each("memory file", vm.memory)?,
        vsock,
        working_set,
        blocks,
        serial,
        control,
        track_dirty: vm.track_dirty,
    })
}

/// The one walk over every resource of a configuration.
fn convert<A, B>(vm: VmConfig<A>, each: Each<'_, A, B>) -> Result<VmConfig<B>, ResourceError> {
    count_blocks(vm.blocks.len())?;
    let mut maybe = |what, resource: Option<A>| resource.map(|r| each(what, r)).transpose();
    let mut blocks = Vec::new();
    for BlockConfig { id, base, overlay, size_bytes, cache, limit } in vm.blocks {
        let (base, overlay) = (maybe("disk base", base)?, maybe(OVERLAY, overlay)?);
        blocks.push(BlockConfig { id, base, overlay, size_bytes, cache, limit });
    }
    let vsock = match vm.vsock {
        Some(VsockConfig { guest_cid, socket, connections }) => {
            Some(VsockConfig { guest_cid, socket: maybe(VSOCK, socket)?, connections })
        }
        None => None,
    };
    let serial = match vm.serial {
        Some(SerialConfig { output, limit_bytes }) => {
            maybe(SERIAL, Some(output))?.map(|output| SerialConfig { output, limit_bytes })
        }
        None => None,
    };
    let initramfs = maybe("initramfs", vm.initramfs)?;
    let control = maybe(CONTROL, vm.control)?;
    Ok(VmConfig {
        kvm: each(KVM, vm.kvm)?,
        vcpus: vm.vcpus,
        memory_mib: vm.memory_mib,
        huge_pages: vm.huge_pages,
        kernel: Kernel { image: each("kernel", vm.kernel.image)?, command_line: vm.kernel.command_line },
        initramfs,
        vsock,
        blocks,
        entropy: vm.entropy,
        balloon: vm.balloon,
        serial,
        control,
        track_dirty: vm.track_dirty,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(kernel: u8) -> VmConfig<Descriptor> {
        let text = format!(
            r#"{{"kvm":0,"vcpus":1,"memory_mib":64,"kernel":{{"image":{kernel},"command_line":""}}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    fn fds(n: usize) -> Vec<OwnedFd> {
        (0..n).map(|_| File::open("/dev/null").unwrap().into()).collect()
    }

    #[test]
    fn each_descriptor_is_used_once_and_none_is_left() {
        assert!(from_owner(vm(1), fds(2)).is_ok());
        assert!(matches!(from_owner(vm(0), fds(1)), Err(ResourceError::NoDescriptor { index: 0, .. })));
        assert!(matches!(from_owner(vm(9), fds(2)), Err(ResourceError::NoDescriptor { index: 9, .. })));
        assert!(matches!(from_owner(vm(1), fds(3)), Err(ResourceError::LeftOver { count: 1 })));
    }

    #[test]
    fn a_missing_file_is_named_with_its_field() {
        let text = r#"{"kvm":"/dev/null","vcpus":1,"memory_mib":64,
            "kernel":{"image":"/nonexistent/vmlinux","command_line":""}}"#;
        let error = from_file(serde_json::from_str(text).unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "/nonexistent/vmlinux (kernel) can't be opened");
    }
}
