//! Why a machine can't be made, and under which end of the process that falls.

use carrel_protocol::vmm::End;
use thiserror::Error;

use crate::arch::current as arch;
use crate::arch::current::state::StateError;
use crate::devices::DevicesError;
use crate::memory::MemoryError;
use crate::resources::ResourceError;
use crate::seccomp::SeccompError;
use crate::snapshot::SnapshotError;

/// A machine can't be made.
#[derive(Debug, Error)]
pub enum StartError {
    /// The configuration's resources don't fit.
    #[error(transparent)]
    Resources(#[from] ResourceError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel or initramfs.
    #[error(transparent)]
    Load(#[from] arch::load::LoadError),
    /// The boot information.
    #[error(transparent)]
    Parameters(#[from] arch::boot::BootError),
    /// vCPU registers.
    #[error(transparent)]
    Registers(#[from] arch::registers::RegisterError),
    /// CPUID.
    #[error(transparent)]
    Cpuid(#[from] arch::cpuid::CpuidError),
    /// Devices.
    #[error(transparent)]
    Devices(#[from] DevicesError),
    /// Filters.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// KVM.
    #[error("KVM refused to {what}")]
    Kvm {
        /// What was asked.
        what: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The host has no such thing to give.
    #[error("the host refused to {what}")]
    Host {
        /// What was asked.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Boot tables.
    #[error("the boot tables do not fit into the guest's memory")]
    Tables(#[from] vm_memory::GuestMemoryError),
    /// The state file.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A vCPU's or the clock's state.
    #[error(transparent)]
    State(#[from] StateError),
    /// The snapshot's guest knows other addresses.
    #[error(
        "the snapshot was made by a carrel-vmm that lays machines out differently; make the snapshot anew"
    )]
    Layout,
    /// The snapshot was made under another kernel.
    #[error("the snapshot was made under Linux {saved} and this host runs {here}; make the snapshot anew")]
    HostKernel {
        /// The snapshot's.
        saved: String,
        /// This one.
        here: String,
    },
    /// What was handed over is not what the snapshot's machine needs.
    #[error("the snapshot's machine has {has}, for which the configuration has {given}")]
    Misfit {
        /// What it has.
        has: String,
        /// What was given.
        given: String,
    },
    /// The VMM was prepared for another machine.
    #[error(
        "the snapshot's machine has {has}, and this carrel-vmm was prepared for {prepared}; prepare one for what the snapshot has"
    )]
    PreparedForAnother {
        /// What the snapshot has.
        has: String,
        /// What was announced.
        prepared: String,
    },
    /// No `/dev/kvm`, or one too many.
    #[error("a machine needs /dev/kvm once: with the request to prepare it, or else to restore it")]
    Device,
    /// Device state that no driver could have made.
    #[error("the snapshot holds a state that no device of this carrel-vmm can be in; make the snapshot anew")]
    DeviceState,
}

impl StartError {
    /// Under which end of the process this falls.
    pub fn end(&self) -> End {
        match self {
            Self::Resources(e) => e.end(),
            Self::Parameters(_)
            | Self::Load(_)
            | Self::Tables(_)
            | Self::Misfit { .. }
            | Self::PreparedForAnother { .. }
            | Self::Device => End::BadConfiguration,
            Self::Devices(e) => e.end(),
            Self::Memory(e) => e.end(),
            Self::State(e) if !e.is_misfit() => End::Kvm,
            Self::Snapshot(_)
            | Self::State(_)
            | Self::Layout
            | Self::HostKernel { .. }
            | Self::DeviceState => End::BadSnapshot,
            Self::Kvm { .. } | Self::Cpuid(_) | Self::Registers(_) => End::Kvm,
            Self::Host { .. } | Self::Seccomp(_) => End::Host,
        }
    }
}
