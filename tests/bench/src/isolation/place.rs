//! Where it was measured: what a reader has to know of the host.

use std::fs;

use serde::{Deserialize, Serialize};

/// A host, as far as it matters for the figures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Place {
    /// The processor's own name.
    pub(crate) cpu: String,
    /// CPUs that may be used.
    pub(crate) cpus: usize,
    /// Memory, MiB.
    pub(crate) memory_mib: u64,
    /// Kernel release and version.
    pub(crate) kernel: String,
    /// The hypervisor's signature (CPUID leaf 0x40000000), if it runs under one that says so.
    pub(crate) hypervisor: Option<String>,
    /// Whether the CPU is emulated, and figures are no figures of hardware.
    pub(crate) emulated: bool,
    /// Transparent huge pages, as the kernel's file has it.
    pub(crate) huge_pages: String,
    /// Load average over one minute when it began: others on the same CPUs.
    pub(crate) load: String,
    /// When it began, seconds since 1970, UTC.
    pub(crate) began: u64,
}

impl Place {
    /// This host, now.
    pub(crate) fn here() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map(|(_, name)| name);
        let hypervisor = cpuinfo.contains("hypervisor").then(signature).flatten();
        let huge = read("/sys/kernel/mm/transparent_hugepage/enabled");
        let uname = nix::sys::utsname::uname().ok();
        let kernel =
            uname.map(|u| format!("{} {}", u.release().to_string_lossy(), u.version().to_string_lossy()));
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            cpu: model.unwrap_or("unknown").to_owned(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: crate::meter::field(&read("/proc/meminfo"), "MemTotal:").unwrap_or(0) / 1024,
            kernel: kernel.unwrap_or_default(),
            emulated: hypervisor.as_deref() == Some("TCGTCGTCGTCG"),
            hypervisor,
            huge_pages: huge.split(['[', ']']).nth(1).unwrap_or("unknown").to_owned(),
            load: read("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned(),
            began: now.map_or(0, |since| since.as_secs()),
        }
    }

    /// Whether figures of both can be compared. How busy it was may differ, and when.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let timeless = |place: &Self| Self { load: String::new(), began: 0, ..place.clone() };
        timeless(self) == timeless(other)
    }

    /// In a sentence.
    pub(crate) fn sentence(&self) -> String {
        let Self { cpu, cpus, memory_mib, kernel, hypervisor, emulated, huge_pages, load, .. } = self;
        let under = match hypervisor {
            _ if *emulated => {
                "; an EMULATED host (QEMU's TCG): ratios within this run mean something, times don't".into()
            }
            Some(name) => format!("; under a hypervisor ({name})"),
            None => String::new(),
        };
        format!(
            "{cpu}, {cpus} CPUs, {memory_mib} MiB, Linux {kernel}, huge pages {huge_pages}, load {load}{under}"
        )
    }
}

/// The twelve characters by which a hypervisor names itself.
fn signature() -> Option<String> {
    let leaf = std::arch::x86_64::__cpuid(0x4000_0000);
    let bytes: Vec<u8> = [leaf.ebx, leaf.ecx, leaf.edx].into_iter().flat_map(u32::to_le_bytes).collect();
    let name = String::from_utf8(bytes).ok()?;
    let name = name.trim_end_matches('\0');
    (!name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_is_described() {
        let here = Place::here();
        assert!(here.cpus > 0 && here.memory_mib > 0 && !here.kernel.is_empty(), "{here:?}");
        assert!(here.sentence().contains(&here.cpu));
    }

    #[test]
    fn an_emulated_host_says_so() {
        let emulated = Place { emulated: true, hypervisor: Some("TCGTCGTCGTCG".into()), ..Place::here() };
        assert!(emulated.sentence().contains("EMULATED"));
    }
}
