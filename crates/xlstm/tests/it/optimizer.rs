//! Steps of the optimizer on the device under test, matrices by Muon, against the processor in f64: the
//! gradients of each step are random.

use serde_json::json;
use xlstm::model::LanguageModel;
use xlstm::nn::{Builder, Init, Parameters, Role};
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

/// What the parameters of a family are to the optimizer, by the ends of their names.
#[test]
fn every_family_says_what_its_matrices_are() {
    let square = |n: usize, side: usize| Role::Matrices(vec![[side, side]; n]);
    let halves = Role::Matrices(vec![[192, 64]; 2]);
    let border = || Role::Border;
    let elements = || Role::Elements;
    let cases = [
        (
            json!({"family": "small", "slstm_at": [1], "num_blocks": 2, "bias": true}),
            vec![
                ("token_embedding.weight", border()),
                ("lm_head.weight", border()),
                ("proj_up.weight", Role::Matrices(vec![[128, 64]; 2])),
                ("proj_up.bias", elements()),
                ("proj_down.weight", Role::Matrices(vec![[64, 128]])),
                ("q_proj.weight", elements()),
                ("conv1d.conv.weight", elements()),
                ("mlstm_cell.igate.weight", elements()),
                ("xlstm_norm.weight", elements()),
                ("xlstm.zgate.weight", square(4, 16)),
                ("_recurrent_kernel_", square(16, 16)),
            ],
        ),
        (
            json!({"family": "large", "num_blocks": 1}),
            vec![
                ("embedding.weight", border()),
                ("lm_head.weight", border()),
                ("mlstm_layer.v.weight", square(1, 64)),
                ("igate_preact.weight", elements()),
                ("ffn.proj_down.weight", Role::Matrices(vec![[64, 192]])),
                ("norm_ffn.weight", elements()),
            ],
        ),
        (
            json!({"family": "large", "num_blocks": 1, "large": {"weight_mode": "fused"}}),
            vec![
                ("qkv_opreact.weight", Role::Matrices(vec![[32, 64], [32, 64], [64, 64], [64, 64]])),
                ("ifgate_preact.weight", elements()),
                ("proj_up_gate_z.weight", halves),
            ],
        ),
        (
            json!({"family": "lstm", "num_blocks": 1}),
            vec![
                ("weight_ih_l0", square(4, 64)),
                ("weight_hh_l0", square(4, 64)),
                ("bias_hh_l0", elements()),
            ],
        ),
        (
            json!({"family": "transformer", "num_blocks": 1}),
            vec![
                ("wte.weight", border()),
                ("c_attn.weight", square(3, 64)),
                ("c_fc.weight", Role::Matrices(vec![[256, 64]])),
            ],
        ),
        (
            json!({"family": "original", "num_blocks": 1, "original": {"hidden_size": 64, "lstm_type": "slstm"}}),
            vec![
                ("output_layer.weight", border()),
                ("output_layer.bias", border()),
                ("weight_ih", square(4, 64)),
                ("norm.bias", elements()),
            ],
        ),
        (
            json!({"family": "original", "num_blocks": 1, "original": {"hidden_size": 64, "lstm_type": "mlstm"}}),
            vec![("weight_ih", elements()), ("W_q.weight", square(1, 64))],
        ),
    ];
    for (mut config, wanted) in cases {
        config["vocab_size"] = 50.into();
        config["embedding_dim"] = 64.into();
        let parsed = serde_json::from_value(config.clone()).expect("a configuration");
        let model = LanguageModel::new(&parsed).expect("a model");
        for (end, role) in wanted {
            let named: Vec<_> = model.specs().iter().filter(|spec| spec.name.ends_with(end)).collect();
            let first = named.first();
            assert_eq!(first.map(|spec| &spec.role), Some(&role), "{config}: {end} in {first:?}");
        }
        for spec in model.specs().iter() {
            if let Role::Matrices(sizes) = &spec.role {
                let count: usize = sizes.iter().map(|[rows, columns]| rows * columns).sum();
                assert_eq!(count, spec.count(), "{config}: {}", spec.name);
            }
        }
    }
}
