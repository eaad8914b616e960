//! What a list of blocks means for the chunk runtime: the parameters in definition order, and who uses which.

use std::collections::HashMap;

use patrickstar_actors::Access;
use patrickstar_actors::chunk::{Layout, TensorSpec};
use patrickstar_actors::types::{ChunkId, Kind, TensorId};

use crate::error::Error;
use crate::model::block::{Block, ParameterSpec};

/// Parameters of a model and their users.
#[derive(Clone, Debug)]
pub struct Program {
    /// Each parameter once, in definition order.
    pub parameters: Vec<ParameterSpec>,
    /// For each block the parameters it uses.
    pub uses: Vec<Vec<TensorId>>,
    /// Names of the blocks.
    pub names: Vec<String>,
}

impl Program {
    /// Collects the parameters of `blocks`; a name that several blocks list is one tied parameter.
    pub fn new(blocks: &[Box<dyn Block>]) -> Result<Self, Error> {
        let mut parameters: Vec<ParameterSpec> = Vec::new();
        let mut by_name: HashMap<String, usize> = HashMap::new();
        let mut uses = Vec::with_capacity(blocks.len());
        for block in blocks {
            let mut used = Vec::new();
            for spec in block.parameters() {
                let index = match by_name.get(&spec.name) {
                    Some(&index) if parameters[index].shape == spec.shape => index,
                    Some(&index) => {
                        return Err(Error::Model(format!(
                            "parameter `{}` has shape {:?} in one block and {:?} in another: tied parameters must agree",
                            spec.name, parameters[index].shape, spec.shape
                        )));
                    }
                    None => {
                        by_name.insert(spec.name.clone(), parameters.len());
                        parameters.push(spec);
                        parameters.len() - 1
                    }
                };
                used.push(TensorId(index as u32));
            }
            uses.push(used);
        }
        if blocks.is_empty() {
            return Err(Error::Model("a model needs at least one block".into()));
        }
        Ok(Program { parameters, uses, names: blocks.iter().map(|block| block.name().to_owned()).collect() })
    }

    /// The parameters as the layout wants them.
    pub fn tensor_specs(&self) -> Vec<TensorSpec> {
        self.parameters
            .iter()
            .map(|spec| TensorSpec {
                name: spec.name.clone(),
                rows: spec.shape.first().copied().unwrap_or(1),
                columns: spec.shape.iter().skip(1).product(),
                tile_rows: spec.tile_rows,
                decay: spec.decay,
            })
            .collect()
    }

    /// For each block the indices of its tensors, for the chunk-size search.
    pub fn working_sets(&self) -> Vec<Vec<usize>> {
        self.uses.iter().map(|used| used.iter().map(|tensor| tensor.0 as usize).collect()).collect()
    }

    /// Chunks of `kind` that `block` needs, without repetition.
    pub fn chunks_of(&self, layout: &Layout, block: usize, kind: Kind) -> Vec<ChunkId> {
        let mut chunks: Vec<ChunkId> = self.uses[block]
            .iter()
            .flat_map(|&tensor| layout.tiles(tensor))
            .flat_map(|tile| layout.group_chunks(tile.group, kind).iter().copied())
            .collect();
        chunks.sort_unstable();
        chunks.dedup();
        chunks
    }

    /// The lease a forward pass of `block` takes.
    pub fn forward_access(&self, layout: &Layout, block: usize) -> Vec<(ChunkId, Access)> {
        self.chunks_of(layout, block, Kind::Weight).into_iter().map(|chunk| (chunk, Access::Read)).collect()
    }

    /// The lease a backward pass of `block` takes.
    pub fn backward_access(&self, layout: &Layout, block: usize) -> Vec<(ChunkId, Access)> {
        let gradients = self.chunks_of(layout, block, Kind::Gradient).into_iter().map(|chunk| (chunk, Access::Fresh));
        self.forward_access(layout, block).into_iter().chain(gradients).collect()
    }

    /// How many blocks accumulate into each group.
    pub fn gradient_uses(&self, layout: &Layout) -> Vec<u32> {
        let mut uses = vec![0; layout.group_count()];
        for block in 0..self.uses.len() {
            for chunk in self.chunks_of(layout, block, Kind::Gradient) {
                uses[layout.chunk(chunk).group.0 as usize] += 1;
            }
        }
        uses
    }

    /// Chunks of the largest access.
    pub fn working_set_chunks(&self, layout: &Layout) -> u32 {
        (0..self.uses.len()).map(|block| self.backward_access(layout, block).len() as u32).max().unwrap_or(0)
    }

    /// Parameters, tied ones once.
    pub fn parameter_count(&self) -> u64 {
        self.parameters.iter().map(|spec| spec.shape.iter().map(|&size| size as u64).product::<u64>()).sum()
    }
}
