//! Packs tensors, in definition order, into groups of equally sized chunks.

use std::collections::HashMap;

use crate::types::{Bytes, ChunkId, GroupId, Kind, Precision, TensorId};

/// Chunk sizes are multiples of this many bytes: a page, so that slots can be registered and written directly.
pub const CHUNK_ALIGNMENT: u64 = 4096;
/// Tiles start at multiples of this many bytes of the weight chunk, which vector loads rely on.
pub const TILE_ALIGNMENT: usize = 256;

/// A parameter tensor; tied weights appear once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Unique name.
    pub name: String,
    /// Rows; 1 for a vector.
    pub rows: usize,
    /// Elements of a row.
    pub columns: usize,
    /// When set, the tensor may be split at multiples of this many rows.
    pub tile_rows: Option<usize>,
    /// Whether weight decay applies.
    pub decay: bool,
}

/// Consecutive rows of a tensor that lie together in one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// The tensor.
    pub tensor: TensorId,
    /// The group that holds the rows.
    pub group: GroupId,
    /// First row.
    pub row_start: usize,
    /// Number of rows.
    pub rows: usize,
    /// Elements from the start of the group.
    pub offset: usize,
}

/// What a chunk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkInfo {
    /// Its position in the layout.
    pub id: ChunkId,
    /// The group it belongs to.
    pub group: GroupId,
    /// The kind of its elements.
    pub kind: Kind,
    /// Which part of the group it covers, for kinds wider than the weight.
    pub part: u32,
}

/// Why tensors cannot be laid out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The chunk size is zero or not a multiple of a page.
    #[error("chunk size of {} bytes is not a positive multiple of {CHUNK_ALIGNMENT}: set one that is", .0.0)]
    ChunkSize(Bytes),
    /// Two tensors have one name.
    #[error("tensor `{0}` is defined twice: list a tied weight once")]
    Duplicate(String),
    /// A tensor has no elements.
    #[error("tensor `{0}` has no elements: give it at least one row and one column, or leave it out")]
    Empty(String),
    /// `tile_rows` is zero.
    #[error("tensor `{0}` has tiles of zero rows: set tile_rows to at least 1, or to none")]
    EmptyTile(String),
    /// A tensor or panel does not fit in a chunk.
    #[error("tensor `{tensor}` needs {} contiguous bytes, a chunk has {}: set the chunk size to at least {} bytes", need.0, chunk.0, set.0)]
    TooLarge {
        /// The tensor.
        tensor: String,
        /// Bytes of what may not be split.
        need: Bytes,
        /// The chunk size asked for.
        chunk: Bytes,
        /// The smallest chunk size that would do for this tensor.
        set: Bytes,
    },
    /// A size or count does not fit its integer.
    #[error("tensor `{0}` is too large to address: split it or use larger chunks")]
    Overflow(String),
    /// The range of a search is empty.
    #[error("no chunk size between {} and {} bytes: raise the upper bound", min.0, max.0)]
    EmptyRange {
        /// Smallest legal size.
        min: Bytes,
        /// Upper bound asked for.
        max: Bytes,
    },
    /// A block names a tensor that does not exist.
    #[error("a block uses tensor number {index}, but there are {count}: list tensors by their position")]
    UnknownTensor {
        /// The index given.
        index: usize,
        /// Number of tensors.
        count: usize,
    },
}

/// Where every tensor lies, and which chunks there are.
#[derive(Clone, Debug)]
pub struct Layout {
    precision: Precision,
    chunk_bytes: Bytes,
    specs: Vec<TensorSpec>,
    names: HashMap<String, TensorId>,
    tiles: Vec<Vec<Tile>>,
    group_tiles: Vec<Vec<Tile>>,
    chunks: Vec<ChunkInfo>,
    ids: Vec<ChunkId>,
    capacity: usize,
    parameters: u64,
}

/// Bytes of the largest piece of `spec` that may not be split.
pub(super) fn indivisible_bytes(spec: &TensorSpec, precision: Precision) -> Result<u64, LayoutError> {
    if spec.rows == 0 || spec.columns == 0 {
        return Err(LayoutError::Empty(spec.name.clone()));
    }
    if spec.tile_rows == Some(0) {
        return Err(LayoutError::EmptyTile(spec.name.clone()));
    }
    let overflow = || LayoutError::Overflow(spec.name.clone());
    // Checked on the whole tensor, so that later products of its rows and columns cannot overflow.
    let element = precision.element_bytes(Kind::Weight).unwrap_or(4);
    let row = spec.columns.checked_mul(element).ok_or_else(overflow)?;
    spec.rows.checked_mul(row).filter(|&bytes| bytes <= isize::MAX as usize).ok_or_else(overflow)?;
    Ok((spec.tile_rows.unwrap_or(spec.rows).min(spec.rows) * row) as u64)
}

