//! How a room ends: first asked, then stopped, then killed; and what is cleared away after it.
//!
//! ```text
//!   shut_down: Shutdown to the agent ──(in time)──▶ VMM gone ─▶ finish
//!                   └─ too late ─▶ Stop to the VMM ──▶ …
//!   give_up:   Stop to the VMM ─────────────────────▶ …
//!                   └─ too late ─▶ SIGKILL ──────────▶ …
//! ```

use std::fs;
use std::time::{Duration, Instant};

use carrel_protocol::agent::{FromAgent, Shutdown};
use carrel_protocol::vmm::{End, Ended, FromOwner, Stop};

use super::super::api::{self, ToClient};
use super::super::events::Event;
use super::{Ownership, Pressure, Process, Room, SIGTERM, WORKLOAD};
use crate::launch::ChildEnd;
use crate::outcome::{Outcome, Step, clean, clean_lines};
use crate::packet::Connection;
use crate::record::{Phase, Record, Remains};
use crate::timestamp::{mark, now_ms};

/// From the VMM's end to that of its agent's connection, which is read as fast as an agent may speak.
const LAST_WORDS: Duration = Duration::from_millis(500);

impl Room {
    /// The workload ended: the room ends when all that it wrote was read.
    pub(super) fn end_if_drained(&mut self) {
        if self.record.phase != Phase::Draining {
            return;
        }
        let attached = !self.own.spec.detached && self.clients.contains_key(&self.creator);
        let logged = self.processes.get(&WORKLOAD).is_none_or(|workload| workload.logged.is_empty());
        if !attached && logged {
            self.shut_down();
        }
    }

    /// Waits no longer for the streams of processes that ended so long ago. A log is read on while its writer runs, whoever else ends.
    pub(super) fn flush(&mut self, now: Instant) {
        let late = |process: &mut Process| process.flush.take_if(|at| *at <= now).is_some();
        let late: Vec<_> =
            self.processes.iter_mut().filter_map(|(id, process)| late(process).then_some(*id)).collect();
        for id in late {
            let Some(process) = self.processes.get_mut(&id) else { continue };
            process.logged.clear();
            if process.awaited.is_empty() {
                self.end_if_drained();
            } else {
                self.tell_exit(id);
            }
        }
    }

    /// Asks the agent to end the guest: its last report and its disk's last writes come first.
    pub(super) fn shut_down(&mut self) {
        self.enter(Phase::Ending, None);
        if self.control.is_none() {
            return self.press();
        }
        self.pressure = Some(Pressure::Asked);
        self.deadlines.pressure = Some(Instant::now() + self.own.patience.shut_down());
        self.tell_agent(Shutdown {});
    }

    /// Ends the room for this reason, unless it has another one already.
    pub(super) fn give_up(&mut self, outcome: Outcome) {
        tracing::debug!(?outcome, "the room is given up");
        // An agent that did not say in time that the workload is dead says nothing more.
        let mute = matches!(outcome, Outcome::Overdue { step: Step::Kill, .. });
        self.record.outcome.get_or_insert(outcome);
        let ran = matches!(self.record.phase, Phase::Running | Phase::Draining);
        self.enter(Phase::Ending, None);
        match self.pressure {
            // What ran is asked for its last report; what never ran has none, and who rests gave it before.
            None if ran && !mute && !self.is_paused() && self.control.is_some() => self.shut_down(),
            None | Some(Pressure::Asked) => {
                self.pressure = Some(Pressure::Asked);
                self.press();
            }
            Some(Pressure::Stopped | Pressure::Killed) => {}
        }
    }

    /// The next harder step.
    pub(super) fn press(&mut self) {
        self.deadlines.step = None;
        self.deadlines.pressure = Some(Instant::now() + self.own.patience.stop_vmm());
        match self.pressure {
            None | Some(Pressure::Asked) => {
                self.pressure = Some(Pressure::Stopped);
                if self.control.is_none() && self.record.outcome.is_none() {
                    let message =
                        self.agent_said.clone().unwrap_or_else(|| "it ended the conversation".into());
                    self.record.outcome = Some(Outcome::AgentFailed { message });
                }
                if self.vmm.send(&FromOwner::from(Stop {}), &[]).is_err() {
                    self.child.kill();
                }
            }
            Some(Pressure::Stopped | Pressure::Killed) => {
                self.pressure = Some(Pressure::Killed);
                self.child.kill();
            }
        }
    }

    /// The agent's last report comes over another connection than its VMM's end, and may be heard after it. That connection has an end too, now.
    pub(super) fn hear_last_words(&mut self) {
        let until = Instant::now() + LAST_WORDS;
        while self.control.is_some() {
            match self.events.next(Some(until)) {
                Some(Event::Agent(message @ (FromAgent::Usage(_) | FromAgent::Ending(_)))) => {
                    self.hear_agent(message);
                }
                Some(Event::AgentClosed(_)) | None => return,
                Some(_) => {}
            }
        }
    }

