//! Hugging Face GPT-2 directories: `config.json` and `model.safetensors`.

#![expect(unsafe_code, reason = "maps files")]

use std::fs::File;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::gpt2::{DIVIDE_ABOVE, Gpt2Config};
use crate::error::Error;

/// Reads `config.json`.
pub fn read_config(directory: &Path) -> Result<Gpt2Config, Error> {
    let path = directory.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|error| Error::io(&path, error))?;
    let json: Value = serde_json::from_str(&text)
        .map_err(|error| Error::Model(format!("{} is not JSON ({error}): fetch it again", path.display())))?;
    if json["model_type"] != "gpt2" {
        return Err(Error::Model(format!(
            "{}: model_type is {}, only gpt2 can be loaded",
            path.display(),
            json["model_type"]
        )));
    }
    let size = |key: &str| {
        json[key]
            .as_u64()
            .map(|value| value as usize)
            .ok_or_else(|| Error::Model(format!("{}: `{key}` is missing or not a number", path.display())))
    };
    let exact_gelu = match json["activation_function"].as_str() {
        None | Some("gelu_new" | "gelu_pytorch_tanh") => false,
        Some("gelu") => true,
        Some(other) => return Err(Error::Model(format!("{}: activation `{other}` is not supported", path.display()))),
    };
    let inner = json["n_inner"].as_u64().unwrap_or(4 * size("n_embd")? as u64) as usize;
    if inner != 4 * size("n_embd")? || json["scale_attn_by_inverse_layer_idx"] == Value::Bool(true) {
        return Err(Error::Model(format!(
            "{}: n_inner and per-layer attention scales are not supported",
            path.display()
        )));
    }
    let model = Gpt2Config {
        vocab: size("vocab_size")?,
        context: size("n_positions")?,
        hidden: size("n_embd")?,
        layers: size("n_layer")?,
        heads: size("n_head")?,
        dropout: json["resid_pdrop"].as_f64().unwrap_or(0.0),
        tied: json["tie_word_embeddings"].as_bool().unwrap_or(true),
        layer_norm_eps: json["layer_norm_epsilon"].as_f64().unwrap_or(1e-5),
        exact_gelu,
        initializer_range: json["initializer_range"].as_f64().unwrap_or(0.02) as f32,
        divide_above: DIVIDE_ABOVE,
    };
    model.validate()?;
    Ok(model)
}

/// A memory-mapped `model.safetensors`.
pub struct Weights {
    path: PathBuf,
    map: Mmap,
}

impl Weights {
    /// Opens the weights in `directory`.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let path = directory.join("model.safetensors");
        let file = File::open(&path).map_err(|error| Error::io(&path, error))?;
        // SAFETY: the file is only read; somebody who truncates it meanwhile takes the process down, as for any mapped file.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::io(&path, error))?;
        let weights = Weights { path, map };
        weights.tensors()?;
        Ok(weights)
    }

    fn tensors(&self) -> Result<SafeTensors<'_>, Error> {
        SafeTensors::deserialize(&self.map).map_err(|error| {
            Error::Model(format!("{} is damaged or cut short ({error}): fetch it again", self.path.display()))
        })
    }

    /// Fills `out` with rows of a parameter, from `first_row` on, in our (out, in) order: Hugging Face keeps GPT-2's linear
    /// weights as (in, out).
    pub fn read_parameter(&self, name: &str, first_row: usize, out: &mut [f32]) -> Result<(), Error> {
        let tensors = self.tensors()?;
        // Checkpoints of the bare model leave the prefix away.
        let view = tensors
            .tensor(name)
            .or_else(|_| tensors.tensor(name.trim_start_matches("transformer.")))
            .map_err(|_| Error::Model(format!("{} has no tensor `{name}`: is it a GPT-2?", self.path.display())))?;
        let transposed = view.shape().len() == 2 && is_conv1d(name);
        let element: fn(&[u8], usize) -> f32 = match view.dtype() {
            Dtype::F32 => {
                |data, i| f32::from_le_bytes([data[4 * i], data[4 * i + 1], data[4 * i + 2], data[4 * i + 3]])
            }
            Dtype::BF16 => |data, i| bf16::from_le_bytes([data[2 * i], data[2 * i + 1]]).to_f32(),
            Dtype::F16 => |data, i| f16::from_le_bytes([data[2 * i], data[2 * i + 1]]).to_f32(),
            other => {
                return Err(Error::Model(format!(
                    "{}: `{name}` has type {other:?}; f32, bf16 and f16 can be read",
                    self.path.display()
                )));
            }
        };
        let (rows, columns) = match (view.shape(), transposed) {
            (&[inner, outer], true) => (outer, inner),
            (&[rows, columns], false) => (rows, columns),
            (&[rows], _) => (rows, 1),
            (shape, _) => {
                return Err(Error::Model(format!("`{name}` has shape {shape:?}, one or two dimensions are expected")));
            }
        };
        if (first_row * columns + out.len()) > rows * columns || !out.len().is_multiple_of(columns) {
            return Err(Error::Model(format!(
                "{}: `{name}` has shape {:?}, which does not fit config.json",
                self.path.display(),
                view.shape()
            )));
        }
        for (index, value) in out.iter_mut().enumerate() {
            let (row, column) = (first_row + index / columns, index % columns);
            let source = if transposed { column * rows + row } else { row * columns + column };
            *value = element(view.data(), source);
        }
        Ok(())
    }
}

/// Whether Hugging Face stores this weight as (in, out).
pub fn is_conv1d(name: &str) -> bool {
    name.ends_with("c_attn.weight") || name.ends_with("c_proj.weight") || name.ends_with("c_fc.weight")
}