impl Layout {
    /// Packs `specs` in order into chunks of exactly `chunk_bytes`.
    pub fn new(specs: &[TensorSpec], precision: Precision, chunk_bytes: Bytes) -> Result<Layout, LayoutError> {
        if chunk_bytes.0 == 0 || !chunk_bytes.0.is_multiple_of(CHUNK_ALIGNMENT) || chunk_bytes.0 > isize::MAX as u64 {
            return Err(LayoutError::ChunkSize(chunk_bytes));
        }
        let element = precision.element_bytes(Kind::Weight).unwrap_or(4);
        let mut layout = Layout {
            precision,
            chunk_bytes,
            specs: specs.to_vec(),
            names: HashMap::new(),
            tiles: Vec::with_capacity(specs.len()),
            group_tiles: Vec::new(),
            chunks: Vec::new(),
            ids: Vec::new(),
            capacity: chunk_bytes.0 as usize / element,
            parameters: 0,
        };
        let mut cursor = layout.capacity;
        for (index, spec) in specs.iter().enumerate() {
            let overflow = || LayoutError::Overflow(spec.name.clone());
            let id = TensorId(u32::try_from(index).map_err(|_| overflow())?);
            let need = indivisible_bytes(spec, precision)?;
            if need > chunk_bytes.0 {
                let set = need.div_ceil(CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT;
                let tensor = spec.name.clone();
                return Err(LayoutError::TooLarge { tensor, need: Bytes(need), chunk: chunk_bytes, set: Bytes(set) });
            }
            if layout.names.insert(spec.name.clone(), id).is_some() {
                return Err(LayoutError::Duplicate(spec.name.clone()));
            }
            let elements = (spec.rows * spec.columns) as u64;
            layout.parameters = layout.parameters.checked_add(elements).ok_or_else(overflow)?;
            layout.place(id, spec, &mut cursor);
        }
        layout.number_chunks()?;
        Ok(layout)
    }

    /// Places one tensor at `cursor` (elements used of the last group). Every panel is known to fit in a chunk.
    fn place(&mut self, tensor: TensorId, spec: &TensorSpec, cursor: &mut usize) {
        let align = self.capacity.min(TILE_ALIGNMENT * self.capacity / self.chunk_bytes.0 as usize);
        let mut tiles = Vec::new();
        let mut row_start = 0;
        while row_start < spec.rows {
            let offset = cursor.next_multiple_of(align);
            let rest = self.capacity.saturating_sub(offset);
            let left = spec.rows - row_start;
            let fitting = rest / spec.columns;
            let rows = match spec.tile_rows {
                _ if fitting >= left => left,
                Some(panel) => fitting / panel * panel,
                None => 0,
            };
            if rows == 0 || self.group_tiles.is_empty() {
                self.group_tiles.push(Vec::new());
                *cursor = 0;
                continue;
            }
            // Fits in u32: `number_chunks` refuses layouts with more groups before anyone sees them.
            let group = GroupId((self.group_tiles.len() - 1) as u32);
            let tile = Tile { tensor, group, row_start, rows, offset };
            tiles.push(tile);
            if let Some(last) = self.group_tiles.last_mut() {
                last.push(tile);
            }
            row_start += rows;
            *cursor = offset + rows * spec.columns;
        }
        self.tiles.push(tiles);
    }

    fn number_chunks(&mut self) -> Result<(), LayoutError> {
        let total = self.group_tiles.len() * self.chunks_per_group() as usize;
        if u32::try_from(total).is_err() {
            let last = self.specs.last().map(|spec| spec.name.clone()).unwrap_or_default();
            return Err(LayoutError::Overflow(last));
        }
        for group in 0..self.group_tiles.len() {
            for kind in kinds(self.precision) {
                for part in 0..self.parts(kind) {
                    let id = ChunkId(self.chunks.len() as u32);
                    self.chunks.push(ChunkInfo { id, group: GroupId(group as u32), kind, part });
                    self.ids.push(id);
                }
            }
        }
        Ok(())
    }

    fn chunks_per_group(&self) -> u32 {
        kinds(self.precision).map(|kind| self.parts(kind)).sum()
    }

    /// How states are stored.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Size of every chunk.
    pub fn chunk_bytes(&self) -> Bytes {
        self.chunk_bytes
    }

    /// The tensors, indexed by `TensorId`.
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.specs
    }

