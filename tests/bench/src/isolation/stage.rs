//! What is prepared once for all runs: programs and images copied beside each other on one local disk, the shared root mounted, a home for
//! carrel, the snapshot. All of it goes with the stage; mounts are made in a mount namespace of the bench's own and end with it in any case.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::cgroups::{RoomCgroup, Tree};
use super::image;
use super::plans::{self, Work};
use super::room::{Expect, Patience, Room};
use super::snapshot::Snapshot;
use super::subjects::{Present, Subject};
use crate::engine::Engine;
use crate::guest_images;

/// Memory of every guest.
pub(crate) const GUEST_MIB: u32 = 128;
/// VMMs that `carrel pool` has ready.
const POOL_READY: &str = "8";
/// How long it may take to listen.
const POOL_BEGINS: Duration = Duration::from_secs(30);
/// How long a room for `exec` may take to be there, its template made.
const WARM_BEGINS: Duration = Duration::from_secs(120);
const PREFIX: &str = "carrel-bench-";

/// Where the parts come from.
pub(crate) struct Sources<'a> {
    /// A directory on the disk to measure on.
    pub(crate) work: &'a Path,
    /// carrel's assets: `vmlinux`, `scratch.ext4`, `runtimes/python3.11`.
    pub(crate) assets: &'a Path,
    /// The program that rooms run.
    pub(crate) guest: &'a Path,
    /// The shared root's disk, if it has been made already.
    pub(crate) root: Option<&'a Path>,
    /// carrel's VMM by itself.
    pub(crate) carrel_vmm: &'a Path,
}

/// `carrel pool`. Killed when dropped, and its rooms with it.
struct PoolProcess {
    child: Child,
    _cgroup: RoomCgroup,
}

impl Drop for PoolProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What runs are made from.
pub(crate) struct Stage {
    /// Subjects that are there; the programs are the copies.
    pub(crate) present: BTreeMap<Subject, Present>,
    /// Guest kernel.
    pub(crate) kernel: PathBuf,
    /// The kernel of three instructions, for entry by the 64-bit protocol and by PVH.
    pub(crate) tiny: [PathBuf; 2],
    /// The shared root: its disk, and where that is mounted.
    pub(crate) root_disk: PathBuf,
    pub(crate) root: PathBuf,
    /// An empty disk of 64 MiB, ext4.
    pub(crate) scratch: PathBuf,
    /// OCI layouts: our program's, Python's.
    pub(crate) layouts: [PathBuf; 2],
    /// carrel's assets and home.
    pub(crate) assets: PathBuf,
    pub(crate) home: PathBuf,
    /// carrel-vmm by itself.
    pub(crate) carrel_vmm: Engine,
    /// Cgroups.
    pub(crate) tree: Tree,
    /// Whether to stop.
    pub(crate) interrupted: Arc<AtomicBool>,
    snapshot: OnceLock<Snapshot>,
    pool: Mutex<Option<PoolProcess>>,
    warm: Mutex<BTreeMap<&'static str, Room>>,
    folder: PathBuf,
    /// Tells a bench that comes later that this folder is in use.
    _lock: Flock<File>,
}

impl Stage {
    /// Prepares all of it. Call before any thread is started: it leaves the caller's mount namespace.
    pub(crate) fn new(
        sources: &Sources<'_>,
        mut present: BTreeMap<Subject, Present>,
        interrupted: &Arc<AtomicBool>,
    ) -> Result<Self> {
        let none: Option<&str> = None;
        unshare(CloneFlags::CLONE_NEWNS).context("a bench wants root: it mounts, and makes cgroups")?;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        // What a killed bench has left: processes, then files.
        let tree = Tree::new()?;
        sweep(sources.work);
        let folder = sources.work.join(format!("{PREFIX}{}", std::process::id()));
        fs::create_dir(&folder).with_context(|| format!("{} can't be made", folder.display()))?;
        let lock = Flock::lock(File::open(&folder)?, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| std::io::Error::from(errno))?;
        // From here on a failure leaves a folder that nobody locks, which the next bench removes.
        let write = |name: &str, bytes: &[u8]| -> Result<PathBuf> {
            let path = folder.join(name);
            fs::write(&path, bytes)?;
            Ok(path)
        };
        let copy = |from: &Path, name: &str| -> Result<PathBuf> {
            let to = folder.join(name);
            image::copy_sparse(from, &to)?;
            Ok(to)
        };
        let asset = |name: &str| copy(&sources.assets.join(name), name);
        let root_disk = folder.join("root.ext4");
        match sources.root {
            Some(made) => image::copy_sparse(made, &root_disk)?,
            None => image::make_root(&sources.assets.join("runtimes/python3.11"), sources.guest, &root_disk)?,
        }
        let root = folder.join("root");
        fs::create_dir(&root)?;
        image::run(Command::new("mount").args(["-o", "loop,ro"]).arg(&root_disk).arg(&root))?;
        let guest = copy(sources.guest, "work")?;
        let layout = folder.join("layout");
        image::make_layout(&guest, &layout)?;
        let home = folder.join("home");
        fs::create_dir(&home)?;
        // Static programs of ours and Firecracker are copied: read over a shared file system they would take longer than their start.
        for one in
            present.values_mut().filter(|one| one.subject.needs_kvm() && one.subject != Subject::QemuMicrovm)
        {
            let to = folder.join(one.subject.program().unwrap_or_default());
            if !to.exists() {
                image::copy_sparse(&one.program, &to)?;
            }
            one.program = to;
        }
        let carrel_vmm =
            Engine::Carrel { binary: copy(sources.carrel_vmm, "carrel-vmm")?, arguments: Vec::new() };
        Ok(Self {
            kernel: asset("vmlinux")?,
            tiny: [
                write("tiny", &guest_images::tiny_kernel())?,
                write("tiny-pvh", &guest_images::tiny_pvh_kernel())?,
            ],
            scratch: asset("scratch.ext4")?,
            layouts: [layout, sources.assets.join("runtimes/python3.11")],
            assets: sources.assets.to_owned(),
            root_disk,
            root,
            home,
            carrel_vmm,
            present,
            tree,
            interrupted: Arc::clone(interrupted),
            snapshot: OnceLock::new(),
            pool: Mutex::new(None),
            warm: Mutex::default(),
            folder,
            _lock: lock,
        })
    }

