//! The wire form is pinned: one golden frame a message kind, in both directions, for both protocols.
//!
//! A change here is a change of [`agent::VERSION`] or [`vmm::VERSION`]. `UPDATE_GOLDEN=1 cargo test` writes the files anew.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that can't go on has failed")]

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::path::Path;

use carrel_protocol::agent::{self, *};
use carrel_protocol::units::{MemoryMib, VcpuCount};
use carrel_protocol::usage::{Cpu, GuestUsage, Io, Memory, Network, Processes};
use carrel_protocol::vmm::{self, *};
use carrel_protocol::{FrameError, HEADER_BYTES, Message};

/// Compares each message's frame with its golden file and reads the file back.
fn pinned<M: Message + PartialEq + Debug>(direction: &str, version: u32, messages: &[(&str, M)]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(direction);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::create_dir_all(&folder).unwrap();
        for (name, message) in messages {
            fs::write(folder.join(format!("v{version}-{name}.frame")), message.encode().unwrap()).unwrap();
        }
    }
    for (name, message) in messages {
        let path = folder.join(format!("v{version}-{name}.frame"));
        let golden = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(
            String::from_utf8_lossy(&message.encode().unwrap()),
            String::from_utf8_lossy(&golden),
            "the wire form of {direction}/{name} changed: raise the version and write the golden files anew"
        );
        assert_eq!(&M::decode(&golden).unwrap(), message, "{direction}/{name}");
    }
    // Every kind is pinned, so that adding one without a golden file fails here.
    let pinned: Vec<u16> = messages.iter().map(|(_, m)| m.kind()).collect();
    let all: Vec<u16> = (0..=u16::MAX).filter(|&kind| M::kind_limit(kind).is_some()).collect();
    assert!(all.iter().all(|kind| pinned.contains(kind)), "{direction}: pinned {pinned:?} of {all:?}");
}

fn stream(port: u32) -> Stream {
    Stream { port, token: Token(*b"sixteen bytes ok") }
}

fn process(id: u32) -> Process {
    Process {
        id: ProcessId(id),
        arguments: vec!["sh".into(), "-c".into(), "echo \"ü\"".into()],
        environment: vec!["PATH=/bin".into(), "EMPTY=".into()],
        working_directory: "/".into(),
        user: "nobody:nogroup".into(),
        stdio: Stdio {
            stdin: Some(stream(0x1_0001)),
            stdout: Some(stream(0x1_0002)),
            stderr: None,
            terminal: Some(TerminalSize { rows: 24, columns: 80 }),
        },
    }
}

fn blob(port: u32) -> Blob {
    Blob { digest: format!("sha256:{}", "ab".repeat(32)), size: 12345, stream: stream(port) }
}

#[test]
fn what_comes_back_from_a_room_is_pinned() {
    use carrel_protocol::returned::{Done, Entry, FromRoom, Kind, Missing};
    let entry = |path: &str, kind, mode| Entry { root: 1, path: path.into(), kind, mode, mtime: -1 };
    let messages: Vec<(&str, FromRoom)> = vec![
        ("directory", entry("", Kind::Directory, 0o755).into()),
        ("file", entry("a/\u{e9}", Kind::File { bytes: 1 << 40 }, 0o644).into()),
        ("link", entry("b", Kind::Link { target: "a/c".into() }, 0o777).into()),
        ("missing", Missing { root: 0 }.into()),
        ("done", Done { left_out: 2 }.into()),
    ];
    pinned("from-room", agent::VERSION, &messages);
    // The longest that there is, all of it escaped.
    let longest = "\u{1}".repeat(4096);
    let entry = entry(&longest, Kind::Link { target: longest.clone() }, 0o777);
    FromRoom::from(entry).encode().unwrap();
}

