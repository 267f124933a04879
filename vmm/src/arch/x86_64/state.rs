//! A vCPU and the machine's clock as they are saved, and the order in which they come back.
//!
//! ```text
//!  save     complete the exit under way ─▶ MP state, registers, XSAVE, local APIC, MSRs, events
//!  restore  (CPUID) ─▶ TSC rate ─▶ MP state ─▶ registers ─▶ XSAVE, XCRs ─▶ debug registers ─▶ local APIC ─▶ MSRs ─▶ events ─▶ (all vCPUs) ─▶ clock
//! ```
//!
//! The order is KVM's: CPUID says which registers there are; the local APIC's base is a system register; the deadline timer is set when the TSC is
//! right; events come last, for some of the others clear them. The structures are KVM's own (KVM API, *4. API description*), kept as bytes.

use std::ops::RangeInclusive;

use kvm_bindings::{
    CpuId, KVM_CLOCK_TSC_STABLE, Msrs, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::cpuid::{self, CpuidError};

const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// KVM's own copy of the first two under other numbers; the new ones do what these did.
const MSR_KVM_WALL_CLOCK: u32 = 0x11;
const MSR_KVM_SYSTEM_TIME: u32 = 0x12;
/// Memory types: variable ranges (eight pairs), fixed ranges, the default (SDM volume 3A, *12.11 Memory Type Range Registers*). KVM has them and doesn't name them.
const MTRRS: [RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];
const MSR_IA32_MCG_CAP: u32 = 0x179;
/// The first machine-check bank's; each has four (SDM volume 3B, *17.3.2 Error-Reporting Register Banks*). Not named either.
const MSR_IA32_MC0_CTL: u32 = 0x400;
/// KVM has no more banks.
const MOST_BANKS: u32 = 32;
/// What is asked for in one KVM_GET_MSRS or KVM_SET_MSRS; KVM takes 256.
const MSRS_AT_ONCE: usize = 128;
/// Two TSC rates that differ by no more are one (Linux, arch/x86/kvm/x86.c, `tsc_tolerance_ppm`).
const TOLERANCE_PPM: u64 = 250;

/// A vCPU can't be saved or go on.
#[derive(Debug, Error)]
pub enum StateError {
    /// KVM refused.
    #[error("KVM refused to {what}")]
    Kvm {
        /// What was asked.
        what: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A part of the state can't be set here.
    #[error("this host's KVM does not take {what} of the snapshot; make the snapshot anew on this host")]
    Refused {
        /// Which.
        what: &'static str,
        /// EINVAL.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A register of this number can't be set here.
    #[error(
        "this host's KVM does not take MSR {index:#x} = {value:#x} of the snapshot; make the snapshot anew on this host"
    )]
    Msr {
        /// Its number.
        index: u32,
        /// What it was.
        value: u64,
    },
    /// The processor is another one.
    #[error(
        "the snapshot was made on another kind of processor or under another KVM (CPUID leaf {leaf:#x}.{subleaf} differs); make it anew on this host"
    )]
    Cpu {
        /// The first leaf that differs.
        leaf: u32,
        /// Its subleaf.
        subleaf: u32,
    },
    /// The TSC's rate is another one and can't be scaled.
    #[error(
        "the snapshot's processor counted at {saved} kHz, this host's at {here} kHz, and KVM can't scale it; make the snapshot anew on this host"
    )]
    TscRate {
        /// The snapshot's.
        saved: u32,
        /// This host's.
        here: u32,
    },
    /// State that this format has no room for.
    #[error("the guest's extended state has {bytes} bytes; a snapshot holds 4,096")]
    ExtendedState {
        /// What KVM says.
        bytes: i32,
    },
    /// CPUID.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// An exit that does not come to its end, or ended the machine.
    #[error("a vCPU's last exit could not be completed")]
    Unsettled,
    /// A list is longer than KVM takes.
    #[error("a list of registers is longer than KVM takes")]
    List,
}

