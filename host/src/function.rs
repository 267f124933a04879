//! A function: what it is, the room that it gets, and what its invocations say.
//!
//! ```text
//!   Function + image + zip ── room ──▶ RoomSpec ─▶ Home::create ─▶ Session
//!                                                                     │ invoke ([`invocation`])
//!   response, or error ◀── answer ([`answer`]) ◀── how it ended ◀─────┘
//! ```
//!
//! Everything but the invocation itself is a pure function of its inputs. The numbers and names are Lambda's (AWS Lambda, *Quotas*,
//! *Defined runtime environment variables*).

use std::fmt;
use std::io;
use std::time::Duration;

use carrel_protocol::agent::Surroundings;
use carrel_protocol::units::{MemoryMib, OutOfRange, VcpuCount};
use thiserror::Error;

use crate::home::random;
use crate::image::{self, ComposeError, ImageDefaults, Overrides};
use crate::patience::Patience;
use crate::spec::{
    DEFAULT_DISK_BYTES, FunctionSpec, LayerSpec, Machine, Part, Payload, ProcessSpec, RoomSpec, ZipSpec,
};
use crate::timestamp::rfc3339;

pub mod answer;
pub mod invocation;

/// The only version that a function has here.
pub const VERSION: &str = "$LATEST";
/// The largest event, bytes.
pub const EVENT_BYTES: u64 = 6 << 20;
/// The largest response that is not streamed, bytes: 6 MiB and Lambda's 100 bytes.
pub const RESPONSE_BYTES: u64 = (6 << 20) + 100;
/// The largest zip, and the most that it may hold once unpacked, bytes.
pub const ZIP_BYTES: u64 = 250 << 20;

/// Where a zip's files go.
const TASK_ROOT: &str = "/var/task";
const RUNTIME_ROOT: &str = "/var/runtime";
/// What a custom runtime's zip has to bring.
const BOOTSTRAP: &str = "/var/task/bootstrap";
/// Who functions run as, whatever their image says: Lambda's own user. It needs no entry in the image's files.
const USER: &str = "993:990";
/// Processes and threads.
const PROCESSES: u32 = 1024;
/// Memory that buys one CPU, MB.
const MB_PER_CPU: u32 = 1769;
/// What the guest's kernel and agent take beside the function's own memory, MiB.
const GUEST_MIB: u64 = 64;
/// The most that a managed runtime's own files take, bytes.
const RUNTIME_BYTES: u64 = 96 << 20;
/// The most that variables may take, bytes.
const ENVIRONMENT_BYTES: usize = 4096;
/// A function is not asked politely: Lambda's own shutdown has no time without extensions.
const SIGKILL: u8 = 9;
/// Where a function believes to be unless its variables say otherwise.
pub const DEFAULT_REGION: &str = "us-east-1";

/// Variables that say what is so, and can't be set to something else.
const RESERVED: [&str; 6] = [
    "_HANDLER",
    "AWS_EXECUTION_ENV",
    "AWS_LAMBDA_RUNTIME_API",
    "AWS_LAMBDA_INITIALIZATION_TYPE",
    "LAMBDA_TASK_ROOT",
    "LAMBDA_RUNTIME_DIR",
];
const RESERVED_PREFIXES: [&str; 2] = ["AWS_LAMBDA_FUNCTION_", "AWS_LAMBDA_LOG_"];

/// Defaults that an image, and then the user, may replace.
const WEAK: [&str; 4] = [
    "LANG=en_US.UTF-8",
    "TZ=:UTC",
    "PATH=/usr/local/bin:/usr/bin/:/bin:/opt/bin",
    "LD_LIBRARY_PATH=/lib64:/usr/lib64:/var/runtime:/var/runtime/lib:/var/task:/var/task/lib:/opt/lib",
];

