//! The I/O APIC (Intel 82093AA data sheet, chapter 3): which interrupt of a device becomes which vector of which vCPU.
//!
//! ```text
//!  guest ── MMIO exit ──▶ IoApic: registers ──▶ Routes ── KVM_SET_GSI_ROUTING ──▶ KVM
//!  device ── irqfd(GSI n) ─────────────────────────────────────────────────────▶ KVM ── as pin n's message ──▶ local APIC
//! ```
//!
//! KVM keeps the local APICs alone (a *split* interrupt chip, KVM API, `KVM_CAP_SPLIT_IRQCHIP`). A guest comes here a few times for each interrupt
//! that it sets up; interrupts themselves never do. There is no 8259 then, and a Linux that finds none leaves out two passes over every pin. Every interrupt here is an edge: a pin that is set to level is served as edge, and one that is masked loses what comes.

use std::sync::{Mutex, PoisonError};

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry,
    kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

/// Where it lies.
pub(crate) const ADDRESS: u32 = 0xfec0_0000;
/// Pins at most, as many as a PC's has. GSI n is pin n.
const MAX_PINS: u8 = 24;
const WINDOW: u64 = 0x20;

const SELECT: u64 = 0x00;
const DATA: u64 = 0x10;

const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const REDIRECTION: u8 = 0x10;

const VERSION_11: u32 = 0x11;
const ID_BITS: u32 = 0x0f00_0000;
/// All of a redirection entry's lower half but delivery status and remote IRR, which are read-only, and what is reserved.
const LOW_BITS: u32 = 0x0001_afff;
/// The destination.
const HIGH_BITS: u32 = 0xff00_0000;
const MASKED: u32 = 1 << 16;

/// The registers, as they are saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    select: u8,
    id: u32,
    /// Lower and upper half of each pin's entry.
    redirection: Vec<[u32; 2]>,
}

/// What KVM sends to a local APIC for an interrupt (SDM volume 3, *Message Signalled Interrupts*).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Message {
    address: u32,
    data: u32,
}

impl Message {
    fn route(self, gsi: u32) -> kvm_irq_routing_entry {
        let msi = kvm_irq_routing_msi { address_lo: self.address, data: self.data, ..Default::default() };
        let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
        entry.u.msi = msi;
        entry
    }
}

impl Registers {
    fn new(pins: u8) -> Self {
        Self { select: 0, id: 0, redirection: vec![[MASKED, 0]; pins.clamp(1, MAX_PINS).into()] }
    }

    fn read(&self, offset: u64) -> u32 {
        match offset {
            SELECT => self.select.into(),
            DATA => match self.select {
                ID | ARBITRATION => self.id,
                VERSION => {
                    let last = u32::try_from(self.redirection.len() - 1).unwrap_or(0);
                    VERSION_11 | last << 16
                }
                select => self.half(select).unwrap_or(0),
            },
            _ => 0,
        }
    }

    /// Returns whether a message changed: what happens behind a mask concerns nobody.
    fn write(&mut self, offset: u64, value: u32) -> bool {
        match (offset, self.select) {
            // The register has eight bits.
            (SELECT, _) => self.select = value.to_le_bytes()[0],
            (DATA, ID) => self.id = value & ID_BITS,
            (DATA, select) => {
                let Some((pin, half)) = place(select) else { return false };
                let before = self.message(pin);
                let writable = if half == 0 { LOW_BITS } else { HIGH_BITS };
                if let Some(now) = self.redirection.get_mut(pin).and_then(|entry| entry.get_mut(half)) {
                    *now = value & writable;
                }
                return self.message(pin) != before;
            }
            _ => {}
        }
        false
    }

    fn half(&self, select: u8) -> Option<u32> {
        let (pin, half) = place(select)?;
        self.redirection.get(pin)?.get(half).copied()
    }

