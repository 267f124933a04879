//! Owner and VMM: one `SOCK_SEQPACKET` connection, a frame a packet, descriptors beside it (SCM_RIGHTS).
//!
//! ```text
//!  owner                                        carrel-vmm
//!    │ ── Configure or Restore + descriptors ───▶ │  set-up filter: maps, KVM_CREATE_*
//!    │    or ahead of need:                       │
//!    │ ── Prepare + /dev/kvm ───────────────────▶ │  makes all that needs no snapshot, and waits
//!    │ ◀────────────────── Prepared / Broken ──── │
//!    │ ── Restore + descriptors, any time later ▶ │
//!    │ ◀──────────────────── Booted / Broken ──── │  run filter from here on
//!    │ ── RecordWorkingSet + descriptor ────────▶ │  which pages a clone has touched
//!    │ ◀──────────────── Dialled + descriptor ─── │  the guest dialled a port: one end of a socketpair
//!    │ ── SetBalloon, Pause, Resume, Stop … ────▶ │
//!    │ ◀──────────────── Done / Refused ───────── │  one answer a request, in order
//!    │ ── Snapshot + descriptors (paused) ──────▶ │
//!    │ ◀──────────────── Snapshotted / Refused ── │
//!    │ ◀──────────── Metrics, DeviceStopped ───── │
//!    │ ◀───────────────────────────── Ended ───── │  then the process ends with [`End::status`]
//! ```
//!
//! The VMM opens nothing: every resource in a [`VmConfig`] is an index into the descriptors that came with it. The same
//! structure with paths in their place is what `carrel-vmm --config vm.json` reads.
//!
//! A new owner connects to the control socket ([`VmConfig::control`]); its connection then replaces the old one.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::units::{MemoryMib, VcpuCount};

/// Version of this wire form.
pub const VERSION: u32 = 4;
/// Descriptors that one packet carries at most (Linux's SCM_MAX_FD is 253).
pub const MAX_DESCRIPTORS: usize = 32;
/// Bytes in one packet at most, header included: above every kind's cap.
pub const MAX_PACKET_BYTES: usize = 96 << 10;
/// Block devices at most.
pub const MAX_BLOCKS: usize = 8;

const KIB: u32 = 1 << 10;

crate::messages! {
    /// What the owner tells the VMM.
    FromOwner {
        1 Configure 64 * KIB;
        2 SetBalloon KIB;
        3 Pause KIB;
        4 Resume KIB;
        5 ReadMetrics KIB;
        6 Stop KIB;
        7 Restore 64 * KIB;
        8 Snapshot KIB;
        9 Prepare KIB;
        10 RecordWorkingSet KIB;
    }
}

crate::messages! {
    /// What the VMM tells its owner.
    FromVmm {
        1 Booted 8 * KIB;
        2 Broken 8 * KIB;
        3 Dialled KIB;
        4 Done KIB;
        5 Refused 4 * KIB;
        6 Metrics 8 * KIB;
        7 DeviceStopped 4 * KIB;
        8 Ended 8 * KIB;
        9 Snapshotted KIB;
        10 Prepared 8 * KIB;
    }
}

/// A resource as the owner passes it: the index of a descriptor that came in the same packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor(pub u8);

/// The first packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Configure {
    /// [`VERSION`] of the owner's build. The VMM refuses any but its own.
    pub version: u32,
    /// The machine.
    pub vm: VmConfig<Descriptor>,
}

/// A microVM. `R` is how a resource is named: [`Descriptor`] from an owner, [`PathBuf`] in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig<R> {
    /// `/dev/kvm`.
    pub kvm: R,
    /// Number of vCPUs.
    pub vcpus: VcpuCount,
    /// Guest memory.
    pub memory_mib: MemoryMib,
    /// Ask for transparent huge pages behind guest memory.
    #[serde(default = "yes")]
    pub huge_pages: bool,
    /// The kernel.
    pub kernel: Kernel<R>,
    /// The initramfs, a cpio archive.
    pub initramfs: Option<R>,
    /// Devices.
    pub vsock: Option<VsockConfig<R>>,
    /// Disks, in the order in which the guest names them (`/dev/vda`, …); at most [`MAX_BLOCKS`].
    #[serde(default = "Vec::new")]
    pub blocks: Vec<BlockConfig<R>>,
    /// virtio-rng.
    pub entropy: Option<EntropyConfig>,
    /// virtio-balloon.
    pub balloon: Option<BalloonConfig>,
    /// A 16550A at port 0x3f8 whose output goes here. Without it the guest has no serial port.
    pub serial: Option<SerialConfig<R>>,
    /// A listening `SOCK_SEQPACKET` socket on which new owners are accepted.
    pub control: Option<R>,
    /// Note which pages the guest writes, so that a [`SnapshotKind::Differential`] can be made. Costs the guest huge pages and a fault for each
    /// page's first write after each snapshot.
    #[serde(default)]
    pub track_dirty: bool,
}

