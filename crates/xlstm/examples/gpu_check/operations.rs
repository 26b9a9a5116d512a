//! The operations but attention and its own.

use xlstm::engine::{Tape, Var};
use xlstm::marks::IGNORE;
use xlstm::ops::activation::{Activation, activated, gated};
use xlstm::ops::add::add;
use xlstm::ops::causal_conv::causal_conv;
use xlstm::ops::draw::draw;
use xlstm::ops::dropout::dropout;
use xlstm::ops::embedding::embedding;
use xlstm::ops::from_bits::from_bits;
use xlstm::ops::gates::gates;
use xlstm::ops::head_loss::{Head, head_loss};
use xlstm::ops::headwise::{headwise, headwise_full, headwises};
use xlstm::ops::last_token::last_token;
use xlstm::ops::linear::linear;
use xlstm::ops::mean_tokens::mean_tokens;
use xlstm::ops::norm::{Norm, NormKind, add_norm, gated_norm, norm};
use xlstm::ops::qkv::{Fed, qkv};
use xlstm::ops::reverse::reverse;
use xlstm::ops::skip_norm::skip_norm;
use xlstm::ops::soft_cap::soft_cap;
use xlstm::ops::squared_error::squared_error;

use super::case::{Case, marks, noise};
use super::table::Table;

