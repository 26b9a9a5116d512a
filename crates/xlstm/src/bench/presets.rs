//! Models and batch shapes with names: the sizes at which public implementations are timed.

use crate::data::Batching;
use crate::error::{Error, Result};
use crate::model::objective::Carry;
use crate::model::{BlockForm, Family, LstmType, ModelConfig, OriginalConfig, SlstmAt};
use crate::nn::large::LargeConfig;
use crate::nn::lstm::LstmConfig;
use crate::nn::transformer::{PositionKind, TransformerConfig};
use crate::optim::OptimizerOptions;
use crate::train::{RunConfig, unknown_name};

/// A model, a batch and a prompt with a name.
#[derive(Clone, Debug)]
pub struct Preset {
    /// Its name on the command line.
    pub name: String,
    /// The model.
    pub model: ModelConfig,
    /// Sequences of a training batch.
    pub batch_size: usize,
    /// Tokens of each of them.
    pub length: usize,
    /// Batches of a training step.
    pub accumulation: usize,
    /// What the state does between training batches.
    pub carry: Carry,
    /// What follows the gradients.
    pub options: OptimizerOptions,
    /// Tokens of the prompt that prefill reads.
    pub prompt: usize,
    /// Tokens that decode draws after it.
    pub drawn: usize,
}

/// The names of all presets.
pub const PRESETS: [&str; 29] = [
    "large-128",
    "large-256",
    "lm-mlstm-128",
    "lm-mlstm-256",
    "lm-slstm-128",
    "lm-slstm-256",
    "lm-mixed-128",
    "pyx-slstm-128",
    "pyx-slstm-256",
    "pyx-mlstm-128",
    "pyx-mlstm-256",
    "lstm-128",
    "lstm-eq256",
    "gpt-128",
    "gpt-256",
    "infer-50m",
    "small-125m",
    "gpt-125m",
    "large-74m",
    "large-162m",
    "large-407m",
    "gen-407m",
    "mlstm-7b",
    "mlstm-256",
    "mlstm-400m",
    "mlstm-125m",
    "slstm-512",
    "slstm-768",
    "slstm-1024",
];

