//! Hugging Face's folders of the large family (`model_type: xlstm`): `config.json`, weights in one
//! safetensors file or several with an index, `tokenizer.json`, `generation_config.json`.
//!
//! Parameters have NX-AI's names but for the embedding's. Three things of that implementation
//! matter here: it has the last norm whatever `add_out_norm` says, and no bias in it; it ties no
//! weights; and the state that it keeps between tokens has the widths of queries and values rounded
//! up to multiples of 64, so that it can generate only where they are multiples already.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::keys::Keys;
use super::names;
use super::tensors::TensorFiles;
use super::weights::Recipe;
use super::{Description, readable};
use crate::engine::Format;
use crate::error::{Error, Result};
use crate::model::{Family, ModelConfig};
use crate::nn::large::{LargeConfig, WeightMode};

/// The `model_type` of these folders.
pub(crate) const MODEL_TYPE: &str = "xlstm";
pub(crate) const GENERATION: &str = "generation_config.json";
const EMBEDDING: &str = "embedding.weight";
const THEIR_EMBEDDING: &str = "backbone.embeddings.weight";
const HEAD: &str = "lm_head.weight";
/// What widths are rounded up to in the state.
const ROUNDED_TO: usize = 64;

/// Keys that choose a kernel or its number format.
pub(crate) const KERNELS: [&str; 10] = [
    "chunkwise_kernel",
    "sequence_kernel",
    "step_kernel",
    "mode",
    "autocast_kernel_dtype",
    "inference_state_dtype",
    "return_last_states",
    "norm_reduction_force_float32",
    "max_inference_chunksize",
    "use_cache",
];

/// What `transformers` notes in every configuration.
const NOTES: [&str; 24] = [
    "model_type",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "bos_token_id",
    "pad_token_id",
    "eos_token_id",
    "name_or_path",
    "auto_map",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "id2label",
    "label2id",
    "problem_type",
    "tokenizer_class",
    "task_specific_params",
    "torchscript",
    "use_bfloat16",
    "is_decoder",
    "sep_token_id",
];

/// One token, several, or none.
#[derive(Deserialize)]
#[serde(untagged)]
enum Tokens {
    One(u32),
    Several(Vec<u32>),
}

impl Tokens {
    fn list(self) -> Vec<u32> {
        match self {
            Tokens::One(token) => vec![token],
            Tokens::Several(tokens) => tokens,
        }
    }
}

const TOKENS: &str = "a token id, a list of them or null";

/// The keys that this format and NX-AI's share, with the defaults in `config`.
///
/// # Errors
/// When a key has a value of another kind.
pub(crate) fn shared_keys(keys: &mut Keys, config: &mut ModelConfig) -> Result<()> {
    keys.count("vocab_size", &mut config.vocab_size)?;
    let large = &mut config.large;
    keys.count("num_heads", &mut large.num_heads)?;
    keys.flag("use_bias", &mut large.use_bias)?;
    keys.flag("add_out_norm", &mut large.add_out_norm)?;
    keys.number("norm_eps", &mut large.norm_eps)?;
    keys.number("eps", &mut large.eps)?;
    keys.number("qk_dim_factor", &mut large.qk_dim_factor)?;
    keys.number("v_dim_factor", &mut large.v_dim_factor)?;
    keys.number("ffn_proj_factor", &mut large.ffn_proj_factor)?;
    keys.count("ffn_round_up_to_multiple_of", &mut large.ffn_round_up_to_multiple_of)?;
    keys.limit("gate_soft_cap", &mut large.gate_soft_cap)?;
    keys.limit("output_logit_soft_cap", &mut large.output_logit_soft_cap)?;
    keys.count("chunk_size", &mut large.chunk_size)?;
    keys.set("weight_mode", "single or fused", &mut large.weight_mode)?;
    keys.ignore(&KERNELS);
    Ok(())
}