    /// `None` for a masked pin.
    fn message(&self, pin: usize) -> Option<Message> {
        let &[low, high] = self.redirection.get(pin)?;
        let logical = low >> 11 & 1;
        let address = super::LOCAL_APIC | (high >> 24) << 12 | logical << 2;
        // Vector and delivery mode. Bit 15 stays clear: an edge.
        (low & MASKED == 0).then_some(Message { address, data: low & 0x7ff })
    }

    fn routes(&self) -> Vec<kvm_irq_routing_entry> {
        let route = |(gsi, pin)| Some(self.message(pin)?.route(gsi));
        (0..).zip(0..self.redirection.len()).filter_map(route).collect()
    }
}

/// Pin and half of an entry's register.
fn place(select: u8) -> Option<(usize, usize)> {
    let index = usize::from(select.checked_sub(REDIRECTION)?);
    Some((index / 2, index % 2))
}

/// Which of its registers lies at an address.
pub fn register(address: u64) -> Option<u64> {
    address.checked_sub(ADDRESS.into()).filter(|&offset| offset < WINDOW)
}

/// The chip with the VM whose interrupts it routes.
#[derive(Debug)]
pub struct IoApic {
    registers: Mutex<Registers>,
    /// The machine's, kept here; the vCPUs have their own descriptors.
    vm: VmFd,
}

/// Leaves the I/O APIC to this process. Before the first vCPU.
///
/// # Errors
///
/// KVM's, which has it since Linux 4.4.
pub fn split(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    // As many pins may ask to hear of the end of a level interrupt. None does, but KVM wants to know where other routes begin.
    split.args[0] = MAX_PINS.into();
    vm.enable_cap(&split)
}

impl IoApic {
    /// A chip as after a reset: every pin masked. It has no more pins than there are interrupts, 24 at most: a Linux that enables x2APIC saves and
    /// restores them all, eight exits each.
    pub fn new(vm: VmFd, pins: u8) -> Self {
        Self { registers: Registers::new(pins).into(), vm }
    }

    /// A chip that goes on from saved registers, of a machine with so many interrupts. Nothing is routed until [`Self::route`].
    ///
    /// Whatever a file says, the chip can hold it: bits that no guest could have set are dropped. `None`: it has not as many pins.
    pub fn restored(vm: VmFd, saved: &Registers, pins: u8) -> Option<Self> {
        let fresh = Registers::new(pins);
        if saved.redirection.len() != fresh.redirection.len() {
            return None;
        }
        let redirection =
            saved.redirection.iter().map(|[low, high]| [low & LOW_BITS, high & HIGH_BITS]).collect();
        let registers = Registers { select: saved.select, id: saved.id & ID_BITS, redirection };
        Some(Self { registers: registers.into(), vm })
    }

    /// Tells KVM all routes.
    ///
    /// # Errors
    ///
    /// KVM's, if it does not take them.
    pub fn route(&self) -> Result<(), kvm_ioctls::Error> {
        self.tell(&self.state())
    }

