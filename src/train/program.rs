//! What a list of blocks means for the chunk runtime: the parameters in definition order, and who uses which.

use std::collections::{BTreeSet, HashMap};

use patrickstar_actors::Access;
use patrickstar_actors::chunk::{Layout, TensorSpec};
use patrickstar_actors::types::{ChunkId, GroupId, Kind, TensorId, Tier};

use crate::config::Embedding;
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
    /// Where each block's parameters lie while it runs.
    pub tiers: Vec<Tier>,
}

impl Program {
    /// Collects the parameters of `blocks`; a name that several blocks list is one tied parameter. Blocks that look up rows do
    /// it where `embedding` says.
    pub fn new(blocks: &[Box<dyn Block>], embedding: Embedding) -> Result<Self, Error> {
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
        let tier = |looks_up: bool| match embedding {
            Embedding::Host if looks_up => Tier::Host,
            Embedding::Host | Embedding::Device => Tier::Device,
        };
        let tiers: Vec<Tier> = blocks.iter().map(|block| tier(block.looks_up())).collect();
        if embedding == Embedding::Host && !tiers.contains(&Tier::Host) {
            return Err(Error::Model(
                "model.embedding = \"host\" needs a block that only looks up rows, and says so by `looks_up`: this model has none, \
                 set model.embedding = \"device\""
                    .into(),
            ));
        }
        Ok(Program { parameters, uses, names: blocks.iter().map(|block| block.name().to_owned()).collect(), tiers })
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

    /// Blocks whose parameters lie in `tier` while they run.
    fn blocks_in(&self, tier: Tier) -> impl Iterator<Item = usize> {
        (0..self.uses.len()).filter(move |&block| self.tiers[block] == tier)
    }

    /// For each block that runs on the device the indices of its tensors, for the chunk-size search.
    pub fn working_sets(&self) -> Vec<Vec<usize>> {
        let tensors = |block: usize| self.uses[block].iter().map(|tensor| tensor.0 as usize).collect();
        self.blocks_in(Tier::Device).map(tensors).collect()
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

    /// Chunks of the largest access in `tier`.
    pub fn working_set_chunks(&self, layout: &Layout, tier: Tier) -> u32 {
        self.blocks_in(tier).map(|block| self.backward_access(layout, block).len() as u32).max().unwrap_or(0)
    }

    /// How many of the first groups are used in host memory.
    pub fn looked_up_groups(&self, layout: &Layout) -> u32 {
        let used: Vec<TensorId> =
            self.blocks_in(Tier::Host).flat_map(|block| self.uses[block].iter().copied()).collect();
        let is_used = |&group: &GroupId| layout.group_tiles(group).iter().any(|tile| used.contains(&tile.tensor));
        (0..layout.group_count() as u32).map(GroupId).take_while(is_used).count() as u32
    }

    /// Groups into whose gradients blocks on the device accumulate.
    pub fn groups_on_device(&self, layout: &Layout) -> u32 {
        let chunks = self.blocks_in(Tier::Device).flat_map(|block| self.chunks_of(layout, block, Kind::Gradient));
        chunks.collect::<BTreeSet<_>>().len() as u32
    }

    /// Parameters, tied ones once.
    pub fn parameter_count(&self) -> u64 {
        self.parameters.iter().map(|spec| spec.shape.iter().map(|&size| size as u64).product::<u64>()).sum()
    }
}
