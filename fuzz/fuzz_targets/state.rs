//! The reader of state files: whatever the bytes are, with a header that fits them, it is a state that can be written again or an error.
#![no_main]

use carrel_vmm::snapshot::{MachineState, sealed};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| {
    let _ = MachineState::decode(body);
    if let Ok(state) = MachineState::decode(&sealed(body)) {
        state.encode().expect("what was read can be written");
    }
});
