//! The large family's parameters and the tensors of files: weights that read the same input lie
//! one by one (`single`) or as rows of one matrix (`fused`), and either is read as the other.
//!
//! ```text
//! mlstm_layer.qkv_opreact     q, k, v, ogate_preact
//! mlstm_layer.ifgate_preact   igate_preact, fgate_preact
//! ffn.proj_up_gate_z          proj_up_gate, proj_up
//! ```
//! A name is taken apart at its dots and compared part by part: block 1 is not the beginning of
//! block 10. Which of the two a file has shows in its names, whatever its configuration says.

use super::weights::Recipe;
use crate::nn::ModelConfig;

/// A fused matrix, and what its rows are, in order.
struct Fusion {
    name: &'static str,
    parts: &'static [&'static str],
}

const FUSIONS: [Fusion; 3] = [
    Fusion { name: "qkv_opreact", parts: &["q", "k", "v", "ogate_preact"] },
    Fusion { name: "ifgate_preact", parts: &["igate_preact", "fgate_preact"] },
    Fusion { name: "proj_up_gate_z", parts: &["proj_up_gate", "proj_up"] },
];

/// The rows of each part.
fn rows(config: &ModelConfig, part: &str) -> usize {
    let (large, dim) = (&config.large, config.embedding_dim);
    let [qk, v] = large.head_dims(dim);
    match part {
        "q" | "k" => qk,
        "v" | "ogate_preact" => v,
        "igate_preact" | "fgate_preact" => large.num_heads,
        _ => large.feedforward_dim(dim),
    }
}

/// How the parameter `name` is made of the tensors of a file, which has `has` of a tensor.
pub(crate) fn recipe(config: &ModelConfig, has: impl Fn(&str) -> bool, name: &str) -> Recipe {
    let mut parts = name.rsplitn(3, '.');
    let (Some(kind), Some(layer), Some(scope), false) = (parts.next(), parts.next(), parts.next(), has(name))
    else {
        return Recipe::tensor(name);
    };
    let full = |layer: &str| format!("{scope}.{layer}.{kind}");
    for fusion in &FUSIONS {
        if layer == fusion.name && has(&full(fusion.parts[0])) {
            return Recipe::stacked(fusion.parts.iter().map(|part| full(part)));
        }
        let Some(index) = fusion.parts.iter().position(|part| *part == layer) else { continue };
        if has(&full(fusion.name)) {
            let first = fusion.parts[..index].iter().map(|part| rows(config, part)).sum();
            return Recipe::rows(full(fusion.name), first..first + rows(config, layer));
        }
    }
    Recipe::tensor(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Family;

    #[test]
    fn twelve_blocks_keep_their_numbers() {
        let mut config = ModelConfig { family: Family::Large, num_blocks: 12, ..ModelConfig::default() };
        config.large.num_heads = 4;
        let block = |i: usize, name: &str| format!("backbone.blocks.{i}.{name}");
        for i in [1, 10, 11] {
            let single = |name: &str| {
                name.contains(".q.") || name.contains("proj_up_gate.") || name.contains("igate_preact.")
            };
            let got = recipe(&config, single, &block(i, "mlstm_layer.qkv_opreact.weight"));
            let names: Vec<String> = got.pieces.into_iter().map(|piece| piece.tensor).collect();
            let want = ["q", "k", "v", "ogate_preact"].map(|p| block(i, &format!("mlstm_layer.{p}.weight")));
            assert_eq!(names, want);

            let fused =
                |name: &str| name.contains("qkv_opreact") || name.contains("_z.") || name.contains("ifgate");
            let got = recipe(&config, fused, &block(i, "mlstm_layer.v.weight"));
            assert_eq!(got.pieces[0].tensor, block(i, "mlstm_layer.qkv_opreact.weight"));
            assert_eq!(got.pieces[0].rows, Some(128..256));
            let got = recipe(&config, fused, &block(i, "mlstm_layer.fgate_preact.bias"));
            assert_eq!(got.pieces[0].rows, Some(4..8));
            let got = recipe(&config, fused, &block(i, "ffn.proj_up.weight"));
            assert_eq!(got.pieces[0].tensor, block(i, "ffn.proj_up_gate_z.weight"));
        }
        for name in ["embedding.weight", "backbone.out_norm.weight", "backbone.blocks.0.ffn.proj_down.weight"]
        {
            assert_eq!(recipe(&config, |_| false, name).pieces[0].tensor, name);
        }
    }
}
