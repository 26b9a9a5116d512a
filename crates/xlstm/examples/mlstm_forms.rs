//! The mLSTM cell in its three forms, which are one function: outputs and time.
//!
//! `cargo run --release --example mlstm_forms`

use std::time::Instant;

use xlstm::Result;
use xlstm::cell::mlstm::{Form, MlstmConfig, mlstm};
use xlstm::cell::{ForgetGate, InputGate};
use xlstm::engine::{Executor, Mode, Tape};
use xlstm::rng::Rng;

const BATCH: usize = 2;
const LENGTH: usize = 512;
const HEADS: usize = 4;
const HEAD_SIZE: usize = 32;

/// h (B, S, NH dhv) of random q, k, v and gates, and the seconds of one forward pass.
fn run(form: Form) -> Result<(Vec<f64>, f64)> {
    let config = MlstmConfig {
        heads: HEADS,
        input_gate: InputGate::Exponential,
        forget_gate: ForgetGate::Sigmoid,
        normalize: true,
        eps: 1e-6,
        form,
    };
    // A tape records the operation once; an executor then replays it.
    let mut tape = Tape::new(Mode::Evaluate);
    let width = HEADS * HEAD_SIZE;
    let [q, k, v] = [(); 3].map(|()| tape.input([BATCH, LENGTH, width]));
    let [i, f] = [(); 2].map(|()| tape.input([BATCH, LENGTH, HEADS]));
    let (h, _state) = mlstm(&mut tape, &config, q, k, v, (i, f), None, None)?;
    tape.keep(h);

    let mut executor = Executor::<f64>::new(tape);
    let mut rng = Rng::new(1, 0);
    for (input, mean) in [(q, 0.0), (k, 0.0), (v, 0.0), (i, 0.0), (f, 3.0)] {
        executor.input_mut(input).fill_with(|| mean + rng.normal());
    }
    executor.forward(&[]);
    let started = Instant::now();
    executor.forward(&[]);
    Ok((executor.value(h).to_vec(), started.elapsed().as_secs_f64()))
}

fn main() -> Result<()> {
    let (truth, seconds) = run(Form::Recurrent)?;
    println!("{:<16} {:>8.2} ms", "recurrent", 1e3 * seconds);
    for (name, form) in [
        ("parallel", Form::Parallel),
        ("chunkwise(16)", Form::Chunkwise(16)),
        ("chunkwise(64)", Form::Chunkwise(64)),
        ("chunkwise(512)", Form::Chunkwise(512)),
    ] {
        let (h, seconds) = run(form)?;
        let distance = h.iter().zip(&truth).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        println!("{name:<16} {:>8.2} ms   at most {distance:.0e} from the recurrent form", 1e3 * seconds);
    }
    Ok(())
}
