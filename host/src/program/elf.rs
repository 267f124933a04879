//! What an ELF file asks of its loader: its interpreter, its libraries, where it wants them looked for (gABI, chapter 5, *Dynamic Section*).
//!
//! The file is a stranger's: it is read, never run (`ld.so --list` would run it where its interpreter is its own), through checked offsets, and as
//! much as a name is long.

use std::fs::File;

use object::Endianness;
use object::elf::{
    DT_NEEDED, DT_NULL, DT_RPATH, DT_RUNPATH, DT_STRSZ, DT_STRTAB, EM_X86_64, FileHeader64, ProgramHeader64,
};
use object::read::elf::{Dyn, FileHeader, ProgramHeader};
use object::read::{ReadCache, ReadRef, StringTable};
use serde::{Deserialize, Serialize};

/// Libraries that one object may name; more are passed over.
const MOST_NEEDED: usize = 4096;

/// What one object asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Needs {
    /// `PT_INTERP`.
    pub(crate) interpreter: Option<String>,
    /// `DT_NEEDED`, in order.
    pub(crate) libraries: Vec<String>,
    /// `DT_RPATH`: for itself and for what it loads.
    pub(crate) rpath: Option<String>,
    /// `DT_RUNPATH`: for itself alone; an `rpath` beside it means nothing.
    pub(crate) runpath: Option<String>,
}

/// What this file needs; `None` if it is no program or library for x86_64, or is damaged: no loader would take it.
pub(crate) fn needs(file: &File) -> Option<Needs> {
    let cache = ReadCache::new(file);
    let data = &cache;
    let header = FileHeader64::<Endianness>::parse(data).ok()?;
    let endian = header.endian().ok()?;
    if endian != Endianness::Little || header.e_machine.get(endian) != EM_X86_64 {
        return None;
    }
    let segments = header.program_headers(endian, data).ok()?;
    let mut needs = Needs::default();
    for segment in segments {
        if let Ok(Some(name)) = segment.interpreter(endian, data) {
            needs.interpreter = text(name);
        }
    }
    let dynamic = segments.iter().find_map(|segment| segment.dynamic(endian, data).ok().flatten());
    let Some(dynamic) = dynamic else { return Some(needs) };
    let value = |tag| dynamic.iter().find(|entry| entry.tag(endian) == tag).map(|entry| entry.val(endian));
    let strings = (|| strings(segments, endian, value(DT_STRTAB)?, value(DT_STRSZ)?, data))();
    let Some(strings) = strings else { return Some(needs) };
    let string = |entry: &object::elf::Dyn64<Endianness>| text(strings.get(entry.val32(endian)?).ok()?);
    for entry in dynamic {
        match entry.tag(endian) {
            DT_NULL => break,
            DT_NEEDED if needs.libraries.len() < MOST_NEEDED => needs.libraries.extend(string(entry)),
            DT_RPATH => needs.rpath = string(entry),
            DT_RUNPATH => needs.runpath = string(entry),
            _ => {}
        }
    }
    Some(needs)
}

/// The string table, which is named by its address in memory.
fn strings<'a, R: ReadRef<'a>>(
    segments: &[ProgramHeader64<Endianness>],
    endian: Endianness,
    address: u64,
    size: u64,
    data: R,
) -> Option<StringTable<'a, R>> {
    let offset = segments.iter().find_map(|segment| {
        if segment.p_type(endian) != object::elf::PT_LOAD {
            return None;
        }
        let within = address.checked_sub(segment.p_vaddr(endian))?;
        (within < segment.p_filesz(endian)).then(|| segment.p_offset(endian).checked_add(within))?
    })?;
    Some(StringTable::new(data, offset, offset.checked_add(size)?))
}

fn text(bytes: &[u8]) -> Option<String> {
    std::str::from_utf8(bytes).ok().filter(|text| !text.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use proptest::prelude::*;

    use super::*;

    fn of(bytes: &[u8]) -> Option<Needs> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        needs(&file)
    }

    #[test]
    fn a_program_names_its_loader_and_its_c_library() {
        let needs = needs(&File::open("/bin/sh").unwrap()).unwrap();
        assert!(needs.interpreter.as_ref().unwrap().contains("ld-"), "{needs:?}");
        assert!(needs.libraries.iter().any(|name| name.starts_with("libc.")), "{needs:?}");
    }

    #[test]
    fn what_is_no_program_needs_nothing() {
        for bytes in [&b""[..], b"#!/bin/sh\n", b"\x7fELF", &[0x7f; 4096]] {
            assert_eq!(of(bytes), None);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// A loader's own program, whose every header is damaged somewhere.
        #[test]
        fn damaged_headers_are_survived(hits in prop::collection::vec((0_usize..4096, any::<u8>()), 1..40)) {
            let mut bytes = std::fs::read("/bin/true").unwrap();
            let dynamic = bytes.len().min(4096);
            for (at, byte) in hits {
                bytes[at % dynamic] = byte;
            }
            let _ = of(&bytes);
        }
    }
}
