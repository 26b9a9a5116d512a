//! The optimizer.

use xlstm::engine::Precision;
use xlstm::engine::cuda::{CudaParameters, CudaTensors};
use xlstm::nn::{Builder, Init, Parameters, Role};
use xlstm::optim::cuda::{CudaOptimizer, layout_of};
use xlstm::optim::{MuonOptions, Optimizer, OptimizerOptions, global_norm};

use super::case::{narrow, noise, wide};
use super::table::{MUON_BF16, Table, relative_norm};

/// Steps of the optimizer with Muon: how far parameters have moved, and the first moments. Matrices are high,
/// wide and square, stacked and of odd sides; shapes come more than once, in either direction.
pub fn check(table: &mut Table<'_>) {
    const STEPS: u64 = 4;
    const OPTIONS: OptimizerOptions =
        OptimizerOptions { muon: Some(MuonOptions::DEFAULT), border_rate: 0.5, ..OptimizerOptions::DEFAULT };
    let (mut builder, start) = (Builder::new(), || Init::Normal(0.1));
    let embedding = builder.parameter("embedding", &[300, 256], start());
    builder.at_border(embedding);
    builder.matrices("up", &[2 * 704, 256], start(), [704; 2]);
    builder.matrices("down", &[256, 704], start(), [256]);
    builder.matrices("square", &[4 * 256, 256], start(), [256; 4]);
    builder.matrices("odd", &[131, 77], start(), [131]);
    builder.matrices("recurrent", &[3, 4 * 36, 36], start(), [36; 12]);
    builder.parameter("norm", &[517], start());
    let (specs, precision) = (builder.finish(), table.precision);
    let first = Parameters::<f32>::initialize(&specs, 3);
    let gradients = |step: u64| -> Vec<Vec<f64>> {
        let seeds = 10_000 * (step + 1)..;
        specs.iter().zip(seeds).map(|(spec, seed)| noise(seed, spec.count())).collect()
    };
    let truth = || {
        let mut parameters = Parameters::<f64>::zeros(&specs);
        parameters.values = first.values.iter().map(|w| wide(w)).collect();
        let mut optimizer = Optimizer::new(OPTIONS, &parameters);
        for step in 0..STEPS {
            let gradients = gradients(step);
            optimizer.update(&mut parameters, &gradients, global_norm(&gradients), 0.02);
        }
        (parameters.values, optimizer.first)
    };
    let gpu = || -> xlstm::Result<_> {
        let layout = layout_of(&specs);
        let parameters = CudaParameters::zeros(table.gpu, &layout, precision)?;
        parameters.upload(&first.values)?;
        let sums = CudaTensors::zeros(table.gpu, &layout)?;
        let mut optimizer = CudaOptimizer::new(table.gpu, &specs, OPTIONS, precision)?;
        for step in 0..STEPS {
            sums.upload(&gradients(step).iter().map(|g| narrow(g)).collect::<Vec<_>>())?;
            optimizer.update(&parameters, &sums, 0.02)?;
        }
        Ok([parameters.download()?, optimizer.moments().0.download()?])
    };
    let ([values, moments], again) = match (gpu(), gpu()) {
        (Ok(once), Ok(again)) => (once.clone(), once == again),
        (Err(e), _) | (_, Err(e)) => return table.row("muon", f64::INFINITY, 0.0, &format!("{e}")),
    };
    let (true_values, true_moments) = truth();
    table.row("muon: same bits", f64::from(u8::from(!again)), 0.0, "");
    for (i, spec) in specs.iter().enumerate() {
        let moved = |x: &[f64]| -> Vec<f64> {
            x.iter().zip(&first.values[i]).map(|(x, start)| x - f64::from(*start)).collect()
        };
        // What AdamW does is f32 in either precision; what Muon multiplies is not.
        let is_matrix = matches!(spec.role, Role::Matrices(_));
        let bound = if is_matrix && precision == Precision::Bf16 { MUON_BF16 } else { 1e-4 };
        let error = relative_norm(&moved(&wide(&values[i])), &moved(&true_values[i]));
        let momentum = relative_norm(&wide(&moments[i]), &true_moments[i]);
        table.row(&format!("muon {}", spec.name), error, bound, "the way of four steps");
        table.row(&format!("muon {}, moment", spec.name), momentum, 1e-5, "");
    }
}
