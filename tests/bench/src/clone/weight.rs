//! Idle clones of one template beside each other: what each takes of the host's memory.
//!
//! A clone's PSS is that of all of its VMM's processes, guest memory included; its kernel memory is that of the cgroup which its VMM is in, alone. What the pool
//! that owns carrel's clones takes itself is not in it: docs/performance.md has that beside.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::rooms::{Room, Side};
use super::template::Template;
use super::{Clones, MEMORY_MIB, single};
use crate::isolation::stage::available_mib;
use crate::{Metric, Sample, meter, progress};

/// Host memory that is left alone, MiB.
const RESERVE_MIB: u64 = 512;
/// What was just started comes to rest.
pub(super) const REST: Duration = Duration::from_secs(8);

/// A clone that stays, in a cgroup that is removed after it.
struct Idle {
    room: Room,
    _cgroup: Option<meter::Cgroup>,
}

/// One clone's figures, KiB.
struct Weight {
    pss: f64,
    own_pss: f64,
    kernel: f64,
}

/// Weighs as many as are asked for, or as memory allows.
pub(super) fn weigh(clones: &Clones<'_>) -> Result<Vec<Metric>> {
    let template = clones.template(&clones.linux(MEMORY_MIB)?, true)?;
    let ours = beside_each_other(clones, Side::Prepared, &template, clones.options.clone.clones)?;
    let theirs = beside_each_other(clones, Side::Firecracker, &template, u32::try_from(ours.len())?)?;
    if ours.len() != theirs.len() {
        eprintln!(
            "memory: {} clones of carrel's beside {} of Firecracker's, for there was no memory for more",
            ours.len(),
            theirs.len()
        );
    }
    let n = ours.len().min(theirs.len());
    let row = |what: &str, of: fn(&Weight) -> f64| {
        let column = |weights: &[Weight]| -> Vec<Sample> { single(weights.iter().map(of)) };
        let metric = format!("{what} per idle clone, {n} clones");
        clones.compare(&metric, "KiB", &clones.version, &column(&ours), &column(&theirs))
    };
    let rows = [
        row("PSS and kernel memory", |weight| weight.pss + weight.kernel),
        row("PSS", |weight| weight.pss),
        row("PSS without guest memory", |weight| weight.own_pss),
        row("kernel memory", |weight| weight.kernel),
    ];
    Ok(rows.into_iter().flatten().collect())
}

fn beside_each_other(
    clones: &Clones<'_>,
    side: Side,
    template: &Template,
    wanted: u32,
) -> Result<Vec<Weight>> {
    let mut idle = Vec::new();
    for n in 0..wanted {
        if available_mib()? < RESERVE_MIB + u64::from(MEMORY_MIB) {
            eprintln!("\n{}: no memory for more than {n} of {wanted} clones", side.name());
            break;
        }
        idle.push(one(clones, side, template, n)?);
        progress(n + 1, wanted);
    }
    ensure!(!idle.is_empty(), "there is no memory for a single clone");
    std::thread::sleep(REST);
    let parents = meter::parents();
    idle.iter().map(|idle| weight(&parents, idle)).collect()
}

/// One more idle clone.
fn one(clones: &Clones<'_>, side: Side, template: &Template, n: u32) -> Result<Idle> {
    // A prepared VMM has one by its launcher.
    let cgroup = match side {
        Side::Firecracker | Side::FirecrackerApi => meter::Cgroup::new(&format!("carrel-bench-{n}")),
        Side::Carrel | Side::Prepared => None,
    };
    let wrapper = cgroup.as_ref().map(meter::Cgroup::wrapper).unwrap_or_default();
    let ready = clones.bed.ready(side, template, &wrapper)?;
    let started = ready.start(template).with_context(|| format!("{}: clone {}", side.name(), n + 1))?;
    Ok(Idle { room: started.room, _cgroup: cgroup })
}

fn weight(parents: &[(u32, u32)], idle: &Idle) -> Result<Weight> {
    let number = |n: u64| u32::try_from(n).map_or(f64::NAN, f64::from);
    let family = meter::family_in(parents, idle.room.pid());
    let pss = meter::whole_pss_kib(&family).context("a clone ended before it was weighed")?;
    Ok(Weight {
        pss: number(pss),
        own_pss: number(meter::pss_kib(&family, MEMORY_MIB)?),
        kernel: meter::kernel_kib_of(idle.room.pid()).map_or(f64::NAN, number),
    })
}
