//! One typed configuration, loaded from defaults, a file, the environment and flags, with the origin of every value.

mod error;
mod keys;
mod live;
mod load;
mod origin;
mod sections;
mod validate;
mod values;

pub use error::ConfigError;
pub use keys::KeyInfo;
pub use live::{Changes, LIVE_KEYS};
pub use load::{Loaded, Sources};
pub use origin::{Origin, Origins};
pub use sections::{
    Actors, Checkpoint, Compute, Data, Eviction, Memory, Model, Monitor, Optimizer, Reduction, Service, Telemetry,
    Train,
};
pub use validate::SHAPES;
pub use values::{
    Boundaries, DeviceKind, Embedding, OptimizerKind, Placement, Policy, Recompute, Schedule, Share, Size,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Everything a run depends on; a table of the file is a field.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The model that is trained.
    pub model: Model,
    /// Where the model computes.
    pub compute: Compute,
    /// What each tier may use.
    pub memory: Memory,
    /// The training loop.
    pub train: Train,
    /// Where the text comes from.
    pub data: Data,
    /// When states are saved.
    pub checkpoint: Checkpoint,
    /// What a run records about itself.
    pub telemetry: Telemetry,
    /// The independent parts of the runtime.
    pub actors: Actors,
    /// The service itself; jobs cannot set these.
    pub service: Service,
}