#[test]
fn what_the_host_tells_the_agent_is_pinned() {
    let messages: Vec<(&str, agent::FromHost)> = vec![
        (
            "welcome",
            Welcome {
                version: agent::VERSION,
                identity: Identity {
                    id: "r-1".into(),
                    hostname: "r-1".into(),
                    realtime_ns: 1_700_000_000_000_000_001,
                    entropy: Entropy([0xa5; 64]),
                },
            }
            .into(),
        ),
        ("refused", agent::Refused { reason: "no".into() }.into()),
        (
            "prepare",
            agent::Prepare {
                container: ContainerId(0),
                layers: vec![
                    Layer {
                        compression: Compression::None,
                        blob: blob(0x1_0003),
                        diff_id: "sha256:00".into(),
                    },
                    Layer {
                        compression: Compression::Gzip,
                        blob: blob(0x1_0004),
                        diff_id: "sha256:01".into(),
                    },
                    Layer {
                        compression: Compression::Zstd,
                        blob: blob(0x1_0005),
                        diff_id: "sha256:02".into(),
                    },
                ],
                zips: vec![Zip { blob: blob(0x1_0006), at: "/var/task".into() }],
                limits: UnpackLimits { bytes: 1 << 34, entries: 1_000_000 },
            }
            .into(),
        ),
        (
            "start",
            Start {
                container: ContainerId(0),
                surroundings: Surroundings {
                    hostname: Some("h".into()),
                    read_only_root: true,
                    tmpfs: vec![Tmpfs { path: "/run".into(), options: "size=1m".into() }],
                    volumes: vec!["/data".into()],
                    memory_bytes: Some(64 << 20),
                    cpu_millis: Some(500),
                    processes: Some(100),
                    sysctls: BTreeMap::from([("net.core.somaxconn".into(), "128".into())]),
                },
                process: process(0),
                function: Some(Function { init_timeout_ms: 10_000, response_bytes: 6 << 20 }),
                cloning: true,
            }
            .into(),
        ),
        ("exec", Exec { container: ContainerId(0), process: process(1) }.into()),
        ("signal", Signal { process: ProcessId(0), signal: 15 }.into()),
        ("resize", Resize { process: ProcessId(0), size: TerminalSize { rows: 1, columns: 2 } }.into()),
        (
            "invoke",
            Invoke {
                id: "8476a536-e9f4-11e8-9739-2dfe598c3fcd".into(),
                event: stream(0x1_0007),
                event_bytes: 2,
                response: stream(0x1_0008),
                timeout_ms: 3000,
                headers: BTreeMap::from([("Trace-Id".into(), "Root=1".into())]),
            }
            .into(),
        ),
        ("report-usage", ReportUsage { every_ms: Some(1000) }.into()),
        ("report-usage-once", ReportUsage { every_ms: None }.into()),
        (
            "collect",
            Collect {
                container: ContainerId(0),
                paths: vec!["/work/report.xml".into()],
                stream: stream(0x1_0009),
            }
            .into(),
        ),
        ("shutdown", Shutdown {}.into()),
        ("freeze", Freeze {}.into()),
        ("attach", Attach { process: ProcessId(0), stdio: process(0).stdio }.into()),
    ];
    pinned("agent-from-host", agent::VERSION, &messages);
}