impl StateError {
    /// Whether it is the snapshot that is wrong here, rather than KVM that failed.
    pub fn is_misfit(&self) -> bool {
        match self {
            Self::Refused { .. }
            | Self::Msr { .. }
            | Self::Cpu { .. }
            | Self::TscRate { .. }
            | Self::List => true,
            Self::Kvm { .. } | Self::ExtendedState { .. } | Self::Cpuid(_) | Self::Unsettled => false,
        }
    }
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Kvm { what, source }
}

/// What KVM finds wrong with saved state is the snapshot's fault, and all else KVM's.
fn set(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StateError {
    move |source| match source.errno() {
        libc::EINVAL => StateError::Refused { what, source },
        _ => StateError::Kvm { what: "set the state of a vCPU", source },
    }
}

/// Everything of one vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    /// kHz; 0 where KVM does not tell.
    tsc_khz: u32,
    mp_state: kvm_mp_state,
    registers: kvm_regs,
    system_registers: kvm_sregs,
    extended_state: kvm_xsave,
    extended_controls: kvm_xcrs,
    debug_registers: kvm_debugregs,
    local_apic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// What to save of vCPUs, beside what every one has.
#[derive(Debug, Default)]
pub struct Wanted {
    /// Numbers of MSRs.
    msrs: Vec<u32>,
    /// What each vCPU was offered. KVM itself would tell what it has made of it since.
    cpuid: Vec<CpuId>,
}

impl Wanted {
    /// All MSRs that KVM names, but those that say the same twice; and those that it has and does not name.
    ///
    /// # Errors
    ///
    /// KVM's.
    pub fn of(device: &Kvm, vcpus: u8) -> Result<Self, StateError> {
        let list = device.get_msr_index_list().map_err(kvm("name its MSRs"))?;
        let twice = [MSR_KVM_WALL_CLOCK, MSR_KVM_SYSTEM_TIME];
        let supported = cpuid::supported(device)?;
        let cpuid = (0..vcpus).map(|index| cpuid::for_vcpu(&supported, device, index, vcpus));
        Ok(Self {
            msrs: list
                .as_slice()
                .iter()
                .copied()
                .filter(|index| !twice.contains(index))
                .chain(MTRRS.into_iter().flatten())
                .collect(),
            cpuid: cpuid.collect::<Result<_, _>>()?,
        })
    }
}

/// Refuses a machine whose extended state (AMX, for one) is larger than what is saved. None is offered to guests that has it.
///
/// # Errors
///
/// It is.
pub fn check_extended_state(vm: &VmFd) -> Result<(), StateError> {
    match vm.check_extension_int(Cap::Xsave2) {
        bytes if bytes > 4096 => Err(StateError::ExtendedState { bytes }),
        _ => Ok(()),
    }
}

impl VcpuState {
    /// Reads all of it. The exit that the vCPU came out with must be completed: KVM_RUN came back with EINTR.
    ///
    /// # Errors
    ///
    /// KVM's.
    pub fn save(vcpu: &VcpuFd, index: usize, wanted: &Wanted) -> Result<Self, StateError> {
        Ok(Self {
            cpuid: wanted.cpuid.get(index).ok_or(StateError::List)?.as_slice().to_vec(),
            tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
            // First: it lets KVM take up an INIT or SIPI that is on its way, which changes registers.
            mp_state: vcpu.get_mp_state().map_err(kvm("tell a vCPU's MP state"))?,
            registers: vcpu.get_regs().map_err(kvm("tell a vCPU's registers"))?,
            system_registers: vcpu.get_sregs().map_err(kvm("tell a vCPU's system registers"))?,
            extended_state: vcpu.get_xsave().map_err(kvm("tell a vCPU's extended state"))?,
            extended_controls: vcpu.get_xcrs().map_err(kvm("tell a vCPU's XCRs"))?,
            debug_registers: vcpu.get_debug_regs().map_err(kvm("tell a vCPU's debug registers"))?,
            // Before the local APIC, with the deadline of its timer: one that comes in between is told twice, and not lost.
            msrs: ordered([read_msrs(vcpu, &wanted.msrs)?, read_banks(vcpu)?].concat()),
            local_apic: vcpu.get_lapic().map_err(kvm("tell a vCPU's local APIC"))?,
            events: vcpu.get_vcpu_events().map_err(kvm("tell a vCPU's events"))?,
        })
    }

    /// Gives all of it to a new vCPU that has its CPUID ([`Self::check_cpu`]).
    ///
    /// # Errors
    ///
    /// This host can't go on with it, or KVM's.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), StateError> {
        self.set_tsc_rate(vcpu)?;
        vcpu.set_mp_state(self.mp_state).map_err(set("a vCPU's MP state"))?;
        vcpu.set_regs(&self.registers).map_err(set("a vCPU's registers"))?;
        vcpu.set_sregs(&self.system_registers).map_err(set("a vCPU's system registers"))?;
        // SAFETY: the structure is as large as KVM's without XSAVE components that a process has to ask for, and this process asks for none.
        unsafe { vcpu.set_xsave(&self.extended_state) }.map_err(set("a vCPU's extended state"))?;
        vcpu.set_xcrs(&self.extended_controls).map_err(set("a vCPU's XCRs"))?;
        vcpu.set_debug_regs(&self.debug_registers).map_err(set("a vCPU's debug registers"))?;
        vcpu.set_lapic(&self.local_apic).map_err(set("a vCPU's local APIC"))?;
        write_msrs(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events).map_err(set("a vCPU's events"))
    }

    /// That the processor here is the one that the guest knows: what it would be offered at a boot is what it was offered.
    ///
    /// # Errors
    ///
    /// The first leaf that differs.
    pub fn check_cpu(&self, offered: &[kvm_cpuid_entry2]) -> Result<(), StateError> {
        let differs =
            |entry: &kvm_cpuid_entry2| StateError::Cpu { leaf: entry.function, subleaf: entry.index };
        let mut pairs = self.cpuid.iter().zip(offered);
        if let Some((ours, _)) = pairs.find(|(ours, theirs)| ours != theirs) {
            return Err(differs(ours));
        }
        let shorter = self.cpuid.len().min(offered.len());
        match self.cpuid.get(shorter).or(offered.get(shorter)) {
            Some(entry) => Err(differs(entry)),
            None => Ok(()),
        }
    }

    fn set_tsc_rate(&self, vcpu: &VcpuFd) -> Result<(), StateError> {
        let here = vcpu.get_tsc_khz().unwrap_or(0);
        let (saved, here_wide) = (u64::from(self.tsc_khz), u64::from(here));
        if saved == 0 || here == 0 || saved.abs_diff(here_wide) * 1_000_000 <= here_wide * TOLERANCE_PPM {
            return Ok(());
        }
        vcpu.set_tsc_khz(self.tsc_khz).map_err(|_| StateError::TscRate { saved: self.tsc_khz, here })
    }
}

