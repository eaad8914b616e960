//! Attention on packed queries, keys and values; scores exist in registers only.

use candle_core::{DType, Result, Tensor, bail};
use patrickstar_actors::cuda::{Arg, Grid};

use super::ops::CudaOps;
use super::tensor_map::{Heads, encode};

/// Queries of a tile of the 16-bit kernels; row statistics are padded to it.
const TILE: usize = 128;
const THREADS: u32 = 384;
/// Rows of a tile of the fp32 kernels.
const TILE_F32: usize = 32;

/// A width that kernels are compiled for: names and bytes of shared memory, in the order bf16, fp16.
struct Width {
    width: usize,
    forward: [&'static str; 2],
    backward_q: [&'static str; 2],
    backward_kv: [&'static str; 2],
    shared: [u32; 3],
    /// Keys of a tile of the last kernel.
    keys: usize,
}

macro_rules! width {
    ($width:literal, $shared:expr, $keys:literal) => {
        Width {
            width: $width,
            forward: [concat!("attention_forward_bf16_d", $width), concat!("attention_forward_f16_d", $width)],
            backward_q: [concat!("attention_backward_q_bf16_d", $width), concat!("attention_backward_q_f16_d", $width)],
            backward_kv: [
                concat!("attention_backward_kv_bf16_d", $width),
                concat!("attention_backward_kv_f16_d", $width),
            ],
            shared: $shared,
            keys: $keys,
        }
    };
}

static WIDTHS: [Width; 4] = [
    width!(64, [99_456, 99_584, 117_376], 128),
    width!(96, [197_760, 197_888, 232_064], 128),
    width!(128, [197_760, 197_888, 232_064], 128),
    width!(256, [197_760, 197_760, 198_720], 64),
];

/// An fp32 width: names of forward and both backward kernels.
static WIDTHS_F32: [(usize, [&str; 3]); 3] = [
    (64, ["attention_forward_f32_d64", "attention_backward_q_f32_d64", "attention_backward_kv_f32_d64"]),
    (128, ["attention_forward_f32_d128", "attention_backward_q_f32_d128", "attention_backward_kv_f32_d128"]),
    (256, ["attention_forward_f32_d256", "attention_backward_q_f32_d256", "attention_backward_kv_f32_d256"]),
];

/// Sizes of one call.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    time: usize,
    heads: usize,
    head: usize,
    dtype: DType,
}

impl Sizes {
    fn of(qkv: &Tensor, heads: usize) -> Result<Self> {
        let (batch, time, packed) = qkv.dims3()?;
        let sizes = Sizes { batch, time, heads, head: packed / 3 / heads, dtype: qkv.dtype() };
        let multiple = if sizes.dtype == DType::F32 { 4 } else { 8 };
        if !sizes.head.is_multiple_of(multiple) || sizes.head > 256 {
            bail!(
                "attention on a GPU needs heads of a multiple of {multiple} up to 256 elements, not {}: change model.heads",
                sizes.head
            );
        }
        Ok(sizes)
    }

    fn hidden(&self) -> usize {
        self.heads * self.head
    }

    /// Columns of a packed row.
    fn packed(&self) -> usize {
        3 * self.hidden()
    }

    fn width(&self) -> Result<&'static Width> {
        match WIDTHS.iter().find(|width| width.width >= self.head) {
            Some(width) => Ok(width),
            None => bail!("no attention kernel for heads of {} elements", self.head),
        }
    }

    fn names_f32(&self) -> Result<&'static (usize, [&'static str; 3])> {
        match WIDTHS_F32.iter().find(|(width, _)| *width >= self.head) {
            Some(names) => Ok(names),
            None => bail!("no attention kernel for heads of {} elements", self.head),
        }
    }

    fn which(&self) -> usize {
        usize::from(self.dtype == DType::F16)
    }

    /// Query, key (1) or value (2) in a packed buffer.
    fn part(&self, address: u64, which: usize) -> Heads {
        let offset = which * self.hidden() * self.dtype.size_in_bytes();
        Heads { address: address + offset as u64, stride: self.packed(), heads: self.heads }
    }

    fn map(&self, heads: Heads) -> Result<Arg> {
        encode(heads, (self.batch, self.time, self.head), self.dtype).map(Arg::Map)
    }

    /// What all kernels take last: scale, causal, no window, no segments.
    fn masks(&self) -> [Arg; 5] {
        let scale = 1.0 / (self.head as f32).sqrt();
        [Arg::F32(scale), Arg::I32(1), Arg::I32(0), Arg::Pointer(0), Arg::Pointer(0)]
    }

    fn dims(&self) -> [Arg; 5] {
        [self.batch, self.time, self.heads, self.heads, self.head].map(|size| Arg::I32(size as i32))
    }

    fn padded_time(&self) -> usize {
        self.time.div_ceil(TILE) * TILE
    }
}

fn shared_f32(tiles: u32, width: usize) -> u32 {
    let tile = TILE_F32 as u32;
    (tiles * tile * (width as u32 + 4) + 2 * tile * (tile + 1)) * 4
}