#[test]
fn what_the_agent_tells_the_host_is_pinned() {
    let invoked = |outcome| Invoked {
        id: "i".into(),
        outcome,
        init_us: Some(5),
        duration_us: 6,
        memory_peak_bytes: 7,
        response_bytes: 8,
    };
    let usage = GuestUsage {
        wall_us: 1,
        cpu: Cpu { user_us: 2, system_us: 3, throttled_us: 4 },
        memory: Memory { current_bytes: 5, peak_bytes: 6, byte_seconds: 7, oom_kills: 8 },
        io: Io { read_bytes: 9, write_bytes: 10, read_operations: 11, write_operations: 12 },
        network: Network { received_bytes: 13, sent_bytes: 14 },
        processes: Processes { current: 15, peak: 16 },
    };
    let failed = |request, failure| Failed { request, failure, message: "why".into() };
    let process = Request::Process(ProcessId(1));
    let messages: Vec<(&str, agent::FromAgent)> = vec![
        (
            "hello",
            Hello {
                version: agent::VERSION,
                agent: "0.1.0".into(),
                kernel: "6.12.1".into(),
                booted_us: 400_000,
                clone: false,
            }
            .into(),
        ),
        (
            "hello-clone",
            Hello {
                version: agent::VERSION,
                agent: "0.1.0".into(),
                kernel: "6.12.1".into(),
                booted_us: 400_000,
                clone: true,
            }
            .into(),
        ),
        ("prepared", agent::Prepared { container: ContainerId(0), bytes: 1, entries: 2, took_us: 3 }.into()),
        ("started", Started { process: ProcessId(0) }.into()),
        (
            "exited",
            Exited { process: ProcessId(0), status: ExitStatus::Code(7), out_of_memory: false }.into(),
        ),
        (
            "exited-by-signal",
            Exited { process: ProcessId(0), status: ExitStatus::Signal(9), out_of_memory: true }.into(),
        ),
        ("failed-prepare", failed(Request::Prepare(ContainerId(0)), Failure::BadPayload).into()),
        ("failed-too-large", failed(Request::Prepare(ContainerId(0)), Failure::PayloadTooLarge).into()),
        ("failed-disk-full", failed(Request::Prepare(ContainerId(0)), Failure::DiskFull).into()),
        ("failed-not-found", failed(process.clone(), Failure::CommandNotFound).into()),
        ("failed-not-executable", failed(process.clone(), Failure::CommandNotExecutable).into()),
        ("failed-user", failed(process.clone(), Failure::UnknownUser).into()),
        ("failed-request", failed(process, Failure::BadRequest).into()),
        ("failed-freeze", failed(Request::Freeze, Failure::BadRequest).into()),
        ("failed-attach", failed(Request::Attach(ProcessId(0)), Failure::BadRequest).into()),
        ("frozen", Frozen {}.into()),
        ("awake", Awake { behind_ns: -2_000_000_001, took_us: 900 }.into()),
        ("ready", Ready { process: ProcessId(0) }.into()),
        ("attached", Attached { process: ProcessId(0) }.into()),
        ("failed-system", failed(Request::Invoke("i".into()), Failure::System).into()),
        (
            "usage",
            agent::Usage { containers: BTreeMap::from([(0, usage)]), spare_bytes: 1 << 20, last: true }
                .into(),
        ),
        ("invoked-response", invoked(Outcome::Response { content_type: "application/json".into() }).into()),
        ("invoked-error", invoked(Outcome::Error { error_type: "E".into() }).into()),
        ("invoked-init-error", invoked(Outcome::InitError { error_type: "E".into() }).into()),
        ("invoked-timed-out", invoked(Outcome::TimedOut).into()),
        ("invoked-init-timed-out", invoked(Outcome::InitTimedOut).into()),
        (
            "invoked-exited",
            invoked(Outcome::Exited { status: ExitStatus::Code(1), out_of_memory: false }).into(),
        ),
        ("invoked-too-large", invoked(Outcome::ResponseTooLarge { bytes: 9 }).into()),
        ("ending", Ending { reason: EndingReason::Asked }.into()),
        ("ending-broken", Ending { reason: EndingReason::Broken { message: "m".into() } }.into()),
    ];
    pinned("agent-from-agent", agent::VERSION, &messages);
}

fn vm() -> VmConfig<Descriptor> {
    VmConfig {
        kvm: Descriptor(0),
        vcpus: VcpuCount::try_from(2).unwrap(),
        memory_mib: MemoryMib::try_from(128).unwrap(),
        huge_pages: true,
        kernel: Kernel { image: Descriptor(1), command_line: "reboot=t,panic_warm panic=-1".into() },
        initramfs: Some(Descriptor(2)),
        vsock: Some(VsockConfig { guest_cid: 3, socket: Some(Descriptor(3)), connections: 256 }),
        blocks: vec![BlockConfig {
            id: "room".into(),
            base: Some(Descriptor(4)),
            overlay: Some(Descriptor(5)),
            size_bytes: 1 << 30,
            cache: Cache::Unsafe,
            limit: Some(IoLimit { bytes_per_second: Some(1), operations_per_second: None }),
        }],
        entropy: Some(EntropyConfig {}),
        balloon: Some(BalloonConfig { size_mib: 0, free_page_reporting: true }),
        serial: Some(SerialConfig { output: Descriptor(6), limit_bytes: 65_536 }),
        control: Some(Descriptor(7)),
        track_dirty: true,
    }
}

