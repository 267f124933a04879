//! What stands between a workload and the host's kernel, in counts: system calls that a filter lets through, code that a VMM has mapped, lines of source.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::filter::{Filter, allowed, installed};
use super::measure::{Bench, progress, progress_end};
use super::metrics::Group;
use super::plans::{Work, bare};
use super::room::Expect;
use super::subjects::{Subject, on_path};
use crate::meter;

const GROUP: Group = Group::Surface;

/// Each chosen count of each subject, once.
pub(crate) fn count(bench: &mut Bench<'_>) {
    for subject in bench.subjects(GROUP) {
        for metric in bench.metrics(GROUP).into_iter().filter(|metric| metric.subjects.contains(&subject)) {
            if bench.is_interrupted() {
                return;
            }
            progress(GROUP, &format!("{}, {}", metric.name, subject.name()));
            let counted = match metric.name {
                "syscalls-allowed" => system_calls(bench, subject),
                "code-mapped" => code_mapped(bench, subject),
                _ => bench.sources.folders(subject).and_then(|folders| lines(&folders)),
            };
            match counted {
                Ok(count) => bench.results.add(metric, None, subject, &[count]),
                Err(error) => bench.results.skip(&[metric], None, subject, format!("{error:#}")),
            }
        }
    }
    progress_end();
}

/// Calls that some thread of the workload, or of the process that runs the guest, may make.
fn system_calls(bench: &Bench<'_>, subject: Subject) -> Result<f64> {
    let calls = if subject == Subject::Plain {
        // Nobody filters it: strace would have nothing to see.
        allowed(&[])?
    } else {
        on_path("strace").context("strace is not installed")?;
        let mut plan = bare(bench.stage, subject, Work::Idle)?;
        let log = plan.folder.path().join("strace");
        let mut traced = Command::new("strace");
        traced.args(["-f", "-qq", "-v", "-X", "raw", "-e", "trace=seccomp,prctl", "-o"]).arg(&log);
        traced.arg(plan.command.get_program()).args(plan.command.get_args());
        if let Some(folder) = plan.command.get_current_dir() {
            traced.current_dir(folder);
        }
        plan.command = traced;
        let room = plan.start(Expect::Ready, &bench.patience(4))?.room;
        let processes = room.cgroup().processes(&meter::parents());
        let log = fs::read_to_string(&log).context("strace wrote no log")?;
        let installed = installed(&log)?;
        let of = |thread: u32| installed.get(&thread).cloned().unwrap_or_default();
        let mut calls = BTreeSet::new();
        for thread in threads(inhabitant(&processes, subject)?)? {
            calls.extend(allowed(&filters(thread, &of)?)?);
        }
        calls
    };
    Ok(f64::from(u32::try_from(calls.len())?))
}

/// The process that runs the guest: it holds a vCPU. In a container: the workload.
fn inhabitant(processes: &[u32], subject: Subject) -> Result<u32> {
    let is_it = |pid: u32| {
        if subject.needs_kvm() {
            let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            descriptors
                .filter_map(|entry| fs::read_link(entry.path()).ok())
                .any(|to| to.to_string_lossy().contains("kvm-vcpu"))
        } else {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.starts_with(super::image::WORK.as_bytes())
        }
    };
    processes.iter().copied().find(|&pid| is_it(pid)).context("the room's own process was not found")
}

fn threads(pid: u32) -> Result<Vec<u32>> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"))?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// All filters of a thread: its own, and before them those that it got from who made it. The kernel says how many there are, so that none is missed.
fn filters(thread: u32, of: &impl Fn(u32) -> Vec<Filter>) -> Result<Vec<Filter>> {
    let status = fs::read_to_string(format!("/proc/{thread}/status"))?;
    let field = |name: &str| meter::field(&status, name).and_then(|value| usize::try_from(value).ok());
    let there = field("Seccomp_filters:").context("the kernel does not say how many filters a thread has")?;
    let mut filters = Vec::new();
    let mut from = thread;
    // Thread, its group's first one, that one's parent, and so on.
    for _ in 0..8 {
        let mut earlier = of(from);
        earlier.truncate(there.saturating_sub(filters.len()));
        earlier.append(&mut filters);
        filters = earlier;
        if filters.len() >= there {
            return Ok(filters);
        }
        let status = fs::read_to_string(format!("/proc/{from}/status"))?;
        let [group, parent] = ["Tgid:", "PPid:"].map(|name| meter::field(&status, name).unwrap_or(0));
        from = u32::try_from(if group == u64::from(from) { parent } else { group })?;
        if from <= 1 {
            break;
        }
    }
    ensure!(
        filters.len() == there,
        "thread {thread} has {there} filters, and strace saw {} installed",
        filters.len()
    );
    Ok(filters)
}

/// KiB of executable mappings.
fn code_mapped(bench: &Bench<'_>, subject: Subject) -> Result<f64> {
    let room = bare(bench.stage, subject, Work::Idle)?.start(Expect::Ready, &bench.patience(1))?.room;
    let pid = inhabitant(&room.cgroup().processes(&meter::parents()), subject)?;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    Ok(f64::from(u32::try_from(executable_bytes(&maps) / 1024)?))
}

