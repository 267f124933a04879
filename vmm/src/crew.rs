//! vCPU threads, started before there are vCPUs: a thread's start takes as long as making the VM, and needs nothing of it.
//!
//! ```text
//!  start ──▶ each: its filter ──▶ waits ─────────────────────────▶ vcpu::run
//!    └─▶ meanwhile: VM, devices, kernel ──▶ filtered ──▶ run ──────────┘
//! ```

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use kvm_ioctls::VcpuFd;

use crate::seccomp::{self, SeccompError, Stage};
use crate::vcpu::{self, Shared};

/// Threads that wait for their vCPUs. Dropped before they had any, they wait for the process's end.
#[derive(Debug)]
pub struct Crew {
    board: Arc<Board>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Board {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    filtered: usize,
    failed: Option<SeccompError>,
    /// What they wait for: each its own vCPU, and what all of them share.
    work: Option<(Vec<Option<VcpuFd>>, Arc<Shared>)>,
}

impl Crew {
    /// Starts so many threads. They inherit which signals are blocked. With `filters` each puts itself under a vCPU's run filter at once.
    ///
    /// # Errors
    ///
    /// The host's, if it has no thread to give.
    pub fn start(count: u8, filters: bool) -> io::Result<Self> {
        let board = Arc::<Board>::default();
        let threads = (0..usize::from(count))
            .map(|index| {
                let board = board.clone();
                let thread = Builder::new().name(format!("vcpu{index}")).stack_size(128 << 10);
                thread.spawn(move || board.serve(index, filters))
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { board, threads })
    }

    /// Returns once each is under its filter.
    ///
    /// # Errors
    ///
    /// One could not be installed.
    pub fn filtered(&self) -> Result<(), SeccompError> {
        let mut inner = self.board.lock();
        while inner.filtered < self.threads.len() {
            inner = self.board.wait(inner);
        }
        inner.failed.take().map_or(Ok(()), Err)
    }

    /// Lets each run its vCPU.
    pub fn run(self, vcpus: Vec<VcpuFd>, shared: &Arc<Shared>) -> Vec<JoinHandle<()>> {
        self.board.lock().work = Some((vcpus.into_iter().map(Some).collect(), shared.clone()));
        self.board.changed.notify_all();
        self.threads
    }
}

impl Board {
    fn serve(&self, index: usize, filters: bool) {
        let installed = if filters { seccomp::install(Stage::RunVcpu) } else { Ok(()) };
        let mut inner = self.lock();
        inner.filtered += 1;
        inner.failed = inner.failed.take().or(installed.err());
        self.changed.notify_all();
        let (vcpu, shared) = loop {
            match &mut inner.work {
                Some((vcpus, shared)) => {
                    let vcpu = vcpus.get_mut(index).and_then(Option::take);
                    break (vcpu, shared.clone());
                }
                None => inner = self.wait(inner),
            }
        };
        drop(inner);
        if let Some(vcpu) = vcpu {
            vcpu::run(index, vcpu, &shared);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner)
    }
}
