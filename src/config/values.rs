//! Words that values of the configuration are made of.

use std::fmt;
use std::str::FromStr;

use patrickstar_actors::types::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
        #[serde(rename_all = "lowercase")]
        pub enum $name { $($(#[$variant_doc])* $variant),+ }

        impl $name {
            /// Every accepted word.
            pub const WORDS: &'static [&'static str] = &[$($word),+];
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $word),+ })
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($word => Ok(Self::$variant),)+
                    _ => Err(format!("`{text}` is not one of {}", Self::WORDS.join(", "))),
                }
            }
        }
    };
}

words! {
    /// Which chunk leaves a full tier.
    Policy {
        /// The one whose next use is farthest, known from the trace.
        #[default]
        Opt = "opt",
        /// The one unused for longest.
        Lru = "lru",
        /// None: what lives where is fixed before the run.
        Static = "static",
    }
}

words! {
    /// Where chunks are stepped.
    Placement {
        /// All on the device.
        Device = "device",
        /// All on host cores.
        Host = "host",
        /// Each where it lives, both sides at the same time.
        #[default]
        Hybrid = "hybrid",
    }
}

words! {
    /// Where the model computes.
    DeviceKind {
        /// On the GPU in a program built for one, else on the host.
        #[default]
        Auto = "auto",
        /// On the cores of the host.
        Cpu = "cpu",
        /// On an NVIDIA GPU.
        Cuda = "cuda",
    }
}

words! {
    /// What the backward pass computes again instead of keeping it. The bits do not depend on it.
    Recompute {
        /// Kept as far as device memory is worth more for activations than for chunks, block by block.
        #[default]
        Auto = "auto",
        /// Everything inside a block: only the inputs of blocks are kept.
        Full = "full",
        /// What is cheap: norms and activation functions.
        Selective = "selective",
        /// Nothing: all activations are kept.
        None = "none",
    }
}

words! {
    /// Where the inputs of blocks wait for the backward pass. The bits do not depend on it.
    Boundaries {
        /// On the device as far as chunks leave room, the others in host memory.
        #[default]
        Auto = "auto",
        /// On the device.
        Device = "device",
        /// In host memory.
        Host = "host",
    }
}

words! {
    /// Where rows of the embedding are looked up and their gradients are summed. The bits do not depend on it.
    Embedding {
        /// On the device, to which its chunks come.
        #[default]
        Device = "device",
        /// In host memory, where its chunks stay: the rows in use cross the link.
        Host = "host",
    }
}

words! {
    /// Who decides what chunks may use of the device. The bits do not depend on it.
    Share {
        /// Activations as they are measured, and neighbours: chunks get what those leave.
        #[default]
        Dynamic = "dynamic",
        /// Nobody: chunks have a fixed part.
        Static = "static",
    }
}

words! {
    /// How the learning rate changes after the warm-up.
    Schedule {
        /// Half a cosine from `lr` to `min_lr`.
        #[default]
        Cosine = "cosine",
        /// A straight line from `lr` to `min_lr`.
        Linear = "linear",
        /// `lr` throughout.
        Constant = "constant",
    }
}

words! {
    /// The update rule.
    OptimizerKind {
        /// Adam with decoupled weight decay.
        #[default]
        AdamW = "adamw",
        /// Adam with weight decay added to the gradient.
        Adam = "adam",
    }
}

/// A size, or the one that the program works out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Size {
    /// Worked out from the machine and the model.
    #[default]
    Auto,
    /// Exactly this much.
    Bytes(Bytes),
}

impl Size {
    /// The size that was asked for, if one was.
    pub fn bytes(self) -> Option<Bytes> {
        match self {
            Size::Auto => None,
            Size::Bytes(bytes) => Some(bytes),
        }
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" { Ok(Size::Auto) } else { text.parse().map(Size::Bytes) }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Size::Auto => f.write_str("auto"),
            Size::Bytes(bytes) => bytes.fmt(f),
        }
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Size::Auto => serializer.serialize_str("auto"),
            Size::Bytes(bytes) => bytes.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SizeVisitor)
    }
}

/// A size without `auto`; `Bytes` itself has no opinion on file formats.
pub(super) fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
    match Size::deserialize(deserializer)? {
        Size::Bytes(bytes) => Ok(bytes),
        Size::Auto => Err(de::Error::custom("`auto` is not possible here")),
    }
}

struct SizeVisitor;

impl de::Visitor<'_> for SizeVisitor {
    type Value = Size;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a size such as 24GB or a number of bytes")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Size, E> {
        Ok(Size::Bytes(Bytes(value)))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Size, E> {
        let value = u64::try_from(value).map_err(|_| E::custom("a size cannot be negative"))?;
        Ok(Size::Bytes(Bytes(value)))
    }
}
