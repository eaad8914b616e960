//! Attention on packed queries, keys and values; scores exist in registers only.

use std::sync::PoisonError;

use candle_core::{DType, Result, Tensor, bail};
use patrickstar_actors::cuda::{Arg, Grid};

use super::ops::CudaOps;
use super::tensor_map::{Heads, MapBox, encode};
use crate::model::ops::{Attention, Segments};

/// Queries of a tile of the 16-bit kernels; row statistics are padded to it.
const TILE: usize = 128;
/// Rows and columns that a copy takes, unless a width says otherwise.
const BOX: u32 = 64;
/// Columns that a copy of the last panel takes where that has maps of its own.
const TAIL: u32 = 16;
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
    /// Keys that a copy of the first kernel takes.
    rows: u32,
    /// Keys of a tile of the last kernel.
    keys: usize,
}

macro_rules! width {
    ($width:literal, $shared:expr, $rows:expr, $keys:literal) => {
        Width {
            width: $width,
            forward: [concat!("attention_forward_bf16_d", $width), concat!("attention_forward_f16_d", $width)],
            backward_q: [concat!("attention_backward_q_bf16_d", $width), concat!("attention_backward_q_f16_d", $width)],
            backward_kv: [
                concat!("attention_backward_kv_bf16_d", $width),
                concat!("attention_backward_kv_f16_d", $width),
            ],
            shared: $shared,
            rows: $rows,
            keys: $keys,
        }
    };
}

static WIDTHS: [Width; 6] = [
    width!(64, [99_456, 99_584, 117_376], BOX, 128),
    width!(96, [197_760, 197_888, 232_064], BOX, 128),
    width!(128, [197_760, 197_888, 232_064], BOX, 128),
    width!(144, [222_336, 222_464, 232_192], 112, 64),
    width!(192, [222_336, 222_464, 232_192], 112, 64),
    width!(256, [230_528, 230_656, 231_680], 80, 64),
];

impl Width {
    /// Whether the last panel is so narrow that each operand has a second map for it.
    fn has_tail(&self) -> bool {
        self.width % BOX as usize == TAIL as usize
    }
}

/// An fp32 width: names of forward and both backward kernels.
static WIDTHS_F32: [(usize, [&str; 3]); 3] = [
    (64, ["attention_forward_f32_d64", "attention_backward_q_f32_d64", "attention_backward_kv_f32_d64"]),
    (128, ["attention_forward_f32_d128", "attention_backward_q_f32_d128", "attention_backward_kv_f32_d128"]),
    (256, ["attention_forward_f32_d256", "attention_backward_q_f32_d256", "attention_backward_kv_f32_d256"]),
];

/// Sizes and masks of one call.
struct Call {
    batch: usize,
    time: usize,
    heads: usize,
    kv_heads: usize,
    /// Elements of a head.
    head: usize,
    dtype: DType,
    causal: bool,
    /// 0 for none.
    window: usize,
    /// Where the sample of each token begins, then where it ends.
    segments: Option<Tensor>,
}

/// Parts of a packed row.
#[derive(Clone, Copy)]
enum Part {
    Query,
    Key,
    Value,
}

const PARTS: [Part; 3] = [Part::Query, Part::Key, Part::Value];

impl Call {
    fn hidden(&self) -> usize {
        self.heads * self.head
    }

