//! How a room, or a process in it, ended.

use carrel_protocol::agent::{ExitStatus, Failure};
use carrel_protocol::one_line;
use carrel_protocol::vmm::End;
use serde::{Deserialize, Serialize};

/// How a room ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum Outcome {
    /// The workload ended.
    Exited {
        /// How.
        status: ExitStatus,
        /// The guest's kernel killed a process of it for want of memory.
        out_of_memory: bool,
    },
    /// The room's timeout ran out.
    TimedOut {
        /// The timeout, ms.
        after_ms: u64,
    },
    /// Somebody asked for the end before the workload began, or its command was killed.
    Stopped {
        /// The signal that asked, or would have.
        signal: u8,
    },
    /// The payload, the command or the user were refused by the guest's agent.
    Refused {
        /// What was wrong.
        failure: Failure,
        /// One sentence, made in the guest, cleaned.
        message: String,
    },
    /// The VMM did not come up, or broke down.
    VmmFailed {
        /// In which class.
        end: End,
        /// One sentence.
        message: String,
    },
    /// It was saved as a template, as it was meant to.
    Saved {
        /// Bytes of its state.
        state_bytes: u64,
        /// Bytes of its memory that are not zeros.
        memory_bytes: u64,
    },
    /// A signal killed the VMM.
    VmmKilled {
        /// Which.
        signal: u8,
        /// Its cgroup ran out of memory.
        out_of_memory: bool,
    },
    /// The guest's kernel panicked.
    GuestPanicked {
        /// Lines of its log around that, as the guest's memory has them: printable, a few KiB.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        last_words: Option<String>,
    },
    /// The guest restarted, or fell over, before its workload ended.
    GuestEnded {
        /// How.
        end: End,
        /// What the agent said before, if anything.
        message: Option<String>,
    },
    /// A step took longer than it ever should.
    Overdue {
        /// What was waited for.
        step: Step,
        /// For how long, s.
        seconds: u64,
        /// What the VMM had used of the CPUs since its start, ms: tells a guest that stands still from one that is slow.
        #[serde(default)]
        cpu_ms: u64,
        /// Where the VMM's threads stood: `NAME STATE in FUNCTION` each.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        threads: Vec<String>,
    },
    /// The agent broke the protocol, or is of another version.
    AgentFailed {
        /// One sentence.
        message: String,
    },
    /// The host has promised all that it can to other rooms, or has nothing left.
    NoCapacity {
        /// One sentence, without its end.
        message: String,
    },
    /// The owner itself could not go on.
    OwnerFailed {
        /// One sentence, causes included.
        message: String,
    },
    /// Its owner was killed, or the host went down: nobody knows.
    Lost,
}

/// Steps with a deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// From the VMM's start to the agent's first word.
    Boot,
    /// Fetching and unpacking the payload.
    Prepare,
    /// Freezing a template's guest.
    Freeze,
    /// Saving it.
    Save,
    /// Starting the workload.
    Start,
    /// The workload's own way to where it is ready to be cloned.
    Initialise,
    /// Handling an event, beyond the function's own timeouts.
    Invoke,
    /// Ending the workload after SIGKILL.
    Kill,
    /// Sending the first of the files that were asked for.
    Return,
}

