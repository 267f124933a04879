//! The reader of working sets: whatever the bytes are, with a header that fits them, it is a set within its memory that is written as it was read, or an error.
#![no_main]

use carrel_vmm::working_set::{WorkingSet, sealed};
use libfuzzer_sys::fuzz_target;

/// Of 256 MiB.
const MEMORY_PAGES: u64 = 65_536;

fuzz_target!(|body: &[u8]| {
    let _ = WorkingSet::decode(body, MEMORY_PAGES);
    let bytes = sealed(body);
    if let Ok(set) = WorkingSet::decode(&bytes, MEMORY_PAGES) {
        for run in set.written().iter().chain(set.read_only()) {
            assert!(u64::from(run.first) + u64::from(run.pages) <= MEMORY_PAGES);
        }
        assert_eq!(set.encode(), bytes);
    }
});
