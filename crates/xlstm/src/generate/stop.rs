//! Stop strings: a text that ends before any of them, as it arises.

/// Watches text that comes in parts for strings at which it ends.
///
/// What could be the beginning of a stop string is held back until it is known not to be one. The
/// stop string itself is not part of the text.
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    strings: Vec<String>,
    held: String,
}

impl StopStrings {
    /// Ends the text at the first of `strings`; empty ones mean nothing.
    pub fn new(strings: impl IntoIterator<Item = String>) -> Self {
        let strings = strings.into_iter().filter(|string| !string.is_empty()).collect();
        StopStrings { strings, held: String::new() }
    }

    /// Takes the next part; returns what leaves now, and whether the text ends there.
    pub fn push(&mut self, part: &str) -> (String, bool) {
        self.held.push_str(part);
        if let Some(end) = self.strings.iter().filter_map(|string| self.held.find(string)).min() {
            self.held.truncate(end);
            return (std::mem::take(&mut self.held), true);
        }
        let pending = self.strings.iter().map(|string| overlap(&self.held, string)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - pending);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, now that no more comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// The length of the longest end of `text` that is a beginning of `string`.
fn overlap(text: &str, string: &str) -> usize {
    let beginnings = string.char_indices().map(|(end, _)| end).filter(|end| *end > 0);
    beginnings.filter(|end| text.ends_with(&string[..*end])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(strings: &[&str], parts: &[&str]) -> (String, bool) {
        let mut stop = StopStrings::new(strings.iter().map(|string| (*string).to_owned()));
        let mut text = String::new();
        for part in parts {
            let (fresh, ended) = stop.push(part);
            text += &fresh;
            if ended {
                return (text, true);
            }
        }
        (text + &stop.finish(), false)
    }

    #[test]
    fn text_ends_before_the_first_stop_string() {
        assert_eq!(run(&["\n\n"], &["a\n", "b\n", "\nc"]), ("a\nb".into(), true));
        assert_eq!(run(&["END", "ND"], &["the E", "N", "D"]), ("the ".into(), true));
        assert_eq!(run(&["é!"], &["caf", "é", "?"]), ("café?".into(), false));
        assert_eq!(run(&["aab"], &["a", "a", "a", "b"]), ("a".into(), true));
        assert_eq!(run(&[], &["a", "b"]), ("ab".into(), false));
        assert_eq!(run(&["", "x"], &["ab"]), ("ab".into(), false));
        assert_eq!(run(&["abc"], &["ab"]), ("ab".into(), false), "what was held back comes in the end");
    }
}