impl Outcome {
    /// The exit status that `carrel run` and `carrel wait` show: the workload's own, 124, 125, 126, 127, 128 + n.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Exited { status, .. } => exit_status(*status),
            Self::Saved { .. } => 0,
            Self::TimedOut { .. } => 124,
            Self::Stopped { signal } => 128_u8.saturating_add(*signal),
            Self::Refused { failure, .. } => failure_status(*failure),
            Self::VmmFailed { .. }
            | Self::VmmKilled { .. }
            | Self::GuestPanicked { .. }
            | Self::GuestEnded { .. }
            | Self::Overdue { .. }
            | Self::AgentFailed { .. }
            | Self::NoCapacity { .. }
            | Self::OwnerFailed { .. }
            | Self::Lost => 125,
        }
    }

    /// One sentence for the user where the status doesn't say it all: `None` for a workload that just ended.
    pub fn sentence(&self) -> Option<String> {
        Some(match self {
            Self::Exited { status: ExitStatus::Signal(9), out_of_memory: true } => {
                "The workload was killed because the room is out of memory; give it more with --memory.".into()
            }
            Self::Exited { .. } | Self::Saved { .. } => return None,
            Self::TimedOut { after_ms } => {
                format!("The room was ended because its timeout of {} ran out.", seconds(*after_ms))
            }
            Self::Stopped { .. } => "The room was ended before its workload began.".into(),
            Self::Refused { failure, message } => {
                let what = match failure {
                    Failure::BadPayload => "The room's payload is damaged or not allowed",
                    Failure::PayloadTooLarge => "The room's payload is too large",
                    Failure::DiskFull => "The room's disk is too small for its payload, give it more with --disk",
                    Failure::CommandNotFound => "The command was not found",
                    Failure::CommandNotExecutable => "The command can't be executed",
                    Failure::UnknownUser => "The user or group is unknown in this image",
                    Failure::BadRequest => "The request was refused",
                    Failure::System => "The guest failed",
                };
                format!("{what}: {message}")
            }
            Self::VmmFailed { end: End::Host, message } => format!("The VMM could not be confined or fed: {message}"),
            Self::VmmFailed { end: End::BadConfiguration, message } => {
                format!("The VMM refused the kernel or the machine: {message}")
            }
            Self::VmmFailed { end: End::BadSnapshot, message } => {
                format!("The room could not go on from its template: {message}")
            }
            Self::VmmFailed { message, .. } => format!("The VMM failed: {message}"),
            Self::VmmKilled { out_of_memory: true, .. } => {
                "The VMM was killed because its cgroup ran out of memory: the host gave it too little beside the guest's."
                    .into()
            }
            Self::VmmKilled { signal: 31, .. } => {
                "The VMM was killed by its system-call filter (SIGSYS): report this, or see --unconfined.".into()
            }
            Self::VmmKilled { signal, .. } => format!("The VMM was killed by signal {signal}."),
            Self::GuestPanicked { last_words } => {
                let mut text =
                    "The guest's kernel panicked; `carrel doctor` tells whether guests run well on this host.".to_owned();
                if let Some(words) = last_words {
                    text.push_str(" Its last words:");
                    for line in words.lines() {
                        text.push_str("\n  ");
                        text.push_str(line);
                    }
                }
                text
            }
            Self::GuestEnded { end, message } => {
                let how = match end {
                    End::Shutdown => "powered itself off",
                    End::Reset => "restarted",
                    End::TripleFault => "triple-faulted",
                    End::Panic => "panicked",
                    End::Stopped | End::BadConfiguration | End::BadSnapshot | End::Kvm | End::Host | End::Internal => "was ended",
                };
                match message {
                    Some(message) => format!("The guest {how} before its workload ended: {message}"),
                    None => format!("The guest {how} before its workload ended."),
                }
            }
            Self::Overdue { step, seconds: limit, cpu_ms, threads } => {
                let what = match step {
                    Step::Boot => "The guest did not come up",
                    Step::Prepare => "The payload was not unpacked",
                    Step::Freeze => "The guest did not come to rest",
                    Step::Save => "The guest was not saved",
                    Step::Start => "The workload did not start",
                    Step::Initialise => "The workload did not say that it is ready to be cloned",
                    Step::Invoke => "The guest's agent did not answer for the function",
                    Step::Kill => "The workload did not end after SIGKILL",
                    Step::Return => "The room did not send its files",
                };
                let cpu = seconds(*cpu_ms);
                let threads = match threads.as_slice() {
                    [] => String::new(),
                    threads => format!(" ({})", threads.join(", ")),
                };
                format!(
                    "{what} within {limit} s, and its VMM had used {cpu} of CPU{threads}; on a slow host set CARREL_PATIENCE to a factor above 1."
                )
            }
            Self::AgentFailed { message } => format!("The guest's agent failed: {message}"),
            Self::NoCapacity { message } => format!("The room was not begun: {message}."),
            Self::OwnerFailed { message } => format!("The room's owner failed: {message}"),
            Self::Lost => "The room's owner was killed, so nobody knows how the room ended.".into(),
        })
    }
}

