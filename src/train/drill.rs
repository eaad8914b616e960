//! Breaks something on purpose, so that an operator can see what a failure looks like and that a run goes on from its last
//! checkpoint. The failures are real: an address that no kernel may read, memory that no host has.

use patrickstar_actors::error::RuntimeError;
use patrickstar_actors::memory::Arena;
use patrickstar_actors::types::{Bytes, Step, Tier};

use crate::error::Error;
use crate::model::compute::Compute;

/// The variable that asks for a drill: `gpu@7` breaks the GPU's context in step 7, `host@7` fails to get host memory then.
pub const VARIABLE: &str = "PATRICKSTAR_DRILL";
/// More than any host has.
const TOO_MUCH: Bytes = Bytes(1 << 50);

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    Gpu,
    Host,
}

/// A failure to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drill {
    broken: Broken,
    step: Step,
}

impl Drill {
    /// The drill that the environment asks for.
    pub fn from_environment() -> Result<Option<Self>, Error> {
        std::env::var(VARIABLE).ok().map(|text| Self::parse(&text)).transpose()
    }

    fn parse(text: &str) -> Result<Self, Error> {
        let parsed = text.split_once('@').and_then(|(what, step)| {
            let broken = match what {
                "gpu" => Broken::Gpu,
                "host" => Broken::Host,
                _ => return None,
            };
            Some(Drill { broken, step: Step(step.parse().ok()?) })
        });
        parsed.ok_or_else(|| Error::Failed(format!("{VARIABLE} is `{text}`: write gpu@STEP or host@STEP, or unset it")))
    }

    /// Breaks it if its step has come.
    pub fn before(&self, step: Step, compute: &Compute) -> Result<(), Error> {
        if step != self.step {
            return Ok(());
        }
        tracing::warn!(?self, "a drill breaks this run: {VARIABLE} is set");
        match self.broken {
            Broken::Host => {
                Arena::new(Tier::Host, 1, TOO_MUCH).map(drop).map_err(|error| RuntimeError::from(error).into())
            }
            Broken::Gpu => break_gpu(compute),
        }
    }
}

fn break_gpu(compute: &Compute) -> Result<(), Error> {
    match compute {
        Compute::Cpu => Err(Error::Failed(format!("{VARIABLE} breaks a GPU, and this run computes on the host"))),
        // Queued only: the step finds out, as it would about a kernel of its own.
        #[cfg(feature = "cuda")]
        Compute::Cuda(ops) => Ok(ops.read_forbidden_memory()?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drill_names_what_and_when() {
        assert_eq!(Drill::parse("gpu@7").unwrap(), Drill { broken: Broken::Gpu, step: Step(7) });
        assert_eq!(Drill::parse("host@12").unwrap(), Drill { broken: Broken::Host, step: Step(12) });
        for wrong in ["", "gpu", "disk@1", "host@", "host@x"] {
            assert!(Drill::parse(wrong).unwrap_err().to_string().contains("gpu@STEP"), "{wrong}");
        }
    }

    #[test]
    fn memory_that_no_host_has_is_refused_in_its_step_alone() {
        let drill = Drill::parse("host@3").unwrap();
        assert!(drill.before(Step(2), &Compute::Cpu).is_ok());
        assert!(drill.before(Step(3), &Compute::Cpu).unwrap_err().to_string().contains("host"));
    }
}
