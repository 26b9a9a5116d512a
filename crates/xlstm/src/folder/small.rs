//! The small family's official state dict in a safetensors file, and its configuration under the
//! official keys, in YAML or JSON.
//!
//! Parameters have the names that we use, the sLSTM's swapped gates included. Its recurrent weights
//! and biases come in two layouts, which the shape tells apart (4 DH is never DH):
//!
//! ```text
//!            _recurrent_kernel_                 _bias_
//! vanilla    (NH, 4 DH, DH)  gate, out | in     gate, head, unit      as ours
//! cuda       (NH, DH, 4 DH)  in | gate, out     head, gate, unit
//! ```

use serde_json::{Value, json};

use super::Description;
use super::keys::Keys;
use super::tensors::TensorFiles;
use super::weights::{Piece, Recipe};
use crate::error::Result;
use crate::model::{ModelConfig, SlstmAt};
use crate::nn::ParameterSpec;

const RECURRENT: &str = "_recurrent_kernel_";
const BIAS: &str = "_bias_";
/// i, f, z, o.
const GATES: usize = 4;

/// Keys that choose a kernel, repeat a size of another section, or are about training alone.
const IGNORED: [&str; 21] = [
    "context_length",
    "embedding_dim",
    "feature_dim",
    "backend",
    "num_states",
    "num_gates",
    "batch_size",
    "input_shape",
    "internal_input_shape",
    "output_shape",
    "constants",
    "dtype",
    "dtype_b",
    "dtype_r",
    "dtype_w",
    "dtype_g",
    "dtype_s",
    "dtype_a",
    "enable_automatic_mixed_precision",
    "hidden_size",
    "dropout",
];

/// Whether these are the keys of such a configuration.
pub(crate) fn is(keys: &Keys) -> bool {
    ["mlstm_block", "slstm_block", "slstm_at"].iter().any(|key| keys.has(key))
}

/// What the configuration says.
///
/// # Errors
/// When a key has a value of another kind, or asks for what we do not have.
pub(crate) fn describe(mut keys: Keys) -> Result<Description> {
    let mut config = ModelConfig { num_blocks: 1, ..ModelConfig::default() };
    keys.count("vocab_size", &mut config.vocab_size)?;
    keys.count("embedding_dim", &mut config.embedding_dim)?;
    keys.count("num_blocks", &mut config.num_blocks)?;
    keys.number("dropout", &mut config.dropout)?;
    keys.flag("bias", &mut config.bias)?;
    keys.flag("tie_weights", &mut config.tie_weights)?;
    keys.flag("weight_decay_on_embedding", &mut config.weight_decay_on_embedding)?;
    keys.flag("add_embedding_dropout", &mut config.add_embedding_dropout)?;
    keys.flag("add_post_blocks_norm", &mut config.add_post_blocks_norm)?;
    let at = "a list of block numbers or all";
    let slstm_at: Option<SlstmAt> = keys.take("slstm_at", at)?;
    let (mlstm, slstm) = (keys.section("mlstm_block")?, keys.section("slstm_block")?);
    // As there: without mLSTM blocks all are sLSTM blocks, without sLSTM blocks none is.
    config.slstm_at = match (&mlstm, &slstm) {
        (None, Some(_)) => SlstmAt::All,
        (_, None) => SlstmAt::None,
        (Some(_), Some(_)) => slstm_at.unwrap_or_default(),
    };
    keys.ignore(&["context_length"]);
    let mut warnings = keys.finish();
    if let Some(block) = mlstm {
        warnings.extend(mlstm_block(block, &mut config)?);
    }
    if let Some(block) = slstm {
        warnings.extend(slstm_block(block, &mut config)?);
    }
    Ok(Description { config, ends: None, warnings })
}

fn mlstm_block(mut block: Keys, config: &mut ModelConfig) -> Result<Vec<String>> {
    let layer = block.section("mlstm")?;
    let mut warnings = block.finish();
    if let Some(mut keys) = layer {
        let mlstm = &mut config.mlstm;
        keys.count("num_heads", &mut mlstm.num_heads)?;
        keys.count("conv1d_kernel_size", &mut mlstm.conv1d_kernel_size)?;
        keys.count("qkv_proj_blocksize", &mut mlstm.qkv_proj_blocksize)?;
        keys.number("proj_factor", &mut mlstm.proj_factor)?;
        keys.count("round_proj_up_to_multiple_of", &mut mlstm.round_proj_up_to_multiple_of)?;
        keys.require("round_proj_up_dim_up", &json!(true))?;
        // The stack's `bias` and `dropout` are written over this section's.
        keys.ignore(&["bias"]);
        keys.ignore(&IGNORED);
        warnings.extend(keys.finish());
    }
    Ok(warnings)
}

