//! GPT-2's own files, `vocab.json` and `merges.txt`, as a Hugging Face `tokenizer.json`.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::{Error, Result};

const VOCABULARY: &str = "vocab.json";
const MERGES: &str = "merges.txt";
const END_OF_TEXT: &str = "<|endoftext|>";

/// The two files, where `path` is one of them beside the other, or their folder.
pub(super) fn files(path: &Path) -> Option<(PathBuf, PathBuf)> {
    let folder = if path.is_dir() { path } else { path.parent()? };
    let named = [VOCABULARY, MERGES].iter().any(|name| path.ends_with(name));
    let (vocabulary, merges) = (folder.join(VOCABULARY), folder.join(MERGES));
    ((named || path.is_dir()) && vocabulary.is_file() && merges.is_file()).then_some((vocabulary, merges))
}

/// The content of the `tokenizer.json` that says the same.
pub(super) fn tokenizer_json(vocabulary: &Path, merges: &Path) -> Result<String> {
    let read = |path: &Path| fs::read_to_string(path).map_err(|e| Error::io("read", path, &e));
    let ids: HashMap<String, u32> = serde_json::from_str(&read(vocabulary)?).map_err(|e| {
        Error::data(format!("expected an object from token to id at {}, found: {e}", vocabulary.display()))
    })?;
    let text = read(merges)?;
    let lines =
        text.lines().enumerate().filter(|(number, line)| !(*number == 0 && line.starts_with("#version")));
    let pairs = lines.filter(|(_, line)| !line.is_empty());
    let pairs = pairs.map(|(number, line)| match line.split(' ').collect::<Vec<&str>>().as_slice() {
        pair @ [_, _] => Ok(json!(pair)),
        _ => Err(Error::data(format!(
            "expected two tokens in {}, line {}, found {line:?}",
            merges.display(),
            number + 1
        ))),
    });
    let pairs = pairs.collect::<Result<Vec<Value>>>()?;
    let special = |id: &u32| {
        json!({"id": id, "content": END_OF_TEXT, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let added: Vec<Value> = ids.get(END_OF_TEXT).iter().map(|id| special(id)).collect();
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": ids,
                  "merges": pairs}
    });
    Ok(file.to_string())
}
