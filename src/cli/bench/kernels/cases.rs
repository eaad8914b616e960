//! The kernels of a step of the 1b shape, those that memory bounds also at the width of the 10b shape, and of chunk work, with what each must at least do.

#![expect(unsafe_code, reason = "binds parameters to memory of its own and calls kernels")]

use std::sync::Arc;

use candle_core::{DType, Tensor};
use patrickstar_actors::adam::{AdamConfig, StepScalars};
use patrickstar_actors::cuda::ChunkMath;
use patrickstar_actors::error::RuntimeError;
use patrickstar_actors::memory::{DeviceMath, MemoryError, Rows, StateAddresses};
use patrickstar_actors::types::{Bytes, Precision, Step};
use serde_json::{Value, json};

use super::clock::Clock;
use crate::Error;
use crate::model::block::Context;
use crate::model::cuda::{CudaOps, LogitRows};
use crate::model::ops::cross_entropy::tokens_per_block;
use crate::model::ops::lookup::ByToken;
use crate::model::ops::{Attention, Gelu, Rope};
use crate::model::param::{Param, ParamTile};
use crate::model::rng::{self, Mask};

const BATCH: usize = 16;
const TIME: usize = 1024;
const TOKENS: usize = BATCH * TIME;
const HIDDEN: usize = 2048;
/// Of the 10b shape. Launching a kernel and filling the GPU costs the same for twice as much.
const LARGE_HIDDEN: usize = 4096;
const WIDE: usize = 4 * HIDDEN;
const VOCABULARY: usize = 50_304;
/// Sides of the product that gives the rate.
const SQUARE: usize = 8192;
const PARAMETERS: usize = 100_000_000;
/// Sequences that are read before each timed call: 128 MiB, more than a cache holds.
const SCANNED: usize = 32;
/// More than any operation returns.
const BUFFERS: Bytes = Bytes(8 << 30);
/// Heads of attention.
const HEADS: usize = 16;
/// Bytes of a bf16 number.
const B: f64 = 2.0;

/// What a kernel cannot do without.
#[derive(Clone, Copy)]
enum Need {
    Bytes(f64),
    Operations(f64),
}

struct Report {
    clock: Clock,
    bytes_per_s: f64,
    operations_per_s: f64,
    rows: Vec<Value>,
}

/// A parameter with random weights, and the memory it is bound to.
struct Weight {
    param: Param,
    _memory: Vec<Tensor>,
}

pub fn measure() -> Result<Vec<Value>, Error> {
    let ops = CudaOps::open(0).map_err(|error| {
        let reason = error.to_string();
        Error::Failed(format!("no GPU to time: {}; see nvidia-smi", reason.lines().next().unwrap_or_default()))
    })?;
    // Allocations are queued too, and are no kernel's time.
    ops.keep_buffers(BUFFERS)?;
    let mut report = Report::new(ops)?;
    for hidden in [HIDDEN, LARGE_HIDDEN] {
        report.norms_and_sums(hidden)?;
        report.embeddings(hidden)?;
    }
    report.wide()?;
    report.llama()?;
    report.head()?;
    // Heads of the 1b, 4b, 6b and 10b shapes, and narrow ones.
    for (batch, time, head) in [
        (16, 1024, 64),
        (16, 1024, 80),
        (16, 1024, 96),
        (16, 1024, 128),
        (4, 4096, 128),
        (16, 1024, 144),
        (4, 4096, 144),
        (16, 1024, 192),
        (4, 4096, 192),
        (16, 1024, 256),
    ] {
        report.attention(
            ("attention_forward", "attention_backward"),
            (batch, time, head),
            &Attention::causal(HEADS),
        )?;
    }
    let masks = [
        (
            ("attention_full_forward", "attention_full_backward"),
            Attention { causal: false, ..Attention::causal(HEADS) },
        ),
        (
            ("attention_grouped_forward", "attention_grouped_backward"),
            Attention { kv_heads: 4, ..Attention::causal(HEADS) },
        ),
        (
            ("attention_window_forward", "attention_window_backward"),
            Attention { window: Some(1024), ..Attention::causal(HEADS) },
        ),
    ];
    for (names, attention) in masks {
        report.attention(names, (4, 4096, 128), &attention)?;
    }
    for (name, inner, outer) in
        [("qkv", HIDDEN, 3 * HIDDEN), ("proj", HIDDEN, HIDDEN), ("fc", HIDDEN, WIDE), ("fc2", WIDE, HIDDEN)]
    {
        report.products(name, inner, outer)?;
    }
    report.chunk_work()?;
    Ok(report.rows)
}