/// What the `config.json` in `folder` and the files beside it say.
///
/// # Errors
/// When a key has a value of another kind or that does not fit.
pub(crate) fn describe(folder: &Path, mut keys: Keys, files: &TensorFiles) -> Result<Description> {
    let path = folder.join(super::CONFIG);
    // The defaults of that implementation's configuration: what an absent key means.
    let mut config = ModelConfig {
        family: Family::Large,
        vocab_size: 50304,
        large: LargeConfig { num_heads: 8, ffn_proj_factor: 2.667, ..LargeConfig::default() },
        ..ModelConfig::default()
    };
    config.embedding_dim = same(&mut keys, "hidden_size", "embedding_dim", 4096)?;
    config.num_blocks = same(&mut keys, "num_hidden_layers", "num_blocks", 32)?;
    shared_keys(&mut keys, &mut config)?;
    let mut tied = false;
    keys.flag("tie_word_embeddings", &mut tied)?;
    config.tie_weights = tied && files.get(HEAD).is_none();
    let ends = ends(folder, &mut keys)?;
    keys.ignore(&NOTES);
    let mut warnings = keys.finish();
    if !config.large.add_out_norm {
        warnings
            .push(format!("{}: add_out_norm is false, but this format always has the norm", path.display()));
        config.large.add_out_norm = true;
    }
    if tied && !config.tie_weights {
        let path = path.display();
        warnings.push(format!(
            "{path}: tie_word_embeddings is true, but there is a head of its own, which is used"
        ));
    }
    widths_of_files(&path, &mut config, files, &mut warnings);
    Ok(Description { config, ends, warnings })
}

/// A size that has two keys, which have to agree.
fn same(keys: &mut Keys, first: &str, second: &str, default: usize) -> Result<usize> {
    let expected = "a whole number";
    let (a, b): (Option<usize>, Option<usize>) = (keys.take(first, expected)?, keys.take(second, expected)?);
    match (a, b) {
        (Some(a), Some(b)) if a != b => Err(keys.unfit(second, &format!("{a}, as {first}"), &json!(b))),
        _ => Ok(a.or(b).unwrap_or(default)),
    }
}

/// The tokens that end a text: those of `generation_config.json` where there is one, else those of
/// `config.json`, whose default is 2. None where nothing is said.
fn ends(folder: &Path, keys: &mut Keys) -> Result<Option<Vec<u32>>> {
    let own: Option<Option<Tokens>> = keys.take_nullable("eos_token_id", TOKENS)?;
    let path = folder.join(GENERATION);
    if path.exists() {
        let found: Option<Tokens> = Keys::read(&path)?.take("eos_token_id", TOKENS)?;
        return Ok(found.map(Tokens::list));
    }
    Ok(own.unwrap_or(Some(Tokens::One(2))).map(Tokens::list))
}

/// Where the tensors have widths that are rounded up, those are meant.
fn widths_of_files(path: &Path, config: &mut ModelConfig, files: &TensorFiles, warnings: &mut Vec<String>) {
    let dim = config.embedding_dim;
    let [qk, v] = config.large.head_dims(dim);
    let large = &mut config.large;
    for (name, key, width, factor) in [
        ("q", "qk_dim_factor", qk, &mut large.qk_dim_factor),
        ("v", "v_dim_factor", v, &mut large.v_dim_factor),
    ] {
        let tensor = files.get(&format!("backbone.blocks.0.mlstm_layer.{name}.weight"));
        let Some(&rows) = tensor.as_ref().and_then(|tensor| tensor.shape.first()) else { continue };
        if rows != width && rows == width.next_multiple_of(ROUNDED_TO) {
            *factor = factor_of(rows, dim);
            warnings.push(format!(
                "{}: {key} makes a width of {width}, but the weights have {rows}, which is used",
                path.display()
            ));
        }
    }
}

/// A factor that makes `rows` of `dim` when the product is rounded down.
fn factor_of(rows: usize, dim: usize) -> f64 {
    let factor = rows as f64 / dim as f64;
    if (factor * dim as f64) as usize == rows { factor } else { (rows as f64 + 0.25) / dim as f64 }
}

/// How a parameter is made of the tensors of such files.
pub(crate) fn recipe(config: &ModelConfig, files: &TensorFiles, name: &str) -> Recipe {
    if name == EMBEDDING {
        return Recipe::tensor(THEIR_EMBEDDING);
    }
    if name == "backbone.out_norm.bias" && files.get(name).is_none() {
        // Theirs has none: as many zeros as the weight beside it has values.
        let weight = Recipe::tensor("backbone.out_norm.weight");
        return Recipe { rearrange: Some(|_, values| vec![0.0; values.len()]), ..weight };
    }
    names::recipe(config, |name| files.get(name).is_some(), name)
}

