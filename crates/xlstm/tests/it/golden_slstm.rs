//! The sLSTM and LSTM cells against the official implementation, values and gradients.

use xlstm::cell::slstm::{CellFunction, SlstmConfig, SlstmState, slstm};
use xlstm::cell::{ForgetGate, InputGate};
use xlstm::engine::operation::Element;
use xlstm::engine::{Mode, Tape, Var};

use crate::golden::{Golden, assert_close};
use crate::pass::{Pass, on_gpu};

/// What the values lose by being stored in f32.
const STORAGE: f64 = 1e-6;

#[test]
fn official_cells() {
    for name in [
        "slstm_s1",
        "slstm_s7",
        "slstm_s33_init",
        "slstm_s33_wide",
        "slstm_s65_wide_init",
        "slstm_extreme20_init",
        "slstm_lstmfn",
    ] {
        let golden = Golden::load(name);
        if !on_gpu() {
            run::<f64>(&golden, STORAGE);
        }
        run::<f32>(&golden, (4.0 * golden.f32_error()).max(2.0 * STORAGE));
    }
}

/// (B, S, parts, width) as `parts` tensors (B, S, width).
fn split(x: &[f64], parts: usize, width: usize) -> Vec<Vec<f64>> {
    let part = |p: usize| x.chunks(parts * width).flat_map(|x| x[p * width..][..width].to_vec()).collect();
    (0..parts).map(part).collect()
}

/// (B, NH, S, DH) as (B, S, NH DH), or back with NH and S exchanged.
fn swap_middle(x: &[f64], [a, b, c, d]: [usize; 4]) -> Vec<f64> {
    (0..a * b * c * d)
        .map(|i| (i / (c * b * d), i / (b * d) % c, i / d % b, i % d))
        .map(|(i, k, j, l)| x[((i * b + j) * c + k) * d + l])
        .collect()
}

fn run<T: Element>(golden: &Golden, tolerance: f64) {
    let number = |key: &str| golden.json["config"]["args"][key].as_u64().expect("a number") as usize;
    let (width, heads) = (number("hidden"), number("heads"));
    let lstm = golden.json["config"]["args"]["function"] == "lstm";
    let config = SlstmConfig {
        heads,
        function: if lstm { CellFunction::Lstm } else { CellFunction::Slstm },
        input_gate: InputGate::Exponential,
        forget_gate: ForgetGate::Sigmoid,
        gradient_cut: false,
        gradient_clip: None,
    };
    let (shape, x) = golden.tensor("in.x");
    let (batch, steps, dim) = (shape[0], shape[1], width / heads);
    let parts = if lstm { 2 } else { 4 };

    let mut tape = Tape::new(Mode::Train);
    let gates: [Var; 4] = std::array::from_fn(|_| tape.input_with_gradient([batch, steps, width]));
    let recurrent = tape.input_with_gradient([heads, 4 * dim, dim]);
    let bias = tape.input_with_gradient([4 * width]);
    let initial: Vec<Var> = match golden.has("in.state0") {
        true => (0..parts).map(|_| tape.input_with_gradient([batch, width])).collect(),
        false => Vec::new(),
    };
    let state = (!initial.is_empty()).then(|| SlstmState {
        h: initial[0],
        c: initial[1],
        n: initial.get(2).copied(),
        m: initial.get(3).copied(),
    });
    let (h, last) = slstm(&mut tape, &config, gates, recurrent, bias, state, None).expect("shapes fit");
    let last: Vec<Var> = [Some(last.h), Some(last.c), last.n, last.m].into_iter().flatten().collect();
    for &y in last.iter().chain([&h]) {
        tape.keep(y);
        tape.seed_gradient(y);
    }

    let mut pass = Pass::<T>::bare(tape);
    for (&gate, values) in gates.iter().zip(split(&x, 4, width)) {
        pass.set(gate, &values);
    }
    pass.set(recurrent, &golden.values("param._recurrent_kernel_"));
    pass.set(bias, &golden.values("param._bias_"));
    if !initial.is_empty() {
        let values = golden.values("in.state0");
        for (&part, values) in initial.iter().zip(values.chunks(batch * width)) {
            pass.set(part, values);
        }
    }
    pass.forward();
    let weights = golden.values("gw.y");
    pass.seed(h, &swap_middle(&weights, [batch, heads, steps, dim]));
    let weights = golden.has("gw.state_last").then(|| golden.values("gw.state_last"));
    for (part, &var) in last.iter().enumerate() {
        let len = batch * width;
        let weights = weights.as_ref().map_or(vec![0.0; len], |w| w[part * len..][..len].to_vec());
        pass.seed(var, &weights);
    }
    pass.backward();

    let all =
        |vars: &[Var], of: &dyn Fn(Var) -> Vec<f64>| vars.iter().flat_map(|&v| of(v)).collect::<Vec<_>>();
    let value = |v: Var| pass.value(v);
    let gradient = |v: Var| pass.gradient(v);
    let check = |tensor: &str, got: Vec<f64>| {
        let name = format!("{} {tensor} in {}", golden.name, std::any::type_name::<T>());
        assert_close(&name, &got, &golden.values(tensor), tolerance);
    };
    check("out.y", swap_middle(&value(h), [batch, steps, heads, dim]));
    check("out.state_last", all(&last, &value));
    // Gate-major by token, as x is: the parts of `split` put together again.
    let by_gate = gates.map(gradient);
    let rows = (0..batch * steps).flat_map(|row| by_gate.iter().map(move |g| &g[row * width..][..width]));
    check("grad.x", rows.flatten().copied().collect());
    check("gradp._recurrent_kernel_", gradient(recurrent));
    check("gradp._bias_", gradient(bias));
    if !initial.is_empty() {
        check("grad.state0", all(&initial, &gradient));
    }
}