fn executable_bytes(maps: &str) -> u64 {
    let size = |line: &str| {
        let (range, rest) = line.split_once(' ')?;
        let (from, to) = range.split_once('-')?;
        let executable = rest.as_bytes().get(2) == Some(&b'x') && !rest.ends_with("[vsyscall]");
        let bytes = u64::from_str_radix(to, 16).ok()?.checked_sub(u64::from_str_radix(from, 16).ok()?)?;
        executable.then_some(bytes)
    };
    maps.lines().filter_map(size).sum()
}

/// Where sources are.
#[derive(Clone, Debug, Default)]
pub(crate) struct SourceFolders {
    /// A folder a subject, by its name.
    pub(crate) peers: Option<PathBuf>,
    /// carrel's own tree.
    pub(crate) carrel: Option<PathBuf>,
}

impl SourceFolders {
    /// Those of a subject.
    fn folders(&self, subject: Subject) -> Result<Vec<PathBuf>> {
        ensure!(subject != Subject::Plain, "there is no source but the kernel's");
        if subject == Subject::Carrel
            && let Some(tree) = &self.carrel
        {
            return Ok(["vmm/src", "protocol/src"].map(|part| tree.join(part)).to_vec());
        }
        let peers = self.peers.as_ref().context("--sources names no folder with its sources")?;
        Ok(vec![peers.join(subject.name())])
    }
}

/// Lines of source below some folders.
fn lines(of: &[PathBuf]) -> Result<f64> {
    let mut total = 0;
    let mut folders = of.to_vec();
    while let Some(next) = folders.pop() {
        let entries = fs::read_dir(&next).with_context(|| format!("there is no {}", next.display()))?;
        for entry in entries.flatten() {
            let (path, kind) = (entry.path(), entry.file_type()?);
            if kind.is_dir() && !is_left_out(&path) {
                folders.push(path);
            } else if kind.is_file() && is_source(&path) {
                total += code_lines(&String::from_utf8_lossy(&fs::read(&path)?));
            }
        }
    }
    ensure!(total > 0, "there is no source in {}", of.first().unwrap_or(&PathBuf::new()).display());
    Ok(f64::from(u32::try_from(total)?))
}

/// Folders of tests, of others' code and of version control.
fn is_left_out(folder: &Path) -> bool {
    let names = [
        "test",
        "tests",
        "testdata",
        "vendor",
        "third_party",
        "subprojects",
        "benches",
        "examples",
        "fuzz",
        "target",
    ];
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with('.') || names.contains(&&*name)
}

fn is_source(file: &Path) -> bool {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let kind = file.extension().unwrap_or_default().to_string_lossy();
    ["rs", "c", "h", "go"].contains(&&*kind) && !name.ends_with("_test.go") && name != "tests.rs"
}

/// Lines that are neither blank nor comment (`//` and `/* … */`, as Rust, C and Go have them) nor of a module of tests (Rust's, as rustfmt writes it).
fn code_lines(source: &str) -> usize {
    let (mut inside, mut tests) = (false, false);
    let mut lines = source.lines().peekable();
    let mut shown = Vec::new();
    while let Some(line) = lines.next() {
        if line == "#[cfg(test)]" && lines.peek().is_some_and(|next| is_block_of_tests(next)) {
            tests = true;
        }
        if !tests {
            shown.push(line);
        }
        tests &= line != "}";
    }
    let counts = |line: &str| {
        let line = line.trim();
        if inside {
            inside = !line.contains("*/");
            return false;
        }
        if line.starts_with("/*") {
            inside = !line.contains("*/");
            return false;
        }
        !line.is_empty() && !line.starts_with("//")
    };
    shown.into_iter().map(counts).filter(|&counts| counts).count()
}

/// `mod tests {`, `pub(crate) mod testing {`; what has a name alone is a file.
fn is_block_of_tests(line: &str) -> bool {
    line.contains("mod ") && line.ends_with('{')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blank_lines_and_comments_are_no_code() {
        assert_eq!(code_lines("//! a\n\nfn x() {} // b\n/* c\n d\n*/\n/* e */\n  }\n"), 2);
        let tests = "fn x() {}\n#[cfg(test)]\nmod tests;\n#[cfg(test)]\nmod tests {\n    fn y() {\n    }\n}\nfn z() {}\n";
        assert_eq!(code_lines(tests), 4);
    }

    #[test]
    fn tests_and_vendored_code_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("runc");
        for (path, text) in [
            ("a.go", "package a\n"),
            ("a_test.go", "package a\n"),
            ("vendor/b.go", "package b\n"),
            ("sub/tests/c.rs", "fn c() {}\n"),
            ("sub/d.c", "int d;\nint e;\n"),
            ("README", "text\n"),
        ] {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let sources = SourceFolders { peers: Some(folder.path().to_owned()), carrel: None };
        let count = |subject| sources.folders(subject).and_then(|folders| lines(&folders));
        assert_eq!(count(Subject::Runc).unwrap().to_bits(), 3.0_f64.to_bits());
        assert!(count(Subject::Crun).unwrap_err().to_string().contains("crun"));
        let none = SourceFolders::default().folders(Subject::Runc).unwrap_err();
        assert!(none.to_string().contains("--sources"));
    }

    #[test]
    fn code_is_what_may_be_executed() {
        let maps = "1000-3000 r-xp 00000000 00:00 0 /bin/x\n3000-9000 rw-p 00000000 00:00 0\n\
            ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]\n";
        assert_eq!(executable_bytes(maps), 0x2000);
    }
}