/// What can't be a function.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum FunctionError {
    /// Lambda's names go into paths of logs, and into headers.
    #[error("{0:?} is no function's name: use 1 to 64 letters, digits, '-' or '_'")]
    Name(String),
    /// Outside Lambda's range.
    #[error("a function's memory must be between 128 and 10240 MB, not {0} MB")]
    Memory(u64),
    /// Outside Lambda's range.
    #[error("a function's timeout must be between 1 and 900 seconds")]
    Timeout,
    /// Says nothing to a managed runtime.
    #[error("the runtime {0} needs a handler; give one, such as module.function")]
    NoHandler(String),
    /// Control characters, or too long.
    #[error("the handler must be 1 to 128 characters without spaces or control characters")]
    Handler,
    /// A variable that carrel sets itself.
    #[error("the variable {0} is reserved for the runtime; leave it out")]
    Reserved(String),
    /// Too many or too long.
    #[error("the function's variables take {0} bytes; {ENVIRONMENT_BYTES} are allowed")]
    Environment(usize),
    /// Too large to be tried.
    #[error("the zip has {0} bytes; {ZIP_BYTES} are allowed")]
    Zip(u64),
    /// See there.
    #[error(transparent)]
    Compose(#[from] ComposeError),
    /// See there.
    #[error(transparent)]
    Machine(#[from] OutOfRange),
}

/// What runs the code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Engine {
    /// A managed runtime of this name, and a zip.
    Managed(String),
    /// The function's own image.
    Image,
}

impl Engine {
    /// Managed runtimes that bring nothing but a userland.
    fn is_custom(&self) -> bool {
        matches!(self, Self::Managed(name) if name.starts_with("provided"))
    }
}

/// Memory of a function: 128 to 10,240 MB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionMemory(u32);

impl TryFrom<u64> for FunctionMemory {
    type Error = FunctionError;
    fn try_from(mb: u64) -> Result<Self, FunctionError> {
        let fits = u32::try_from(mb).ok().filter(|mb| (128..=10_240).contains(mb));
        fits.map(Self).ok_or(FunctionError::Memory(mb))
    }
}

impl FunctionMemory {
    /// MB, which are MiB.
    pub fn get(self) -> u32 {
        self.0
    }

    /// The CPU share that it buys, in thousandths of one CPU, rounded up.
    fn cpu_millis(self) -> u32 {
        (self.0 * 1000).div_ceil(MB_PER_CPU)
    }
}

/// Timeout of a function: 1 to 900 s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionTimeout(u32);

impl TryFrom<Duration> for FunctionTimeout {
    type Error = FunctionError;
    fn try_from(time: Duration) -> Result<Self, FunctionError> {
        let fits = u32::try_from(time.as_millis()).ok().filter(|ms| (1000..=900_000).contains(ms));
        fits.map(Self).ok_or(FunctionError::Timeout)
    }
}

impl FunctionTimeout {
    /// ms.
    pub fn millis(self) -> u32 {
        self.0
    }
}

/// As Lambda says it: `3.00 seconds`.
impl fmt::Display for FunctionTimeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:02} seconds", self.0 / 1000, self.0 % 1000 / 10)
    }
}

/// A function.
#[derive(Clone, Debug)]
pub struct Function {
    /// As it sees it itself.
    pub name: String,
    /// What runs it.
    pub engine: Engine,
    /// What the runtime calls; of an image, what replaces its `Cmd`.
    pub handler: Option<String>,
    /// Memory, and with it the CPU share.
    pub memory: FunctionMemory,
    /// For one event.
    pub timeout: FunctionTimeout,
    /// `NAME=value`, the user's.
    pub environment: Vec<String>,
}

/// What a function's room is made of, beside the function.
#[derive(Clone, Debug)]
pub struct Parts {
    /// What the image says of itself.
    pub defaults: ImageDefaults,
    /// The image's layers, lowest first.
    pub layers: Vec<LayerSpec>,
    /// The zip's digest and size.
    pub zip: Option<(String, u64)>,
    /// For `carrel ps`.
    pub image: String,
}

/// Where and when an instance lives.
#[derive(Clone, Debug)]
pub struct Circumstances {
    /// How long INIT may take before the function's own timeout begins to count.
    pub init: Duration,
    /// Its log stream. Instances that begin initialised are clones of one that ran before them, so they have none.
    pub log_stream: Option<String>,
}

impl Circumstances {
    /// A new instance, here and now.
    ///
    /// # Errors
    ///
    /// The kernel gives no random bytes.
    pub fn now(patience: Patience) -> io::Result<Self> {
        let mut bytes = [0; 16];
        random(&mut bytes)?;
        let stream = log_stream(crate::timestamp::now_ns(), bytes);
        Ok(Self { init: patience.init(), log_stream: Some(stream) })
    }