/// The name of a parameter in such a file.
pub(crate) fn tensor_name(name: &str) -> &str {
    if name == EMBEDDING { THEIR_EMBEDDING } else { name }
}

/// The content of `config.json`, and what the reader of the folder should know.
///
/// # Errors
/// When the model has what the format cannot express.
pub(crate) fn config_file(
    config: &ModelConfig,
    format: Format,
    ends: Option<&[u32]>,
) -> Result<(Value, Vec<String>)> {
    let large = &config.large;
    let refuse = |key: &str, value: &str| {
        Err(Error::config(format!("a Hugging Face folder cannot hold a model with {key}: {value}"))
            .hint("`--to ours` and `--to nx-ai` can"))
    };
    if config.family != Family::Large {
        return Err(Error::config(format!(
            "a Hugging Face folder holds models of the large family, and this one is of the {} family",
            config.family.name()
        ))
        .hint("`--to ours` holds every family"));
    }
    if !large.add_out_norm {
        return refuse("add_out_norm", "false");
    }
    if large.use_bias {
        return refuse("use_bias", "true");
    }
    let (Some(gate_soft_cap), Some(output_logit_soft_cap)) =
        (large.gate_soft_cap, large.output_logit_soft_cap)
    else {
        return refuse("gate_soft_cap or output_logit_soft_cap", "null");
    };
    let dtype = readable(format);
    let mut warnings = Vec::new();
    if large.weight_mode == WeightMode::Fused {
        warnings.push(
            "transformers (5.24) cannot open fused weights; --weights single writes what it opens".into(),
        );
    }
    for (what, width) in ["queries", "values"].into_iter().zip(large.head_dims(config.embedding_dim)) {
        if width % ROUNDED_TO != 0 {
            warnings.push(format!(
                "all {what} have a width of {width}, no multiple of {ROUNDED_TO}: transformers computes logits but \
                 cannot generate with its cache"
            ));
        }
    }
    let value = json!({
        "architectures": ["xLSTMForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embedding_dim,
        "embedding_dim": config.embedding_dim,
        "num_hidden_layers": config.num_blocks,
        "num_blocks": config.num_blocks,
        "num_heads": large.num_heads,
        "use_bias": false,
        "add_out_norm": true,
        "tie_word_embeddings": false,
        "norm_eps": large.norm_eps,
        "eps": large.eps,
        "qk_dim_factor": large.qk_dim_factor,
        "v_dim_factor": large.v_dim_factor,
        "ffn_proj_factor": large.ffn_proj_factor,
        "ffn_round_up_to_multiple_of": large.ffn_round_up_to_multiple_of,
        "gate_soft_cap": gate_soft_cap,
        "output_logit_soft_cap": output_logit_soft_cap,
        "weight_mode": large.weight_mode,
        "chunk_size": large.chunk_size,
        "autocast_kernel_dtype": dtype,
        "inference_state_dtype": "float32",
        "return_last_states": true,
        "mode": "inference",
        "bos_token_id": null,
        "pad_token_id": null,
        "eos_token_id": ends,
    });
    Ok((value, warnings))
}

/// The content of `generation_config.json`.
pub(crate) fn generation_file(ends: Option<&[u32]>) -> Value {
    json!({"eos_token_id": ends, "use_cache": true})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_make_the_rows_they_were_made_of() {
        for dim in [48, 96, 100, 127, 4096] {
            for rows in 1..=dim {
                assert_eq!((factor_of(rows, dim) * dim as f64) as usize, rows, "{rows} of {dim}");
            }
        }
    }

    #[test]
    fn what_the_format_cannot_hold_is_refused() {
        let with = |change: fn(&mut ModelConfig)| {
            let mut config = ModelConfig { family: Family::Large, vocab_size: 64, ..ModelConfig::default() };
            change(&mut config);
            config_file(&config, Format::F32, None)
        };
        assert!(with(|_| ()).unwrap().1.is_empty());
        assert_eq!(with(|c| c.large.qk_dim_factor = 0.25).unwrap().1.len(), 1);
        let changes: [fn(&mut ModelConfig); 4] = [
            |c| c.large.add_out_norm = false,
            |c| c.large.use_bias = true,
            |c| c.large.gate_soft_cap = None,
            |c| c.family = Family::Small,
        ];
        for change in changes {
            assert!(with(change).unwrap_err().hint_text().unwrap().contains("--to"));
        }
    }
}
