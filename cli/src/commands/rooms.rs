//! Commands on rooms that exist.

use std::io::IsTerminal;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, bail, ensure};
use carrel_host::log::{self, LogError, LogOptions};
use carrel_host::record::Record;
use carrel_host::session::Session;
use carrel_host::timestamp::rfc3339_of;
use carrel_host::{Home, Room, SessionError, UsageReport};
use serde_json::{Value, json};

use super::place;
use crate::arguments::rooms::{KillArgs, LogsArgs, PsArgs, RmArgs, StatsArgs, StopArgs, WaitArgs};
use crate::configuration::Configuration;
use crate::failure;
use crate::table::{Align, Table};
use crate::values::{size, span};

const SIGKILL: u8 = 9;

/// `carrel ps`.
pub(crate) fn ps(args: &PsArgs, configuration: &Configuration) -> Result<u8> {
    let mut rooms = place::home(configuration)?.rooms()?;
    // Newest first, as people look for it.
    rooms.reverse();
    let shown =
        rooms.iter().map(|room| (room, room.record())).filter(|(_, record)| args.all || !over(record));
    if args.quiet {
        return print_lines(shown.map(|(room, _)| room.id().to_string()));
    }
    if args.json {
        let all: Vec<Value> = shown.map(|(room, record)| as_json(room, &record)).collect();
        failure::print(format_args!("{}\n", serde_json::to_string_pretty(&all)?))?;
        return Ok(0);
    }
    let mut table = Table::new(&[
        ("ROOM", Align::Left),
        ("NAME", Align::Left),
        ("IMAGE", Align::Left),
        ("COMMAND", Align::Left),
        ("CREATED", Align::Left),
        ("STATE", Align::Left),
    ]);
    let now = SystemTime::now();
    for (room, record) in shown {
        let state = match record.outcome.as_ref() {
            Some(outcome) => format!("{} ({})", record.phase.word(), outcome.exit_status()),
            None => record.phase.word().to_owned(),
        };
        table.row([
            room.id().to_string(),
            room.spec().name.as_ref().map_or_else(String::new, ToString::to_string),
            shortened(&room.spec().image, 40),
            shortened(&room.spec().process.arguments.join(" "), 30),
            span::ago(moment(record.created_ms), now),
            state,
        ]);
    }
    failure::print(table)?;
    Ok(0)
}

fn over(record: &Record) -> bool {
    record.phase == carrel_host::record::Phase::Ended
}

fn as_json(room: &Room, record: &Record) -> Value {
    let time = |ms: Option<u64>| ms.map(|ms| rfc3339_of(moment(ms)));
    let spec = room.spec();
    json!({
        "id": room.id().as_str(),
        "name": spec.name.as_ref().map(|name| name.as_str()),
        "image": spec.image,
        "command": spec.process.arguments,
        "state": record.phase.word(),
        "created": time(Some(record.created_ms)),
        "started": time(record.started_ms),
        "ended": time(record.ended_ms),
        "exit_status": record.outcome.as_ref().map(|outcome| outcome.exit_status()),
        "reason": record.outcome.as_ref().and_then(|outcome| outcome.sentence()),
        "vcpus": spec.machine.vcpus,
        "memory_bytes": spec.machine.memory_mib.bytes(),
        "detached": spec.detached,
        "usage": record.usage,
    })
}

fn moment(ms: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(ms)
}

fn shortened(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}

fn print_lines(lines: impl Iterator<Item = String>) -> Result<u8> {
    let text: String = lines.map(|line| line + "\n").collect();
    failure::print(text)?;
    Ok(0)
}

/// `carrel logs`.
pub(crate) fn logs(args: &LogsArgs, configuration: &Configuration) -> Result<u8> {
    let room = place::home(configuration)?.find(&args.room)?;
    let options = LogOptions { follow: args.follow, tail: args.tail, timestamps: args.timestamps };
    match log::print(&room, options, &mut std::io::stdout().lock(), &mut std::io::stderr().lock()) {
        Err(LogError::Write(e)) if e.kind() == std::io::ErrorKind::BrokenPipe => {
            Err(failure::OutputGone.into())
        }
        other => Ok(other.map(|()| 0)?),
    }
}

