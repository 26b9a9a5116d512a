//! The cells, forward and backward.

use xlstm::cell::mlstm::{Form, MlstmConfig, MlstmState, mlstm};
use xlstm::cell::slstm::{CellFunction, SlstmConfig, SlstmState, slstm};
use xlstm::cell::{ForgetGate, InputGate};
use xlstm::engine::Precision;

use super::case::{Case, Record, marks};
use super::table::Table;

/// Both cells in many shapes; see [`Table::compare`].
pub fn check(table: &mut Table<'_>) {
    use ForgetGate::{Exponential as ExponentialForget, Sigmoid as SigmoidForget};
    use InputGate::{Exponential, Sigmoid};
    for (batch, length, dqk, dhv, marked, input_gate, forget_gate, normalize) in [
        (2, 1, 16, 16, false, Exponential, SigmoidForget, true),
        (2, 70, 16, 24, true, Exponential, SigmoidForget, true),
        (2, 200, 64, 64, false, Exponential, SigmoidForget, true),
        (2, 130, 80, 96, true, Exponential, SigmoidForget, true),
        (2, 300, 128, 256, true, Exponential, SigmoidForget, true),
        (2, 130, 36, 20, true, Exponential, SigmoidForget, true),
        (2, 1, 16, 16, false, Sigmoid, SigmoidForget, true),
        (2, 130, 32, 32, true, Sigmoid, SigmoidForget, true),
        (2, 130, 32, 32, true, Exponential, ExponentialForget, true),
        (2, 130, 32, 32, true, Sigmoid, SigmoidForget, false),
        (2, 130, 32, 32, true, Sigmoid, ExponentialForget, false),
        // Heads for every multiprocessor of a large card. Among more tokens with a normaliser there are
        // some with |q . n| so near to exp(-m) that the GPU is on the other side of the kink.
        (70, 140, 64, 128, true, Exponential, SigmoidForget, true),
        (70, 270, 128, 128, true, Sigmoid, SigmoidForget, false),
        (70, 130, 88, 72, false, Exponential, SigmoidForget, true),
        (70, 60, 40, 96, true, Sigmoid, ExponentialForget, false),
        // And slices of wider heads.
        (12, 200, 256, 320, true, Exponential, SigmoidForget, true),
        (16, 130, 136, 136, true, Sigmoid, ExponentialForget, false),
        (12, 150, 384, 192, true, Exponential, SigmoidForget, true),
        (16, 70, 264, 72, false, Sigmoid, SigmoidForget, true),
    ] {
        let heads = 3;
        // An exponential gate that lets the state grow would make all else small.
        let forget = if forget_gate == ExponentialForget { (-2.0, 0.2) } else { (0.0, 5.0) };
        let mut case = Case::default()
            .input(&[batch, length, heads * dqk])
            .input(&[batch, length, heads * dqk])
            .input(&[batch, length, heads * dhv])
            .between(&[batch, length, heads], -2.0, 2.0)
            .between(&[batch, length, heads], forget.0, forget.1)
            .input(&[batch, heads, dqk, dhv])
            .input(&[batch, heads, dqk])
            .input(&[batch, heads]);
        if marked {
            case = case.ids(marks(batch * length));
        }
        let form = Form::Chunkwise(64);
        let config = MlstmConfig { heads, input_gate, forget_gate, normalize, eps: 1e-6, form };
        let mut name = format!("mlstm {batch}x{length} {dqk} {dhv}{}", if marked { " marks" } else { "" });
        for (differs, option) in [
            (input_gate == Sigmoid, " sigmoid i"),
            (forget_gate == ExponentialForget, " exp f"),
            (!normalize, " no norm"),
        ] {
            name += if differs { option } else { "" };
        }
        table.compare(&name, &case, 2e-4, &|t, v, i| {
            let state = Some(MlstmState { c: v[5], n: v[6], m: v[7] });
            let (h, s) = mlstm(t, &config, v[0], v[1], v[2], (v[3], v[4]), state, i.first().copied())?;
            Ok(vec![h, s.c, s.n, s.m])
        });
    }
    let usual = SlstmConfig {
        heads: 2,
        function: CellFunction::Slstm,
        input_gate: Exponential,
        forget_gate: SigmoidForget,
        gradient_cut: false,
        gradient_clip: None,
    };
    let lstm = SlstmConfig { function: CellFunction::Lstm, ..usual.clone() };
    let siging = SlstmConfig { input_gate: Sigmoid, ..usual.clone() };
    let expf = SlstmConfig { forget_gate: ExponentialForget, ..usual.clone() };
    let cut = SlstmConfig { gradient_cut: true, ..usual.clone() };
    let clip = SlstmConfig { gradient_clip: Some(0.1), ..usual.clone() };
    let lstm_clip = SlstmConfig { gradient_clip: Some(0.1), ..lstm.clone() };
    for (batch, length, dim, marked, option, config) in [
        (5, 1, 16, false, "", usual.clone()),
        (5, 60, 16, true, "", usual.clone()),
        (5, 40, 64, false, "", usual.clone()),
        (5, 20, 192, false, "", usual.clone()),
        (5, 60, 16, true, " sigmoid i", siging.clone()),
        (5, 60, 16, true, " exp f", expf.clone()),
        (5, 60, 16, true, " cut", cut.clone()),
        (5, 60, 16, true, " clip", clip.clone()),
        (5, 60, 20, true, "", lstm.clone()),
        (5, 60, 20, true, " clip", lstm_clip.clone()),
        (5, 60, 20, false, " cut", SlstmConfig { gradient_cut: true, ..lstm.clone() }),
        // Every kernel for bf16, whole and in part; two tiles of sequences, the second not full.
        (5, 60, 18, true, "", usual.clone()),
        (11, 60, 40, true, " exp f", expf),
        (11, 60, 72, true, " sigmoid i", siging.clone()),
        (11, 60, 128, true, "", usual.clone()),
        (11, 60, 128, true, " clip", clip.clone()),
        (600, 12, 128, true, "", usual.clone()),
        (11, 60, 128, true, " empty state", usual.clone()),
        (11, 40, 144, false, " sigmoid i", siging),
        (11, 60, 192, true, " clip", clip.clone()),
        (11, 40, 208, true, " cut", cut),
        (11, 60, 256, true, "", usual),
        (11, 60, 256, true, " clip", clip),
        (11, 60, 64, true, "", lstm.clone()),
        (11, 60, 128, true, " clip", lstm_clip),
        (11, 40, 176, true, "", lstm.clone()),
        (11, 40, 240, true, "", lstm),
    ] {
        let (heads, function) = (config.heads, config.function);
        let width = heads * dim;
        let mut case = Case::default();
        for _ in 0..4 {
            case = case.input(&[batch, length, width]);
        }
        case = case.between(&[heads, 4 * dim, dim], -0.1, 0.1).input(&[4 * width]);
        case = case.input(&[batch, width]).input(&[batch, width]);
        if function == CellFunction::Slstm {
            case = case.between(&[batch, width], 0.5, 1.5).input(&[batch, width]);
        }
        if option == " empty state" {
            for part in [7, 8] {
                case.inputs[part].1.fill(0.0);
            }
        }
        if marked {
            case = case.ids(marks(batch * length));
        }
        let name =
            format!("{function:?} {batch} {length} {dim}{}{option}", if marked { " marks" } else { "" });
        let record: Record<'_> = &|t, v, i| {
            let state = SlstmState { h: v[6], c: v[7], n: v.get(8).copied(), m: v.get(9).copied() };
            let gates = [v[0], v[1], v[2], v[3]];
            let (h, s) = slstm(t, &config, gates, v[4], v[5], Some(state), i.first().copied())?;
            Ok([Some(h), Some(s.h), Some(s.c), s.n, s.m].into_iter().flatten().collect())
        };
        if table.precision == Precision::Bf16
            && function == CellFunction::Slstm
            && let Err(e) = blind_to_ties(&mut case, record)
        {
            table.row(&name, f64::INFINITY, 0.0, &format!("{e}"));
            continue;
        }
        table.compare(&name, &case, 5e-5, record);
    }
}

/// Gradients of the last state of an sLSTM that come from a loss of c / n and of log n + m alone. One that sees
/// m itself has a gradient that jumps from one token to another where both set m equally: rounding to bf16 is
/// enough for it.
fn blind_to_ties(case: &mut Case, record: Record<'_>) -> xlstm::Result<()> {
    let [values, ..] = case.rounded(Precision::Bf16).cpu(record)?;
    let [h, last, c, n, m] = &values[..] else { return Ok(()) };
    let mut seeds: Vec<Vec<f64>> =
        [h, last, c, n, m].iter().enumerate().map(|(i, x)| case.seed(i, x.len())).collect();
    for (i, (c, n)) in c.iter().zip(n).enumerate() {
        let (ratio, log) = (seeds[2][i], seeds[4][i]);
        seeds[2][i] = ratio / n;
        seeds[3][i] = (log - ratio * c / n) / n;
    }
    case.seeds = Some(seeds);
    Ok(())
}
