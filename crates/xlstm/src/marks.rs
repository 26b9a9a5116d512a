//! What a position in a batch may be, besides a plain token.

/// A mark: this token starts a new document; every state before it is cleared.
pub const RESET: u32 = 1;
/// A mark: not a token; states pass through unchanged and its output means nothing.
/// [`RESET`] beside it is not looked at.
pub const PAD: u32 = 2;
/// A target that is not asked for.
pub const IGNORE: u32 = u32::MAX;
