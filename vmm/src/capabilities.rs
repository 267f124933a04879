//! What the VMM builds on in KVM, as one table that `carrel doctor` reads by `carrel-vmm --print-kvm`.
//!
//! A capability says that KVM knows a request, not that guests run: that is found out by running one.

use carrel_protocol::vmm::{self, KvmCapability, KvmSupport};
use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;

/// `/dev/kvm` can't be asked.
#[derive(Debug, Error)]
#[error(
    "/dev/kvm can't be opened; enable virtualisation, load kvm_intel or kvm_amd, and let your user use it"
)]
pub struct CapabilityError(#[source] kvm_ioctls::Error);

struct Want {
    cap: Cap,
    name: &'static str,
    required: bool,
    purpose: &'static str,
}

const fn required(cap: Cap, name: &'static str, purpose: &'static str) -> Want {
    Want { cap, name, required: true, purpose }
}

const fn useful(cap: Cap, name: &'static str, purpose: &'static str) -> Want {
    Want { cap, name, required: false, purpose }
}

/// KVM API documentation, section 4 and 8; the names are those of its headers.
const WANTS: &[Want] = &[
    required(Cap::UserMemory, "KVM_CAP_USER_MEMORY", "guest memory is this process's own"),
    required(
        Cap::SplitIrqchip,
        "KVM_CAP_SPLIT_IRQCHIP",
        "local APICs in the kernel, and no other interrupt chip there",
    ),
    required(Cap::Irqfd, "KVM_CAP_IRQFD", "devices interrupt by an eventfd"),
    required(
        Cap::Ioeventfd,
        "KVM_CAP_IOEVENTFD",
        "queue notifications without a way through the vCPU thread",
    ),
    required(Cap::ExtCpuid, "KVM_CAP_EXT_CPUID", "CPUID cut down to an allow-list"),
    required(Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "a pause that can't be missed"),
    useful(
        Cap::TscDeadlineTimer,
        "KVM_CAP_TSC_DEADLINE_TIMER",
        "a guest's timer; calibrating another costs a boot half a second",
    ),
    useful(Cap::Clocksource, "KVM_CAP_CLOCKSOURCE", "kvm-clock"),
    useful(Cap::Xcrs, "KVM_CAP_XCRS", "AVX in the guest"),
];

/// Asks `/dev/kvm`.
pub fn of_this_host() -> Result<KvmSupport, CapabilityError> {
    let kvm = Kvm::new().map_err(CapabilityError)?;
    let capability = |want: &Want| KvmCapability {
        name: want.name.into(),
        purpose: want.purpose.into(),
        required: want.required,
        present: kvm.check_extension(want.cap),
    };
    Ok(KvmSupport {
        version: vmm::VERSION,
        api_version: kvm.get_api_version(),
        vcpus: kvm.get_max_vcpus(),
        capabilities: WANTS.iter().map(capability).collect(),
    })
}
