//! The words of the runtime as types: sizes, identities, tiers and kinds.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A size in bytes. Parses `"24GB"` (powers of ten), `"64MiB"` (powers of two) and plain numbers; never rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

/// Position of a chunk in the layout: every kind of every group has its own chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChunkId(pub u32);

/// The chunks that hold the same parameters in different kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GroupId(pub u32);

/// A parameter tensor, numbered in definition order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TensorId(pub u32);

/// Position in a step's fixed sequence of accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Moment(pub u32);

/// A completed or running training step; the first is 1, 0 means "not started".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Step(pub u64);

/// A place that holds chunks, with its own capacity and budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Where the model computes.
    Device,
    /// Main memory.
    Host,
    /// A file of slots.
    Disk,
}

/// What the elements of a chunk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// What the model multiplies with.
    Weight,
    /// The 16 low bits of an fp32 weight whose high half is `weight`.
    Low,
    /// fp32 weight, where `weight` is not its high half.
    Master,
    /// First moment of Adam.
    Momentum,
    /// Second moment of Adam.
    Variance,
    /// Gradient of the loss; transient.
    Gradient,
}

/// How a parameter's states are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// fp32 weight, momentum, variance: 12 bytes a parameter, and a 4-byte gradient while it lives.
    #[default]
    Fp32,
    /// bf16 weight + 16 low bits + fp32 momentum and variance: 12 bytes, and a 2-byte gradient while it lives.
    Bf16,
    /// fp16 weight + fp32 master, momentum and variance: 14 bytes, and a 2-byte gradient while it lives. Gradients are those
    /// of a scaled loss.
    Fp16,
}

impl Tier {
    /// All tiers, nearest to the compute first.
    pub const ALL: [Tier; 3] = [Tier::Device, Tier::Host, Tier::Disk];

    /// Dense index for per-tier arrays.
    pub fn index(self) -> usize {
        self as usize
    }
}

impl Kind {
    /// Dense index for per-kind arrays.
    pub fn index(self) -> usize {
        self as usize
    }

    /// Whether it holds the parameter or a part of it; other kinds begin at zero.
    pub fn is_weight(self) -> bool {
        matches!(self, Kind::Weight | Kind::Low | Kind::Master)
    }

    /// The word used in logs, metrics and checkpoints.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Weight => "weight",
            Kind::Low => "low",
            Kind::Master => "master",
            Kind::Momentum => "momentum",
            Kind::Variance => "variance",
            Kind::Gradient => "gradient",
        }
    }
}

impl Precision {
    /// Kinds that live across steps, in the order they are laid out.
    pub fn persistent_kinds(self) -> &'static [Kind] {
        match self {
            Precision::Fp32 => &[Kind::Weight, Kind::Momentum, Kind::Variance],
            Precision::Bf16 => &[Kind::Weight, Kind::Low, Kind::Momentum, Kind::Variance],
            Precision::Fp16 => &[Kind::Weight, Kind::Master, Kind::Momentum, Kind::Variance],
        }
    }

    /// Bytes of one element of `kind`; `None` when this precision has no such kind.
    pub fn element_bytes(self, kind: Kind) -> Option<usize> {
        match (self, kind) {
            (Precision::Fp32, Kind::Weight | Kind::Gradient) => Some(4),
            (Precision::Bf16, Kind::Weight | Kind::Gradient | Kind::Low) => Some(2),
            (Precision::Fp16, Kind::Weight | Kind::Gradient) => Some(2),
            (Precision::Fp16, Kind::Master) => Some(4),
            (_, Kind::Momentum | Kind::Variance) => Some(4),
            (_, Kind::Low | Kind::Master) => None,
        }
    }

    /// Whether weights and gradients take 16 bits.
    pub fn is_half(self) -> bool {
        self != Precision::Fp32
    }

    /// Whether gradients are small enough to vanish, so that the loss has to be scaled up, and may overflow then.
    pub fn scales_loss(self) -> bool {
        self == Precision::Fp16
    }

    /// The kind that holds the fp32 weight in one piece; `None` where it is split in two.
    pub fn master(self) -> Option<Kind> {
        match self {
            Precision::Fp32 => Some(Kind::Weight),
            Precision::Bf16 => None,
            Precision::Fp16 => Some(Kind::Master),
        }
    }

    /// Bytes a parameter occupies across steps: 12, or 14 with a master weight.
    pub fn state_bytes(self) -> u64 {
        self.persistent_kinds().iter().filter_map(|&kind| self.element_bytes(kind)).sum::<usize>() as u64
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Tier::Device => "device",
            Tier::Host => "host",
            Tier::Disk => "disk",
        })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chunk {}", self.0)
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "group {}", self.0)
    }
}

const UNITS: [(&str, u64); 8] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

impl Bytes {
    /// What a setting must say to be no less: in words that parse, which those of `Display` do not where they are rounded.
    pub fn as_setting(self) -> String {
        format!("{}MiB", self.0.div_ceil(1 << 20))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS[..4].iter().rev().find(|(_, size)| self.0 >= *size);
        match unit {
            Some((name, size)) if self.0.is_multiple_of(*size) => write!(f, "{}{name}", self.0 / size),
            Some((name, size)) => write!(f, "{:.2}{name}", self.0 as f64 / *size as f64),
            None => write!(f, "{}B", self.0),
        }
    }
}

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let invalid =
            || format!("`{text}` is not a size: write a number of bytes or one with a unit, such as 24GB or 64MiB");
        let trimmed = text.trim();
        let (number, unit) = UNITS
            .iter()
            .find_map(|(name, size)| Some((trimmed.strip_suffix(name)?, *size)))
            .or_else(|| Some((trimmed.strip_suffix('B')?, 1)))
            .unwrap_or((trimmed, 1));
        let number = number.trim().replace('_', "");
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(unit).map(Bytes).ok_or_else(invalid);
        }
        let value: f64 = number.parse().map_err(|_| invalid())?;
        let bytes = value * unit as f64;
        // A fraction of a byte would have to be rounded: refused, sizes are never changed silently.
        if !(0.0..9e18).contains(&bytes) || bytes.fract() != 0.0 {
            return Err(invalid());
        }
        Ok(Bytes(bytes as u64))
    }
}

impl Serialize for Bytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_exactly_or_not_at_all() {
        for (text, bytes) in
            [("24GB", 24_000_000_000), ("64MiB", 64 << 20), ("1.5 GiB", 3 << 29), ("17", 17), ("9B", 9)]
        {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "GB", "-1", "1.5", "1.0000001KB", "1e30GB", "12 parsecs"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
        assert_eq!(Bytes(64 << 20).to_string(), "64MiB");
    }
}