/// The first packet, for a machine that will go on from a snapshot which nobody has chosen yet: the VMM makes everything that needs none. Its second packet is
/// a [`Restore`] without `kvm`, and nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prepare {
    /// [`VERSION`] of the owner's build. The VMM refuses any but its own.
    pub version: u32,
    /// `/dev/kvm`.
    pub kvm: Descriptor,
    /// vCPUs that the snapshot will have to have.
    pub vcpus: VcpuCount,
    /// Guest memory that the snapshot will have to have.
    pub memory_mib: MemoryMib,
}

/// The first packet, or the second after [`Prepare`], for a machine that goes on from a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Restore {
    /// [`VERSION`] of the owner's build. The VMM refuses any but its own.
    pub version: u32,
    /// What the machine gets in place of what it had.
    pub vm: RestoreConfig<Descriptor>,
}

/// A microVM that goes on from a snapshot. Its shape (vCPUs, memory, which devices, sizes, limits on connections) is the snapshot's; here are
/// the resources, new ones for each clone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig<R> {
    /// `/dev/kvm`, unless the VMM was prepared: then it has had it.
    pub kvm: Option<R>,
    /// The state file, read once, its checksum checked.
    pub state: R,
    /// The memory file, mapped copy-on-write: it is not written to, and must not be truncated while any clone lives.
    pub memory: R,
    /// The vsock device's listening socket, as [`VsockConfig::socket`].
    pub vsock: Option<R>,
    /// Which pages to have ahead of the guest ([`RecordWorkingSet`]). One that can't be used is not: see [`Booted::notice`].
    pub working_set: Option<R>,
    /// A disk for each that the snapshot has, in its order.
    #[serde(default = "Vec::new")]
    pub blocks: Vec<RestoredBlock<R>>,
    /// Where the serial port's output goes, if the snapshot has one. Without it output is dropped.
    pub serial: Option<SerialConfig<R>>,
    /// As [`VmConfig::control`].
    pub control: Option<R>,
    /// As [`VmConfig::track_dirty`].
    #[serde(default)]
    pub track_dirty: bool,
}

/// A disk of a restored machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoredBlock<R> {
    /// [`BlockConfig::id`]; the snapshot's.
    pub id: String,
    /// The disk as it was when the snapshot was made, whole (see [`Snapshot`]); never written.
    pub base: Option<R>,
    /// Where writes go from now on. With a base it is empty at first; without one it holds the whole disk.
    pub overlay: Option<R>,
    /// Reads and writes together.
    pub limit: Option<IoLimit>,
}

/// Save a paused machine. Before the answer each disk's overlay is completed from its base, so that it holds the whole disk: whoever keeps the snapshot
/// keeps a copy of the overlays with it, made before the machine goes on, or lets the machine end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// `/dev/kvm`, which the run filters' VMM holds no more.
    pub kvm: Descriptor,
    /// An empty file for the state, opened for writing.
    pub state: Descriptor,
    /// The memory file, opened for writing: as long as the guest's memory and a hole all through for a full snapshot, an
    /// earlier snapshot's (or a copy) for a differential one.
    pub memory: Descriptor,
    /// Which pages are written.
    pub kind: SnapshotKind,
}

/// Which pages a snapshot writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotKind {
    /// All that are not zeros.
    Full,
    /// Those written since the machine began or was last snapshotted ([`VmConfig::track_dirty`]). Refused after a snapshot that failed, until there is a full one. One that
    /// fails has changed the memory file, which then belongs to no state.
    Differential,
}

/// The snapshot is written; making it durable is its owner's business.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshotted {
    /// Bytes of the state file.
    pub state_bytes: u64,
    /// Bytes written to the memory file.
    pub memory_bytes: u64,
    /// From the request to this, µs.
    pub took_us: u64,
}

fn yes() -> bool {
    true
}

/// The guest kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel<R> {
    /// ELF `vmlinux` or bzImage.
    pub image: R,
    /// The command line, at most 2,047 bytes with what the VMM appends for each virtio-mmio device.
    pub command_line: String,
}