/// Reads those that can be read: KVM names some that it then has not, on this processor.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let mut rest = indices.to_vec();
    let mut all: Vec<kvm_msr_entry> = Vec::with_capacity(rest.len());
    while !rest.is_empty() {
        let now: Vec<kvm_msr_entry> = rest
            .iter()
            .take(MSRS_AT_ONCE)
            .map(|index| kvm_msr_entry { index: *index, ..Default::default() })
            .collect();
        let mut msrs = Msrs::from_entries(&now).map_err(|_| StateError::List)?;
        let read = vcpu.get_msrs(&mut msrs).map_err(kvm("tell a vCPU's MSRs"))?;
        all.extend(msrs.as_slice().iter().take(read));
        // The one that stopped it is left out.
        rest.drain(..(read + usize::from(read < now.len())).min(rest.len()));
    }
    Ok(all)
}

/// A timer that is armed by a wrong TSC fires at once or never.
fn ordered(mut msrs: Vec<kvm_msr_entry>) -> Vec<kvm_msr_entry> {
    msrs.sort_by_key(|entry| (entry.index == MSR_IA32_TSC_DEADLINE, entry.index != MSR_IA32_TSC));
    msrs
}

/// Machine-check banks, as far as they are not as they begin: all errors enabled, none there.
fn read_banks(vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, StateError> {
    let capability = read_msrs(vcpu, &[MSR_IA32_MCG_CAP])?;
    let banks = capability.first().map_or(0, |entry| u32::from(entry.data.to_le_bytes()[0])).min(MOST_BANKS);
    let all: Vec<u32> = (MSR_IA32_MC0_CTL..).take(usize::try_from(banks * 4).unwrap_or(0)).collect();
    let mut read = read_msrs(vcpu, &all)?;
    let begins = |entry: &kvm_msr_entry| if entry.index.is_multiple_of(4) { u64::MAX } else { 0 };
    read.retain(|entry| entry.data != begins(entry));
    Ok(read)
}

fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), StateError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let now = rest.get(..MSRS_AT_ONCE).unwrap_or(rest);
        let msrs = Msrs::from_entries(now).map_err(|_| StateError::List)?;
        let written = vcpu.set_msrs(&msrs).map_err(kvm("set a vCPU's MSRs"))?;
        let done = match now.get(written) {
            None => written,
            // What is zero here too need not be set; KVM lets some be read that it lets nobody write.
            Some(stopped) if stopped.data == 0 => written + 1,
            Some(stopped) => return Err(StateError::Msr { index: stopped.index, value: stopped.data }),
        };
        rest = rest.get(done..).unwrap_or_default();
    }
    Ok(())
}