/// All of them; see [`Table::compare`].
pub fn check(table: &mut Table<'_>) {
    const T: f64 = 2e-5;
    let new = Case::default;
    table.compare("add", &new().input(&[3, 37, 50]).input(&[3, 37, 50]), T, &|t, v, _| {
        Ok(vec![add(t, v[0], v[1])?])
    });
    for (rows, inner, outer) in [(130, 96, 64), (7, 5, 3), (512, 256, 384), (1, 33, 65)] {
        let case = new().input(&[2, rows, inner]).input(&[outer]).weight(&[outer, inner]);
        let name = format!("linear {rows}x{inner}x{outer}");
        table.compare(&name, &case, T, &|t, v, _| Ok(vec![linear(t, v[0], v[2], Some(v[1]))?]));
    }
    let case = new().input(&[2, 31, 48]).weight(&[20, 48]);
    table.compare("linear without bias", &case, T, &|t, v, _| Ok(vec![linear(t, v[0], v[1], None)?]));
    for (heads, outer, inner) in [(24, 4, 4), (5, 4, 4), (4, 32, 32), (3, 7, 5), (2, 17, 18)] {
        let width = heads * outer;
        let case = new().input(&[2, 70, heads * inner]).input(&[width]).weight(&[heads, outer, inner]);
        let name = format!("headwise {heads}x{outer}x{inner}");
        if outer == inner {
            // The gradients of one are added to those of the other.
            table.compare(&format!("{name} twice"), &case, T, &|t, v, _| {
                let other = headwise(t, v[0], v[2], None)?;
                Ok(vec![headwise(t, v[0], v[2], Some(v[1]))?, other])
            });
        }
        table.compare(&name, &case, T, &|t, v, _| Ok(vec![headwise(t, v[0], v[2], Some(v[1]))?]));
        table.compare(&format!("{name} full"), &case, T, &|t, v, _| {
            Ok(vec![headwise_full(t, v[0], v[2], Some(v[1]))?])
        });
    }
    for (heads, outer, inner) in [(24, 4, 4), (2, 17, 16), (3, 7, 5)] {
        let shape = [heads, outer, inner];
        let case = new().input(&[2, 70, heads * inner]).input(&[heads * outer]);
        let case = [(); 3].iter().fold(case, |case, ()| case.weight(&shape));
        table.compare(&format!("headwises of three {heads}x{outer}x{inner}"), &case, T, &|t, v, _| {
            let maps = [(v[2], None), (v[3], Some(v[1])), (v[4], None)];
            Ok(headwises(t, v[0], maps)?.to_vec())
        });
    }
    for (width, outer) in [(96, 4), (88, 12), (600, 8), (6, 1)] {
        let shape = [outer, width];
        let case = new().input(&[2, 70, width]).input(&[outer]).input(&[outer]).weight(&shape).weight(&shape);
        for cap in [None, Some(5.0)] {
            let capped = if cap.is_some() { " capped" } else { "" };
            table.compare(&format!("gates {width} {outer}{capped}"), &case, T, &|t, v, _| {
                let maps = [0, 1].map(|gate| (v[3 + gate], Some(v[1 + gate])));
                Ok(gates(t, v[0], maps, cap)?.to_vec())
            });
        }
    }
    // Blocks, their size, heads and rows; the last ones leave the kernels for blocks of 4 x 4.
    for (blocks, size, heads, rows) in [
        (256, 4, 4, 130),
        (384, 4, 4, 67),
        (256, 4, 8, 1500),
        (384, 4, 7, 33),
        (21, 4, 3, 65),
        (320, 4, 10, 300),
        (22, 4, 5, 1),
        (6, 4, 9, 70),
        (10, 4, 16, 5),
        (6, 4, 20, 70),
        (5, 32, 4, 70),
        (7, 5, 2, 9),
    ] {
        let width = blocks * size;
        let x = [2, rows, width];
        let mut case = new().input(&x).input(&x).input(&[width]).input(&[width]).input(&[width]);
        case = case.input(&[heads]).input(&[heads]);
        case = [(); 3].iter().fold(case, |case, ()| case.weight(&[blocks, size, size]));
        case = [(); 2].iter().fold(case, |case, ()| case.weight(&[heads, 3 * width]));
        let record = |t: &mut Tape, v: &[Var], biased: bool| {
            let map = |i: usize| (v[7 + i], biased.then_some(v[2 + i]));
            let Fed { q, k, v, gates: [i, f] } = qkv(t, [v[0], v[1]], [0, 1, 2].map(map), [3, 4].map(map))?;
            Ok(vec![q, k, v, i, f])
        };
        let name = format!("qkv {rows} of {blocks}x{size}, {heads} heads");
        table.compare(&name, &case, T, &|t, v, _| record(t, v, true));
        table.compare(&format!("{name}, no biases"), &case, T, &|t, v, _| record(t, v, false));
        // The gradients of one are added to those of the other, of which some are not there.
        table.compare(&format!("{name}, twice"), &case, T, &|t, v, _| {
            let mut first = record(t, v, true)?;
            let second = record(t, v, false)?;
            first.extend([second[1], second[4]]);
            Ok(first)
        });
        let mut evaluated = case.clone();
        evaluated.evaluated = true;
        table.compare(&format!("{name}, evaluated"), &evaluated, T, &|t, v, _| record(t, v, true));
    }

    for (kind, groups, width) in [
        (NormKind::Layer, 1, 96),
        (NormKind::Layer, 4, 256),
        (NormKind::RootMeanSquare, 1, 640),
        (NormKind::Layer, 6, 768),
        (NormKind::Layer, 2, 1024),
        (NormKind::RootMeanSquare, 3, 33),
        (NormKind::RootMeanSquare, 1, 1536),
    ] {
        let options = Norm { kind, groups, eps: 1e-5, unit_offset: groups != 3 };
        let case = new().between(&[3, 67, width], -1.0, 3.0).input(&[width]).input(&[width]);
        table.compare(&format!("norm {kind:?} {groups} of {width}"), &case, T, &|t, v, _| {
            Ok(vec![norm(t, v[0], v[1], None, options)?, norm(t, v[0], v[1], Some(v[2]), options)?])
        });
        let shape = [3, 67, width];
        let case = new().between(&shape, -1.0, 3.0).input(&shape).input(&[width]).input(&[width]);
        table.compare(&format!("add_norm {kind:?} {groups} of {width}"), &case, T, &|t, v, _| {
            let (s, y) = add_norm(t, [v[0], v[1]], v[2], Some(v[3]), options)?;
            let (sum, z) = add_norm(t, [s, v[1]], v[2], None, options)?;
            Ok(vec![y, sum, z])
        });
        table.compare(&format!("gated_norm {kind:?} {groups} of {width}"), &case, T, &|t, v, _| {
            let y = gated_norm(t, v[0], v[1], v[2], Some(v[3]), options)?;
            Ok(vec![y, gated_norm(t, v[0], v[1], v[2], None, options)?])
        });
    }
    for (rows, vocabulary) in [(5, 50_304), (3, 8_193), (2, 7)] {
        let mut case = new().between(&[rows, 1, vocabulary], -8.0, 8.0).between(&[rows, 3], 0.0, 1.0);
        let settings = case.inputs[1].1.chunks_exact_mut(3).enumerate();
        for (i, settings) in settings {
            settings[0] = f64::from((i as f32 + 0.5) / 8.0);
            settings[1] = [1.0, 0.0, 0.5][i % 3];
            settings[2] = if i == 1 { 5.0 } else { vocabulary as f64 };
        }
        case.evaluated = true;
        table.compare(&format!("draw {rows} of {vocabulary}"), &case, 1e-3, &|t, v, _| {
            Ok(vec![draw(t, v[0], v[1])?])
        });
    }
    for cap in [15.0, 0.5] {
        let case = new().between(&[999], -40.0, 40.0);
        table.compare(&format!("soft_cap {cap}"), &case, T, &|t, v, _| Ok(vec![soft_cap(t, v[0], cap)?]));
    }
    // Rows enough for a block to take several, heads that fill their lanes, that do not, and that have none.
    for (rows, groups, width) in [
        (67, 8, 512),
        (67, 8, 1024),
        (601, 4, 1024),
        (301, 4, 1536),
        (50, 2, 1024),
        (67, 3, 300),
        (9, 5, 60),
        (67, 3, 99),
        (50, 1, 1536),
        (3, 2, 2100),
    ] {
        let shape = [2, rows, width];
        let case =
            new().between(&shape, -1.0, 3.0).input(&[width]).input(&[width]).input(&shape).input(&shape);
        for kind in [NormKind::Layer, NormKind::RootMeanSquare] {
            let options = Norm { kind, groups, eps: 1e-5, unit_offset: kind == NormKind::Layer };
            let name = format!("skip_norm {kind:?} {rows} of {groups} in {width}");
            table.compare(&name, &case, T, &|t, v, _| {
                Ok(vec![skip_norm(t, v[0], v[1], v[2], [v[3], v[4]], options)?])
            });
            // The gradients of one are added to those of the other.
            table.compare(&format!("{name} twice"), &case, T, &|t, v, _| {
                let other = skip_norm(t, v[3], v[2], v[1], [v[4], v[0]], options)?;
                Ok(vec![skip_norm(t, v[0], v[1], v[2], [v[3], v[4]], options)?, other])
            });
        }
    }
    use Activation::{Gelu, Relu, ReluSquared, Selu, Sigmoid, Swish};
    let case = new().between(&[3, 17, 60], -3.0, 3.0);
    for activation in [Gelu, Relu, ReluSquared, Selu, Sigmoid, Swish] {
        let name = format!("activated {activation:?}");
        table.compare(&name, &case, T, &|t, v, _| Ok(vec![activated(t, v[0], activation)?]));
    }
    for act in [Gelu, Relu, ReluSquared, Sigmoid, Swish, Selu] {
        let case = new().between(&[999], -5.0, 5.0).input(&[999]);
        table.compare(&format!("gated {act:?}"), &case, T, &|t, v, _| Ok(vec![gated(t, v[0], v[1], act)?]));
    }
    let case = new().input(&[3000]).ids(vec![5, 6, 7, 8]);
    table.compare("dropout", &case, T, &|t, v, i| Ok(vec![dropout(t, v[0], 0.3, i[0], 9)?]));
    for width in [300, 1200, 7] {
        let case = new().weight(&[41, width]).ids((0..700).map(|i| i * i % 40).collect());
        table.compare(&format!("embedding {width}"), &case, T, &|t, v, i| {
            Ok(vec![embedding(t, i[0], v[0], [7, 100])?])
        });
    }
    let case = new().input(&[3, 4, 50]);
    table.compare("last_token", &case, T, &|t, v, _| Ok(vec![last_token(t, v[0], None)?]));
    let case = new().input(&[9, 13, 50]).ids(marks(9 * 13));
    table.compare("last_token marked", &case, T, &|t, v, i| Ok(vec![last_token(t, v[0], Some(i[0]))?]));
    let case = new().input(&[3, 40, 200]);
    table.compare("mean_tokens", &case, T, &|t, v, _| Ok(vec![mean_tokens(t, v[0], None, None)?.mean]));
    let case = new().input(&[9, 13, 200]).input(&[9, 200]).between(&[9, 1], 1.0, 5.0).ids(marks(9 * 13));
    table.compare("mean_tokens marked", &case, T, &|t, v, i| {
        let mean = mean_tokens(t, v[0], Some([v[1], v[2]]), Some(i[0]))?;
        Ok(vec![mean.mean, mean.state[0], mean.state[1]])
    });
    let bits = |n: usize| noise(9, n).iter().map(|x| (*x as f32).to_bits()).collect::<Vec<u32>>();
    let case = new().input(&[3, 70, 50]).ids(bits(3 * 70 * 50));
    table.compare("from_bits", &case, T, &|t, v, i| {
        let x = from_bits(t, i[0], [3, 70, 50])?;
        Ok(vec![add(t, v[0], x)?])
    });
    for width in [1, 7, 96] {
        let mut targets = bits(39 * width);
        targets.iter_mut().step_by(5).for_each(|target| *target = IGNORE);
        let case = new().input(&[3, 13, width]).input(&[1]).ids(targets);
        table.compare(&format!("squared_error {width}"), &case, T, &|t, v, i| {
            let (loss, errors) = squared_error(t, v[0], i[0], v[1])?;
            Ok(vec![loss, errors])
        });
    }
    for length in [5, 70, 300] {
        let case = new().input(&[2, length, 50]);
        table.compare(&format!("reverse {length}"), &case, T, &|t, v, _| Ok(vec![reverse(t, v[0], None)?]));
        let case = case.ids(marks(2 * length));
        table.compare(&format!("reverse {length} marks"), &case, T, &|t, v, i| {
            Ok(vec![reverse(t, v[0], Some(i[0]))?])
        });
    }
    // The last has more rows than a slice.
    for (rows, vocabulary, cap) in [
        (39, 70, None),
        (39, 5000, Some(5.0)),
        (39, 5000, None),
        (39, 5003, None),
        (20, 50_304, Some(30.0)),
        (1100, 270_000, None),
    ] {
        let targets = (0..rows as u32).map(|i| if i % 5 == 2 { IGNORE } else { i * 7 % 70 }).collect();
        let case = new().between(&[rows, 8], -2.0, 2.0).input(&[vocabulary]).input(&[1]);
        let case = case.weight(&[vocabulary, 8]).ids(targets);
        table.compare(&format!("head_loss {rows}x{vocabulary}"), &case, T, &|t, v, i| {
            let head = Head { weight: v[3], bias: Some(v[1]), cap };
            Ok(vec![head_loss(t, v[0], head, i[0], v[2])?.0])
        });
    }
    for (length, taps, width, silu) in [
        (70, 4, 40, true),
        (3, 4, 40, false),
        (200, 4, 520, true),
        (70, 4, 37, true),
        (33, 1, 40, true),
        (70, 3, 40, true),
    ] {
        let case = new().input(&[2, length, width]).input(&[width, 1, taps]).input(&[width]);
        let case = case.input(&[2, taps - 1, width]).ids(marks(2 * length));
        table.compare(&format!("causal_conv {length} {taps} {width} marks"), &case, T, &|t, v, i| {
            let (y, window) = causal_conv(t, v[0], v[1], Some(v[2]), Some(v[3]), Some(i[0]), silu)?;
            Ok(if taps > 1 { vec![y, window] } else { vec![y] })
        });
    }
    let case = new().input(&[2, 150, 40]).input(&[40, 1, 4]);
    table.compare("causal_conv plain", &case, T, &|t, v, _| {
        Ok(vec![causal_conv(t, v[0], v[1], None, None, None, true)?.0])
    });
    table.compare("causal_conv twice, its window alone", &case, T, &|t, v, _| {
        let (y, _) = causal_conv(t, v[0], v[1], None, None, None, true)?;
        let (_, window) = causal_conv(t, v[0], v[1], None, None, None, false)?;
        Ok(vec![y, window])
    });
}