impl Preset {
    /// The preset of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn named(name: &str) -> Result<Preset> {
        let Some(name) = PRESETS.into_iter().find(|preset| *preset == name) else {
            return Err(unknown_name("preset", name, &PRESETS));
        };
        let of = |family: Family| {
            let (embedding_dim, vocab_size) = if name.ends_with("256") { (256, 5000) } else { (128, 1000) };
            ModelConfig { family, vocab_size, embedding_dim, num_blocks: 4, ..ModelConfig::default() }
        };
        let small = |slstm_at: SlstmAt| ModelConfig { slstm_at, ..of(Family::Small) };
        let one_slstm =
            |embedding_dim: usize| ModelConfig { embedding_dim, num_blocks: 1, ..small(SlstmAt::All) };
        let model = match name {
            "large-128" | "large-256" => of(Family::Large),
            "large-74m" => xlstm_large(512, 7, 4),
            "large-162m" => xlstm_large(768, 12, 6),
            "large-407m" | "gen-407m" => xlstm_large(1024, 24, 4),
            // Cells alone: one block.
            "mlstm-7b" => xlstm_large(4096, 1, 8),
            "mlstm-256" => {
                let mut model = xlstm_large(1024, 1, 4);
                model.large.qk_dim_factor = 1.0;
                model
            }
            "mlstm-400m" => xlstm_large(1024, 1, 4),
            "mlstm-125m" => xlstm_large(768, 1, 6),
            "gpt-125m" => gpt2(2048),
            "infer-50m" => {
                ModelConfig { vocab_size: 16000, embedding_dim: 640, num_blocks: 6, ..of(Family::Large) }
            }
            "small-125m" => {
                ModelConfig { vocab_size: 50304, embedding_dim: 768, num_blocks: 24, ..small(SlstmAt::None) }
            }
            "lm-slstm-128" | "lm-slstm-256" => small(SlstmAt::All),
            "slstm-512" => one_slstm(512),
            "slstm-768" => one_slstm(768),
            "slstm-1024" => one_slstm(1024),
            "lm-mixed-128" => small(SlstmAt::Positions(vec![1])),
            "pyx-slstm-128" | "pyx-slstm-256" => original(of(Family::Original), LstmType::Slstm),
            "pyx-mlstm-128" | "pyx-mlstm-256" => original(of(Family::Original), LstmType::Mlstm),
            "lstm-128" | "lstm-eq256" => {
                // As wide as has the parameters of an xLSTM of 128, or of 256.
                let hidden_dim = if name == "lstm-128" { 160 } else { 304 };
                let lstm = LstmConfig { hidden_dim, ..LstmConfig::default() };
                ModelConfig { lstm, ..of(Family::Lstm) }
            }
            "gpt-128" | "gpt-256" => {
                let positions = PositionKind::Learned;
                let transformer = TransformerConfig { positions, ..TransformerConfig::default() };
                ModelConfig { transformer, ..of(Family::Transformer) }
            }
            _ => small(SlstmAt::None),
        };
        let (batch_size, length) = match name {
            "infer-50m" => (1, 512),
            "gen-407m" => (1, 2048),
            "small-125m" => (4, 512),
            "gpt-125m" | "large-74m" | "large-162m" | "large-407m" => (8, 2048),
            "mlstm-7b" | "mlstm-256" => (8, 8192),
            "mlstm-400m" | "mlstm-125m" => (32, 2048),
            "slstm-512" | "slstm-768" | "slstm-1024" => (64, 1024),
            _ if model.family == Family::Original => (8, 128),
            _ => (8, 256),
        };
        // Learned positions end at 256.
        let prompt = match name {
            "gen-407m" => 2048,
            _ if model.family == Family::Transformer => 128,
            _ => 512,
        };
        Ok(Preset {
            name: name.into(),
            model,
            batch_size,
            length,
            accumulation: 1,
            carry: Carry::Fresh,
            options: OptimizerOptions::DEFAULT,
            prompt,
            drawn: 128,
        })
    }

    /// The model, the batches and the optimizer of a training run, under this name; generation after a
    /// prompt as long as a sequence.
    ///
    /// # Errors
    /// When the configuration leaves the vocabulary to the tokenizer.
    pub fn of_run(name: &str, config: &RunConfig) -> Result<Preset> {
        if config.model.vocab_size == 0 {
            return Err(Error::config("model.vocab_size is 0, which takes it from the tokenizer")
                .hint("a benchmark reads no text: set model.vocab_size"));
        }
        let carry = match config.data.batching {
            Batching::Stream => Carry::Carried,
            Batching::Documents | Batching::Windows => Carry::Marked,
        };
        Ok(Preset {
            name: name.into(),
            model: config.model.clone(),
            batch_size: config.data.batch_size,
            length: config.data.length,
            accumulation: config.training.accumulation,
            carry,
            options: config.optimizer.options(),
            prompt: config.data.length,
            drawn: 128,
        })
    }
}

/// Numbers of GPT-2's vocabulary, rounded up as its trainers do.
const GPT2_VOCABULARY: usize = 50_304;

/// An `xLSTMLarge` of NX-AI over the vocabulary of GPT-2.
fn xlstm_large(embedding_dim: usize, num_blocks: usize, num_heads: usize) -> ModelConfig {
    let large = LargeConfig { num_heads, ..LargeConfig::default() };
    let family = Family::Large;
    let vocab_size = GPT2_VOCABULARY;
    ModelConfig { family, vocab_size, embedding_dim, num_blocks, large, ..ModelConfig::default() }
}