/// virtio-vsock (virtio §5.10).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig<R> {
    /// The guest's address, 3 or more.
    pub guest_cid: u32,
    /// A listening stream socket. Who connects and says `CONNECT <port>\n` is put through to that port in the guest and
    /// answered `OK <their port>\n`. Without it only the guest dials.
    ///
    /// In a file: the path of the socket to make. What the guest dials is then put through to `<path>_<port>`.
    pub socket: Option<R>,
    /// Connections at most, both directions together.
    #[serde(default = "default_connections")]
    pub connections: u16,
}

fn default_connections() -> u16 {
    256
}

/// virtio-blk (virtio §5.2). Disks are raw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockConfig<R> {
    /// What the guest reads as the device's serial, at most 20 bytes of ASCII.
    pub id: String,
    /// What is read where the overlay has nothing. Never written; shorter than the disk reads as zeros beyond its end.
    pub base: Option<R>,
    /// Where writes go. Without it the disk is read-only. Without a base this is the whole disk.
    pub overlay: Option<R>,
    /// The disk's size in bytes, a multiple of 4,096.
    pub size_bytes: u64,
    /// What a flush is worth.
    #[serde(default)]
    pub cache: Cache,
    /// Reads and writes together.
    pub limit: Option<IoLimit>,
}

/// Whether what a guest has written outlives the host's crash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cache {
    /// The guest may flush (VIRTIO_BLK_F_FLUSH): what was written is then on the host's disk. The machine's other devices wait meanwhile.
    #[default]
    Writeback,
    /// There is nothing to flush: for disks that end with their machine.
    Unsafe,
}

/// A token bucket for a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoLimit {
    /// Bytes a second; without it unlimited.
    pub bytes_per_second: Option<u64>,
    /// Operations a second; without it unlimited.
    pub operations_per_second: Option<u64>,
}

/// virtio-rng (virtio §5.4), fed by the host's `getrandom`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntropyConfig {}

/// virtio-balloon (virtio §5.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// MiB taken from the guest at the start.
    #[serde(default)]
    pub size_mib: u32,
    /// Pages that the guest reports free go back to the host (VIRTIO_BALLOON_F_REPORTING).
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// The serial port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig<R> {
    /// Where output goes: a pipe or a file. Output that can't be written at once is dropped, never waited for.
    pub output: R,
    /// Bytes of output at most; what exceeds it is dropped.
    pub limit_bytes: u64,
}

/// The configuration file of a VMM on its own.
pub type VmFile = VmConfig<PathBuf>;
/// The same for one that goes on from a snapshot.
pub type RestoreFile = RestoreConfig<PathBuf>;

/// All that needs no snapshot is there, after [`Prepare`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prepared {
    /// As [`Booted::timeline`].
    pub timeline: Vec<Mark>,
}

/// The first vCPU is about to run, and the run filter holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Booted {
    /// What happened when, since [`Prepared`] where there was one: names in order, each with CLOCK_MONOTONIC in µs.
    pub timeline: Vec<Mark>,
    /// What was handed over and could not be used, in one sentence; the machine runs without.
    #[serde(default)]
    pub notice: Option<String>,
}

/// A moment in a start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mark {
    /// What was just done.
    pub done: String,
    /// CLOCK_MONOTONIC, µs.
    pub at_us: u64,
}

/// The VM could not be made. The process ends with [`End::status`] of what it says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Broken {
    /// In which class.
    pub end: End,
    /// One sentence, causes included.
    pub message: String,
}

/// The guest dialled; the descriptor beside this is the other end. Dropping it refuses the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dialled {
    /// The port it asked for.
    pub port: u32,
}

/// Take memory from the guest or give it back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetBalloon {
    /// The balloon's size, MiB.
    pub size_mib: u32,
}

/// Stop all vCPUs and let devices come to rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pause {}

/// Go on after [`Pause`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resume {}

/// Write down which pages of its memory a machine that goes on from a snapshot has touched by now, for [`RestoreConfig::working_set`] of others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordWorkingSet {
    /// An empty file, opened for writing.
    pub file: Descriptor,
}

/// Answer with [`Metrics`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReadMetrics {}

/// End now, whatever the guest does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stop {}

/// A request was carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Done {}

/// A request can't be carried out; nothing changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refused {
    /// One sentence.
    pub reason: String,
}

