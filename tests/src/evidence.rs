//! What a room does that hangs, told before anything of it is killed: a hang that is seen once in a hundred runs has to explain itself.
//!
//! ```text
//!   look ── a second ── look ──▶ each thread: where it waits, what CPU it took since     (nothing taken: it sleeps; a whole second: it spins)
//!                           └──▶ KVM's counters that moved since                         (exits that don't move: the guest doesn't run)
//!   ps --json, the owners' logs, free memory, load
//! ```

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::carrel::binary;
use crate::processes;

const BETWEEN: Duration = Duration::from_secs(1);
/// `ps` may hang as what it is asked about does.
const PS_SECONDS: &str = "10";
const LOG_LINES: usize = 40;
const COUNTERS: &str = "/sys/kernel/debug/kvm";

/// All that can be known from outside, as text.
pub fn gathered(home: Option<&Path>) -> String {
    let mut text = String::from("evidence:\n");
    let (threads, counters) = (Threads::now(), Counters::now());
    std::thread::sleep(BETWEEN);
    Threads::now().write(&threads, &mut text);
    Counters::now().write(&counters, &mut text);
    for file in ["/proc/loadavg", "/proc/pressure/cpu", "/proc/pressure/io", "/proc/pressure/memory"] {
        let _ = writeln!(text, "{file}: {}", read(Path::new(file)).trim_end().replace('\n', "; "));
    }
    let memory = read(Path::new("/proc/meminfo"));
    let lines = memory.lines().filter(|line| line.starts_with("Mem") || line.starts_with("Swap"));
    let _ = writeln!(text, "memory: {}", lines.collect::<Vec<_>>().join("; "));
    if let Some(home) = home {
        text.push_str(&of_rooms(home));
    }
    text
}

/// What is known of the rooms of this home, those that have ended too.
pub fn of_rooms(home: &Path) -> String {
    let mut text = format!("ps -a --json: {}\n", rooms(home));
    owners_logs(home, &mut text);
    text
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| format!("({error})"))
}

/// A thread of a process of carrel's.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Thread {
    name: String,
    state: char,
    /// Since its start, in ticks of 1/100 s: in user mode (a guest's time counts as such), in the kernel.
    ticks: (u64, u64),
}

impl Thread {
    /// Of a line of `/proc/PID/task/TID/stat`. A name may hold spaces and brackets, so it ends at the last one.
    fn parse(stat: &str) -> Option<Self> {
        let (before, after) = stat.rsplit_once(") ")?;
        let words: Vec<&str> = after.split_whitespace().collect();
        // The third word of the line is the state; the 14th and 15th are utime and stime (proc(5)).
        let ticks = (words.get(11)?.parse().ok()?, words.get(12)?.parse().ok()?);
        Some(Self {
            name: before.split_once('(')?.1.to_owned(),
            state: words.first()?.chars().next()?,
            ticks,
        })
    }
}

/// Every thread, by its process's command line and its folder in `/proc`.
struct Threads(BTreeMap<(String, PathBuf), Thread>);

impl Threads {
    fn now() -> Self {
        let mut all = BTreeMap::new();
        for process in processes::all() {
            for task in fs::read_dir(process.folder().join("task")).into_iter().flatten().flatten() {
                if let Some(thread) = Thread::parse(&read(&task.path().join("stat"))) {
                    all.insert((format!("{} {}", process.pid, process.line), task.path()), thread);
                }
            }
        }
        Self(all)
    }

    fn write(&self, before: &Self, text: &mut String) {
        let mut last = "";
        for (key @ (process, folder), thread) in &self.0 {
            if process != last {
                let _ = writeln!(text, "process {process}");
                last = process;
            }
            let then = before.0.get(key).map_or((0, 0), |thread| thread.ticks);
            let (user, system) =
                (thread.ticks.0.saturating_sub(then.0), thread.ticks.1.saturating_sub(then.1));
            let file = |name: &str| read(&folder.join(name)).trim_end().to_owned();
            let _ = writeln!(
                text,
                "  thread {} '{}' {} took {user}+{system} ticks in {} s (of {}+{}), wchan {}, syscall {}",
                folder.file_name().unwrap_or_default().to_string_lossy(),
                thread.name,
                thread.state,
                BETWEEN.as_secs(),
                thread.ticks.0,
                thread.ticks.1,
                file("wchan"),
                file("syscall"),
            );
            for frame in file("stack").lines() {
                let _ = writeln!(text, "    {frame}");
            }
        }
    }
}