/// Every room is found before anything is done to one.
fn find_all(home: &Home, words: &[String]) -> Result<Vec<Room>> {
    Ok(words.iter().map(|word| home.find(word)).collect::<Result<_, _>>()?)
}

/// An owner that is gone has ended its room: that is no failure for who wants the room ended.
fn unless_gone<T>(asked: Result<T, SessionError>) -> Result<Option<T>> {
    match asked {
        Ok(answer) => Ok(Some(answer)),
        Err(SessionError::Unreachable(_) | SessionError::OwnerGone(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What was done to each of several rooms: the words of those with which it went well are printed, the others' failures are one error.
fn conclude(words: &[String], done: Vec<Result<()>>) -> Result<u8> {
    let (mut well, mut failed) = (Vec::new(), Vec::new());
    for (word, done) in words.iter().zip(done) {
        match done {
            Ok(()) => well.push(word.clone()),
            Err(error) => failed.push((word, error)),
        }
    }
    print_lines(well.into_iter())?;
    match failed.pop() {
        None => Ok(0),
        Some((_, only)) if words.len() == 1 => Err(only),
        Some(last) => {
            failed.push(last);
            let each: Vec<String> = failed.iter().map(|(word, error)| format!("{word}: {error:#}")).collect();
            bail!("It went wrong with {} of {} rooms. {}", each.len(), words.len(), each.join("; "))
        }
    }
}

/// `carrel stop`.
pub(crate) fn stop(args: &StopArgs, configuration: &Configuration) -> Result<u8> {
    let rooms = find_all(&place::home(configuration)?, &args.rooms)?;
    let ask = |room: &Room| -> Result<Option<(Session, Instant)>> {
        if room.has_ended() {
            return Ok(None);
        }
        let Some(session) = unless_gone(room.connect())? else { return Ok(None) };
        let asked = unless_gone(session.remote().stop(args.time.map(super::run::millis)))?;
        Ok(asked.map(|()| (session, Instant::now())))
    };
    // All are told before any is waited for.
    let asked: Vec<_> = rooms.iter().map(ask).collect();
    let heard = rooms.iter().zip(asked).map(|(room, asked)| {
        let Some((session, at)) = asked? else { return Ok(()) };
        let time = args.time.unwrap_or(Duration::from_millis(room.spec().stop_timeout_ms));
        unless_gone(session.wait_stopped(at, time)).map(drop)
    });
    conclude(&args.rooms, heard.collect())
}

/// `carrel kill`.
pub(crate) fn kill(args: &KillArgs, configuration: &Configuration) -> Result<u8> {
    let rooms = find_all(&place::home(configuration)?, &args.rooms)?;
    let done = rooms.iter().map(|room| {
        ensure!(!room.has_ended(), "The room {} has ended.", room.title());
        Ok(room.connect()?.remote().signal(args.signal.0)?)
    });
    conclude(&args.rooms, done.collect())
}

/// `carrel rm`.
pub(crate) fn rm(args: &RmArgs, configuration: &Configuration) -> Result<u8> {
    let rooms = find_all(&place::home(configuration)?, &args.rooms)?;
    let done = rooms.iter().map(|room| {
        if args.force && !room.has_ended() {
            end_by_force(room)?;
        }
        Ok(room.remove()?)
    });
    conclude(&args.rooms, done.collect())
}

fn end_by_force(room: &Room) -> Result<()> {
    if let Some(session) = unless_gone(room.connect())? {
        let asked = Instant::now();
        unless_gone(session.remote().signal(SIGKILL))?;
        // That one is not answered; this is, and does the same again.
        unless_gone(session.remote().stop(Some(0)))?;
        unless_gone(session.wait_stopped(asked, Duration::ZERO))?;
    }
    Ok(())
}

/// `carrel wait`.
pub(crate) fn wait(args: &WaitArgs, configuration: &Configuration) -> Result<u8> {
    let home = place::home(configuration)?;
    for room in find_all(&home, &args.rooms)? {
        if !room.has_ended()
            && let Some(session) = unless_gone(room.connect())?
            && let Some(ended) = unless_gone(session.wait())?
        {
            failure::print(format_args!("{}\n", ended.outcome.exit_status()))?;
            continue;
        }
        // It ended meanwhile, or its owner did: what is known is in its record.
        home.sweep()?;
        match room.outcome() {
            Some(outcome) => failure::print(format_args!("{}\n", outcome.exit_status()))?,
            None => bail!("The room {} is gone, and nobody knows how it ended.", room.title()),
        }
    }
    Ok(0)
}

/// `carrel stats`.
pub(crate) fn stats(args: &StatsArgs, configuration: &Configuration) -> Result<u8> {
    let home = place::home(configuration)?;
    let mut before: Vec<UsageReport> = Vec::new();
    loop {
        let rooms = match &args.rooms[..] {
            [] => home.rooms()?,
            some => find_all(&home, some)?,
        };
        let named = !args.rooms.is_empty();
        let asked: Vec<_> = rooms.iter().map(|room| (room, ask_usage(room), Instant::now())).collect();
        let mut running = false;
        let mut reports = Vec::new();
        for (room, session, at) in asked {
            match session.and_then(|session| session.map(|session| session.hear_usage(at)).transpose()) {
                Ok(Some(report)) => {
                    running = true;
                    reports.push(report);
                }
                Err(error @ (SessionError::SilentOwner { .. } | SessionError::Silent)) => {
                    let error = anyhow::Error::new(error)
                        .context(format!("Nobody says what the room {} uses", room.title()));
                    if named {
                        return Err(error);
                    }
                    // The others' numbers are worth having.
                    tracing::warn!("{error:#}");
                }
                // One that was asked for by name, and ended, perhaps while it was asked: what it used is in its record.
                Ok(None) | Err(_) if named => reports.extend(last_report(room)?),
                Ok(None) | Err(_) => {}
            }
        }
        if args.json {
            failure::print(format_args!("{}\n", serde_json::to_string(&reports)?))?;
        } else {
            // Home and clear below, so that the table stays where it is.
            let again = !args.no_stream && std::io::stdout().is_terminal();
            let clear = if again { "\x1b[H\x1b[J" } else { "" };
            failure::print(format_args!("{clear}{}", stats_table(&reports, &before)))?;
        }
        if args.no_stream || !args.rooms.is_empty() && !running {
            return Ok(0);
        }
        before = reports;
        thread::sleep(args.interval);
    }
}

/// Asks a room that is not over what it uses.
fn ask_usage(room: &Room) -> Result<Option<Session>, SessionError> {
    if room.has_ended() {
        return Ok(None);
    }
    let session = room.connect()?;
    session.ask_usage()?;
    Ok(Some(session))
}

/// What a room that has ended used; nothing of one that is still being asked for its first report.
fn last_report(room: &Room) -> Result<Option<UsageReport>> {
    let record = room.record();
    ensure!(
        record.usage.is_some() || !over(&record),
        "The room {} has ended, and left no report of what it used.",
        room.title()
    );
    Ok(record.usage)
}

fn stats_table(reports: &[UsageReport], before: &[UsageReport]) -> Table {
    let mut table = Table::new(&[
        ("ROOM", Align::Left),
        ("NAME", Align::Left),
        ("CPU", Align::Right),
        ("MEMORY", Align::Right),
        ("HOST MEMORY", Align::Right),
        ("GIVEN BACK", Align::Right),
        ("READ", Align::Right),
        ("WRITTEN", Align::Right),
        ("PROCESSES", Align::Right),
    ]);
    for report in reports {
        let guest = report.guest.as_ref();
        let bytes = |n: Option<u64>| n.map_or_else(|| "-".to_owned(), size::human);
        let earlier = before.iter().find(|earlier| earlier.room == report.room);
        table.row([
            report.room.clone(),
            report.name.clone().unwrap_or_default(),
            cpu_share(report, earlier),
            bytes(guest.map(|guest| guest.memory.current_bytes)),
            bytes(report.host.pss_bytes.or(report.host.memory_current_bytes)),
            bytes(report.host.given_back_bytes),
            bytes(guest.map(|guest| guest.io.read_bytes)),
            bytes(guest.map(|guest| guest.io.write_bytes)),
            guest.map_or_else(|| "-".to_owned(), |guest| guest.processes.current.to_string()),
        ]);
    }
    table
}

/// What the host metered since the last look, or since the start, in per cent of one CPU.
fn cpu_share(report: &UsageReport, earlier: Option<&UsageReport>) -> String {
    let of = |report: &UsageReport| report.host.cpu_user_us + report.host.cpu_system_us;
    let used = of(report).saturating_sub(earlier.map_or(0, of));
    let passed = report.wall_us.saturating_sub(earlier.map_or(0, |earlier| earlier.wall_us)).max(1);
    let tenths = used.saturating_mul(1000) / passed;
    format!("{}.{} %", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A home with one detached room in it that was made by hand and is over.
    fn home_with(record: &Record) -> (tempfile::TempDir, Home) {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("rooms/0123456789ab");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("lock"), "").unwrap();
        let order = json!({
            "spec": {
                "id": "0123456789ab", "name": "job", "image": "image",
                "machine": {
                    "vcpus": 1, "memory_mib": 128, "cpu_millis": 1000, "disk_bytes": 1 << 30, "kernel": null,
                },
                "payload": carrel_host::spec::Payload::default(),
                "surroundings": carrel_protocol::agent::Surroundings::default(),
                "process": carrel_host::spec::ProcessSpec::default(),
                "stop_signal": 15, "stop_timeout_ms": 0, "timeout_ms": null, "detached": true,
                "without": [], "function": null,
            },
            "assets": { "kernel": "/k", "initramfs": "/i", "scratch": "/s", "vmm": "/v" },
            "patience": 1.0,
        });
        std::fs::write(folder.join("room.json"), order.to_string()).unwrap();
        record.write(&folder.join("state.json")).unwrap();
        let nowhere = std::path::PathBuf::from("/nowhere");
        let assets = carrel_host::Assets {
            kernel: nowhere.clone(),
            initramfs: nowhere.clone(),
            scratch: nowhere.clone(),
            vmm: nowhere,
        };
        let home = Home::open(root.path(), assets, carrel_host::Patience::default()).unwrap();
        (root, home)
    }

    #[test]
    fn what_a_room_used_can_be_had_after_its_end() {
        let usage = UsageReport {
            room: "0123456789ab".into(),
            name: Some("job".into()),
            wall_us: 5,
            guest: None,
            host: carrel_host::usage::HostUsage::default(),
        };
        let mut record = Record::new(1);
        record.phase = carrel_host::record::Phase::Ended;
        record.usage = Some(usage.clone());
        let (_root, home) = home_with(&record);
        let room = home.find("job").unwrap();
        assert_eq!(last_report(&room).unwrap(), Some(usage));
        assert_eq!(as_json(&room, &room.record())["usage"]["wall_us"], 5);
        record.usage = None;
        let (_root, home) = home_with(&record);
        let error = last_report(&home.find("job").unwrap()).unwrap_err();
        assert!(error.to_string().contains("job has ended"), "{error}");
    }

    #[test]
    fn what_failed_with_one_room_is_said_after_all_were_tried() {
        let words = ["a", "b", "c"].map(str::to_owned);
        let failed = |why: &str| Err(anyhow::anyhow!("{why}"));
        assert_eq!(conclude(&words, vec![Ok(()), Ok(()), Ok(())]).unwrap(), 0);
        let error = conclude(&words, vec![failed("it has ended"), Ok(()), failed("gone")]).unwrap_err();
        assert_eq!(error.to_string(), "It went wrong with 2 of 3 rooms. a: it has ended; c: gone");
        assert_eq!(conclude(&words[..1], vec![failed("gone")]).unwrap_err().to_string(), "gone");
    }

    #[test]
    fn long_words_are_shortened_visibly() {
        assert_eq!(shortened("short", 5), "short");
        assert_eq!(shortened("longer", 5), "long…");
    }

    #[test]
    fn cpu_is_a_share_of_the_time_between_two_looks() {
        let report = |cpu_user_us, wall_us| UsageReport {
            room: "0123456789ab".into(),
            name: None,
            wall_us,
            guest: None,
            host: carrel_host::usage::HostUsage { cpu_user_us, ..Default::default() },
        };
        let (first, second) = (report(500, 1000), report(2000, 2000));
        assert_eq!(cpu_share(&first, None), "50.0 %");
        assert_eq!(cpu_share(&second, Some(&first)), "150.0 %");
    }
}
