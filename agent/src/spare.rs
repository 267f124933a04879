//! What the guest's kernel can spare: `/proc/zoneinfo` (proc(5)).
//!
//! A zone's free pages down to its mark `high` are nobody's: above it the kernel neither reclaims nor wakes who does (Linux, mm/page_alloc.c,
//! `__zone_watermark_ok`). Nor does it count what a zone protects against allocations that other zones could serve.

/// Bytes of a page on x86_64.
const PAGE: u64 = 4096;

/// A zone's own numbers, pages.
#[derive(Clone, Copy, Default)]
struct Zone {
    free: u64,
    high: u64,
    protected: u64,
}

impl Zone {
    fn spare(self) -> u64 {
        self.free.saturating_sub(self.high).saturating_sub(self.protected)
    }
}

/// What could be taken from the guest without its having to reclaim anything, bytes; 0 where that can't be read.
pub(crate) fn spare_bytes() -> u64 {
    spare(&std::fs::read_to_string("/proc/zoneinfo").unwrap_or_default())
}

fn spare(zones: &str) -> u64 {
    let (mut pages, mut zone) = (0_u64, Zone::default());
    for line in zones.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some("Node"), ..) => {
                pages = pages.saturating_add(zone.spare());
                zone = Zone::default();
            }
            (Some("pages"), Some("free"), Some(count)) => zone.free = number(count),
            (Some("high"), Some(count), None) => zone.high = number(count),
            // One number for each zone that an allocation may have been for; the balloon's may be for any.
            (Some("protection:"), ..) => {
                let numbers = line.split(|c: char| !c.is_ascii_digit()).map(number);
                zone.protected = numbers.max().unwrap_or_default();
            }
            _ => {}
        }
    }
    pages.saturating_add(zone.spare()).saturating_mul(PAGE)
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Linux 6.18, shortened.
    const ZONES: &str = "\
Node 0, zone      DMA
  per-node stats
      nr_inactive_anon 7
  pages free     3840
        boost    0
        min      66
        low      82
        high     98
        spanned  4095
        protection: (0, 1000, 1000)
      nr_free_pages 3840
  pagesets
    cpu: 0
              count:    5
              high:     13
              batch:    1
Node 0, zone    DMA32
  pages free     20000
        high     1500
        protection: (0, 0, 0)
Node 0, zone   Normal
  pages free     10
        high     20
        protection: (0, 0, 0)
Node 0, zone  Movable
  pages free     0
        high     0
        protection: (0, 0, 0)
";

    #[test]
    fn what_is_above_each_zones_high_mark_and_protection_is_spare() {
        assert_eq!(spare(ZONES), (3840 - 98 - 1000 + 20_000 - 1500) * PAGE);
    }

    #[test]
    fn what_is_missing_or_strange_is_nothing_to_spare() {
        for text in ["", "pages free", "pages free -1\n", "Node 0\nhigh 5\nprotection: ()\n"] {
            assert_eq!(spare(text), 0, "{text}");
        }
        assert_eq!(spare("pages free 99999999999999999999\nhigh 1"), 0);
        assert_eq!(spare(&format!("pages free {}", u64::MAX)), u64::MAX);
    }
}
