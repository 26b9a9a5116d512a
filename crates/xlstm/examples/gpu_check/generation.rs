//! What is left to the products of few rows in generation.

use xlstm::ops::activation::{Activation, gated};
use xlstm::ops::gates::gates;
use xlstm::ops::linear::{linear, linears};
use xlstm::ops::norm::{Norm, NormKind, add_norm, gated_norm};

use super::case::Case;
use super::table::Table;

/// What the steps of generation have: few rows, and norms and gates whose work is left to the products
/// after them.
pub fn check(table: &mut Table<'_>) {
    for (rows, width, groups, kind) in [
        (1, 1024, 1, NormKind::RootMeanSquare),
        (1, 96, 4, NormKind::Layer),
        (3, 128, 2, NormKind::Layer),
        (8, 2752, 1, NormKind::RootMeanSquare),
        (9, 256, 4, NormKind::Layer),
        (17, 768, 1, NormKind::RootMeanSquare),
        (32, 512, 4, NormKind::Layer),
        (33, 64, 1, NormKind::Layer),
        (2, 72, 1, NormKind::Layer),
    ] {
        let mut case = Case::default().input(&[rows, 1, width]).input(&[rows, 1, width]);
        case = case.input(&[width]).input(&[width]).input(&[40]).input(&[4]);
        case = case.weight(&[4, width]).weight(&[4, width]).weight(&[40, width]);
        case = case.weight(&[width, width]).weight(&[width, width]);
        case.evaluated = true;
        let options = Norm { kind, groups, eps: 1e-5, unit_offset: groups == 1 };
        let name = format!("generation {rows} of {width}, {kind:?} {groups}");
        table.compare(&name, &case, 1e-4, &|t, v, _| {
            let (sum, u) = add_norm(t, [v[0], v[1]], v[2], Some(v[3]), options)?;
            let [i, f] = gates(t, u, [(v[6], Some(v[5])), (v[7], None)], Some(15.0))?;
            let [few, gate, up] = linears(t, u, [(v[8], Some(v[4])), (v[9], None), (v[10], None)])?;
            let product = gated(t, gate, up, Activation::Swish)?;
            let y = linear(t, product, v[10], None)?;
            let h = gated_norm(t, sum, gate, v[2], None, options)?;
            Ok(vec![sum, i, f, few, gate, y, linear(t, h, v[9], None)?])
        });
    }
}
