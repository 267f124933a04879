//! Where a VMM's threads stand, for whoever asks why a guest does not go on: one that waits for a disk and one that spins look alike from outside.

use std::fs;
use std::path::Path;

use carrel_protocol::one_line;

use crate::stat::Stat;

/// Threads that are told at most.
const MOST: usize = 16;
/// Of a thread's name (TASK_COMM_LEN) and of a kernel function's.
const NAME_CHARACTERS: usize = 15;
const PLACE_CHARACTERS: usize = 60;

/// Each thread of a process as `NAME STATE in FUNCTION`: its state's letter, and the kernel's function in which it waits, where the kernel tells (proc(5), `stat`
/// and `wchan`). None for a process that is gone.
pub(crate) fn of(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.take(MOST).filter_map(|task| thread(&task.path())).collect()
}

fn thread(task: &Path) -> Option<String> {
    let stat = fs::read_to_string(task.join("stat")).ok()?;
    let stat = Stat::parse(&stat)?;
    let mut text = format!("{} {}", one_line(stat.name, NAME_CHARACTERS), stat.field(3)?);
    match fs::read_to_string(task.join("wchan")) {
        // "0": it runs, or waits to run.
        Ok(place) if !place.is_empty() && place != "0" => {
            text.push_str(" in ");
            text.push_str(&one_line(&place, PLACE_CHARACTERS));
        }
        Ok(_) | Err(_) => {}
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_is_told_with_its_state() {
        let waits = std::sync::Arc::new(std::sync::Barrier::new(2));
        let other = std::thread::Builder::new().name("told (x) 7".into());
        let barrier = waits.clone();
        let thread = other.spawn(move || barrier.wait()).unwrap();
        let told = (0..500).find_map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            of(std::process::id()).into_iter().find(|line| line.starts_with("told (x) 7 S"))
        });
        waits.wait();
        thread.join().unwrap();
        assert!(told.is_some());
        assert_eq!(of(u32::MAX), [""; 0]);
    }
}