/// The smallest GPT-2 with this context: biases everywhere, its embedding as head.
fn gpt2(context_length: usize) -> ModelConfig {
    let transformer = TransformerConfig {
        num_heads: 12,
        context_length,
        positions: PositionKind::Learned,
        bias: true,
        ..TransformerConfig::default()
    };
    ModelConfig {
        family: Family::Transformer,
        vocab_size: GPT2_VOCABULARY,
        embedding_dim: 768,
        num_blocks: 12,
        tie_weights: true,
        transformer,
        ..ModelConfig::default()
    }
}

/// The Python original's model at the size of its own code: two cells a block; two blocks at width
/// 128, four at 256. Its code has one form of block, without a projection up, and an mLSTM whose
/// gates are vectors that see the last output; ours are its article's forms and the paper's gates.
/// The width between the projections is chosen so that the weights are as many: half the cells' width
/// for the sLSTM, 5.5 times it for the mLSTM, whose gates have so many weights less.
fn original(shape: ModelConfig, lstm_type: LstmType) -> ModelConfig {
    let proj_factor = match lstm_type {
        LstmType::Slstm => 0.5,
        LstmType::Mlstm => 5.5,
    };
    let original = OriginalConfig {
        hidden_size: shape.embedding_dim,
        num_layers: 2,
        lstm_type,
        block: Some(BlockForm::Post),
        proj_factor,
        ..OriginalConfig::default()
    };
    ModelConfig { num_blocks: if shape.embedding_dim == 128 { 2 } else { 4 }, original, ..shape }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::model::LanguageModel;

    /// A preset of both cells that takes no time.
    pub(in crate::bench) fn tiny() -> Preset {
        let model = ModelConfig {
            vocab_size: 11,
            embedding_dim: 16,
            num_blocks: 2,
            slstm_at: SlstmAt::Positions(vec![1]),
            ..ModelConfig::default()
        };
        Preset {
            name: "tiny".into(),
            model,
            batch_size: 2,
            length: 9,
            accumulation: 1,
            carry: Carry::Fresh,
            options: OptimizerOptions::DEFAULT,
            prompt: 7,
            drawn: 3,
        }
    }

    fn count(name: &str) -> usize {
        LanguageModel::new(&Preset::named(name).unwrap().model).unwrap().parameter_count()
    }

    #[test]
    fn every_preset_is_a_model() {
        for name in PRESETS {
            let preset = Preset::named(name).unwrap();
            assert_eq!(preset.name, name);
            let model = LanguageModel::new(&preset.model).unwrap();
            assert!(model.most_tokens().is_none_or(|most| preset.prompt + preset.drawn <= most), "{name}");
        }
        let mut run = RunConfig::default();
        assert!(Preset::of_run("run", &run).unwrap_err().to_string().contains("model.vocab_size"));
        (run.model.vocab_size, run.data.batching, run.data.length) = (11, Batching::Stream, 40);
        let preset = Preset::of_run("run", &run).unwrap();
        assert_eq!((preset.length, preset.prompt, preset.carry), (40, 40, Carry::Carried));
        let error = Preset::named("lm-mlstm-12").unwrap_err();
        assert!(error.hint_text().unwrap_or_default().contains("lm-mlstm-128"), "{error}");
    }

    /// An LSTM as PyTorch's, of two biases a layer, and a GPT of norms with biases and projections
    /// without.
    #[test]
    fn baselines_have_the_sizes_of_their_peers() {
        let lstm = |v: usize, d: usize, h: usize| {
            let layer = |inputs: usize| 4 * h * (inputs + h) + 2 * 4 * h;
            v * d + layer(d) + 3 * layer(h) + v * h
        };
        assert_eq!((count("lstm-128"), count("lstm-eq256")), (lstm(1000, 128, 160), lstm(5000, 256, 304)));
        let gpt = |v: usize, d: usize| 2 * v * d + 256 * d + 4 * (12 * d * d + 4 * d) + 2 * d;
        assert_eq!((count("gpt-128"), count("gpt-256")), (gpt(1000, 128), gpt(5000, 256)));
        // GPT-2 with 2048 positions: matrices and biases of 12 blocks, two norms each, one at the end.
        let d = 768;
        assert_eq!(count("gpt-125m"), (50304 + 2048) * d + 12 * (12 * d * d + 9 * d + 4 * d) + 2 * d);
    }

    /// NX-AI's `xLSTMLarge`: queries and keys of half the width, gates with biases, a feed-forward
    /// layer of F.
    #[test]
    fn large_presets_have_the_sizes_of_their_peer() {
        let large = |v: usize, d: usize, blocks: usize, f: usize| {
            2 * v * d + blocks * (4 * d * d + 2 * (4 * d + 4) + 3 * d * f + 3 * d) + d
        };
        assert_eq!(count("large-128"), large(1000, 128, 4, 384));
        assert_eq!(count("large-256"), large(5000, 256, 4, 704));
        assert_eq!(count("infer-50m"), large(16000, 640, 6, 1728));
        let gates = |d: usize, blocks: usize, heads: usize| 2 * blocks * (heads - 4) * (d + 1);
        assert_eq!(count("large-74m"), large(50304, 512, 7, 1408));
        assert_eq!(count("large-162m"), large(50304, 768, 12, 2048) + gates(768, 12, 6));
        assert_eq!(count("large-407m"), large(50304, 1024, 24, 2752));
    }

    /// NX-AI's `xLSTMLMModel`: an mLSTM block of inner width 2 D, an sLSTM block with a feed-forward
    /// layer of F.
    #[test]
    fn small_presets_have_the_sizes_of_their_peer() {
        let mlstm = |d: usize| {
            let e = 2 * d;
            let (convolution, gates) = (5 * e, 2 * (4 * 3 * e + 4));
            d + 2 * e * d + 3 * 4 * e + convolution + gates + 2 * e + e * d
        };
        let slstm = |d: usize, f: usize| d + 5 * d + 2 * d * d + 4 * d + d + d + 3 * d * f;
        let around = |v: usize, d: usize| 2 * v * d + d;
        assert_eq!(count("lm-mlstm-128"), around(1000, 128) + 4 * mlstm(128));
        assert_eq!(count("lm-mlstm-256"), around(5000, 256) + 4 * mlstm(256));
        assert_eq!(count("lm-slstm-128"), around(1000, 128) + 4 * slstm(128, 192));
        assert_eq!(count("lm-slstm-256"), around(5000, 256) + 4 * slstm(256, 384));
        assert_eq!(count("lm-mixed-128"), around(1000, 128) + 3 * mlstm(128) + slstm(128, 192));
    }

    /// PyxLSTM's code: `4 H` or `3 H` gates over the input and the last output, an mLSTM's three
    /// projections, and a block's norm and projection back. Ours have as many weights; what differs
    /// is a few vectors: the biases of the projection up that its code lacks, and an mLSTM's gates,
    /// numbers where its are vectors (their weights are 2 rows instead of 2 H, their biases too).
    #[test]
    fn originals_have_the_sizes_of_their_peer() {
        let peer = |v: usize, h: usize, blocks: usize, cell: usize| {
            v * h + blocks * (2 * cell + 2 * h + h * h + h) + h * v + v
        };
        let slstm = |h: usize| 4 * h * 2 * h + 4 * h;
        let mlstm = |h: usize| 3 * h * 2 * h + 3 * h + 3 * (h * h + h);
        for (name, v, h, blocks) in [("pyx-slstm-128", 1000, 128, 2), ("pyx-slstm-256", 5000, 256, 4)] {
            assert_eq!(count(name), peer(v, h, blocks, slstm(h)) + blocks * h / 2, "{name}");
        }
        for (name, v, h, blocks) in [("pyx-mlstm-128", 1000, 128, 2), ("pyx-mlstm-256", 5000, 256, 4)] {
            assert_eq!(count(name), peer(v, h, blocks, mlstm(h)) + blocks * (11 * h / 2 + 4), "{name}");
        }
    }
}