fn restore() -> RestoreConfig<Descriptor> {
    RestoreConfig {
        kvm: Some(Descriptor(0)),
        state: Descriptor(1),
        memory: Descriptor(2),
        vsock: Some(Descriptor(3)),
        working_set: Some(Descriptor(8)),
        blocks: vec![
            RestoredBlock {
                id: "room".into(),
                base: Some(Descriptor(4)),
                overlay: Some(Descriptor(5)),
                limit: Some(IoLimit { bytes_per_second: Some(1), operations_per_second: None }),
            },
            RestoredBlock { id: "scratch".into(), base: None, overlay: None, limit: None },
        ],
        serial: Some(SerialConfig { output: Descriptor(6), limit_bytes: 65_536 }),
        control: Some(Descriptor(7)),
        track_dirty: false,
    }
}

fn snapshot(kind: SnapshotKind) -> vmm::FromOwner {
    Snapshot { kvm: Descriptor(0), state: Descriptor(1), memory: Descriptor(2), kind }.into()
}

#[test]
fn what_the_owner_tells_the_vmm_is_pinned() {
    let messages: Vec<(&str, vmm::FromOwner)> = vec![
        ("configure", Configure { version: vmm::VERSION, vm: vm() }.into()),
        ("set-balloon", SetBalloon { size_mib: 16 }.into()),
        ("pause", Pause {}.into()),
        ("resume", Resume {}.into()),
        ("read-metrics", ReadMetrics {}.into()),
        ("stop", Stop {}.into()),
        ("restore", Restore { version: vmm::VERSION, vm: restore() }.into()),
        (
            "restore-prepared",
            Restore { version: vmm::VERSION, vm: RestoreConfig { kvm: None, ..restore() } }.into(),
        ),
        (
            "prepare",
            vmm::Prepare {
                version: vmm::VERSION,
                kvm: Descriptor(0),
                vcpus: VcpuCount::try_from(2).unwrap(),
                memory_mib: MemoryMib::try_from(128).unwrap(),
            }
            .into(),
        ),
        ("record-working-set", RecordWorkingSet { file: Descriptor(0) }.into()),
        ("snapshot", snapshot(SnapshotKind::Full)),
        ("snapshot-differential", snapshot(SnapshotKind::Differential)),
    ];
    pinned("vmm-from-owner", vmm::VERSION, &messages);
}

#[test]
fn what_the_vmm_tells_its_owner_is_pinned() {
    let stopped = |reason| DeviceStopped { device: "block room".into(), reason };
    let mut messages: Vec<(String, vmm::FromVmm)> = vec![
        (
            "booted".into(),
            Booted { timeline: vec![Mark { done: "memory".into(), at_us: 1 }], notice: Some("n".into()) }
                .into(),
        ),
        ("prepared".into(), vmm::Prepared { timeline: vec![Mark { done: "vm".into(), at_us: 1 }] }.into()),
        ("broken".into(), Broken { end: End::Kvm, message: "m".into() }.into()),
        ("dialled".into(), Dialled { port: 1024 }.into()),
        ("done".into(), Done {}.into()),
        ("refused".into(), vmm::Refused { reason: "r".into() }.into()),
        ("metrics".into(), Metrics { exits: 1, balloon_bytes: 4096, ..Metrics::default() }.into()),
        (
            "snapshotted".into(),
            Snapshotted { state_bytes: 9000, memory_bytes: 64 << 20, took_us: 120_000 }.into(),
        ),
        ("stopped-driver".into(), stopped(DeviceStopReason::DriverFault).into()),
        ("stopped-full".into(), stopped(DeviceStopReason::HostDiskFull).into()),
        ("stopped-io".into(), stopped(DeviceStopReason::HostIo).into()),
    ];
    for end in End::ALL {
        messages.push((format!("ended-{}", end.status()), Ended { end, detail: Some("d".into()) }.into()));
    }
    let named: Vec<(&str, vmm::FromVmm)> = messages.iter().map(|(n, m)| (n.as_str(), m.clone())).collect();
    pinned("vmm-from-vmm", vmm::VERSION, &named);
}

