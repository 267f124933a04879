//! Sizes: read as Docker reads them, written in IEC units.

use anyhow::{Result, anyhow};
use carrel_host::function::FunctionMemory;
use carrel_protocol::units::MemoryMib;

/// Reads `512m`, `1g`, `1.5GiB`, `1073741824`: binary multiples, bare numbers are bytes.
pub(crate) fn bytes(text: &str) -> Result<u64> {
    let wrong = || anyhow!("give a size such as 512m or 1.5g");
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit.trim_start().to_ascii_lowercase();
    let shift = match unit.as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || number.ends_with('.') || fraction.contains('.') {
        return Err(wrong());
    }
    let whole: u64 = whole.parse().map_err(|_| wrong())?;
    let whole = whole.checked_mul(1 << shift).ok_or_else(wrong)?;
    if fraction.is_empty() {
        return Ok(whole);
    }
    // Nine digits are below a byte's worth of a GiB; more would be noise.
    let billionths: u64 = format!("{fraction:0<9}")[..9].parse().map_err(|_| wrong())?;
    let part = u128::from(billionths) * (1u128 << shift) / 1_000_000_000;
    u64::try_from(part).ok().and_then(|part| whole.checked_add(part)).ok_or_else(wrong)
}

/// Reads a microVM's memory; what is no whole MiB is rounded up.
pub(crate) fn memory(text: &str) -> Result<MemoryMib> {
    let mib = bytes(text)?.div_ceil(1 << 20);
    MemoryMib::try_from(mib).map_err(|_| {
        anyhow!(
            "a room's memory is between {} MiB and {} GiB, and a bare number counts bytes: give it as 512m or 1g",
            MemoryMib::MIN.get(),
            MemoryMib::MAX.get() >> 10
        )
    })
}

/// Reads a function's memory; what is no whole MiB is rounded up.
pub(crate) fn function_memory(text: &str) -> Result<FunctionMemory> {
    FunctionMemory::try_from(bytes(text)?.div_ceil(1 << 20))
        .map_err(|error| anyhow!("{error}, and a bare number counts bytes: give it as 512m"))
}

/// Writes a size with a unit that leaves at most four digits: `512 B`, `1.5 KiB`, `23 MiB`.
pub(crate) fn human(bytes: u64) -> String {
    const UNITS: [(&str, u32); 6] =
        [("EiB", 60), ("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in UNITS {
        let one = 1u64 << shift;
        if bytes < one {
            continue;
        }
        let tenths = u128::from(bytes) * 10 / u128::from(one);
        return match (tenths / 10, tenths % 10) {
            (whole @ 0..=9, tenth) if tenth != 0 => format!("{whole}.{tenth} {unit}"),
            (whole, _) => format!("{whole} {unit}"),
        };
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_functions_memory_has_its_own_bounds() {
        assert_eq!(function_memory("128m").unwrap().get(), 128);
        assert_eq!(function_memory("10g").unwrap().get(), 10_240);
        for wrong in ["127m", "10241m", "128"] {
            assert!(function_memory(wrong).unwrap_err().to_string().contains("between 128 and 10240 MB"));
        }
    }

    #[test]
    fn sizes_are_binary_and_bare_numbers_are_bytes() {
        assert_eq!(bytes("0").unwrap(), 0);
        assert_eq!(bytes("1024").unwrap(), 1024);
        assert_eq!(bytes("512m").unwrap(), 512 << 20);
        assert_eq!(bytes("512M").unwrap(), 512 << 20);
        assert_eq!(bytes("512MiB").unwrap(), 512 << 20);
        assert_eq!(bytes("1.5g").unwrap(), 3 << 29);
        assert_eq!(bytes("2 GB").unwrap(), 2 << 30);
        assert_eq!(bytes("0.5k").unwrap(), 512);
        assert_eq!(bytes("1t").unwrap(), 1 << 40);
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for wrong in
            ["", "m", "-1m", "1.", ".5g", "1.2.3m", "12x", "99999999999999999999", "18446744073709551615k"]
        {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn memory_is_rounded_up_to_whole_mib_and_kept_in_range() {
        assert_eq!(memory("128m").unwrap().get(), 128);
        assert_eq!(memory("134217729").unwrap().get(), 129);
        assert_eq!(memory("64g").unwrap().get(), 65_536);
        for wrong in ["63m", "65g", "512", "0"] {
            let message = memory(wrong).unwrap_err().to_string();
            assert!(message.contains("64 MiB and 64 GiB"), "{wrong}: {message}");
        }
    }

    #[test]
    fn sizes_are_written_with_few_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10 << 10, "10 KiB"),
            ((23 << 20) + (1 << 19), "23 MiB"),
            (u64::MAX, "15 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
