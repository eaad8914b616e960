//! The states of a chunk, and the transitions between them.

/// Which pass used a chunk last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// Forward.
    Forward,
    /// Backward.
    Backward,
    /// Neither: the optimizer, a checkpoint, a load.
    Other,
}

/// A state in which a chunk has contents and nobody uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HeldState {
    /// [`ChunkState::Held`].
    Held,
    /// [`ChunkState::HeldAfterForward`].
    AfterForward,
    /// [`ChunkState::HeldAfterBackward`].
    AfterBackward,
}

/// The state of a chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ChunkState {
    /// Never had contents.
    #[default]
    Free,
    /// Leased: it may neither move nor be released.
    Computing {
        /// Leases out; at least one.
        leases: u32,
    },
    /// Has contents, in no pass.
    Held,
    /// Used by forward.
    HeldAfterForward,
    /// Used by backward.
    HeldAfterBackward,
    /// Between slots: it may not be leased.
    Moving {
        /// What it is when it arrives.
        resume: HeldState,
    },
    /// Its contents were given up.
    Released,
}

/// What can happen to a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChunkEvent {
    /// It gets contents.
    Allocate,
    /// A lease is taken; several may be out.
    Lease,
    /// A lease is given back; the last one decides the held state.
    ReleaseAfter(Pass),
    /// A copy to another slot starts.
    StartMove,
    /// The copy is done.
    EndMove,
    /// Its contents are given up.
    Release,
}

/// An event that the state does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a chunk in state {state:?} does not allow {event:?}: wait until its lease or move ends")]
pub struct IllegalTransition {
    /// The state.
    pub state: ChunkState,
    /// The event refused.
    pub event: ChunkEvent,
}

impl From<HeldState> for ChunkState {
    fn from(held: HeldState) -> ChunkState {
        match held {
            HeldState::Held => ChunkState::Held,
            HeldState::AfterForward => ChunkState::HeldAfterForward,
            HeldState::AfterBackward => ChunkState::HeldAfterBackward,
        }
    }
}

impl ChunkState {
    /// The word that observers read.
    pub fn name(self) -> &'static str {
        match self {
            ChunkState::Free => "free",
            ChunkState::Computing { .. } => "compute",
            ChunkState::Held => "hold",
            ChunkState::HeldAfterForward => "hold_after_forward",
            ChunkState::HeldAfterBackward => "hold_after_backward",
            ChunkState::Moving { .. } => "move",
            ChunkState::Released => "released",
        }
    }

    /// The held state, when it is one.
    pub fn held(self) -> Option<HeldState> {
        match self {
            ChunkState::Held => Some(HeldState::Held),
            ChunkState::HeldAfterForward => Some(HeldState::AfterForward),
            ChunkState::HeldAfterBackward => Some(HeldState::AfterBackward),
            _ => None,
        }
    }

    /// The state after `event`.
    pub fn apply(self, event: ChunkEvent) -> Result<ChunkState, IllegalTransition> {
        let next = match (self, event) {
            (ChunkState::Free | ChunkState::Released, ChunkEvent::Allocate) => Some(ChunkState::Held),
            (ChunkState::Computing { leases }, ChunkEvent::Lease) => {
                leases.checked_add(1).map(|leases| ChunkState::Computing { leases })
            }
            (ChunkState::Computing { leases: 1 }, ChunkEvent::ReleaseAfter(pass)) => Some(match pass {
                Pass::Forward => ChunkState::HeldAfterForward,
                Pass::Backward => ChunkState::HeldAfterBackward,
                Pass::Other => ChunkState::Held,
            }),
            (ChunkState::Computing { leases }, ChunkEvent::ReleaseAfter(_)) => {
                leases.checked_sub(1).map(|leases| ChunkState::Computing { leases })
            }
            (ChunkState::Moving { resume }, ChunkEvent::EndMove) => Some(resume.into()),
            (state, ChunkEvent::Lease) => state.held().map(|_| ChunkState::Computing { leases: 1 }),
            (state, ChunkEvent::StartMove) => state.held().map(|resume| ChunkState::Moving { resume }),
            (state, ChunkEvent::Release) => state.held().map(|_| ChunkState::Released),
            _ => None,
        };
        next.ok_or(IllegalTransition { state: self, event })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use ChunkEvent::*;
    use ChunkState::*;

    const EVENTS: [ChunkEvent; 8] = [
        Allocate,
        Lease,
        ReleaseAfter(Pass::Forward),
        ReleaseAfter(Pass::Backward),
        ReleaseAfter(Pass::Other),
        StartMove,
        EndMove,
        Release,
    ];

    #[test]
    fn the_full_table() {
        let one = Some(Computing { leases: 1 });
        let moving = |resume| Some(Moving { resume });
        let (held, forward, backward) = (HeldState::Held, HeldState::AfterForward, HeldState::AfterBackward);
        let fwd = Some(HeldAfterForward);
        let bwd = Some(HeldAfterBackward);
        let gone = Some(Released);
        // Columns in the order of EVENTS.
        let table = [
            (Free, [Some(Held), None, None, None, None, None, None, None]),
            (Released, [Some(Held), None, None, None, None, None, None, None]),
            (Held, [None, one, None, None, None, moving(held), None, gone]),
            (HeldAfterForward, [None, one, None, None, None, moving(forward), None, gone]),
            (HeldAfterBackward, [None, one, None, None, None, moving(backward), None, gone]),
            (Computing { leases: 1 }, [None, Some(Computing { leases: 2 }), fwd, bwd, Some(Held), None, None, None]),
            (Computing { leases: 2 }, [None, Some(Computing { leases: 3 }), one, one, one, None, None, None]),
            (Moving { resume: held }, [None, None, None, None, None, None, Some(Held), None]),
            (Moving { resume: forward }, [None, None, None, None, None, None, fwd, None]),
            (Moving { resume: backward }, [None, None, None, None, None, None, bwd, None]),
        ];
        for (state, row) in table {
            for (event, expected) in EVENTS.into_iter().zip(row) {
                assert_eq!(state.apply(event), expected.ok_or(IllegalTransition { state, event }));
            }
        }
    }

    proptest! {
        #[test]
        fn a_moving_chunk_is_never_leased_and_a_leased_one_never_moves(
            events in prop::collection::vec(prop::sample::select(EVENTS.to_vec()), 0..100),
        ) {
            let (mut state, mut leases, mut moving) = (Free, 0u32, false);
            for event in events {
                let Ok(next) = state.apply(event) else { continue };
                match event {
                    Lease => { prop_assert!(!moving); leases += 1 }
                    ReleaseAfter(_) => { prop_assert!(leases > 0); leases -= 1 }
                    StartMove => { prop_assert!(leases == 0 && !moving); moving = true }
                    EndMove => moving = false,
                    Release => prop_assert!(leases == 0 && !moving),
                    Allocate => {}
                }
                state = next;
                prop_assert_eq!(matches!(state, Computing { .. }), leases > 0);
                prop_assert_eq!(matches!(state, Moving { .. }), moving);
            }
        }
    }
}