#[test]
fn every_end_has_a_status_of_its_own() {
    for end in End::ALL {
        assert_eq!(End::from_status(end.status()), Some(end));
    }
    assert_eq!(End::from_status(159), None, "a signal's status is no end of ours");
}

#[test]
fn a_length_above_its_kinds_cap_is_refused_before_the_body_is_read() {
    let mut frame = Vec::from(u32::MAX.to_le_bytes());
    frame.extend([1, 0, 0, 0]);
    // Nothing follows the header: reading the body would end in an I/O error instead.
    let error = agent::FromAgent::read_from(&mut frame.as_slice()).unwrap_err();
    assert!(matches!(error, FrameError::TooLong { name: "Hello", .. }), "{error}");
}

#[test]
fn unknown_kinds_reserved_bits_and_unknown_fields_are_refused() {
    let frame = |kind: u16, reserved: u8, body: &[u8]| {
        let mut frame = Vec::from(u32::try_from(body.len()).unwrap().to_le_bytes());
        frame.extend(kind.to_le_bytes());
        frame.extend([reserved, 0]);
        frame.extend(body);
        frame
    };
    let decode = |bytes: Vec<u8>| agent::FromAgent::decode(&bytes).unwrap_err();
    assert!(matches!(decode(frame(0, 0, b"{}")), FrameError::UnknownKind { kind: 0 }));
    assert!(matches!(decode(frame(99, 0, b"{}")), FrameError::UnknownKind { kind: 99 }));
    assert!(matches!(decode(frame(3, 1, b"{\"process\":0}")), FrameError::Reserved));
    assert!(matches!(decode(frame(3, 0, b"{\"process\":0,\"more\":1}")), FrameError::Body { .. }));
    assert!(matches!(decode(frame(3, 0, b"")), FrameError::Body { .. }));
    assert!(matches!(decode(vec![0; HEADER_BYTES - 1]), FrameError::Io(_)));
    let mut trailing = Message::encode(&agent::FromAgent::from(Started { process: ProcessId(0) })).unwrap();
    trailing.push(b' ');
    assert!(matches!(decode(trailing), FrameError::Io(_)));
}

#[test]
fn a_message_above_its_cap_cannot_be_sent() {
    let reason = "x".repeat(5 << 10);
    let error = agent::FromHost::from(agent::Refused { reason }).encode().unwrap_err();
    assert!(matches!(error, FrameError::TooLong { name: "Refused", limit: 4096, .. }), "{error}");
}

#[test]
fn secrets_are_not_printed() {
    let printed = format!("{:?}", stream(1));
    assert!(printed.contains("Token(…)"), "{printed}");
}

#[test]
fn quantities_out_of_range_are_refused_by_name() {
    let text = serde_json::to_string(&vm()).unwrap();
    for (from, to, says) in [
        ("\"vcpus\":2", "\"vcpus\":0", "the number of vCPUs must be between 1 and 16, not 0"),
        ("\"vcpus\":2", "\"vcpus\":17", "not 17"),
        ("\"memory_mib\":128", "\"memory_mib\":63", "memory in MiB must be between 64 and 65536, not 63"),
        ("\"memory_mib\":128", "\"memory_mib\":4294967424", "not 4294967424"),
        ("\"memory_mib\":128", "\"memory_mib\":-1", "invalid value"),
    ] {
        assert!(text.contains(from));
        let error = serde_json::from_str::<VmConfig<Descriptor>>(&text.replace(from, to)).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    }
}