fn slstm_block(mut block: Keys, config: &mut ModelConfig) -> Result<Vec<String>> {
    if block.is_null("feedforward") {
        return Err(block.unfit("feedforward", "a section, as every sLSTM block has one here", &Value::Null));
    }
    let (layer, feedforward) = (block.section("slstm")?, block.section("feedforward")?);
    let mut warnings = block.finish();
    if let Some(mut keys) = layer {
        let slstm = &mut config.slstm;
        keys.count("num_heads", &mut slstm.num_heads)?;
        keys.count("conv1d_kernel_size", &mut slstm.conv1d_kernel_size)?;
        keys.set("function", "slstm or lstm", &mut slstm.function)?;
        let starts = "powerlaw_blockdependent, small_init, standard or zeros";
        keys.set("bias_init", starts, &mut slstm.bias_init)?;
        keys.set("recurrent_weight_init", "zeros or standard", &mut slstm.recurrent_weight_init)?;
        keys.flag("gradient_recurrent_cut", &mut slstm.gradient_recurrent_cut)?;
        keys.limit("gradient_recurrent_clipval", &mut slstm.gradient_recurrent_clipval)?;
        keys.require("group_norm_weight", &json!(true))?;
        keys.require("forward_clipval", &Value::Null)?;
        let mut start = 0.0;
        keys.number("initial_val", &mut start)?;
        if start != 0.0 {
            return Err(keys.unfit("initial_val", "0, all that is supported", &json!(start)));
        }
        keys.ignore(&IGNORED);
        warnings.extend(keys.finish());
    }
    if let Some(mut keys) = feedforward {
        let layer = &mut config.feedforward;
        keys.number("proj_factor", &mut layer.proj_factor)?;
        let functions = "gelu, relu, relu^2, sigmoid, swish or selu";
        keys.set("act_fn", functions, &mut layer.act_fn)?;
        keys.count("round_proj_up_to_multiple_of", &mut layer.round_proj_up_to_multiple_of)?;
        keys.require("round_proj_up_dim_up", &json!(true))?;
        keys.flag("bias", &mut layer.bias)?;
        keys.number("dropout", &mut layer.dropout)?;
        keys.require("ff_type", &json!("ffn_gated"))?;
        keys.ignore(&IGNORED);
        warnings.extend(keys.finish());
    }
    Ok(warnings)
}

/// How a parameter is made of the tensors of such a file.
pub(crate) fn recipe(config: &ModelConfig, files: &TensorFiles, spec: &ParameterSpec) -> Recipe {
    let heads = config.slstm.num_heads.max(1);
    let size = config.embedding_dim / heads;
    if let Some(layer) = spec.name.strip_suffix(RECURRENT)
        && is_cuda(files, layer, heads, size)
    {
        return Recipe { rearrange: Some(transpose_heads), ..Recipe::tensor(&spec.name) };
    }
    if let Some(layer) = spec.name.strip_suffix(BIAS)
        && is_cuda(files, layer, heads, size)
    {
        let rows = |first: usize| Some(first * size..(first + 1) * size);
        let places = (0..GATES).flat_map(|gate| (0..heads).map(move |head| head * GATES + gate));
        let pieces = places.map(|place| Piece { tensor: spec.name.clone(), rows: rows(place) });
        return Recipe { pieces: pieces.collect(), rearrange: None };
    }
    Recipe::tensor(&spec.name)
}

/// Whether the cell with this name prefix has the layout of the CUDA backend.
fn is_cuda(files: &TensorFiles, layer: &str, heads: usize, size: usize) -> bool {
    let kernel = files.get(&format!("{layer}{RECURRENT}"));
    kernel.is_some_and(|kernel| kernel.shape == [heads, size, GATES * size])
}

/// (NH, DH, 4 DH) -> (NH, 4 DH, DH), the shape of the parameter.
fn transpose_heads(spec: &ParameterSpec, values: Vec<f32>) -> Vec<f32> {
    let (rows, columns) = (spec.shape[1], spec.shape[2]);
    let mut ours = Vec::with_capacity(values.len());
    for head in values.chunks(rows * columns) {
        for row in 0..rows {
            ours.extend((0..columns).map(|column| head[column * rows + row]));
        }
    }
    ours
}
