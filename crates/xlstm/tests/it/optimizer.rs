//! Steps of the optimizer on the device under test, matrices by Muon, against the processor in f64: the
//! gradients of each step are random.

use xlstm::nn::{Builder, Init, Parameters};
use xlstm::optim::{MuonOptions, Optimizer, OptimizerOptions, global_norm};
use xlstm::rng::Rng;

use crate::pass::device;

const OPTIONS: OptimizerOptions = OptimizerOptions {
    muon: Some(MuonOptions::DEFAULT),
    clip: Some(30.0),
    border_rate: 0.5,
    ..OptimizerOptions::DEFAULT
};
const RATE: f64 = 0.02;
const STEPS: u64 = 5;

/// Parameters of every role: matrices high and wide, of sides that are no multiples of anything, stacked, a
/// head each, beside others of one shape.
fn parameters() -> Parameters<f32> {
    let mut builder = Builder::new();
    let start = || Init::Normal(0.3);
    let embedding = builder.parameter("embedding.weight", &[70, 40], start());
    builder.at_border(embedding);
    builder.matrices("up.weight", &[2 * 130, 40], start(), [130; 2]);
    builder.matrices("down.weight", &[40, 130], start(), [40]);
    builder.matrices("qkv.weight", &[33 + 33 + 90, 40], start(), [33, 33, 90]);
    builder.matrices("recurrent", &[3, 4 * 17, 17], start(), [17; 12]);
    builder.parameter("norm.weight", &[77], start());
    builder.matrices("few.weight", &[9, 4, 4], start(), [4; 9]);
    Parameters::initialize(&builder.finish(), 7)
}

fn gradients(step: u64, parameters: &Parameters<f32>) -> Vec<Vec<f32>> {
    let mut rng = Rng::new(step, 31);
    parameters.values.iter().map(|w| w.iter().map(|_| rng.normal() as f32).collect()).collect()
}

fn wide(values: &[Vec<f32>]) -> Vec<Vec<f64>> {
    values.iter().map(|values| values.iter().map(|x| f64::from(*x)).collect()).collect()
}

/// Parameters and first moments after the steps, on the device under test.
fn on_the_device(mut parameters: Parameters<f32>) -> [Vec<Vec<f32>>; 2] {
    #[cfg(feature = "cuda")]
    if let xlstm::engine::Device::Cuda(gpu, precision) = device() {
        use xlstm::engine::cuda::{CudaParameters, CudaTensors};
        use xlstm::optim::cuda::{CudaOptimizer, layout_of};
        let layout = layout_of(parameters.specs());
        let weights = CudaParameters::zeros(&gpu, &layout, precision).expect("parameters");
        weights.upload(&parameters.values).expect("parameters");
        let sums = CudaTensors::zeros(&gpu, &layout).expect("gradients");
        let mut optimizer =
            CudaOptimizer::new(&gpu, parameters.specs(), OPTIONS, precision).expect("an optimizer");
        for step in 0..STEPS {
            sums.upload(&gradients(step, &parameters)).expect("gradients");
            optimizer.update(&weights, &sums, RATE).expect("a step");
        }
        let moments = optimizer.moments().0.download().expect("moments");
        return [weights.download().expect("parameters"), moments];
    }
    let mut optimizer = Optimizer::new(OPTIONS, &parameters);
    for step in 0..STEPS {
        let gradients = gradients(step, &parameters);
        let norm = global_norm(&gradients);
        device().install(|| optimizer.update(&mut parameters, &gradients, norm, RATE));
    }
    [parameters.values, optimizer.first]
}

#[test]
fn steps_are_those_of_f64() {
    let start = parameters();
    let specs = start.specs().clone();
    let mut truth = Parameters::<f64>::zeros(&specs);
    truth.values = wide(&start.values);
    let mut optimizer = Optimizer::new(OPTIONS, &truth);
    for step in 0..STEPS {
        let gradients = wide(&gradients(step, &start));
        let norm = global_norm(&gradients);
        assert!(norm > 30.0, "clipping has nothing to do");
        optimizer.update(&mut truth, &gradients, norm, RATE);
    }
    let [values, moments] = on_the_device(start.clone());
    for (i, spec) in specs.iter().enumerate() {
        // How far the steps have gone is what they are held against.
        let moved = |x: f64, j: usize| (x - f64::from(start.values[i][j])).abs();
        let far = truth.values[i].iter().enumerate().map(|(j, x)| moved(*x, j)).fold(0.0, f64::max);
        assert!(far > RATE / 2.0, "{}: moved by {far}", spec.name);
        for (got, want) in values[i].iter().zip(&truth.values[i]) {
            assert!((f64::from(*got) - want).abs() < 1e-3 * far, "{}: {got} and {want}", spec.name);
        }
        for (got, want) in moments[i].iter().zip(&optimizer.first[i]) {
            assert!((f64::from(*got) - want).abs() < 1e-5, "{}: {got} and {want}", spec.name);
        }
    }
}
