//! What an invocation's end means to whoever asked: the error in place of the response, the lines around the function's own in its
//! log (AWS Lambda, *Viewing CloudWatch logs*), and the class that decides an exit status.
//!
//! | the agent says | class | error type |
//! |---|---|---|
//! | Response | Answered | |
//! | Error | FunctionError | the function's own, passed through |
//! | InitError | RuntimeFailed | the runtime's own, passed through |
//! | TimedOut, InitTimedOut | TimedOut | Sandbox.Timedout |
//! | Exited | RuntimeFailed | Runtime.ExitError, Runtime.OutOfMemory |
//! | ResponseTooLarge | TooLarge | Function.ResponseSizeTooLarge |
//! | the runtime's program can't be executed | RuntimeFailed | Runtime.InvalidEntrypoint |

use carrel_protocol::agent::{ExitStatus, Failure, Invoked, Outcome};
use serde::Serialize;

use super::{FunctionMemory, FunctionTimeout, RESPONSE_BYTES, VERSION};
use crate::outcome::{self, clean};
use crate::timestamp::rfc3339;

/// Lambda's bounds of words that a guest chose.
const WORD_CHARACTERS: usize = 256;

/// How an invocation ended, to whoever asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// With a response.
    Answered,
    /// The function itself said that it failed.
    FunctionError,
    /// Its runtime ended, or did not begin.
    RuntimeFailed,
    /// It took too long.
    TimedOut,
    /// It said too much.
    TooLarge,
}

/// The error that stands in the response's place, where the function sent none of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ErrorPayload {
    /// `Runtime.ExitError`, ….
    #[serde(rename = "errorType")]
    pub error_type: String,
    /// With the request's id in it.
    #[serde(rename = "errorMessage")]
    pub error_message: String,
}

/// An invocation that is over.
#[derive(Clone, Debug)]
pub struct Answer<'a> {
    /// The request's id.
    pub id: &'a str,
    /// The function's memory.
    pub memory: FunctionMemory,
    /// The function's timeout.
    pub timeout: FunctionTimeout,
    /// What the agent says.
    pub invoked: &'a Invoked,
}

/// The line before an invocation.
pub fn start(id: &str) -> String {
    format!("START RequestId: {id} Version: {VERSION}\n")
}

/// The line before a managed runtime's first phase: its INIT, or, where that is its template's, its restoring (AWS Lambda, *Monitoring for SnapStart*).
pub fn runtime_start(runtime: &str, initialised: bool) -> String {
    let phase = if initialised { "RESTORE" } else { "INIT" };
    format!("{phase}_START Runtime Version: {runtime}\n")
}

/// END and REPORT. `times` are those of the event and, if there was one, of INIT, µs.
fn report(
    id: &str,
    (duration, init): (u64, Option<u64>),
    memory: FunctionMemory,
    peak_bytes: u64,
    status: &str,
) -> String {
    let billed = duration.saturating_add(init.unwrap_or_default()).div_ceil(1000);
    let init = init.map(|init| format!("Init Duration: {} ms\t", millis(init))).unwrap_or_default();
    format!(
        "END RequestId: {id}\nREPORT RequestId: {id}\tDuration: {} ms\tBilled Duration: {billed} ms\t\
         Memory Size: {} MB\tMax Memory Used: {} MB\t{init}{status}\n",
        millis(duration),
        memory.get(),
        peak_bytes.div_ceil(1 << 20),
    )
}

/// The lines of an invocation whose runtime could not be started.
pub fn not_started(id: &str, memory: FunctionMemory, error: &ErrorPayload) -> String {
    let ErrorPayload { error_type, error_message } = error;
    let status = format!("Status: error\tError Type: {error_type}\t");
    format!("{}{error_message}\n{error_type}\n{}", start(id), report(id, (0, None), memory, 0, &status))
}

