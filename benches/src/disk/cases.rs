//! The cases that are measured.

/// Bytes of each image.
pub const IMAGE: u64 = 256 << 20;

/// Medium of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// In memory (tmpfs): what is left is the cost of software.
    Memory,
    /// On a disk, past the page cache (O_DIRECT).
    Direct,
}

/// Format of the image; all clusters are allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// QEMU's.
    Qcow2,
}

/// Kind of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// 4 KiB anywhere, read.
    Read,
    /// Written.
    Write,
    /// 7 of 10 read, the others written.
    Mixed,
    /// 128 KiB, one behind the other, read.
    ReadOn,
    /// Written.
    WriteOn,
}

impl Pattern {
    /// All of them.
    pub const ALL: [Pattern; 5] = [
        Pattern::Read,
        Pattern::Write,
        Pattern::Mixed,
        Pattern::ReadOn,
        Pattern::WriteOn,
    ];

    /// Bytes of a request.
    pub fn block(self) -> usize {
        match self {
            Pattern::Read | Pattern::Write | Pattern::Mixed => 4 << 10,
            Pattern::ReadOn | Pattern::WriteOn => 128 << 10,
        }
    }

    /// Requests of 10 that read.
    pub fn reads(self) -> u64 {
        match self {
            Pattern::Read | Pattern::ReadOn => 10,
            Pattern::Mixed => 7,
            Pattern::Write | Pattern::WriteOn => 0,
        }
    }

    /// Whether one request follows the other.
    pub fn is_sequential(self) -> bool {
        matches!(self, Pattern::ReadOn | Pattern::WriteOn)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Pattern::Read => "4k random read",
            Pattern::Write => "4k random write",
            Pattern::Mixed => "4k random 70/30",
            Pattern::ReadOn => "128k seq read",
            Pattern::WriteOn => "128k seq write",
        }
    }
}

/// One case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Medium of the image.
    pub medium: Medium,
    /// Format of the image.
    pub format: Format,
    /// Access pattern.
    pub pattern: Pattern,
    /// Requests under way at a time, in each queue.
    pub depth: usize,
    /// Queues, each with a thread of the front end.
    pub queues: usize,
}

impl Case {
    /// Medium and format, as text.
    pub fn place(&self) -> &'static str {
        match (self.medium, self.format) {
            (Medium::Memory, Format::Raw) => "raw on tmpfs",
            (Medium::Memory, Format::Qcow2) => "qcow2 on tmpfs",
            (Medium::Direct, Format::Raw) => "raw with O_DIRECT",
            (Medium::Direct, Format::Qcow2) => "qcow2 with O_DIRECT",
        }
    }

    /// Pattern, depth and queues, as text.
    pub fn work(&self) -> String {
        format!(
            "{:15} depth {:3} x {}",
            self.pattern.name(),
            self.depth,
            self.queues
        )
    }
}

/// All cases, or those that have a target.
pub fn all(quick: bool) -> Vec<Case> {
    let case = |medium, format, pattern, depth, queues| Case {
        medium,
        format,
        pattern,
        depth,
        queues,
    };
    let random = &Pattern::ALL[..3];
    let mut cases = Vec::new();
    if quick {
        for depth in [1, 32] {
            cases.extend(
                random
                    .iter()
                    .map(|&it| case(Medium::Memory, Format::Raw, it, depth, 1)),
            );
        }
        let two = &random[..2];
        cases.extend(
            two.iter()
                .map(|&it| case(Medium::Memory, Format::Qcow2, it, 32, 1)),
        );
        cases.extend(
            two.iter()
                .map(|&it| case(Medium::Direct, Format::Raw, it, 32, 1)),
        );
        return cases;
    }
    for (medium, format, queues) in [
        (Medium::Memory, Format::Raw, &[1, 2][..]),
        (Medium::Memory, Format::Qcow2, &[1]),
        (Medium::Direct, Format::Raw, &[1, 2]),
        (Medium::Direct, Format::Qcow2, &[1]),
    ] {
        for pattern in Pattern::ALL {
            for depth in [1, 32, 128] {
                // How qcow2 fares on a disk is seen at one depth.
                if (medium, format) == (Medium::Direct, Format::Qcow2) && depth != 32 {
                    continue;
                }
                cases.extend(
                    queues
                        .iter()
                        .map(|&n| case(medium, format, pattern, depth, n)),
                );
            }
        }
    }
    cases
}