fn of_chunks(error: MemoryError) -> Error {
    RuntimeError::from(error).into()
}

impl Report {
    /// Measures the two rates.
    fn new(ops: Arc<CudaOps>) -> Result<Self, Error> {
        let clock = Clock::new(ops)?;
        let mut report = Report { clock, bytes_per_s: f64::NAN, operations_per_s: f64::NAN, rows: Vec::new() };
        let scanned = report.random(&[SCANNED, TIME, HIDDEN])?;
        report.clock.set_scan(Box::new(move |ops| ops.read_through(&scanned)));
        let (seconds, bytes) = report.clock.large_copy()?;
        report.bytes_per_s = bytes / seconds;
        let (x, weight) = (report.random(&[SQUARE, SQUARE])?, report.weight("square", &[SQUARE, SQUARE], SQUARE)?);
        let seconds_of_product =
            report.clock.sustained(|| report.clock.ops.linear_forward(&x, &weight.param, None, None).map(drop))?;
        let operations = 2.0 * (SQUARE as f64).powi(3);
        report.operations_per_s = operations / seconds_of_product;
        let card = report.clock.ops.gpu().context().name().unwrap_or_default();
        report.add("device_copy", "2 GiB".into(), seconds, Need::Bytes(bytes))?;
        report.add(
            "large_product",
            format!("{SQUARE} x {SQUARE} x {SQUARE}"),
            seconds_of_product,
            Need::Operations(operations),
        )?;
        for row in &mut report.rows {
            row["card"] = card.clone().into();
        }
        Ok(report)
    }

    fn add(&mut self, name: &str, shape: String, seconds: f64, need: Need) -> Result<(), Error> {
        let (floor, bound, key, rate) = match need {
            Need::Bytes(bytes) => (bytes / self.bytes_per_s, "memory", "gbps", bytes / seconds / 1e9),
            Need::Operations(count) => (count / self.operations_per_s, "compute", "tflops", count / seconds / 1e12),
        };
        let mut row = json!({"name": name, "shape": shape, "s": seconds, "floor_s": floor, "ratio": floor / seconds, "bound": bound});
        row[key] = rate.into();
        if let Need::Bytes(bytes) = need {
            // Starting a kernel and filling the GPU costs a copy as much, and the large one does not show it.
            let copy = self.clock.moved(bytes)?;
            row["copy_s"] = copy.into();
            row["of_copy"] = (copy / seconds).into();
        }
        self.rows.push(row);
        Ok(())
    }

    /// Times `work`, which queues kernels and does not wait.
    fn time(
        &mut self,
        name: &str,
        shape: String,
        need: Need,
        work: impl Fn(&CudaOps) -> candle_core::Result<()>,
    ) -> Result<(), Error> {
        let seconds = self.clock.around(|| work(&self.clock.ops))?;
        self.add(name, shape, seconds, need)
    }

