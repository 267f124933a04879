//! The works: what is measured inside a room, by the room's own monotonic clock.
//!
//! Each prints `name value` lines, then [`READY`]. How long a measurement takes is bounded by time, not by count, so that a slow
//! subject is not a hung one.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::{READY, serve};

/// How long each measurement goes on at least.
const SPAN: Duration = Duration::from_millis(400);
/// Two buffers of this size are copied: beyond most caches' second level, and within a small room.
const COPY_BYTES: usize = 8 << 20;
const DISK_BYTES: usize = 24 << 20;
const BLOCK: usize = 4096;
/// Rounds of the integer loop between two looks at the clock.
const BATCH: u32 = 1_000_000;

/// Does the named work; `scratch` is a directory for files.
pub(crate) fn run(name: &str, scratch: &str) -> io::Result<()> {
    match name {
        "true" => ready(),
        "python" => python(Stdio::inherit()),
        "idle" => {
            ready()?;
            loop {
                nix::unistd::pause();
            }
        }
        "serve" => serve::listen_for_ever(),
        "inside" => inside(Path::new(scratch)),
        other => Err(io::Error::other(format!("there is no work called '{other}'"))),
    }
}

/// Runs the interpreter to its end.
pub(crate) fn python(output: Stdio) -> io::Result<()> {
    let status =
        Command::new("/usr/bin/python3").args(["-c", "print(1)"]).env_clear().stdout(output).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("python3: {status}"))) }
}

fn ready() -> io::Result<()> {
    let mut output = io::stdout().lock();
    output.write_all(&[READY])?;
    output.flush()
}

fn inside(scratch: &Path) -> io::Result<()> {
    println!("cpu {}", cpu());
    println!("memory {}", memory());
    println!("syscalls {}", system_calls());
    println!("forks {}", forks()?);
    disk(scratch)?;
    ready()
}

/// Calls `step`, which returns how much it did, until [`SPAN`] is over; the rate by second.
fn rate(mut step: impl FnMut() -> f64) -> f64 {
    step();
    let (began, mut done) = (Instant::now(), 0.0);
    while began.elapsed() < SPAN {
        done += step();
    }
    done / began.elapsed().as_secs_f64()
}

/// Millions of rounds of a fixed integer loop a second: shifts, exclusive ors and a multiplication, each waiting for the one before.
fn cpu() -> f64 {
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    rate(|| {
        for _ in 0..BATCH {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            state = state.wrapping_mul(0x2545_f491_4f6c_dd1d);
        }
        black_box(state);
        f64::from(BATCH) / 1e6
    })
}

/// MiB copied a second.
fn memory() -> f64 {
    let (from, mut to) = (vec![1_u8; COPY_BYTES], vec![2_u8; COPY_BYTES]);
    rate(|| {
        black_box(&mut to).copy_from_slice(black_box(&from));
        mib(COPY_BYTES)
    })
}

/// Thousands of getppid(2) a second: the shortest way into the kernel and back that no library answers by itself.
fn system_calls() -> f64 {
    rate(|| {
        for _ in 0..1000 {
            black_box(nix::unistd::getppid());
        }
        1.0
    })
}

/// Children started (this very program, `true`) and waited for, a second.
fn forks() -> io::Result<f64> {
    let program = std::env::current_exe().unwrap_or_else(|_| "/bench/work".into());
    let mut failed = None;
    let rate = rate(|| {
        let status = Command::new(&program).arg("true").stdin(Stdio::null()).stdout(Stdio::null()).status();
        match status {
            Ok(status) if status.success() => {}
            Ok(status) => failed = Some(io::Error::other(format!("a child failed: {status}"))),
            Err(error) => failed = Some(error),
        }
        1.0
    });
    failed.map_or(Ok(rate), Err)
}

/// Sequential write with fdatasync at its end, sequential read past the page cache, and the time of one block written and made durable.
fn disk(scratch: &Path) -> io::Result<()> {
    let path = scratch.join("bench");
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
    let chunk = vec![0x5a_u8; 1 << 20];
    let began = Instant::now();
    for _ in 0..DISK_BYTES / chunk.len() {
        file.write_all(&chunk)?;
    }
    file.sync_data()?;
    println!("disk-write {}", mib(DISK_BYTES) / began.elapsed().as_secs_f64());

    // O_DIRECT where the file system has it: otherwise the page cache would be measured.
    if let Ok(direct) = File::options().read(true).custom_flags(nix::libc::O_DIRECT).open(&path) {
        let began = Instant::now();
        let read = read_all(direct)?;
        println!("disk-read {}", mib(read) / began.elapsed().as_secs_f64());
    }

    let (began, mut written) = (Instant::now(), 0_u32);
    while began.elapsed() < SPAN {
        let block = u64::from(written).wrapping_mul(7919) % u64::try_from(DISK_BYTES / BLOCK).unwrap_or(1);
        file.seek(SeekFrom::Start(block * u64::try_from(BLOCK).unwrap_or(0)))?;
        file.write_all(chunk.get(..BLOCK).unwrap_or(&chunk))?;
        file.sync_data()?;
        written += 1;
    }
    println!("disk-latency {}", began.elapsed().as_secs_f64() * 1e6 / f64::from(written.max(1)));
    fs::remove_file(path)
}

/// Reads to the end in aligned chunks, as O_DIRECT wants.
fn read_all(mut file: File) -> io::Result<usize> {
    let mut room = vec![0_u8; (1 << 20) + BLOCK];
    let skip = room.as_ptr().align_offset(BLOCK);
    let aligned = room.get_mut(skip..skip + (1 << 20)).ok_or(io::ErrorKind::InvalidInput)?;
    let mut total = 0;
    loop {
        match file.read(aligned)? {
            0 => return Ok(total),
            read => total += read,
        }
    }
}

fn mib(bytes: usize) -> f64 {
    u32::try_from(bytes).map_or(f64::INFINITY, f64::from) / f64::from(1 << 20)
}