/// The guest's clock (kvm-clock) as it stood.
///
/// # Errors
///
/// KVM's.
pub fn save_clock(vm: &VmFd) -> Result<kvm_clock_data, StateError> {
    vm.get_clock().map_err(kvm("tell the guest's clock"))
}

/// The clock goes on from where it stood: the monotonic time of a guest neither jumps nor counts what it slept. After all vCPUs.
///
/// # Errors
///
/// KVM's.
pub fn restore_clock(vm: &VmFd, saved: &kvm_clock_data) -> Result<(), StateError> {
    // Not KVM_CLOCK_REALTIME, by which KVM would add the time that has passed.
    const { assert!(KVM_CLOCK_TSC_STABLE == 2) };
    let clock = kvm_clock_data { clock: saved.clock, flags: 0, ..Default::default() };
    vm.set_clock(&clock).map_err(kvm("set the guest's clock"))
}

/// A guest that was stopped is told so, lest its watchdog takes the pause for a lockup (KVM API, KVM_KVMCLOCK_CTRL).
pub fn announce_pause(vcpu: &VcpuFd) {
    // Refused where the guest has no such clock.
    let _ = vcpu.kvmclock_ctrl();
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A vCPU with something of everything in it.
    pub(crate) fn sample() -> VcpuState {
        VcpuState {
            tsc_khz: 2_000_000,
            msrs: vec![kvm_msr_entry { index: MSR_IA32_TSC, data: 5, ..Default::default() }],
            ..vcpu(vec![leaf(1, 0, 5)])
        }
    }

    fn leaf(function: u32, index: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ecx, ..Default::default() }
    }

    fn vcpu(cpuid: Vec<kvm_cpuid_entry2>) -> VcpuState {
        VcpuState {
            cpuid,
            tsc_khz: 0,
            mp_state: Default::default(),
            registers: Default::default(),
            system_registers: Default::default(),
            extended_state: Default::default(),
            extended_controls: Default::default(),
            debug_registers: Default::default(),
            local_apic: Default::default(),
            msrs: Vec::new(),
            events: Default::default(),
        }
    }

    #[test]
    fn another_processor_is_named_by_the_leaf_that_differs() {
        let ours = vcpu(vec![leaf(1, 0, 5), leaf(7, 0, 6)]);
        assert!(ours.check_cpu(&[leaf(1, 0, 5), leaf(7, 0, 6)]).is_ok());
        assert!(matches!(
            ours.check_cpu(&[leaf(1, 0, 5), leaf(7, 0, 2)]),
            Err(StateError::Cpu { leaf: 7, subleaf: 0 })
        ));
        assert!(matches!(ours.check_cpu(&[leaf(1, 0, 5)]), Err(StateError::Cpu { leaf: 7, .. })), "fewer");
        let more = [leaf(1, 0, 5), leaf(7, 0, 6), leaf(0xd, 1, 0)];
        assert!(matches!(ours.check_cpu(&more), Err(StateError::Cpu { leaf: 0xd, subleaf: 1 })), "more");
    }
}
