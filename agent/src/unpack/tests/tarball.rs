//! Writes tar archives byte by byte, honest ones and others.

/// One header, and the data after it.
#[derive(Clone, Debug)]
pub(super) struct Member {
    pub(super) name: Vec<u8>,
    pub(super) kind: u8,
    pub(super) mode: u32,
    pub(super) owner: (u32, u32),
    pub(super) mtime: u64,
    pub(super) link: Vec<u8>,
    pub(super) device: (u32, u32),
    pub(super) data: Vec<u8>,
    /// In the header instead of the data's own.
    pub(super) size: Option<u64>,
    /// Extended records before it.
    pub(super) records: Vec<(String, Vec<u8>)>,
    /// Bytes put over the header's.
    pub(super) patches: Vec<(usize, Vec<u8>)>,
}

pub(super) const MTIME: u64 = 1_700_000_000;

impl Member {
    fn new(kind: u8, name: impl AsRef<[u8]>, mode: u32) -> Self {
        Self {
            name: name.as_ref().to_vec(),
            kind,
            mode,
            owner: (0, 0),
            mtime: MTIME,
            link: Vec::new(),
            device: (0, 0),
            data: Vec::new(),
            size: None,
            records: Vec::new(),
            patches: Vec::new(),
        }
    }

    pub(super) fn file(name: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Self {
        Self { data: data.as_ref().to_vec(), ..Self::new(b'0', name, 0o644) }
    }

    pub(super) fn directory(name: impl AsRef<[u8]>) -> Self {
        Self::new(b'5', name, 0o755)
    }

    pub(super) fn symlink(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self { link: target.as_ref().to_vec(), ..Self::new(b'2', name, 0o777) }
    }

    pub(super) fn hard_link(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self { link: target.as_ref().to_vec(), ..Self::new(b'1', name, 0o644) }
    }

    pub(super) fn special(kind: u8, name: impl AsRef<[u8]>, device: (u32, u32)) -> Self {
        Self { device, ..Self::new(kind, name, 0o600) }
    }

    pub(super) fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    pub(super) fn owner(self, uid: u32, gid: u32) -> Self {
        Self { owner: (uid, gid), ..self }
    }

    pub(super) fn mtime(self, mtime: u64) -> Self {
        Self { mtime, ..self }
    }

    pub(super) fn kind(self, kind: u8) -> Self {
        Self { kind, ..self }
    }

    pub(super) fn size(self, size: u64) -> Self {
        Self { size: Some(size), ..self }
    }

    pub(super) fn record(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.records.push((name.into(), value.as_ref().to_vec()));
        self
    }

    pub(super) fn patch(mut self, at: usize, bytes: impl AsRef<[u8]>) -> Self {
        self.patches.push((at, bytes.as_ref().to_vec()));
        self
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut all = Vec::new();
        let mut records = self.records.clone();
        // What doesn't fit the header goes before it.
        for (name, value) in [("path", &self.name), ("linkpath", &self.link)] {
            if value.len() > 100 {
                records.push((name.into(), value.clone()));
            }
        }
        if !records.is_empty() {
            let body: Vec<u8> = records.iter().flat_map(|(name, value)| record(name, value)).collect();
            all.extend(Member { data: body, ..Member::new(b'x', "PaxHeaders/x", 0o644) }.bytes());
        }
        let size = self.size.unwrap_or(self.data.len().try_into().unwrap());
        let mut header = [0_u8; 512];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.name[..self.name.len().min(100)]);
        put(100, format!("{:07o}\0", self.mode).as_bytes());
        put(108, format!("{:07o}\0", self.owner.0).as_bytes());
        put(116, format!("{:07o}\0", self.owner.1).as_bytes());
        put(124, format!("{size:011o}\0").as_bytes());
        put(136, format!("{:011o}\0", self.mtime).as_bytes());
        put(156, &[self.kind]);
        put(157, &self.link[..self.link.len().min(100)]);
        put(257, b"ustar\x0000");
        put(329, format!("{:07o}\0", self.device.0).as_bytes());
        put(337, format!("{:07o}\0", self.device.1).as_bytes());
        for (at, bytes) in &self.patches {
            put(*at, bytes);
        }
        checksum(&mut header);
        all.extend(header);
        all.extend(&self.data);
        all.resize(all.len().next_multiple_of(512), 0);
        all
    }
}

/// Makes a header's checksum true.
pub(super) fn checksum(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header[..512].iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// `length name=value\n`, the length counting itself.
pub(super) fn record(name: &str, value: &[u8]) -> Vec<u8> {
    let body = name.len() + value.len() + 3;
    let mut length = body + 1;
    while length != body + length.to_string().len() {
        length += 1;
    }
    [format!("{length} {name}=").as_bytes(), value, b"\n"].concat()
}

/// An archive with its end.
pub(super) fn tar<'a>(members: impl IntoIterator<Item = &'a Member>) -> Vec<u8> {
    let mut all: Vec<u8> = members.into_iter().flat_map(Member::bytes).collect();
    all.resize(all.len() + 1024, 0);
    all
}