/// A process's status as a shell shows it.
pub fn exit_status(status: ExitStatus) -> u8 {
    match status {
        ExitStatus::Code(code) => code,
        ExitStatus::Signal(signal) => 128_u8.saturating_add(signal),
    }
}

/// `exit status 3`, `signal 9`.
pub fn exit_in_words(status: ExitStatus) -> String {
    match status {
        ExitStatus::Code(code) => format!("exit status {code}"),
        ExitStatus::Signal(signal) => format!("signal {signal}"),
    }
}

/// Docker's statuses for what did not start.
pub fn failure_status(failure: Failure) -> u8 {
    match failure {
        Failure::CommandNotFound => 127,
        Failure::CommandNotExecutable => 126,
        Failure::BadPayload
        | Failure::PayloadTooLarge
        | Failure::DiskFull
        | Failure::UnknownUser
        | Failure::BadRequest
        | Failure::System => 125,
    }
}

/// `1.5 s`, `3 s`.
fn seconds(ms: u64) -> String {
    match ms % 1000 {
        0 => format!("{} s", ms / 1000),
        rest => format!("{}.{} s", ms / 1000, format!("{rest:03}").trim_end_matches('0')),
    }
}

/// Guest-made text as one line of bounded length without control characters.
pub fn clean(text: &str) -> String {
    one_line(text, 1000)
}

/// The same of text that has lines: so many, so long.
pub fn clean_lines(text: &str) -> String {
    let mut cleaned = String::new();
    for line in text.lines().take(100) {
        cleaned.push_str(&one_line(line, 200));
        cleaned.push('\n');
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_overdue_says_whether_it_stood_still() {
        let overdue = Outcome::Overdue { step: Step::Boot, seconds: 60, cpu_ms: 59_100, threads: Vec::new() };
        let sentence = overdue.sentence().unwrap();
        assert!(
            sentence
                .starts_with("The guest did not come up within 60 s, and its VMM had used 59.1 s of CPU;"),
            "{sentence}"
        );
    }

    #[test]
    fn statuses_are_dockers() {
        let exited = |status| Outcome::Exited { status, out_of_memory: false };
        assert_eq!(exited(ExitStatus::Code(7)).exit_status(), 7);
        assert_eq!(exited(ExitStatus::Signal(11)).exit_status(), 139);
        assert_eq!(Outcome::TimedOut { after_ms: 1 }.exit_status(), 124);
        let refused = |failure| Outcome::Refused { failure, message: String::new() }.exit_status();
        assert_eq!(refused(Failure::CommandNotFound), 127);
        assert_eq!(refused(Failure::CommandNotExecutable), 126);
        assert_eq!(refused(Failure::UnknownUser), 125);
        assert_eq!(Outcome::GuestPanicked { last_words: None }.exit_status(), 125);
    }

    #[test]
    fn only_what_needs_it_has_a_sentence() {
        assert_eq!(Outcome::Exited { status: ExitStatus::Code(1), out_of_memory: false }.sentence(), None);
        let text = Outcome::TimedOut { after_ms: 1500 }.sentence().unwrap();
        assert_eq!(text, "The room was ended because its timeout of 1.5 s ran out.");
    }

    #[test]
    fn guests_can_not_drive_the_terminal() {
        assert_eq!(clean(" a\x1b[2Jb\r\nc\u{9b} "), "a[2Jb  c");
        assert_eq!(clean(&"x".repeat(5000)).len(), 1000);
    }
}
