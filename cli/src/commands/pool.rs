//! The resident owner's commands.

use std::thread;

use anyhow::{Context, Result};
use carrel_host::resident::{self, Options, Overcommit, Resident, Status, Stopper};
use carrel_protocol::units::VcpuCount;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::{place, run};
use crate::arguments::pool::{PoolArgs, PoolCommand, StatusArgs};
use crate::configuration::Configuration;
use crate::failure;
use crate::values::size;

/// `carrel pool`.
pub(crate) fn pool(args: &PoolArgs, configuration: &Configuration) -> Result<u8> {
    if let Some(PoolCommand::Status(args)) = &args.command {
        return status(args, configuration);
    }
    let usual = Overcommit::default();
    let overcommit = Overcommit {
        memory: args.memory_overcommit.unwrap_or(usual.memory),
        cpu: args.cpu_overcommit.unwrap_or(usual.cpu),
    };
    let usual = (VcpuCount::ONE, run::usual_memory()?);
    let warm = Some(args.warm).filter(|time| !time.is_zero());
    let options = Options { usual, ready: args.ready(), idle: args.idle, overcommit, warm };
    let home = place::home(configuration)?;
    home.assets().check()?;
    let resident = Resident::open(home, options)?;
    stop_by_signals(resident.stopper())?;
    resident.serve()?;
    Ok(0)
}

fn stop_by_signals(stopper: Stopper) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("Signals can't be received.")?;
    let hear = move || signals.forever().for_each(|_| stopper.stop());
    thread::Builder::new().name("signals".into()).spawn(hear).context("A thread can't be started.")?;
    Ok(())
}

fn status(args: &StatusArgs, configuration: &Configuration) -> Result<u8> {
    let status = resident::status(&place::home(configuration)?)?;
    if args.json {
        failure::print(format_args!("{}\n", serde_json::to_string(&status)?))?;
    } else {
        failure::print(in_words(&status))?;
    }
    Ok(0)
}

fn in_words(status: &Status) -> String {
    let ready: Vec<String> = status
        .ready
        .iter()
        .map(|ready| {
            let vcpus = if ready.vcpus == 1 { "vCPU" } else { "vCPUs" };
            format!("{} with {} {vcpus} and {} MiB", ready.count, ready.vcpus, ready.memory_mib)
        })
        .collect();
    let cpus = |millis: u64| format!("{}.{}", millis / 1000, millis % 1000 / 100);
    format!(
        "process      {pid}, for {up} s\n\
         rooms        {rooms} now ({starting} starting), {given} so far: {from_shelf} in a VMM that was ready, {refused} refused\n\
         warm         {warm} wait for another event ({resting} at rest), {woken} woken so far\n\
         ready        {ready}\n\
         memory       {memory} promised of {most_memory}, {taken} taken\n\
         CPUs         {cpu} promised of {most_cpu}\n",
        pid = status.pid,
        up = status.up_seconds,
        rooms = status.rooms,
        starting = status.starting,
        given = status.given,
        from_shelf = status.from_shelf,
        refused = status.refused,
        warm = status.warm,
        resting = status.resting,
        woken = status.woken,
        ready = if ready.is_empty() { "none".to_owned() } else { ready.join(", ") },
        memory = size::human(status.memory_promised),
        most_memory = size::human(status.memory_limit),
        taken = size::human(status.memory_taken),
        cpu = cpus(status.cpu_promised_millis),
        most_cpu = cpus(status.cpu_limit_millis),
    )
}

#[cfg(test)]
mod tests {
    use carrel_host::resident::Ready;

    use super::*;

    #[test]
    fn a_status_says_what_is_ready_and_what_is_promised() {
        let status = Status {
            pid: 7,
            up_seconds: 60,
            rooms: 2,
            starting: 1,
            given: 9,
            from_shelf: 8,
            refused: 0,
            warm: 1,
            resting: 1,
            woken: 3,
            ready: vec![
                Ready { vcpus: 1, memory_mib: 512, count: 4 },
                Ready { vcpus: 2, memory_mib: 64, count: 0 },
            ],
            memory_promised: 1 << 30,
            memory_limit: 16 << 30,
            memory_taken: 38 << 20,
            cpu_promised_millis: 1500,
            cpu_limit_millis: 200_000,
        };
        let words = in_words(&status);
        for part in [
            "2 now (1 starting)",
            "1 wait for another event (1 at rest), 3 woken",
            "4 with 1 vCPU and 512 MiB, 0 with 2 vCPUs and 64",
            "of 16 GiB, 38 MiB taken",
            "1.5 promised of 200.0",
        ] {
            assert!(words.contains(part), "{part}: {words}");
        }
    }
}