/// Counters since the start, and what the balloon holds now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// Returns from KVM_RUN, all vCPUs.
    pub exits: u64,
    /// Of these, for MMIO.
    pub mmio_exits: u64,
    /// Of these, for port I/O.
    pub port_exits: u64,
    /// Bytes that the guest sent over vsock.
    pub vsock_sent_bytes: u64,
    /// Bytes that the guest received over vsock.
    pub vsock_received_bytes: u64,
    /// Connections that the vsock device refused because there were too many.
    pub vsock_refused: u64,
    /// Disks, all together.
    pub block_read_bytes: u64,
    /// Disks, all together.
    pub block_written_bytes: u64,
    /// Read requests.
    pub block_reads: u64,
    /// Write requests.
    pub block_writes: u64,
    /// Requests that failed at the host.
    pub block_errors: u64,
    /// Bytes of guest memory given back by the balloon or by reporting.
    pub reclaimed_bytes: u64,
    /// What the balloon holds now, by its driver's word, bytes (`actual`, virtio §5.5.6).
    pub balloon_bytes: u64,
}

/// A device stopped serving the guest, or part of it, for the reason given; the VM goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceStopped {
    /// `vsock`, `block <id>`, ….
    pub device: String,
    /// Why.
    pub reason: DeviceStopReason,
}

/// Why a device stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceStopReason {
    /// The guest's driver broke the rules of its queues; the device needs a reset (virtio §2.1.1). Said once a device, however often.
    DriverFault,
    /// The host's file system has no room for the guest's writes. The guest sees an I/O error. Said once.
    HostDiskFull,
    /// The host failed to read or write for another reason. Said once.
    HostIo,
}

/// The VM is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ended {
    /// How.
    pub end: End,
    /// One sentence more, where there is more to say; of a kernel that panicked, the lines of its log around that, which are the guest's own.
    pub detail: Option<String>,
}

/// The ways in which a VMM process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// The guest powered itself off (0x2000 written to port 0x604).
    Shutdown,
    /// The guest restarted: `reboot=t` without a panic, the keyboard controller's pulse, or port 0xcf9. How rooms end.
    Reset,
    /// The guest triple-faulted by accident.
    TripleFault,
    /// The guest's kernel panicked (`panic=-1 reboot=t,panic_warm`).
    Panic,
    /// The owner said [`Stop`], or SIGTERM or SIGINT came.
    Stopped,
    /// The command line or configuration is wrong.
    BadConfiguration,
    /// The snapshot is damaged, of another version, or of a machine that this host can't go on with.
    BadSnapshot,
    /// KVM refused something.
    Kvm,
    /// The host can't give a part of the confinement, or what was handed over is unusable.
    Host,
    /// The VMM found itself in a state that must not be.
    Internal,
}

impl End {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Shutdown,
        Self::Reset,
        Self::TripleFault,
        Self::Panic,
        Self::Stopped,
        Self::BadConfiguration,
        Self::BadSnapshot,
        Self::Kvm,
        Self::Host,
        Self::Internal,
    ];

    /// The process's exit status. A status of 128 + n seen by a shell is a signal's: 159 (SIGSYS) is the seccomp filter's.
    pub const fn status(self) -> u8 {
        match self {
            Self::Shutdown => 0,
            Self::BadConfiguration => 2,
            Self::BadSnapshot => 3,
            Self::Reset => 10,
            Self::TripleFault => 11,
            Self::Panic => 12,
            Self::Stopped => 13,
            Self::Kvm => 20,
            Self::Host => 21,
            Self::Internal => 22,
        }
    }

    /// What a status says.
    pub fn from_status(status: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|end| end.status() == status)
    }
}

/// What `/dev/kvm` offers of what the VMM builds on: printed by `carrel-vmm --print-kvm` as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmSupport {
    /// [`VERSION`] of the VMM's build.
    pub version: u32,
    /// KVM_GET_API_VERSION; 12 since 2007, and the VMM takes no other.
    pub api_version: i32,
    /// vCPUs that one VM may have.
    pub vcpus: usize,
    /// What the VMM wants of KVM, in a fixed order.
    pub capabilities: Vec<KvmCapability>,
}

/// One capability (KVM API, KVM_CHECK_EXTENSION).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmCapability {
    /// `KVM_CAP_…`.
    pub name: String,
    /// What the VMM does with it.
    pub purpose: String,
    /// No VM runs without it; else guests are slower, or poorer.
    pub required: bool,
    /// KVM has it.
    pub present: bool,
}
