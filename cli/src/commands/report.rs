//! How a room ended, and what it used: statuses, tables and JSON.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use carrel_host::{Outcome, UsageReport};

use crate::arguments::run::{UsageArgs, UsageFormat};
use crate::failure::WithStatus;
use crate::table::{Align, Table};
use crate::values::size;

/// The exit status of an outcome, or its sentence with that status.
pub(crate) fn ended(outcome: &Outcome) -> Result<u8> {
    match outcome.sentence() {
        None => Ok(outcome.exit_status()),
        Some(sentence) => Err(WithStatus::new(outcome.exit_status(), sentence).into()),
    }
}

/// Reports usage where it was asked for.
pub(crate) fn usage(args: &UsageArgs, report: Option<&UsageReport>) -> Result<()> {
    let Some(report) = report else { return Ok(()) };
    if let Some(file) = &args.usage_file {
        let format = args.usage.unwrap_or(UsageFormat::Json);
        write_whole(file, &render(report, format)?)
            .with_context(|| format!("The usage report can't be written to {}.", file.display()))?;
    } else if let Some(format) = args.usage {
        // If nobody reads stderr, the status alone must do.
        let _ = std::io::stderr().write_all(render(report, format)?.as_bytes());
    }
    Ok(())
}

/// What would keep the report from being written is said before anything runs: its workload's status would be lost over it.
pub(crate) fn check_file(args: &UsageArgs) -> Result<()> {
    let Some(file) = &args.usage_file else { return Ok(()) };
    let checked = match file.metadata() {
        // A pipe or a terminal: to open it may take a reader, who comes later.
        Ok(there) if !there.is_file() && !there.is_dir() => Ok(()),
        Ok(there) if there.is_dir() => Err(std::io::ErrorKind::IsADirectory.into()),
        Ok(_) | Err(_) => {
            let name = beside(file);
            std::fs::write(&name, "").and_then(|()| std::fs::remove_file(&name))
        }
    };
    checked.with_context(|| format!("The usage report can't be written to {}.", file.display()))
}

/// The file that becomes this one.
fn beside(file: &Path) -> std::ffi::OsString {
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    name
}

/// A reader sees the old report or the new one, never half of one.
fn write_whole(file: &Path, text: &str) -> std::io::Result<()> {
    if file.exists() && !file.is_file() {
        // A pipe or a terminal: there is nothing to replace.
        return std::fs::write(file, text);
    }
    let name = beside(file);
    std::fs::write(&name, text).and_then(|()| std::fs::rename(&name, file)).inspect_err(|_| {
        let _ = std::fs::remove_file(&name);
    })
}

fn render(report: &UsageReport, format: UsageFormat) -> Result<String> {
    Ok(match format {
        UsageFormat::Json => format!("{}\n", serde_json::to_string_pretty(report)?),
        UsageFormat::Table => table(report).to_string(),
    })
}

/// One row a quantity: what the guest says, and what the host metered of the whole room.
fn table(report: &UsageReport) -> Table {
    let mut table = Table::new(&[("USED", Align::Left), ("GUEST", Align::Right), ("HOST", Align::Right)]);
    let guest = report.guest.as_ref();
    let host = &report.host;
    let none = || "-".to_owned();
    let bytes = |n: Option<u64>| n.map_or_else(none, size::human);
    let count = |n: Option<u64>| n.map_or_else(none, |n| n.to_string());
    let time = |us: Option<u64>| us.map_or_else(none, span);
    let mut row = |name: &str, guest: String, host: String| table.row([name.into(), guest, host]);
    row("wall time", time(guest.map(|g| g.wall_us)), span(report.wall_us));
    row("CPU, user", time(guest.map(|g| g.cpu.user_us)), span(host.cpu_user_us));
    row("CPU, system", time(guest.map(|g| g.cpu.system_us)), span(host.cpu_system_us));
    row("CPU, throttled", time(guest.map(|g| g.cpu.throttled_us)), time(host.cpu_throttled_us));
    row("memory, peak", bytes(guest.map(|g| g.memory.peak_bytes)), bytes(host.memory_peak_bytes));
    row("memory, PSS peak", none(), bytes(host.pss_peak_bytes));
    row("memory, kernel", none(), bytes(host.kernel_memory_bytes));
    row("out-of-memory kills", count(guest.map(|g| g.memory.oom_kills)), none());
    row("read", bytes(guest.map(|g| g.io.read_bytes)), bytes(host.read_bytes));
    row("written", bytes(guest.map(|g| g.io.write_bytes)), bytes(host.write_bytes));
    row("read operations", count(guest.map(|g| g.io.read_operations)), count(host.read_operations));
    row("write operations", count(guest.map(|g| g.io.write_operations)), count(host.write_operations));
    row("network, received", bytes(guest.map(|g| g.network.received_bytes)), none());
    row("network, sent", bytes(guest.map(|g| g.network.sent_bytes)), none());
    row("processes, peak", count(guest.map(|g| g.processes.peak)), none());
    table
}

/// `1.234 s`, `12.3 ms`, `45 µs`.
fn span(us: u64) -> String {
    let span = Duration::from_micros(us);
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.1} ms", span.as_secs_f64() * 1e3),
        _ => format!("{:.3} s", span.as_secs_f64()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_a_fitting_unit() {
        assert_eq!([45, 12_345, 1_234_567].map(span), ["45 µs", "12.3 ms", "1.235 s"]);
    }

    #[test]
    fn a_report_without_a_guests_word_has_the_hosts() {
        let report = UsageReport {
            room: "0123456789ab".into(),
            name: None,
            wall_us: 2_000_000,
            guest: None,
            host: carrel_host::usage::HostUsage { pss_peak_bytes: Some(5 << 20), ..Default::default() },
        };
        let text = table(&report).to_string();
        assert!(text.contains("wall time") && text.contains("2.000 s") && text.contains("5 MiB"), "{text}");
    }

    #[test]
    fn a_file_that_can_not_be_written_is_found_out_before_anything_runs() {
        let dir = tempfile::tempdir().unwrap();
        let check = |file: &Path| check_file(&UsageArgs { usage: None, usage_file: Some(file.to_owned()) });
        let file = dir.path().join("use.json");
        check(&file).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is made by it");
        std::fs::write(&file, "an older report").unwrap();
        check(&file).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "an older report");
        check(Path::new("/dev/null")).unwrap();
        for wrong in [dir.path(), &dir.path().join("no/such"), &file.join("below")] {
            let error = check(wrong).unwrap_err().to_string();
            assert!(error.contains(&wrong.display().to_string()), "{error}");
        }
    }

    #[test]
    fn a_file_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("use.json");
        std::fs::write(&file, "an older, longer report").unwrap();
        write_whole(&file, "new").unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "new");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write_whole(&dir.path().join("no/such"), "x").is_err());
    }
}