/// What stands for a runtime that could not be started: its program's fault, if it is one of these.
pub fn unstartable(id: &str, room: &outcome::Outcome) -> Option<ErrorPayload> {
    let outcome::Outcome::Refused { failure, message } = room else { return None };
    match failure {
        Failure::CommandNotFound | Failure::CommandNotExecutable => Some(ErrorPayload {
            error_type: "Runtime.InvalidEntrypoint".into(),
            error_message: format!("RequestId: {id} Error: {}", clean(message)),
        }),
        Failure::BadPayload
        | Failure::PayloadTooLarge
        | Failure::DiskFull
        | Failure::UnknownUser
        | Failure::BadRequest
        | Failure::System => None,
    }
}

impl Answer<'_> {
    /// The class.
    pub fn class(&self) -> Class {
        match self.invoked.outcome {
            Outcome::Response { .. } => Class::Answered,
            Outcome::Error { .. } => Class::FunctionError,
            Outcome::InitError { .. } | Outcome::Exited { .. } => Class::RuntimeFailed,
            Outcome::TimedOut | Outcome::InitTimedOut => Class::TimedOut,
            Outcome::ResponseTooLarge { .. } => Class::TooLarge,
        }
    }

    /// The error in the response's place; `None` where what came over the response's stream stands for itself.
    pub fn error(&self) -> Option<ErrorPayload> {
        let id = self.id;
        let (error_type, error_message) = match &self.invoked.outcome {
            Outcome::Response { .. } | Outcome::Error { .. } => return None,
            Outcome::InitError { .. } if self.invoked.response_bytes > 0 => return None,
            Outcome::InitError { error_type } => {
                (known(error_type, "Runtime.Unknown"), format!("RequestId: {id} Error: INIT failed"))
            }
            Outcome::TimedOut | Outcome::InitTimedOut => {
                let message = format!("RequestId: {id} Error: Task timed out after {}", self.timeout);
                ("Sandbox.Timedout".to_owned(), message)
            }
            Outcome::Exited { status, out_of_memory } => {
                let killed = *status == ExitStatus::Signal(9);
                let kind = if *out_of_memory && killed { "Runtime.OutOfMemory" } else { "Runtime.ExitError" };
                (kind.to_owned(), format!("RequestId: {id} Error: {}", exit_in_words(*status)))
            }
            Outcome::ResponseTooLarge { bytes } => {
                let message = format!(
                    "Response payload size ({bytes} bytes) exceeded maximum allowed payload size ({RESPONSE_BYTES} bytes)."
                );
                ("Function.ResponseSizeTooLarge".to_owned(), message)
            }
        };
        Some(ErrorPayload { error_type, error_message })
    }

    /// The lines after an invocation: what went wrong, END, REPORT. `now_ns` is since the epoch.
    pub fn end(&self, now_ns: u64) -> String {
        let (id, invoked) = (self.id, self.invoked);
        let mut lines = String::new();
        let init = invoked.init_us.unwrap_or_default();
        let phase_failed = |status: &str| {
            format!("INIT_REPORT Init Duration: {} ms\tPhase: init\tStatus: {status}\n", millis(init))
        };
        match &invoked.outcome {
            Outcome::Response { .. } | Outcome::Error { .. } => {}
            Outcome::InitError { error_type } => {
                let kind = known(error_type, "Runtime.Unknown");
                lines += &phase_failed(&format!("error\tError Type: {kind}"));
            }
            Outcome::InitTimedOut => lines += &phase_failed("timeout"),
            Outcome::Exited { .. } if invoked.duration_us == 0 => {
                let kind = self.error().map(|error| error.error_type).unwrap_or_default();
                lines += &phase_failed(&format!("error\tError Type: {kind}"));
            }
            Outcome::TimedOut | Outcome::Exited { .. } | Outcome::ResponseTooLarge { .. } => {}
        }
        let status = match (self.class(), self.error()) {
            (Class::TimedOut, _) => {
                let time: String = rfc3339(now_ns).chars().take(23).collect();
                lines += &format!("{time}Z {id} Task timed out after {}\n\n", self.timeout);
                "Status: timeout\t".to_owned()
            }
            (_, Some(ErrorPayload { error_type, error_message })) => {
                lines += &format!("{error_message}\n{error_type}\n");
                format!("Status: error\tError Type: {error_type}\t")
            }
            (Class::RuntimeFailed, None) => match &invoked.outcome {
                Outcome::InitError { error_type } => {
                    format!("Status: error\tError Type: {}\t", known(error_type, "Runtime.Unknown"))
                }
                Outcome::Response { .. }
                | Outcome::Error { .. }
                | Outcome::TimedOut
                | Outcome::InitTimedOut
                | Outcome::Exited { .. }
                | Outcome::ResponseTooLarge { .. } => String::new(),
            },
            (Class::Answered | Class::FunctionError | Class::TooLarge, None) => String::new(),
        };
        let times = (invoked.duration_us, invoked.init_us);
        lines + &report(id, times, self.memory, invoked.memory_peak_bytes, &status)
    }

    /// One sentence where there is no response.
    pub fn sentence(&self) -> Option<String> {
        let invoked = self.invoked;
        Some(match &invoked.outcome {
            Outcome::Response { .. } => return None,
            Outcome::Error { error_type } => {
                let kind = match known(error_type, "").as_str() {
                    "" => String::new(),
                    kind => format!(" ({kind})"),
                };
                format!("The function answered with an error{kind}; it is on standard output.")
            }
            Outcome::InitError { error_type } => {
                let kind = known(error_type, "Runtime.Unknown");
                format!("The function could not be initialised ({kind}); the error is on standard output.")
            }
            Outcome::TimedOut => format!(
                "The function timed out after {}; give it more with --timeout, or more memory and with it more CPU.",
                self.timeout
            ),
            Outcome::InitTimedOut => format!(
                "The function's runtime did not ask for its event within {} s; give it more time with --timeout, or a runtime client.",
                invoked.init_us.unwrap_or_default() / 1_000_000,
            ),
            Outcome::Exited { status: ExitStatus::Signal(9), out_of_memory: true } => {
                "The function was killed for want of memory; give it more with --memory.".into()
            }
            Outcome::Exited { status, .. } => {
                format!("{} before the function answered.", exit_in_words(*status))
            }
            Outcome::ResponseTooLarge { bytes } => {
                format!(
                    "The function's response of {bytes} bytes is too large: {RESPONSE_BYTES} are possible; let it return less, or stream it."
                )
            }
        })
    }
}

