//! What a running VMM costs, read from `/proc`, cgroup v2 and KVM's debugfs: figures that don't jitter with the clock.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use carrel_host::stat::Stat;

/// Every process and its parent, at one moment.
pub(crate) fn parents() -> Vec<(u32, u32)> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|child| Some((child, stat_field(child, 4)?.try_into().ok()?)))
        .collect()
}

/// `pid` and all its descendants, from every process's parent.
pub(crate) fn family(pid: u32) -> Vec<u32> {
    family_in(&parents(), pid)
}

/// The same, by a look at the parents that was taken before.
pub(crate) fn family_in(parents: &[(u32, u32)], pid: u32) -> Vec<u32> {
    let mut family = vec![pid];
    let mut next = 0;
    while let Some(&of) = family.get(next) {
        family.extend(parents.iter().filter(|(_, parent)| *parent == of).map(|(child, _)| *child));
        next += 1;
    }
    family
}

/// Proportional set size of the processes, KiB, without guest memory: mappings of `guest_mib` or more (`smaps`). How much of its
/// memory a guest takes, and in pages of which size, is its own affair and the host's.
pub(crate) fn pss_kib(pids: &[u32], guest_mib: u32) -> Result<u64> {
    let mut total = 0;
    for pid in pids {
        let path = format!("/proc/{pid}/smaps");
        let text = fs::read_to_string(&path).with_context(|| path.clone())?;
        total += own_pss(&text, u64::from(guest_mib) << 10);
    }
    Ok(total)
}

/// Proportional set size of the processes, KiB, guest memory included. One that has ended since has none.
pub(crate) fn whole_pss_kib(pids: &[u32]) -> Result<u64> {
    let mut total = 0;
    for pid in pids {
        match fs::read_to_string(format!("/proc/{pid}/smaps_rollup")) {
            Ok(text) => total += field(&text, "Pss:").context("smaps_rollup has no line Pss")?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            // ESRCH: it is a zombie, or ended between open and read.
            Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => {}
            Err(error) => return Err(error).with_context(|| format!("/proc/{pid}/smaps_rollup")),
        }
    }
    Ok(total)
}

/// The sum of `Pss:` over the mappings whose `Size:`, which comes first, is below a limit; KiB.
fn own_pss(smaps: &str, limit: u64) -> u64 {
    let mut total = 0;
    let mut counts = false;
    for line in smaps.lines() {
        if let Some(size) = field(line, "Size:") {
            counts = size < limit;
        } else if let Some(pss) = field(line, "Pss:").filter(|_| counts) {
            total += pss;
        }
    }
    total
}

/// Minor and major page faults of the processes so far.
pub(crate) fn page_faults(pids: &[u32]) -> u64 {
    pids.iter().flat_map(|&pid| [stat_field(pid, 10), stat_field(pid, 12)]).flatten().sum()
}

/// Exits of all the processes' vCPUs so far; `None` where KVM's debugfs can't be read.
pub(crate) fn vm_exits(pids: &[u32]) -> Option<u64> {
    let mut exits = None;
    for entry in fs::read_dir("/sys/kernel/debug/kvm").ok()?.flatten() {
        let name = entry.file_name().into_string().unwrap_or_default();
        let owner: Option<u32> = name.split_once('-').and_then(|(pid, _)| pid.parse().ok());
        if owner.is_some_and(|owner| pids.contains(&owner)) {
            let read = fs::read_to_string(entry.path().join("exits")).ok()?;
            exits = Some(exits.unwrap_or(0) + read.trim().parse::<u64>().ok()?);
        }
    }
    exits
}

/// Kernel memory of the cgroup (v2) that a process is in, KiB.
pub(crate) fn kernel_kib_of(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/")).context("it is in no cgroup v2")?;
    let stat = fs::read_to_string(Path::new("/sys/fs/cgroup").join(path).join("memory.stat"))?;
    Ok(field(&stat, "kernel ").context("memory.stat has no line kernel")? / 1024)
}

/// A cgroup of its own below the root, for the kernel's share of a VMM's memory; removed when dropped.
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes one; `None` where cgroup v2 has no memory controller to give.
    pub(crate) fn new(name: &str) -> Option<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let has = |file: &str| {
            fs::read_to_string(root.join(file))
                .is_ok_and(|text| text.split_whitespace().any(|c| c == "memory"))
        };
        if !has("cgroup.controllers") {
            return None;
        }
        if !has("cgroup.subtree_control") {
            fs::write(root.join("cgroup.subtree_control"), "+memory").ok()?;
        }
        let path = root.join(format!("{name}-{}", std::process::id()));
        fs::create_dir(&path).ok()?;
        Some(Self { path })
    }

    /// A command's prefix that starts it inside.
    pub(crate) fn wrapper(&self) -> Vec<String> {
        let script = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.path.display());
        ["sh", "-c", &script, "sh"].map(String::from).to_vec()
    }

    /// Kernel memory charged to it, KiB (`memory.stat`, `kernel`).
    pub(crate) fn kernel_kib(&self) -> Result<u64> {
        let text = fs::read_to_string(self.path.join("memory.stat"))?;
        Ok(field(&text, "kernel ").context("memory.stat has no line kernel")? / 1024)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Its processes were waited for; the kernel may still be letting go of them.
        for _ in 0..100 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

/// The number after a line's name.
pub(crate) fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
}

/// A numeric field of `/proc/PID/stat` by proc(5)'s numbering; fields from 3 on, behind the name's last parenthesis.
fn stat_field(pid: u32, number: usize) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Stat::parse(&text)?.field(number)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_not_the_vmms() {
        let smaps = "1000-2000 r-xp 0 0:0 0 a\nSize: 4 kB\nKernelPageSize: 4 kB\nPss: 3 kB\nPss_Dirty: 3 kB\n\
            2000-9000 rw-p 0 0:0 0\nSize: 131072 kB\nPss: 2048 kB\n\
            9000-a000 rw-p 0 0:0 0\nSize: 8 kB\nPss: 8 kB\n";
        assert_eq!(own_pss(smaps, 128 << 10), 11);
    }

    #[test]
    fn ones_own_family_has_a_size_and_faults() {
        let me = std::process::id();
        assert_eq!(family(me).first(), Some(&me));
        assert!(pss_kib(&[me], 1 << 20).unwrap() > 100);
        assert!(page_faults(&[me]) > 10);
        assert!(whole_pss_kib(&[me, u32::MAX]).unwrap() > 100);
        assert_eq!(field("a 1\nPss:   12 kB\n", "Pss:"), Some(12));
    }
}