/// KVM's counters, by VM and name: `exits`, `halt_exits`, `irq_injections`, ….
struct Counters(BTreeMap<PathBuf, u64>);

impl Counters {
    fn now() -> Self {
        let mut all = BTreeMap::new();
        for vm in fs::read_dir(COUNTERS).into_iter().flatten().flatten() {
            // Those beside the VMs' folders are sums over all VMs.
            for file in fs::read_dir(vm.path()).into_iter().flatten().flatten() {
                if let Ok(count) = read(&file.path()).trim_end().parse() {
                    all.insert(file.path(), count);
                }
            }
        }
        Self(all)
    }

    fn write(&self, before: &Self, text: &mut String) {
        if self.0.is_empty() {
            let _ =
                writeln!(text, "KVM's counters: none in {COUNTERS}: no VM, or debugfs isn't mounted there");
        }
        let mut vm = None;
        for (path, count) in self.0.iter().filter(|(_, count)| **count != 0) {
            if vm != path.parent() {
                vm = path.parent();
                let _ = write!(text, "\nKVM's counters of {}:", vm.unwrap_or(path).display());
            }
            let more = count.saturating_sub(before.0.get(path).copied().unwrap_or(0));
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let _ = write!(text, " {name} {count} (+{more})");
        }
        text.push('\n');
    }
}

fn rooms(home: &Path) -> String {
    let mut command = Command::new("timeout");
    command.arg("-sKILL").arg(PS_SECONDS).arg(binary()).arg("--home").arg(home).args(["ps", "-a", "--json"]);
    match command.stdin(Stdio::null()).output() {
        Ok(output) => {
            let [said, errors] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
            format!("{} {said}{errors}", output.status)
        }
        Err(error) => format!("({error})"),
    }
}

/// What the owners said last; nothing unless `CARREL_LOG` asks for it, or something is wrong.
fn owners_logs(home: &Path, text: &mut String) {
    for room in fs::read_dir(home.join("rooms")).into_iter().flatten().flatten() {
        let log = room.path().join("owner.log");
        let said = read(&log);
        let lines: Vec<&str> = said.lines().collect();
        let _ = writeln!(
            text,
            "{} ({} lines, {:?}):",
            log.display(),
            lines.len(),
            fs::metadata(&log).map(|it| it.len())
        );
        for line in lines.iter().skip(lines.len().saturating_sub(LOG_LINES)) {
            let _ = writeln!(text, "  {line}");
        }
        let _ = writeln!(text, "state.json: {}", read(&room.path().join("state.json")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_read_from_its_stat_whatever_its_name() {
        let stat = "811 (vcpu) 0 (x) S 1 811 811 0 -1 4194560 21 0 0 0 1234 56 0 0 20 0 4 0 99 0 0 1844 0";
        let expected = Thread { name: "vcpu) 0 (x".into(), state: 'S', ticks: (1234, 56) };
        assert_eq!(Thread::parse(stat), Some(expected));
        assert_eq!(Thread::parse("811 (cut off) S 1 2"), None);
        assert_eq!(Thread::parse("(No such process)"), None);
    }

    #[test]
    fn a_thread_is_told_with_what_it_took_meanwhile() {
        let key = || ("7 carrel-vmm".to_owned(), PathBuf::from("/proc/self/task/no-such-thread"));
        let thread = |ticks| Thread { name: "vcpu0".into(), state: 'R', ticks };
        let before = Threads(BTreeMap::from([(key(), thread((10, 5)))]));
        let mut text = String::new();
        Threads(BTreeMap::from([(key(), thread((110, 6)))])).write(&before, &mut text);
        assert!(
            text.starts_with("process 7 carrel-vmm\n  thread no-such-thread 'vcpu0' R took 100+1 ticks"),
            "{text}"
        );
    }

    #[test]
    fn a_counter_is_told_with_how_far_it_moved() {
        let at = |name: &str| PathBuf::from("/sys/kernel/debug/kvm/7-9").join(name);
        let before = Counters(BTreeMap::from([(at("exits"), 40), (at("halt_exits"), 3)]));
        let now = Counters(BTreeMap::from([(at("exits"), 42), (at("halt_exits"), 3), (at("nmi"), 0)]));
        let mut text = String::new();
        now.write(&before, &mut text);
        assert_eq!(text, "\nKVM's counters of /sys/kernel/debug/kvm/7-9: exits 42 (+2) halt_exits 3 (+0)\n");
    }
}