/// A type of Lambda's form (`Runtime.Name`, `Function.Name`), else this one. Guests choose it.
fn known(error_type: &str, else_this: &str) -> String {
    let known = error_type.split_once('.').is_some_and(|(space, name)| {
        matches!(space, "Runtime" | "Function" | "Extension" | "Sandbox")
            && name.len() < WORD_CHARACTERS
            && name.starts_with(|c: char| c.is_ascii_uppercase())
            && name.chars().all(|c| c.is_ascii_alphanumeric())
    });
    if known { error_type } else { else_this }.to_owned()
}

/// `12.96`, for µs.
fn millis(us: u64) -> String {
    let hundredths = us.saturating_add(5) / 10;
    format!("{}.{:02}", hundredths / 100, hundredths % 100)
}

/// As Lambda says it, which is as Go says it.
fn exit_in_words(status: ExitStatus) -> String {
    match status {
        ExitStatus::Code(0) => "Runtime exited without providing a reason".into(),
        ExitStatus::Code(code) => format!("Runtime exited with error: exit status {code}"),
        ExitStatus::Signal(signal) => {
            let name = match signal {
                1 => "hangup",
                2 => "interrupt",
                3 => "quit",
                4 => "illegal instruction",
                5 => "trace/breakpoint trap",
                6 => "aborted",
                7 => "bus error",
                8 => "floating point exception",
                9 => "killed",
                10 => "user defined signal 1",
                11 => "segmentation fault",
                12 => "user defined signal 2",
                13 => "broken pipe",
                14 => "alarm clock",
                15 => "terminated",
                other => return format!("Runtime exited with error: signal {other}"),
            };
            format!("Runtime exited with error: signal: {name}")
        }
    }
}

#[cfg(test)]
mod tests;
