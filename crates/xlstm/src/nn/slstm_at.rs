//! Which blocks are sLSTM blocks: a list of positions, a word, or a ratio.
//!
//! The paper writes `xLSTM[a:b]` for a ratio of `a` mLSTM to `b` sLSTM blocks. As in the
//! official configurations, the sLSTM blocks of each group of `a + b` start at its second
//! place: block `i` is an sLSTM block when `1 <= i mod (a + b) <= b`.

use std::fmt;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The places of the sLSTM blocks in a stack. In YAML: `[1, 5]`, `all`, `none` or `7:1`
/// (also `[7:1]`, as the paper writes it).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum SlstmAt {
    /// Every block is an mLSTM block.
    #[default]
    None,
    /// Every block is an sLSTM block.
    All,
    /// Exactly these blocks, counted from 0, are sLSTM blocks.
    Positions(Vec<usize>),
    /// mLSTM to sLSTM blocks in every group of `mlstm + slstm`.
    Ratio {
        /// mLSTM blocks in a group.
        mlstm: usize,
        /// sLSTM blocks in a group.
        slstm: usize,
    },
}

impl SlstmAt {
    /// Whether block `block`, counted from 0, is an sLSTM block.
    pub fn contains(&self, block: usize) -> bool {
        match self {
            SlstmAt::None => false,
            SlstmAt::All => true,
            SlstmAt::Positions(positions) => positions.contains(&block),
            SlstmAt::Ratio { mlstm: 0, .. } => true,
            SlstmAt::Ratio { mlstm, slstm } => (1..=*slstm).contains(&(block % (mlstm + slstm))),
        }
    }

    /// The choice that `word` names, or what is wrong with it.
    fn parse(word: &str) -> Result<Self, String> {
        match word {
            "none" => return Ok(SlstmAt::None),
            "all" => return Ok(SlstmAt::All),
            _ => {}
        }
        let inner = word.strip_prefix('[').and_then(|w| w.strip_suffix(']')).unwrap_or(word);
        let ratio = inner
            .split_once(':')
            .and_then(|(a, b)| Some((a.trim().parse::<u32>().ok()?, b.trim().parse::<u32>().ok()?)));
        match ratio {
            Some((0, 0)) => Err("the ratio 0:0 holds no block".into()),
            Some((mlstm, slstm)) => Ok(SlstmAt::Ratio { mlstm: mlstm as usize, slstm: slstm as usize }),
            None => Err(format!("`{word}` is not {EXPECTED}")),
        }
    }
}

const EXPECTED: &str = "a list of block positions, `all`, `none` or a ratio mLSTM:sLSTM such as `7:1`";

impl Serialize for SlstmAt {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            SlstmAt::None => serializer.serialize_str("none"),
            SlstmAt::All => serializer.serialize_str("all"),
            SlstmAt::Positions(positions) => positions.serialize(serializer),
            SlstmAt::Ratio { mlstm, slstm } => serializer.serialize_str(&format!("{mlstm}:{slstm}")),
        }
    }
}

impl<'de> Deserialize<'de> for SlstmAt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SlstmAtVisitor)
    }
}

struct SlstmAtVisitor;

impl<'de> Visitor<'de> for SlstmAtVisitor {
    type Value = SlstmAt;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(EXPECTED)
    }

    fn visit_str<E: de::Error>(self, word: &str) -> Result<SlstmAt, E> {
        SlstmAt::parse(word).map_err(E::custom)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<SlstmAt, A::Error> {
        // YAML reads the paper's `[7:1]` as a list that holds the word `7:1`.
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a block position or a ratio such as `7:1`")]
        enum Item {
            Position(usize),
            Word(String),
        }
        let mut positions = Vec::new();
        let mut ratio = None;
        while let Some(item) = items.next_element()? {
            match item {
                Item::Position(position) => positions.push(position),
                Item::Word(word) if ratio.is_none() && word.contains(':') => {
                    ratio = Some(SlstmAt::parse(&word).map_err(de::Error::custom)?);
                }
                Item::Word(word) => {
                    return Err(de::Error::custom(format!("`{word}` is not a block position")));
                }
            }
        }
        match ratio {
            Some(ratio) if positions.is_empty() => Ok(ratio),
            Some(_) => Err(de::Error::custom("a ratio and positions in one list")),
            None => Ok(SlstmAt::Positions(positions)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(yaml: &str, blocks: usize) -> Vec<usize> {
        let at: SlstmAt = serde_saphyr::from_str(yaml).unwrap_or_else(|e| panic!("{yaml}: {e}"));
        let again: SlstmAt = serde_saphyr::from_str(&serde_saphyr::to_string(&at).unwrap()).unwrap();
        assert_eq!(at, again, "{yaml}");
        (0..blocks).filter(|&b| at.contains(b)).collect()
    }

    #[test]
    fn every_spelling_places_the_blocks() {
        assert_eq!(places("[1, 3]", 4), [1, 3]);
        assert_eq!(places("[]", 4), [0usize; 0]);
        assert_eq!(places("none", 4), [0usize; 0]);
        assert_eq!(places("all", 3), [0, 1, 2]);
        assert_eq!(places("7:1", 24), [1, 9, 17]);
        assert_eq!(places("[7:1]", 24), [1, 9, 17]);
        assert_eq!(places("\"[7:1]\"", 24), [1, 9, 17]);
        assert_eq!(places("1:1", 4), [1, 3]);
        assert_eq!(places("2:2", 8), [1, 2, 5, 6]);
        assert_eq!(places("1:0", 4), [0usize; 0]);
        assert_eq!(places("0:1", 3), [0, 1, 2]);
    }

    #[test]
    fn nonsense_is_refused() {
        for yaml in ["0:0", "some", "[1, x]", "[7:1, 3]", "[-1]", "{a: 1}", "1.5"] {
            assert!(serde_saphyr::from_str::<SlstmAt>(yaml).is_err(), "{yaml}");
        }
    }
}