    /// Times the kernels of `class` in `work`.
    fn time_class(
        &mut self,
        (name, class): (&str, &'static str),
        shape: String,
        need: Need,
        work: impl Fn(&CudaOps) -> candle_core::Result<()>,
    ) -> Result<(), Error> {
        let seconds = self.clock.class(class, || work(&self.clock.ops))?;
        self.add(name, shape, seconds, need)
    }

    fn random(&self, shape: &[usize]) -> Result<Tensor, Error> {
        Ok(Tensor::randn(0f32, 1f32, shape, self.clock.ops.device())?.to_dtype(DType::BF16)?)
    }

    /// A parameter in tiles of `rows` rows.
    fn weight(&self, name: &str, shape: &[usize], rows: usize) -> Result<Weight, Error> {
        let ops = &self.clock.ops;
        let columns: usize = shape[1..].iter().product();
        let weight = (self.random(shape)? * 0.02)?;
        let gradient = weight.zeros_like()?;
        let (at, gradient_at) = (ops.address(&weight)?, ops.address(&gradient)?);
        let tiles = (0..shape[0]).step_by(rows).map(|row_start| {
            let offset = (row_start * columns * 2) as u64;
            ParamTile {
                row_start,
                rows: rows.min(shape[0] - row_start),
                weight: (at + offset) as *const u8,
                gradient: (gradient_at + offset) as *mut u8,
            }
        });
        let param = Param::new(name, shape, Precision::Bf16, (rows < shape[0]).then_some(rows));
        // SAFETY: the tensors live as long as the parameter, and nobody else has them.
        unsafe { param.bind(tiles.collect()) };
        Ok(Weight { param, _memory: vec![weight, gradient] })
    }

    fn norms_and_sums(&mut self, hidden: usize) -> Result<(), Error> {
        let (x, dy, before) =
            (self.random(&[TOKENS, hidden])?, self.random(&[TOKENS, hidden])?, self.random(&[TOKENS, hidden])?);
        let (w, b) = (self.weight("w", &[hidden], hidden)?, self.weight("b", &[hidden], hidden)?);
        let shape = || format!("{TOKENS} x {hidden}");
        let one = (TOKENS * hidden) as f64 * B;
        let stats_bytes = (TOKENS * 8) as f64;
        self.time("layer_norm_forward", shape(), Need::Bytes(2.0 * one + stats_bytes), |ops| {
            ops.layer_norm_forward(&x, &w.param, &b.param, 1e-5).map(drop)
        })?;
        let (_, stats) = self.clock.ops.layer_norm_forward(&x, &w.param, &b.param, 1e-5)?;
        self.time("layer_norm_backward_add", shape(), Need::Bytes(4.0 * one + stats_bytes), |ops| {
            ops.layer_norm_backward(&dy, &x, &stats, &w.param, &b.param, Some(before.clone())).map(drop)
        })?;
        self.time("sum", shape(), Need::Bytes(3.0 * one), |ops| ops.sum(&x, &dy).map(drop))?;
        let context =
            Context { seed: 0, step: Step(1), micro: 0, block: 1, training: true, targets: None, target_count: 1 };
        let mask = Mask::new(0.1, &context, 0);
        self.time("dropout", shape(), Need::Bytes(2.0 * one), |ops| ops.dropout(&x, &mask, None).map(drop))?;
        self.time("dropout_add", shape(), Need::Bytes(3.0 * one), |ops| {
            ops.dropout(&x, &mask, Some(before.clone())).map(drop)
        })
    }

    fn embeddings(&mut self, hidden: usize) -> Result<(), Error> {
        let table = self.weight("table", &[VOCABULARY, hidden], VOCABULARY)?;
        let positions = self.weight("positions", &[TIME, hidden], TIME)?;
        let ids: Vec<u32> = (0..TOKENS as u64)
            .map(|i| ((rng::uniform(1, i) * VOCABULARY as f64) as u32).min(VOCABULARY as u32 - 1))
            .collect();
        let by_token = ByToken::new(ids.clone().into());
        let (x, shape) = (self.random(&[BATCH, TIME, hidden])?, || format!("{TOKENS} x {hidden}"));
        let row = hidden as f64 * B;
        let (all, touched) = (TOKENS as f64 * row, by_token.count() as f64 * row);
        let on_device = Tensor::new(&ids[..], self.clock.ops.device())?;
        self.time("embedding_forward", shape(), Need::Bytes(touched + all), |ops| {
            ops.look_up(&on_device, &[BATCH, TIME], &table.param).map(drop)
        })?;
        let rows = self.clock.ops.rows_to_add(&by_token, &table.param)?;
        self.time("embedding_backward", shape(), Need::Bytes(all + 2.0 * touched), |ops| ops.add_rows(&x, &rows))?;
        let places = TIME as f64 * row;
        self.time("positions_forward", shape(), Need::Bytes(2.0 * all + places), |ops| {
            ops.positions_forward(&x, &positions.param).map(drop)
        })?;
        self.time("positions_backward", shape(), Need::Bytes(all + 2.0 * places), |ops| {
            ops.positions_backward(&x, &positions.param)
        })
    }

    fn wide(&mut self) -> Result<(), Error> {
        let (u, dy) = (self.random(&[TOKENS, WIDE])?, self.random(&[TOKENS, WIDE])?);
        let (bias, shape) = (self.weight("bias", &[WIDE], WIDE)?, || format!("{TOKENS} x {WIDE}"));
        let one = (TOKENS * WIDE) as f64 * B;
        for (form, forward, backward) in [
            (Gelu::Tanh, "gelu_tanh_forward", "gelu_tanh_backward"),
            (Gelu::Erf, "gelu_erf_forward", "gelu_erf_backward"),
        ] {
            self.time(forward, shape(), Need::Bytes(2.0 * one), |ops| ops.gelu_forward(&u, form).map(drop))?;
            self.time(backward, shape(), Need::Bytes(3.0 * one), |ops| {
                ops.gelu_backward(&dy, &u, form, None).map(drop)
            })?;
        }
        self.time("gelu_backward_bias", shape(), Need::Bytes(3.0 * one), |ops| {
            ops.gelu_backward_bias(&dy, &u, Gelu::Tanh, &bias.param).map(drop)
        })?;
        let (x, weight) = (self.random(&[TOKENS, HIDDEN])?, self.weight("fc", &[WIDE, HIDDEN], WIDE / 2)?);
        self.time_class(("column_sums", "norm"), shape(), Need::Bytes(one), |ops| {
            ops.linear_backward_weight(&dy, &x, &weight.param, Some(&bias.param))
        })?;
        // Sums over the panels of a tiled weight are fp32 until the last.
        let narrowed = (TOKENS * HIDDEN) as f64 * (4.0 + B);
        self.time_class(("cast", "cast"), format!("{TOKENS} x {HIDDEN}"), Need::Bytes(narrowed), |ops| {
            ops.linear_backward_input(&dy, &weight.param, None).map(drop)
        })
    }

    /// What a Llama has in the place of layer norm, positions and GELU.
    fn llama(&mut self) -> Result<(), Error> {
        let hidden = LARGE_HIDDEN;
        let (x, dy, before) =
            (self.random(&[TOKENS, hidden])?, self.random(&[TOKENS, hidden])?, self.random(&[TOKENS, hidden])?);
        let (w, shape) = (self.weight("w", &[hidden], hidden)?, || format!("{TOKENS} x {hidden}"));
        let (one, stats_bytes) = ((TOKENS * hidden) as f64 * B, (TOKENS * 4) as f64);
        self.time("rms_norm_forward", shape(), Need::Bytes(2.0 * one + stats_bytes), |ops| {
            ops.rms_norm_forward(&x, &w.param, 1e-5).map(drop)
        })?;
        let (_, stats) = self.clock.ops.rms_norm_forward(&x, &w.param, 1e-5)?;
        self.time("rms_norm_backward_add", shape(), Need::Bytes(4.0 * one + stats_bytes), |ops| {
            ops.rms_norm_backward(&dy, &x, &stats, &w.param, Some(before.clone())).map(drop)
        })?;
        let gate_up = self.random(&[TOKENS, 2 * hidden])?;
        self.time("swiglu_forward", shape(), Need::Bytes(3.0 * one), |ops| ops.swiglu_forward(&gate_up).map(drop))?;
        self.time("swiglu_backward", shape(), Need::Bytes(5.0 * one), |ops| {
            ops.swiglu_backward(&dy, &gate_up, None).map(drop)
        })?;
        // Queries and keys of 16 heads are rotated, values are copied.
        let qkv = self.random(&[BATCH, TIME, 3 * HIDDEN])?;
        let rope = Rope { heads: 32, head_dim: 128, rotary_dim: 128, theta: 1e4, interleaved: false };
        let (columns, angles) = (3 * HIDDEN, (TIME * 128 * 4) as f64);
        self.time(
            "rope",
            format!("{TOKENS} x {columns}"),
            Need::Bytes(6.0 * (TOKENS * HIDDEN) as f64 * B + angles),
            |ops| ops.rope(&qkv, &rope, 1).map(drop),
        )
    }

    fn head(&mut self) -> Result<(), Error> {
        let (x, table) = (self.random(&[TOKENS, HIDDEN])?, self.weight("head", &[VOCABULARY, HIDDEN], VOCABULARY)?);
        let targets: Vec<i64> =
            (0..TOKENS as u64).map(|i| (rng::uniform(2, i) * (VOCABULARY - 1) as f64) as i64).collect();
        let logits = (TOKENS * VOCABULARY) as f64;
        let scale = 1.0 / TOKENS as f32;
        let run = |ops: &CudaOps| ops.linear_cross_entropy(&x, &table.param, &targets, scale, Some(scale)).map(drop);
        let shape = || format!("{TOKENS} x {HIDDEN} x {VOCABULARY}");
        self.cross_entropy(&targets, scale)?;
        self.time("linear_cross_entropy", shape(), Need::Operations(6.0 * logits * HIDDEN as f64), run)
    }

    /// Of the tokens whose logits exist at once.
    fn cross_entropy(&mut self, targets: &[i64], scale: f32) -> Result<(), Error> {
        let tokens = tokens_per_block(TOKENS, VOCABULARY);
        let device = self.clock.ops.device();
        let logits = Tensor::randn(0f32, 1f32, (tokens, VOCABULARY), device)?;
        let targets = Tensor::from_iter(targets[..tokens].iter().map(|&target| target as u32), device)?;
        let losses = Tensor::zeros(tokens, DType::F32, device)?;
        let rows = LogitRows { logits: &logits, targets: &targets, losses: &losses, first: 0, tokens };
        // Logits are read in fp32; their gradients are written in bf16. After the first call logits are what gradients left.
        let need = Need::Bytes((tokens * VOCABULARY) as f64 * (4.0 + B));
        self.time("cross_entropy", format!("{tokens} x {VOCABULARY}"), need, |ops| {
            ops.differentiate_logits(&rows, VOCABULARY, scale, DType::BF16)
        })
    }

    fn attention(
        &mut self,
        (forward, backward): (&str, &str),
        (batch, time, head): (usize, usize, usize),
        attention: &Attention,
    ) -> Result<(), Error> {
        let heads = HEADS + 2 * attention.kv_heads;
        let (qkv, dy) = (self.random(&[batch, time, heads * head])?, self.random(&[batch, time, HEADS * head])?);
        let shape = || format!("{batch} x {HEADS} x {time} x {head}");
        // A product of queries and keys or of probabilities and values, of what the mask leaves.
        let (keys, window) = (time as f64, attention.window.unwrap_or(time) as f64);
        let pairs = if attention.causal { keys * window - window * window / 2.0 } else { keys * keys };
        let product = 2.0 * (batch * HEADS * head) as f64 * pairs;
        self.time(forward, shape(), Need::Operations(2.0 * product), |ops| ops.attend(&qkv, attention).map(drop))?;
        let (out, lse) = self.clock.ops.attend(&qkv, attention)?;
        self.time(backward, shape(), Need::Operations(5.0 * product), |ops| {
            ops.attend_backward(&dy, &qkv, &out, lse.as_ref(), attention).map(drop)
        })
    }

    fn products(&mut self, name: &str, inner: usize, outer: usize) -> Result<(), Error> {
        let (x, dy) = (self.random(&[TOKENS, inner])?, self.random(&[TOKENS, outer])?);
        let (weight, bias) = (self.weight(name, &[outer, inner], outer)?, self.weight("bias", &[outer], outer)?);
        // The way back to the residual stream adds it.
        let residual = if outer == HIDDEN { Some(self.random(&[TOKENS, outer])?) } else { None };
        let shape = || format!("{TOKENS} x {inner} x {outer}");
        let need = Need::Operations(2.0 * (TOKENS * inner) as f64 * outer as f64);
        self.time(&format!("{name}_forward"), shape(), need, |ops| {
            ops.linear_forward(&x, &weight.param, Some(&bias.param), residual.as_ref()).map(drop)
        })?;
        self.time(&format!("{name}_dx"), shape(), need, |ops| {
            ops.linear_backward_input(&dy, &weight.param, None).map(drop)
        })?;
        self.time(&format!("{name}_dw"), shape(), need, |ops| ops.linear_backward_weight(&dy, &x, &weight.param, None))
    }

    /// The optimizer's step and the sums of rows, which have a stream of their own.
    fn chunk_work(&mut self) -> Result<(), Error> {
        // On the clock's stream: the start of a kernel after another stream's is no part of its time.
        let ops = &self.clock.ops;
        let math = ChunkMath::on(Arc::clone(ops.gpu()), Arc::clone(ops.stream()));
        let device = self.clock.ops.device();
        let floats = || Tensor::randn(0f32, 1f32, PARAMETERS, device);
        let (weight, momentum, gradient) = (floats()?, floats()?, floats()?);
        let (variance, low) = (momentum.sqr()?, Tensor::zeros(PARAMETERS, DType::BF16, device)?);
        let scalars = StepScalars::new(&AdamConfig::default(), 1e-4, Step(10), 1.0);
        let columns = HIDDEN;
        let rows = PARAMETERS / columns;
        // Weight, momentum and variance are read and written, the gradient is read; beside an fp32 weight one of fp16 is written.
        for (precision, kept, step_bytes, names) in [
            (Precision::Fp32, DType::F32, 28.0, ["adam_fp32", "row_sums_fp32"]),
            (Precision::Bf16, DType::BF16, 26.0, ["adam_bf16", "row_sums_bf16"]),
            (Precision::Fp16, DType::F16, 28.0, ["adam_fp16", "row_sums_fp16"]),
        ] {
            let (narrow, gradient) = (weight.to_dtype(kept)?, gradient.to_dtype(kept)?);
            let at = |tensor: &Tensor| self.clock.ops.address(tensor).map(|address| address as *mut u8);
            let states = StateAddresses {
                weight: at(&narrow)?,
                low: if precision == Precision::Bf16 { at(&low)? } else { std::ptr::null_mut() },
                master: if precision == Precision::Fp16 { at(&weight)? } else { std::ptr::null_mut() },
                momentum: at(&momentum)?,
                variance: at(&variance)?,
                gradient: at(&gradient)?,
            };
            self.clock.ops.device().synchronize()?;
            let seconds = self.clock.class("adam", || {
                // SAFETY: tensors of that many elements, which outlive the call; it is waited for.
                unsafe { math.step(precision, &scalars, true, states, PARAMETERS) }
                    .and_then(|()| math.finish())
                    .map_err(of_chunks)
            })?;
            self.add(names[0], format!("{PARAMETERS}"), seconds, Need::Bytes(step_bytes * PARAMETERS as f64))?;
            let seconds = self.clock.class("adam", || {
                let gradient = Rows { gradient: states.gradient, rows, columns };
                // SAFETY: as above.
                unsafe { math.row_sums(precision, &[gradient]) }.map(drop).map_err(of_chunks)
            })?;
            let bytes = (rows * columns * kept.size_in_bytes()) as f64;
            self.add(names[1], format!("{rows} x {columns}"), seconds, Need::Bytes(bytes))?;
        }
        Ok(())
    }
}