    /// A subject's program.
    pub(crate) fn program(&self, subject: Subject) -> Result<&Path> {
        let present =
            self.present.get(&subject).with_context(|| format!("{} is not there", subject.name()))?;
        Ok(&present.program)
    }

    /// A folder for one room, on the disk that is measured on.
    pub(crate) fn room_folder(&self) -> Result<tempfile::TempDir> {
        Ok(tempfile::Builder::new().prefix("room.").tempdir_in(&self.folder)?)
    }

    /// Starts the pool of the home, when the first of its subjects asks for it, and waits until it listens.
    pub(crate) fn start_pool(&self) -> Result<()> {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.is_some() {
            return Ok(());
        }
        let cgroup = self.tree.room()?;
        let errors = File::create(self.folder.join("pool.stderr"))?;
        let mut command = Command::new(self.program(Subject::CarrelPool)?);
        command.arg("--home").arg(&self.home).args(["pool", "--ready", POOL_READY]);
        command.env("CARREL_ASSETS", &self.assets).process_group(0);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).spawn()?;
        fs::File::from(cgroup.procs()?).write_all(child.id().to_string().as_bytes())?;
        let mut started = PoolProcess { child, _cgroup: cgroup };
        let deadline = Instant::now() + POOL_BEGINS;
        while !self.home.join("pool.sock").exists() {
            let said = || fs::read_to_string(self.folder.join("pool.stderr")).unwrap_or_default();
            ensure!(started.child.try_wait()?.is_none(), "carrel pool ended: {}", said());
            ensure!(Instant::now() < deadline, "carrel pool does not listen: {}", said());
            std::thread::sleep(Duration::from_millis(5));
        }
        *pool = Some(started);
        Ok(())
    }

    /// The name of a room in which a work can be executed; started when the first asks for it.
    pub(crate) fn warm_room(&self, work: Work) -> Result<&'static str> {
        let name = if work.is_python() { "warm-python" } else { "warm" };
        let mut warm = self.warm.lock().unwrap_or_else(PoisonError::into_inner);
        if !warm.contains_key(name) {
            // Its command has ended when the room is there.
            let started = plans::waiting(self, work, name)?
                .start(Expect::End, &Patience::new(WARM_BEGINS, &self.interrupted))?;
            warm.insert(name, started.room);
        }
        Ok(name)
    }

    /// Firecracker's snapshot, made when the first of its subjects asks for it.
    pub(crate) fn snapshot(&self, subject: Subject) -> Result<&Snapshot> {
        if self.snapshot.get().is_none() {
            let made = Snapshot::make(self, self.program(subject)?, &self.folder)
                .context("Firecracker's snapshot could not be made")?;
            // Made by two threads at once, the first is kept.
            let _ = self.snapshot.set(made);
        }
        self.snapshot.get().context("it was made just now")
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Ok(warm) = self.warm.get_mut() {
            warm.clear();
        }
        // Its rooms end with it.
        drop(self.pool.get_mut().map(Option::take));
        let carrel = self.present.values().find(|one| one.subject.is_carrel());
        if let Some(carrel) = carrel.map(|one| &one.program) {
            // Any command sweeps up rooms that were killed.
            let mut sweep = Command::new(carrel);
            sweep
                .arg("--home")
                .arg(&self.home)
                .args(["ps", "-a", "--json"])
                .env("CARREL_ASSETS", &self.assets);
            let _ = sweep.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
        // With what is bound into it.
        let _ = nix::mount::umount2(&self.root, nix::mount::MntFlags::MNT_DETACH);
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            eprintln!("bench: {} could not be removed: {error}", self.folder.display());
        }
    }
}

/// Removes the folders whose bench no longer lives; their mounts ended with it.
fn sweep(work: &Path) {
    for entry in fs::read_dir(work).into_iter().flatten().flatten() {
        let ours = entry.file_name().to_str().is_some_and(|name| {
            name.strip_prefix(PREFIX)
                .is_some_and(|pid| !pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit()))
        });
        let Ok(folder) = File::open(entry.path()) else { continue };
        if ours && Flock::lock(folder, FlockArg::LockExclusiveNonblock).is_ok() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// MiB that the host could give without swapping.
pub(crate) fn available_mib() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let kib = crate::meter::field(&text, "MemAvailable:").context("/proc/meminfo has no MemAvailable")?;
    ensure!(kib > 0, "this host has no memory left");
    Ok(kib / 1024)
}