impl CudaOps {
    /// Causal attention, and the log-sum-exp of each row of scores.
    pub(crate) fn attention_forward(&self, qkv: &Tensor, heads: usize) -> Result<(Tensor, Option<Tensor>)> {
        let sizes = Sizes::of(qkv, heads)?;
        let out = self.uninitialised((sizes.batch, sizes.time, sizes.hidden()), sizes.dtype)?;
        let lse = self.uninitialised((sizes.batch, heads, sizes.time), DType::F32)?;
        let from = self.address(qkv)?;
        let out_args = [self.pointer(&out)?, Arg::U64(sizes.hidden() as u64), self.pointer(&lse)?];
        let parts = [0, 1, 2].map(|which| sizes.part(from, which));
        if sizes.dtype == DType::F32 {
            let (width, names) = sizes.names_f32()?;
            let args = [&strided(&parts)[..], &out_args, &sizes.dims(), &sizes.masks()].concat();
            let grid = self.grid_f32(&sizes, shared_f32(3, *width));
            self.launch(&self.attention_f32, names[0], grid, &args)?;
        } else {
            let width = sizes.width()?;
            let maps = [sizes.map(parts[0])?, sizes.map(parts[1])?, sizes.map(parts[2])?];
            let args = [&maps[..], &out_args, &sizes.dims(), &sizes.masks(), &self.schedule()?].concat();
            let grid = self.grid(&sizes, TILE, width.shared[0]);
            self.launch(&self.attention_forward, width.forward[sizes.which()], grid, &args)?;
        }
        Ok((out, Some(lse)))
    }

    /// The gradient of the packed queries, keys and values.
    pub(crate) fn attention_backward(
        &self,
        dy: &Tensor,
        qkv: &Tensor,
        out: &Tensor,
        lse: Option<&Tensor>,
        heads: usize,
    ) -> Result<Tensor> {
        let sizes = Sizes::of(qkv, heads)?;
        let Some(lse) = lse else { bail!("attention: the backward needs what the forward kept") };
        let dqkv = self.uninitialised(qkv.shape(), sizes.dtype)?;
        if sizes.dtype == DType::F32 {
            self.attention_backward_f32(&sizes, dy, qkv, out, lse, &dqkv)?;
        } else {
            self.attention_backward_16(&sizes, dy, qkv, out, lse, &dqkv)?;
        }
        Ok(dqkv)
    }

    fn attention_backward_16(
        &self,
        sizes: &Sizes,
        dy: &Tensor,
        qkv: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        dqkv: &Tensor,
    ) -> Result<()> {
        let width = sizes.width()?;
        let stats = self.uninitialised((2, sizes.batch, sizes.heads, sizes.padded_time()), DType::F32)?;
        let stats = [self.pointer(&stats)?];
        let from = self.address(qkv)?;
        let parts = [0, 1, 2].map(|which| sizes.part(from, which));
        let dout = Heads { address: self.address(dy)?, stride: sizes.hidden(), heads: sizes.heads };
        let maps = [sizes.map(parts[0])?, sizes.map(parts[1])?, sizes.map(parts[2])?, sizes.map(dout)?];
        let rows = [self.pointer(out)?, Arg::U64(sizes.hidden() as u64), self.pointer(lse)?];
        let to = self.address(dqkv)?;
        let [dq, dk, dv] = [0, 1, 2].map(|which| strided(&[sizes.part(to, which)]));
        let args = [&maps[..], &rows, &stats, &dq, &sizes.dims(), &sizes.masks(), &self.schedule()?].concat();
        let grid = self.grid(sizes, TILE, width.shared[1]);
        self.launch(&self.attention_backward_q, width.backward_q[sizes.which()], grid, &args)?;
        let args = [&maps[..], &stats, &dk, &dv, &sizes.dims(), &sizes.masks(), &self.schedule()?].concat();
        let grid = self.grid(sizes, width.keys, width.shared[2]);
        self.launch(&self.attention_backward_kv, width.backward_kv[sizes.which()], grid, &args)
    }

    fn attention_backward_f32(
        &self,
        sizes: &Sizes,
        dy: &Tensor,
        qkv: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        dqkv: &Tensor,
    ) -> Result<()> {
        let (width, names) = sizes.names_f32()?;
        let grid = self.grid_f32(sizes, shared_f32(4, *width));
        let delta = self.uninitialised(lse.shape(), DType::F32)?;
        let (from, to, stride) = (self.address(qkv)?, self.address(dqkv)?, Arg::U64(sizes.hidden() as u64));
        let inputs = strided(&[0, 1, 2].map(|which| sizes.part(from, which)));
        let [dq, dk, dv] = [0, 1, 2].map(|which| strided(&[sizes.part(to, which)]));
        let tail = [&sizes.dims()[..], &sizes.masks()].concat();
        let rows = [self.pointer(lse)?, self.pointer(&delta)?];
        let (out, dy) = ([self.pointer(out)?, stride], [self.pointer(dy)?, stride]);
        let args = [&inputs[..], &out, &dy, &rows, &dq, &tail].concat();
        self.launch(&self.attention_f32, names[1], grid, &args)?;
        let args = [&inputs[..], &dy, &rows, &dk, &dv, &tail].concat();
        self.launch(&self.attention_f32, names[2], grid, &args)
    }

    /// The counters by which blocks draw their tiles: zero before and after every launch on the stream.
    fn schedule(&self) -> Result<[Arg; 1]> {
        Ok([self.pointer(&self.counters)?])
    }

    /// As many blocks as run at once: they share out the tiles.
    fn grid(&self, sizes: &Sizes, tile: usize, shared: u32) -> Grid {
        let tiles = sizes.time.div_ceil(tile) * sizes.batch * sizes.heads;
        let blocks = (tiles as u64).min(u64::from(self.multiprocessors));
        Grid { shared, ..Grid::linear(blocks, THREADS) }
    }

    fn grid_f32(&self, sizes: &Sizes, shared: u32) -> Grid {
        let blocks = [sizes.time.div_ceil(TILE_F32) as u32, sizes.heads as u32, sizes.batch as u32];
        Grid { blocks, threads: 256, shared }
    }
}

/// Address and stride of each slice.
fn strided(parts: &[Heads]) -> Vec<Arg> {
    parts.iter().flat_map(|part| [Arg::Pointer(part.address), Arg::U64(part.stride as u64)]).collect()
}