    /// The tensor of that name.
    pub fn tensor_id(&self, name: &str) -> Option<TensorId> {
        self.names.get(name).copied()
    }

    /// Number of groups.
    pub fn group_count(&self) -> usize {
        self.group_tiles.len()
    }

    /// Number of chunks of all kinds.
    pub fn chunk_count(&self) -> usize {
        self.chunks.len()
    }

    /// All chunks, indexed by `ChunkId`.
    pub fn chunks(&self) -> &[ChunkInfo] {
        &self.chunks
    }

    /// What chunk `id` holds.
    ///
    /// # Panics
    /// When `id` is not of this layout.
    pub fn chunk(&self, id: ChunkId) -> &ChunkInfo {
        &self.chunks[id.0 as usize]
    }

    /// Elements of a group.
    pub fn group_capacity(&self) -> usize {
        self.capacity
    }

    /// Elements of a chunk whose elements have 4 bytes.
    pub fn part_elements(&self) -> usize {
        self.chunk_bytes.0 as usize / 4
    }

    /// Chunks of `kind` in every group; 0 when the precision has no such kind.
    pub fn parts(&self, kind: Kind) -> u32 {
        let weight = self.precision.element_bytes(Kind::Weight).unwrap_or(4);
        self.precision.element_bytes(kind).map_or(0, |bytes| (bytes / weight) as u32)
    }

    /// The chunk that holds part `part` of `group` in `kind`.
    pub fn chunk_of(&self, group: GroupId, kind: Kind, part: u32) -> Option<ChunkId> {
        self.group_chunks(group, kind).get(part as usize).copied()
    }

    /// The chunks of `group` in `kind`, by part; empty when there are none.
    pub fn group_chunks(&self, group: GroupId, kind: Kind) -> &[ChunkId] {
        let before: u32 = kinds(self.precision).take_while(|&other| other != kind).map(|k| self.parts(k)).sum();
        let start = group.0 as usize * self.chunks_per_group() as usize + before as usize;
        self.ids.get(start..start + self.parts(kind) as usize).unwrap_or(&[])
    }

    /// Where the rows of `tensor` lie, in row order.
    ///
    /// # Panics
    /// When `tensor` is not of this layout.
    pub fn tiles(&self, tensor: TensorId) -> &[Tile] {
        &self.tiles[tensor.0 as usize]
    }

    /// The tiles of `group`, by offset.
    ///
    /// # Panics
    /// When `group` is not of this layout.
    pub fn group_tiles(&self, group: GroupId) -> &[Tile] {
        &self.group_tiles[group.0 as usize]
    }

    /// Elements up to the end of the last tile of `group`.
    pub fn group_used(&self, group: GroupId) -> usize {
        let end = |tile: &Tile| tile.offset + tile.rows * self.specs[tile.tensor.0 as usize].columns;
        self.group_tiles(group).last().map_or(0, end)
    }

    /// Elements of all tensors.
    pub fn parameters(&self) -> u64 {
        self.parameters
    }

    /// Bytes of the states of all parameters, without the waste of packing and without gradients.
    pub fn state_bytes(&self) -> Bytes {
        Bytes(self.parameters * self.precision.state_bytes())
    }

    /// Bytes of all chunks that live across steps: what the tiers must hold together.
    pub fn allocated_bytes(&self) -> Bytes {
        let persistent: u32 = self.precision.persistent_kinds().iter().map(|&kind| self.parts(kind)).sum();
        Bytes(self.group_count() as u64 * u64::from(persistent) * self.chunk_bytes.0)
    }

    /// Share of the groups' elements that are parameters; 1 without groups, where nothing is wasted.
    pub fn utilisation(&self) -> f64 {
        if self.group_tiles.is_empty() {
            return 1.0;
        }
        self.parameters as f64 / (self.group_tiles.len() as f64 * self.capacity as f64)
    }
}

fn kinds(precision: Precision) -> impl Iterator<Item = Kind> {
    precision.persistent_kinds().iter().copied().chain([Kind::Gradient])
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