mod hostile {
    use std::fmt::Debug;
    use std::fs;
    use std::path::Path;

    use carrel_protocol::{Decoder, HEADER_BYTES, Message, agent, vmm};
    use proptest::prelude::*;

    /// Feeds `bytes` in pieces and collects what comes out until an error.
    fn feed<M: Message>(bytes: &[u8], pieces: &[usize]) -> Vec<M> {
        let (mut decoder, mut out, mut rest) = (Decoder::default(), Vec::new(), bytes);
        for &piece in pieces.iter().chain([&bytes.len()]) {
            let (mut now, later) = rest.split_at(piece.min(rest.len()));
            rest = later;
            while !now.is_empty() {
                match decoder.push(&mut now) {
                    Ok(Some(message)) => out.push(message),
                    Ok(None) => {}
                    Err(_) => return out,
                }
            }
        }
        out
    }

    /// Each direction's golden frames.
    fn golden_frames() -> Vec<(String, Vec<u8>)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let mut all = Vec::new();
        for direction in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            for frame in fs::read_dir(direction.path()).unwrap().map(Result::unwrap) {
                all.push((direction.file_name().into_string().unwrap(), fs::read(frame.path()).unwrap()));
            }
        }
        all.sort();
        assert!(all.len() > 40, "{}", all.len());
        all
    }

    fn survives<M: Message + PartialEq + Debug>(bytes: &[u8]) -> Result<(), TestCaseError> {
        let mut rest = bytes;
        let _ = Decoder::default().push::<M>(&mut rest);
        if let Ok(message) = M::decode(bytes) {
            let again = message.encode().unwrap();
            prop_assert_eq!(M::decode(&again).unwrap(), message);
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..512), kind in 0u16..16) {
            let _ = agent::FromAgent::decode(&bytes);
            let _ = agent::FromHost::from_body(kind, &bytes);
            let _ = vmm::FromOwner::from_body(kind, &bytes);
            let _ = vmm::FromVmm::decode(&bytes);
        }

        /// The golden frames with bytes changed, cut out and put in: what is accepted can be written again, and says the same.
        #[test]
        fn a_frame_that_was_tampered_with_is_a_message_or_an_error(
            pick in any::<prop::sample::Index>(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..3), 1..5),
            right_length in any::<bool>(),
        ) {
            let all = golden_frames();
            let (direction, frame) = &all[pick.index(all.len())];
            let mut bytes = frame.clone();
            for (at, byte, how) in changes {
                let at = at.index(bytes.len());
                match how {
                    0 => bytes[at] = byte,
                    1 => bytes.insert(at, byte),
                    _ if bytes.len() > 1 => drop(bytes.remove(at)),
                    _ => {}
                }
            }
            if let (true, Some(body)) = (right_length, bytes.len().checked_sub(HEADER_BYTES)) {
                bytes[..4].copy_from_slice(&u32::try_from(body).unwrap().to_le_bytes());
            }
            match direction.as_str() {
                "agent-from-agent" => survives::<agent::FromAgent>(&bytes)?,
                "agent-from-host" => survives::<agent::FromHost>(&bytes)?,
                "from-room" => survives::<carrel_protocol::returned::FromRoom>(&bytes)?,
                "vmm-from-owner" => survives::<vmm::FromOwner>(&bytes)?,
                "vmm-from-vmm" => survives::<vmm::FromVmm>(&bytes)?,
                other => prop_assert!(false, "{other} is no direction"),
            }
        }

        #[test]
        fn however_a_stream_is_cut_the_same_messages_come_out(
            ports in prop::collection::vec(any::<u32>(), 1..20),
            pieces in prop::collection::vec(0usize..40, 0..60),
        ) {
            let sent: Vec<vmm::FromVmm> = ports.iter().map(|&port| vmm::Dialled { port }.into()).collect();
            let bytes: Vec<u8> = sent.iter().flat_map(|m| m.encode().unwrap()).collect();
            prop_assert_eq!(feed::<vmm::FromVmm>(&bytes, &pieces), sent);
        }
    }
}