    /// A new instance that begins where an earlier one had loaded its handler.
    pub fn initialised(patience: Patience) -> Self {
        Self { init: patience.init(), log_stream: None }
    }
}

/// A log stream's name: `2026/11/21/[$LATEST]` and 32 digits.
fn log_stream(now_ns: u64, random: [u8; 16]) -> String {
    let date: String = rfc3339(now_ns).chars().take(10).map(|c| if c == '-' { '/' } else { c }).collect();
    format!("{date}/[{VERSION}]{:032x}", u128::from_be_bytes(random))
}

/// An invocation's id: a random UUID (RFC 9562, version 4).
///
/// # Errors
///
/// The kernel gives no random bytes.
pub fn request_id() -> io::Result<String> {
    let mut bytes = [0; 16];
    random(&mut bytes)?;
    Ok(uuid(bytes))
}

/// An invocation's tracing header, a root of its own (AWS X-Ray, *Tracing header*): nobody collects it, so it is not sampled.
///
/// # Errors
///
/// The kernel gives no random bytes.
pub fn trace_id(now_ns: u64) -> io::Result<String> {
    let (mut root, mut parent) = ([0; 12], [0; 8]);
    random(&mut root)?;
    random(&mut parent)?;
    Ok(trace(now_ns, root, parent))
}

/// `Root=1-`, seconds since 1970 in 8 digits, 24 digits; the calling segment in 16.
fn trace(now_ns: u64, root: [u8; 12], parent: [u8; 8]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let seconds = now_ns / 1_000_000_000;
    format!("Root=1-{seconds:08x}-{};Parent={};Sampled=0", hex(&root), hex(&parent))
}

fn uuid(random: [u8; 16]) -> String {
    let bits = u128::from_be_bytes(random) & !(0xf << 76) & !(0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let digits = format!("{bits:032x}");
    let mut parts = [8, 4, 4, 4, 12].into_iter().scan(digits.as_str(), |rest, length| {
        let (part, more) = rest.split_at_checked(length)?;
        *rest = more;
        Some(part)
    });
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |id, part| id + "-" + part)
}

impl Function {
    /// The room of one instance.
    ///
    /// # Errors
    ///
    /// What of the function can't be.
    pub fn room(&self, parts: Parts, around: &Circumstances) -> Result<RoomSpec, FunctionError> {
        let Parts { defaults, layers, zip, image } = parts;
        let process = self.process(defaults, around)?;
        let (machine, surroundings) = self.machine()?;
        if let Some((_, size)) = zip.as_ref().filter(|(_, size)| *size > ZIP_BYTES) {
            return Err(FunctionError::Zip(*size));
        }
        let zips: Vec<ZipSpec> = zip
            .into_iter()
            .map(|(digest, size)| ZipSpec { digest, size, at: TASK_ROOT.to_owned() })
            .collect();
        let unpacked_bytes = (!zips.is_empty()).then_some(ZIP_BYTES + RUNTIME_BYTES);
        let init_ms = u32::try_from(around.init.as_millis()).unwrap_or(u32::MAX);
        Ok(RoomSpec {
            id: None,
            name: None,
            image,
            machine,
            payload: Payload { layers, zips, unpacked_bytes },
            surroundings,
            process,
            stop_signal: SIGKILL,
            stop_timeout_ms: 0,
            timeout_ms: None,
            detached: false,
            without: Vec::new(),
            function: Some(FunctionSpec {
                name: self.name.clone(),
                memory_mb: self.memory.get(),
                timeout_ms: self.timeout.millis(),
                // An INIT that takes too long is begun again by Lambda under the function's timeout. Here it just goes on.
                init_timeout_ms: init_ms.saturating_add(self.timeout.millis()),
                response_bytes: RESPONSE_BYTES,
            }),
            initialised: around.log_stream.is_none(),
        })
    }

    /// The VM has all CPUs that the share touches, so that INIT is quick; the container's cgroup has the share.
    fn machine(&self) -> Result<(Machine, Surroundings), FunctionError> {
        let share = self.memory.cpu_millis();
        let vcpus = VcpuCount::try_from(u64::from(share.div_ceil(1000)))?;
        let memory = u64::from(self.memory.get());
        let machine = Machine {
            vcpus,
            memory_mib: MemoryMib::try_from(memory + GUEST_MIB)?,
            cpu_millis: u32::from(vcpus.get()) * 1000,
            disk_bytes: DEFAULT_DISK_BYTES,
            kernel: None,
        };
        let surroundings = Surroundings {
            read_only_root: true,
            volumes: vec!["/tmp".into()],
            memory_bytes: Some(memory << 20),
            cpu_millis: Some(share),
            processes: Some(PROCESSES),
            ..Surroundings::default()
        };
        Ok((machine, surroundings))
    }