    fn tell(&self, registers: &Registers) -> Result<(), kvm_ioctls::Error> {
        let routes = KvmIrqRouting::from_entries(&registers.routes());
        self.vm.set_gsi_routing(&routes.map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))?)
    }

    /// The registers, to be saved.
    pub fn state(&self) -> Registers {
        // No code panics while it holds this; a poisoned lock's content is still right.
        self.registers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The VM that it routes for.
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// The guest reads a [`register`]. They are 32 bits wide; anything else reads as ones, as from an empty bus.
    pub fn read(&self, register: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (Ok(data), Ok(registers)) = (<&mut [u8; 4]>::try_from(data), self.registers.lock()) {
            *data = registers.read(register).to_le_bytes();
        }
    }

    /// The guest writes a [`register`].
    ///
    /// # Errors
    ///
    /// KVM's, if it does not take the routes.
    pub fn write(&self, register: u64, data: &[u8]) -> Result<(), kvm_ioctls::Error> {
        let (Ok(&data), Ok(mut registers)) = (<&[u8; 4]>::try_from(data), self.registers.lock()) else {
            return Ok(());
        };
        if !registers.write(register, u32::from_le_bytes(data)) {
            return Ok(());
        }
        // Told with the lock held, so that the last to write is the last to be told.
        self.tell(&registers)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A chip with a pin in use.
    pub(crate) fn sample() -> Registers {
        let mut chip = Registers::new(6);
        set(&mut chip, REDIRECTION + 10, 0x31);
        chip
    }

    fn set(chip: &mut Registers, select: u8, value: u32) -> bool {
        chip.write(SELECT, select.into());
        chip.write(DATA, value)
    }

    fn get(chip: &mut Registers, select: u8) -> u32 {
        chip.write(SELECT, select.into());
        chip.read(DATA)
    }

    #[test]
    fn it_says_what_it_is() {
        let mut chip = Registers::new(MAX_PINS);
        assert_eq!(get(&mut chip, VERSION), 0x0017_0011);
        set(&mut chip, ID, 0xffff_ffff);
        assert_eq!((get(&mut chip, ID), get(&mut chip, ARBITRATION)), (0x0f00_0000, 0x0f00_0000));
        assert_eq!(chip.read(SELECT), 2);
        assert_eq!(get(&mut chip, 0x40), 0, "there are 24 pins");
        let mut small = Registers::new(6);
        assert_eq!(get(&mut small, VERSION), 0x0005_0011);
        assert!(!set(&mut small, REDIRECTION + 12, 0x31) && get(&mut small, REDIRECTION + 12) == 0);
    }

    #[test]
    fn after_a_reset_every_pin_is_masked() {
        let mut chip = Registers::new(MAX_PINS);
        for pin in 0..MAX_PINS {
            assert_eq!(get(&mut chip, REDIRECTION + 2 * pin), MASKED);
        }
        assert_eq!(chip.routes().len(), 0);
    }

    #[test]
    fn an_unmasked_pin_is_a_message_to_its_vcpu() {
        let mut chip = Registers::new(MAX_PINS);
        // As Linux does it: destination 2, then vector 0x31, fixed, physical, edge.
        assert!(!set(&mut chip, REDIRECTION + 11, 0x0200_0000), "it is still masked");
        assert!(set(&mut chip, REDIRECTION + 10, 0x31));
        assert_eq!(chip.message(5), Some(Message { address: 0xfee0_2000, data: 0x31 }));
        let [route] = chip.routes()[..] else { panic!("one route") };
        assert_eq!((route.gsi, route.type_), (5, KVM_IRQ_ROUTING_MSI));
        // Logical, lowest priority, level: an edge all the same.
        assert!(set(&mut chip, REDIRECTION + 10, 0x0000_8931));
        assert_eq!(chip.message(5), Some(Message { address: 0xfee0_2004, data: 0x131 }));
        assert!(!set(&mut chip, REDIRECTION + 10, 0x0000_8931), "nothing changed");
        assert!(set(&mut chip, REDIRECTION + 10, MASKED | 0x31));
        assert_eq!(chip.routes().len(), 0);
    }

    proptest! {
        /// Whatever a guest writes: reserved and read-only bits stay clear, and the routes are those of pins that are not masked.
        #[test]
        fn routes_are_as_told_and_follow_the_registers(
            writes in prop::collection::vec((0u64..WINDOW, prop_oneof![any::<u32>(), 0u32..0x42]), 0..200),
        ) {
            let mut chip = Registers::new(MAX_PINS);
            let mut told = chip.routes().len();
            for (offset, value) in writes {
                let before: Vec<_> = (0..usize::from(MAX_PINS)).map(|pin| chip.message(pin)).collect();
                let changed = chip.write(offset, value);
                let after: Vec<_> = (0..usize::from(MAX_PINS)).map(|pin| chip.message(pin)).collect();
                prop_assert_eq!(changed, before != after);
                if changed {
                    told = chip.routes().len();
                }
                prop_assert_eq!(told, chip.redirection.iter().filter(|[low, _]| low & MASKED == 0).count());
                prop_assert!(chip.redirection.iter().all(|[low, high]| low & !LOW_BITS == 0 && high & !HIGH_BITS == 0));
            }
        }
    }
}