    /// The VMM is gone: what it was is metered, buried, recorded and told.
    pub(super) fn finish(mut self) {
        self.note(mark("VMM gone"));
        self.meter.sample();
        let end = self.vmm_end.unwrap_or(ChildEnd::Signal(0));
        let out_of_memory = self
            .cgroup
            .as_ref()
            .and_then(|cgroup| cgroup.keyed("memory.events", "oom_kill"))
            .is_some_and(|kills| kills > 0);
        if let Err(error) = self.child.wait() {
            tracing::warn!(%error, "the VMM can't be waited for");
        }
        if let Some(cgroup) = &self.cgroup {
            cgroup.remove();
        }
        let report = self.report();
        let outcome = match self.record.outcome.take() {
            Some(outcome) => outcome,
            None => by_the_vmms_end(end, self.vmm_said.take(), self.agent_said.take(), out_of_memory),
        };
        tracing::debug!(?end, ?outcome, "the room is over");
        self.record.usage = Some(report.clone());
        let clients: Vec<_> = self.clients.values().map(|client| &client.connection).collect();
        let timeline = std::mem::take(&mut self.own.timeline);
        let started = self.record.started_ms.is_some();
        let told =
            ToClient::from(api::Ended { outcome: outcome.clone(), usage: Some(report), started, timeline });
        conclude(self.own, self.record, outcome);
        for client in clients {
            let _ = client.send(&told, &[]);
        }
    }
}

/// What the VMM's end says of a room whose workload did not end by itself.
fn by_the_vmms_end(
    end: ChildEnd,
    said: Option<Ended>,
    agent_said: Option<String>,
    out_of_memory: bool,
) -> Outcome {
    let code = match end {
        ChildEnd::Signal(signal) => return Outcome::VmmKilled { signal, out_of_memory },
        ChildEnd::Status(code) => code,
    };
    let (end, detail) = match (said, End::from_status(code)) {
        (Some(said), _) => (said.end, said.detail),
        (None, Some(end)) => (end, None),
        (None, None) => (End::Internal, Some(format!("it ended with the unknown status {code}"))),
    };
    match end {
        End::Panic => Outcome::GuestPanicked { last_words: detail.as_deref().map(clean_lines) },
        End::Shutdown | End::Reset | End::TripleFault => Outcome::GuestEnded { end, message: agent_said },
        End::Stopped => Outcome::Stopped { signal: SIGTERM },
        End::BadConfiguration | End::BadSnapshot | End::Kvm | End::Host | End::Internal => {
            let message = detail
                .as_deref()
                .map_or_else(|| "it gave no reason; see its owner.log with CARREL_LOG=debug".into(), clean);
            Outcome::VmmFailed { end, message }
        }
    }
}

/// Clears the room's files away, or leaves a detached one's record and log; then gives the lock back.
fn conclude(own: Ownership, mut record: Record, outcome: Outcome) {
    let directory = &own.directory;
    let keep = own.spec.detached;
    let _ = fs::remove_file(directory.join("owner.sock"));
    if keep {
        record.phase = Phase::Ended;
        record.ended_ms = Some(now_ms());
        record.outcome = Some(outcome);
        record.remains = Remains::default();
        if let Err(error) = record.write(&directory.join("state.json")) {
            tracing::error!(%error, "the room's end can't be recorded; its log is all that stays");
        }
    } else if let Err(error) = fs::remove_dir_all(directory) {
        tracing::error!(%error, "the room's directory can't be removed");
    }
    drop(own.lock);
}

/// Ends a room that never had a VMM.
pub(crate) fn end_without_vmm(own: Ownership, creator: &Connection, outcome: Outcome) {
    let record = Record::read(&own.directory.join("state.json")).unwrap_or_else(|| Record::new(now_ms()));
    conclude(own, record, outcome.clone());
    let ended = api::Ended { outcome, usage: None, started: false, timeline: Vec::new() };
    let _ = creator.send(&ToClient::from(ended), &[]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vmms_last_words_win_over_its_status() {
        let said = Ended { end: End::Kvm, detail: Some("no".into()) };
        let outcome = by_the_vmms_end(ChildEnd::Status(End::Kvm.status()), Some(said), None, false);
        assert_eq!(outcome, Outcome::VmmFailed { end: End::Kvm, message: "no".into() });
    }

    #[test]
    fn a_silent_end_is_read_from_its_status() {
        let end = |code| by_the_vmms_end(ChildEnd::Status(code), None, None, false);
        assert_eq!(end(End::Panic.status()), Outcome::GuestPanicked { last_words: None });
        assert_eq!(
            end(End::TripleFault.status()),
            Outcome::GuestEnded { end: End::TripleFault, message: None }
        );
        assert!(matches!(end(99), Outcome::VmmFailed { end: End::Internal, .. }));
        assert_eq!(
            by_the_vmms_end(ChildEnd::Signal(9), None, None, true),
            Outcome::VmmKilled { signal: 9, out_of_memory: true }
        );
    }
}
