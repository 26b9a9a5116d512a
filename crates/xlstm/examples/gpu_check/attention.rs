//! Attention and what goes with it.

use xlstm::ops::attention::attention;
use xlstm::ops::learned_positions::learned_positions;
use xlstm::ops::positions::positions;
use xlstm::ops::rotary::{angles, rotary};
use xlstm::ops::window::window;

use super::case::{Case, marks};
use super::table::Table;

/// Attention and what goes with it: places, caches, rotary and learned positions.
pub fn check(table: &mut Table<'_>) {
    const T: f64 = 2e-5;
    for (length, size, heads, width, marked) in [
        (1, 70, 2, 16, false),
        (1, 30, 2, 64, true),
        (3, 33, 3, 20, false),
        (5, 70, 2, 128, true),
        (15, 300, 1, 96, true),
        (70, 33, 3, 20, true),
        (200, 64, 4, 32, true),
        (130, 300, 2, 128, false),
        (70, 33, 3, 24, true),
        (300, 64, 2, 64, true),
        (140, 500, 2, 64, false),
        (257, 40, 2, 80, true),
        (16, 16, 1, 120, true),
        (193, 140, 1, 96, true),
    ] {
        let [tokens, cache] = [length, size].map(|rows| [2, rows, heads * width]);
        let case = Case::default().input(&tokens).input(&tokens).input(&tokens);
        let case = case.input(&cache).input(&cache).between(&[2], 40.0, 40.2).ids(marks(2 * length));
        let name = format!("attention {length} {size} {heads}x{width}{}", if marked { " marks" } else { "" });
        table.compare(&name, &case, T, &|t, v, i| {
            let marks = if marked { Some(i[0]) } else { None };
            let places = positions(t, [2, length], size, Some(v[5]), marks)?;
            let y = attention(t, heads, [v[0], v[1], v[2]], Some([v[3], v[4]]), places)?;
            let (k, v) = (window(t, size, v[1], Some(v[3]), places)?, window(t, size, v[2], None, places)?);
            Ok(vec![y, k, v, places.position, places.first, places.after])
        });
    }
    // One new token, behind caches that are empty, begun, full and long.
    for (size, filled, heads, width, marked) in [
        (300, 0.0, 3, 64, false),
        (300, 1.0, 2, 32, false),
        (300, 128.0, 2, 20, false),
        (600, 513.0, 2, 128, false),
        (600, 700.0, 5, 96, true),
        (16_384, 16_000.0, 2, 64, false),
    ] {
        let [tokens, cache] = [1, size].map(|rows| [3, rows, heads * width]);
        let case = Case::default().input(&tokens).input(&tokens).input(&tokens);
        let case = case.input(&cache).input(&cache).between(&[3], filled, filled + 0.2).ids(marks(3));
        // Of a token that sees itself alone the query has no gradient, but for rounding.
        let case = Case { evaluated: filled == 0.0, ..case };
        let name = format!("attention behind {filled} of {size}, {heads}x{width}");
        table.compare(&name, &case, T, &|t, v, i| {
            let places = positions(t, [3, 1], size, Some(v[5]), marked.then_some(i[0]))?;
            let y = attention(t, heads, [v[0], v[1], v[2]], Some([v[3], v[4]]), places)?;
            Ok(vec![y, window(t, size, v[1], Some(v[3]), places)?, window(t, size, v[2], None, places)?])
        });
    }
    // Generation: new tokens after a long cache that is filled so far, and updated in place.
    for (batch, length, heads, width, fill) in [
        (1, 1, 2, 64, 0.0),
        (1, 1, 2, 64, 1.0),
        (1, 1, 2, 64, 513.0),
        (1, 1, 8, 64, 16_000.0),
        (3, 1, 2, 64, 0.0),
        (3, 1, 2, 32, 1.0),
        (3, 1, 1, 128, 513.0),
        (3, 1, 2, 64, 16_000.0),
        (3, 1, 2, 20, 16_384.0),
        (1, 1, 2, 64, 50_000.0),
        (1, 4, 2, 64, 9_000.0),
    ] {
        const SIZE: usize = 16_384;
        let [tokens, cache] = [length, SIZE].map(|rows| [batch, rows, heads * width]);
        let case = Case::default().input(&tokens).input(&tokens).input(&tokens);
        let case = Case { evaluated: true, ..case.input(&cache).input(&cache).between(&[batch], fill, fill) };
        let name = format!("attention {batch}x{length} after {fill} {heads}x{width}");
        table.compare(&name, &case, T, &|t, v, _| {
            let places = positions(t, [batch, length], SIZE, Some(v[5]), None)?;
            let y = attention(t, heads, [v[0], v[1], v[2]], Some([v[3], v[4]]), places)?;
            let caches =
                [window(t, SIZE, v[1], Some(v[3]), places)?, window(t, SIZE, v[2], Some(v[4]), places)?];
            // A second replay writes the same rows, which its tokens do not see in the cache.
            t.keep_as(caches[0], v[3]);
            t.keep_as(caches[1], v[4]);
            Ok(vec![y, caches[0], caches[1]])
        });
    }
    // Without a cache: whole sequences, windows of them, documents and pads.
    for (length, size, heads, width, marked) in [
        (17, 8, 2, 64, false),
        (64, 64, 3, 64, false),
        (333, 333, 2, 64, false),
        (333, 333, 2, 64, true),
        (400, 70, 2, 64, false),
        (400, 150, 2, 32, true),
        (129, 129, 2, 16, false),
        (260, 260, 1, 96, true),
        (260, 90, 1, 128, true),
    ] {
        let tokens = [2, length, heads * width];
        let case = Case::default().input(&tokens).input(&tokens).input(&tokens).ids(marks(2 * length));
        let name =
            format!("attention {length} {size} {heads}x{width} alone{}", if marked { " marks" } else { "" });
        table.compare(&name, &case, T, &|t, v, i| {
            let places = positions(t, [2, length], size, None, marked.then_some(i[0]))?;
            // The gradients of one are added to those of the other.
            let others = attention(t, heads, [v[1], v[0], v[2]], None, places)?;
            Ok(vec![attention(t, heads, [v[0], v[1], v[2]], None, places)?, others])
        });
    }
    let tokens = [2, 70, 48];
    let case = Case::default().input(&tokens).input(&tokens).input(&tokens);
    table.compare("attention plain", &case, T, &|t, v, _| {
        let places = positions(t, [2, 70], 70, None, None)?;
        Ok(vec![attention(t, 3, [v[0], v[1], v[2]], None, places)?])
    });
    let case = Case::default().input(&tokens).input(&[100, 48]).between(&[2], 900.0, 901.0);
    table.compare("rotary", &case, T, &|t, v, _| {
        let places = positions(t, [2, 70], 70, Some(v[2]), None)?;
        let table = angles(t, places.position, 12, 10_000.0)?;
        Ok(vec![rotary(t, v[0], table)?])
    });
    table.compare("learned_positions", &case, T, &|t, v, _| {
        let places = positions(t, [2, 70], 70, None, None)?;
        Ok(vec![learned_positions(t, v[0], v[1], places.position)?])
    });
}