    fn process(
        &self,
        mut image: ImageDefaults,
        around: &Circumstances,
    ) -> Result<ProcessSpec, FunctionError> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
        if !(1..=64).contains(&self.name.len()) || !self.name.bytes().all(plain) {
            return Err(FunctionError::Name(self.name.clone()));
        }
        let handler = self.handler.clone();
        if handler.as_ref().is_some_and(|h| {
            !(1..=128).contains(&h.len()) || h.chars().any(|c| c.is_whitespace() || c.is_control())
        }) {
            return Err(FunctionError::Handler);
        }
        let mut overrides = Overrides {
            environment: self.environment(handler.as_deref(), around)?,
            user: Some(USER.into()),
            ..Overrides::default()
        };
        match &self.engine {
            Engine::Managed(name) if handler.is_none() && !self.engine.is_custom() => {
                return Err(FunctionError::NoHandler(name.clone()));
            }
            // Executed by itself, so that one that is missing is told from one that fails.
            Engine::Managed(_) if self.engine.is_custom() => overrides.entrypoint = Some(BOOTSTRAP.into()),
            Engine::Managed(_) => {}
            Engine::Image => overrides.command = handler.into_iter().collect(),
        }
        image.environment.splice(0..0, WEAK.map(str::to_owned));
        Ok(image::compose(&image, &overrides)?)
    }

    /// The user's variables, then those that say what is so.
    fn environment(
        &self,
        handler: Option<&str>,
        around: &Circumstances,
    ) -> Result<Vec<String>, FunctionError> {
        let name = |variable: &String| variable.split('=').next().unwrap_or_default().to_owned();
        let reserved = |name: &String| {
            RESERVED.contains(&name.as_str())
                || RESERVED_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        };
        if let Some(name) = self.environment.iter().map(name).find(reserved) {
            return Err(FunctionError::Reserved(name));
        }
        let bytes = self.environment.iter().map(String::len).sum();
        if bytes > ENVIRONMENT_BYTES {
            return Err(FunctionError::Environment(bytes));
        }
        let region = self.environment.iter().rev().find_map(|one| one.strip_prefix("AWS_REGION="));
        let region = region.unwrap_or(DEFAULT_REGION);
        let mut all = vec![format!("AWS_REGION={region}"), format!("AWS_DEFAULT_REGION={region}")];
        all.extend(self.environment.iter().cloned());
        all.extend([
            format!("AWS_LAMBDA_FUNCTION_NAME={}", self.name),
            format!("AWS_LAMBDA_FUNCTION_MEMORY_SIZE={}", self.memory.get()),
            format!("AWS_LAMBDA_FUNCTION_VERSION={VERSION}"),
            "AWS_LAMBDA_INITIALIZATION_TYPE=on-demand".into(),
            format!("LAMBDA_TASK_ROOT={TASK_ROOT}"),
            format!("LAMBDA_RUNTIME_DIR={RUNTIME_ROOT}"),
        ]);
        // As with SnapStart, where neither is there.
        if let Some(stream) = &around.log_stream {
            all.push(format!("AWS_LAMBDA_LOG_GROUP_NAME=/aws/lambda/{}", self.name));
            all.push(format!("AWS_LAMBDA_LOG_STREAM_NAME={stream}"));
        }
        all.extend(handler.map(|handler| format!("_HANDLER={handler}")));
        match &self.engine {
            Engine::Managed(name) if !self.engine.is_custom() => {
                all.push(format!("AWS_EXECUTION_ENV=AWS_Lambda_{name}"));
            }
            Engine::Managed(_) | Engine::Image => {}
        }
        Ok(all)
    }
}

/// A room that does without parts of its VMM's confinement, or boots another kernel, is said so after it was composed.
pub fn adjust(spec: &mut RoomSpec, without: Vec<Part>, kernel: Option<std::path::PathBuf>) {
    spec.without = without;
    spec.machine.kernel = kernel;
}

#[cfg(test)]
mod tests;