    /// Columns of a packed row.
    fn packed(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head
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

    /// A part of a packed buffer.
    fn part(&self, address: u64, part: Part) -> Heads {
        let (before, heads) = match part {
            Part::Query => (0, self.heads),
            Part::Key => (self.heads, self.kv_heads),
            Part::Value => (self.heads + self.kv_heads, self.kv_heads),
        };
        let offset = before * self.head * self.dtype.size_in_bytes();
        Heads { address: address + offset as u64, stride: self.packed(), heads }
    }

    /// The maps of a kernel's operands, each with the rows that a copy takes; then those of their tails.
    fn maps(&self, width: &Width, operands: &[(Heads, u32)]) -> Result<Vec<Arg>> {
        let columns: &[u32] = if width.has_tail() { &[BOX, TAIL] } else { &[BOX] };
        let boxes = columns.iter().flat_map(|&columns| operands.iter().map(move |&operand| (columns, operand)));
        boxes
            .map(|(columns, (heads, rows))| {
                encode(heads, (self.batch, self.time, self.head), self.dtype, MapBox { columns, rows }).map(Arg::Map)
            })
            .collect()
    }

    /// What all kernels take last: scale, causal, window, begin and end of each token's segment.
    fn masks(&self, ops: &CudaOps) -> Result<[Arg; 5]> {
        let scale = 1.0 / (self.head as f32).sqrt();
        let (starts, ends) = match &self.segments {
            None => (0, 0),
            Some(bounds) => {
                let starts = ops.address(bounds)?;
                (starts, starts + (self.batch * self.time * DType::U32.size_in_bytes()) as u64)
            }
        };
        let (causal, window) = (Arg::I32(self.causal.into()), Arg::I32(self.window as i32));
        Ok([Arg::F32(scale), causal, window, Arg::Pointer(starts), Arg::Pointer(ends)])
    }

    fn dims(&self) -> [Arg; 5] {
        [self.batch, self.time, self.heads, self.kv_heads, self.head].map(|size| Arg::I32(size as i32))
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
    fn attention_call(&self, qkv: &Tensor, attention: &Attention) -> Result<Call> {
        let (batch, time, packed) = qkv.dims3()?;
        let (head, dtype) = (packed / attention.packed_heads(), qkv.dtype());
        let multiple = if dtype == DType::F32 { 4 } else { 8 };
        if !head.is_multiple_of(multiple) || head > 256 {
            bail!(
                "attention on a GPU needs heads of a multiple of {multiple} up to 256 elements, not {head}: change model.heads"
            );
        }
        // A window of all tokens is none.
        let window = attention.window.filter(|&window| window < time).unwrap_or(0);
        let segments = attention.segments.as_ref().map(|segments| self.segments(segments)).transpose()?;
        let (heads, kv_heads, causal) = (attention.heads, attention.kv_heads, attention.causal);
        Ok(Call { batch, time, heads, kv_heads, head, dtype, causal, window, segments })
    }

    /// The bounds of segments in device memory, copied there once.
    fn segments(&self, segments: &Segments) -> Result<Tensor> {
        let mut copy = segments.on_device().lock().unwrap_or_else(PoisonError::into_inner);
        match &*copy {
            Some(bounds) if bounds.device().same_device(self.device()) => Ok(bounds.clone()),
            _ => Ok(copy.insert(self.upload(segments.bounds())?).clone()),
        }
    }

    /// Attention, and the log-sum-exp of each row of scores.
    pub(crate) fn attend(&self, qkv: &Tensor, attention: &Attention) -> Result<(Tensor, Option<Tensor>)> {
        let call = self.attention_call(qkv, attention)?;
        let out = self.uninitialised((call.batch, call.time, call.hidden()), call.dtype)?;
        let lse = self.uninitialised((call.batch, call.heads, call.time), DType::F32)?;
        let from = self.address(qkv)?;
        let out_args = [self.pointer(&out)?, Arg::U64(call.hidden() as u64), self.pointer(&lse)?];
        let tail = [call.dims(), call.masks(self)?].concat();
        let parts = PARTS.map(|part| call.part(from, part));
        if call.dtype == DType::F32 {
            let (width, names) = call.names_f32()?;
            let args = [&strided(&parts)[..], &out_args, &tail].concat();
            let grid = self.grid_f32(&call, call.heads, shared_f32(3, *width));
            self.launch(&self.attention_f32, names[0], grid, &args)?;
        } else {
            let width = call.width()?;
            let [q, k, v] = parts;
            let maps = call.maps(width, &[(q, BOX), (k, width.rows), (v, width.rows)])?;
            let args = [&maps[..], &out_args, &tail, &self.schedule()?].concat();
            let grid = self.grid(&call, TILE, call.heads, width.shared[0]);
            self.launch(&self.attention_forward, width.forward[call.which()], grid, &args)?;
        }
        Ok((out, Some(lse)))
    }

    /// The gradient of the packed queries, keys and values.
    pub(crate) fn attend_backward(
        &self,
        dy: &Tensor,
        qkv: &Tensor,
        out: &Tensor,
        lse: Option<&Tensor>,
        attention: &Attention,
    ) -> Result<Tensor> {
        let call = self.attention_call(qkv, attention)?;
        let Some(lse) = lse else { bail!("attention: the backward needs what the forward kept") };
        let dqkv = self.uninitialised(qkv.shape(), call.dtype)?;
        if call.dtype == DType::F32 {
            self.attention_backward_f32(&call, dy, qkv, out, lse, &dqkv)?;
        } else {
            self.attention_backward_16(&call, dy, qkv, out, lse, &dqkv)?;
        }
        Ok(dqkv)
    }

    fn attention_backward_16(
        &self,
        call: &Call,
        dy: &Tensor,
        qkv: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        dqkv: &Tensor,
    ) -> Result<()> {
        let width = call.width()?;
        let (stats, _scratch) = self.scratch([2 * call.batch * call.heads * call.padded_time()])?;
        let from = self.address(qkv)?;
        let [q, k, v] = PARTS.map(|part| call.part(from, part));
        let dout = Heads { address: self.address(dy)?, stride: call.hidden(), heads: call.heads };
        let maps = call.maps(width, &[q, k, v, dout].map(|operand| (operand, BOX)))?;
        let rows = [self.pointer(out)?, Arg::U64(call.hidden() as u64), self.pointer(lse)?];
        let to = self.address(dqkv)?;
        let [dq, dk, dv] = PARTS.map(|part| strided(&[call.part(to, part)]));
        let tail = [&call.dims()[..], &call.masks(self)?, &self.schedule()?].concat();
        let args = [&maps[..], &rows, &stats, &dq, &tail].concat();
        let grid = self.grid(call, TILE, call.heads, width.shared[1]);
        self.launch(&self.attention_backward_q, width.backward_q[call.which()], grid, &args)?;
        let args = [&maps[..], &stats, &dk, &dv, &tail].concat();
        let grid = self.grid(call, width.keys, call.kv_heads, width.shared[2]);
        self.launch(&self.attention_backward_kv, width.backward_kv[call.which()], grid, &args)
    }

    fn attention_backward_f32(
        &self,
        call: &Call,
        dy: &Tensor,
        qkv: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        dqkv: &Tensor,
    ) -> Result<()> {
        let (width, names) = call.names_f32()?;
        let shared = shared_f32(4, *width);
        let ([delta], _scratch) = self.scratch([lse.elem_count()])?;
        let (from, to, stride) = (self.address(qkv)?, self.address(dqkv)?, Arg::U64(call.hidden() as u64));
        let inputs = strided(&PARTS.map(|part| call.part(from, part)));
        let [dq, dk, dv] = PARTS.map(|part| strided(&[call.part(to, part)]));
        let tail = [call.dims(), call.masks(self)?].concat();
        let rows = [self.pointer(lse)?, delta];
        let (out, dy) = ([self.pointer(out)?, stride], [self.pointer(dy)?, stride]);
        let args = [&inputs[..], &out, &dy, &rows, &dq, &tail].concat();
        self.launch(&self.attention_f32, names[1], self.grid_f32(call, call.heads, shared), &args)?;
        let args = [&inputs[..], &dy, &rows, &dk, &dv, &tail].concat();
        self.launch(&self.attention_f32, names[2], self.grid_f32(call, call.kv_heads, shared), &args)
    }

    /// The counters by which blocks draw their work: zero before and after every launch on the stream.
    pub(super) fn schedule(&self) -> Result<[Arg; 1]> {
        Ok([self.pointer(&self.counters)?])
    }

    /// As many blocks as run at once: they share out the tiles of `heads` heads.
    fn grid(&self, call: &Call, tile: usize, heads: usize, shared: u32) -> Grid {
        let tiles = call.time.div_ceil(tile) * call.batch * heads;
        let blocks = (tiles as u64).min(u64::from(self.multiprocessors));
        Grid { shared, ..Grid::linear(blocks, THREADS) }
    }

    fn grid_f32(&self, call: &Call, heads: usize, shared: u32) -> Grid {
        let blocks = [call.time.div_ceil(TILE_F32) as u32, heads as u32, call.batch as u32];
        Grid { blocks, threads: 256, shared, ..Grid::default() }
    }
}

/// Address and stride of each slice.
fn strided(parts: &[Heads]) -> Vec<Arg> {
    parts.iter().flat_map(|part| [Arg::Pointer(part.address), Arg::U64(part.stride as u64)]).collect()
}
