//! A learner on the device under test: accumulation, steps that are not finite, resuming, and
//! on a GPU a step as a graph and kernel by kernel.

use std::sync::Arc;

use xlstm::data::Batch;
use xlstm::model::LanguageModel;
use xlstm::model::objective::Carry;
use xlstm::nn::Parameters;
use xlstm::optim::{MuonOptions, OptimizerOptions};
use xlstm::train::learner::{Learner, Task, learner};

use crate::pass::{device, on_gpu};
use crate::threads::{SHAPE, batch, model};

const OPTIONS: OptimizerOptions = OptimizerOptions { clip: Some(0.5), ..OptimizerOptions::DEFAULT };
const MUON: OptimizerOptions = OptimizerOptions { muon: Some(MuonOptions::DEFAULT), ..OPTIONS };
const RATE: f64 = 1e-3;

fn task(rows: usize, carry: Carry, captured: bool) -> Task {
    Task { shape: [rows, SHAPE[1]], carry, options: OPTIONS, seed: 3, captured }
}

/// As [`task`], carried, with matrices by Muon.
fn muon_task(captured: bool) -> Task {
    Task { options: MUON, ..task(SHAPE[0], Carry::Carried, captured) }
}

fn new(model: &Arc<LanguageModel>, task: Task) -> Box<dyn Learner> {
    let parameters = Parameters::initialize(model.specs(), 1);
    learner(model, parameters, task, &device()).expect("a learner")
}

/// Rows `rows` of a batch.
fn rows(batch: &Batch, rows: std::ops::Range<usize>) -> Batch {
    let part = |x: &[u32]| x[rows.start * batch.length..rows.end * batch.length].to_vec();
    Batch {
        batch_size: rows.len(),
        length: batch.length,
        inputs: part(&batch.inputs),
        targets: part(&batch.targets),
        marks: part(&batch.marks),
        target_count: rows.len() * batch.length,
    }
}

fn bits(learner: &dyn Learner) -> Vec<u32> {
    let snapshot = learner.snapshot().expect("a snapshot");
    let moments = snapshot.first.iter().chain(snapshot.second.iter());
    let all = snapshot.parameters.values.iter().chain(moments).chain(&snapshot.carried);
    all.flatten().map(|x| x.to_bits()).collect()
}

/// Without dropout, which counts by micro-batch.
fn plain_model() -> Arc<LanguageModel> {
    let mut config = model().config().clone();
    (config.dropout, config.feedforward.dropout, config.add_embedding_dropout) = (0.0, 0.0, false);
    LanguageModel::new(&config).expect("a model").into()
}

#[test]
fn micro_batches_add_up_to_the_batch() {
    let model = plain_model();
    let whole = batch(1, model.config().vocab_size);
    let parts: Vec<Batch> = (0..SHAPE[0]).map(|i| rows(&whole, i..i + 1)).collect();
    let (mut one, mut many) =
        (new(&model, task(SHAPE[0], Carry::Marked, true)), new(&model, task(1, Carry::Marked, true)));
    for step in 0..4 {
        let a = one.step(std::slice::from_ref(&whole), step, RATE).expect("a step");
        let b = many.step(&parts, step, RATE).expect("a step");
        assert!((a.loss - b.loss).abs() < 1e-4 * a.loss, "step {step}: {a:?} {b:?}");
        assert!((a.norm - b.norm).abs() < 1e-3 * a.norm, "step {step}: {a:?} {b:?}");
    }
}

#[test]
fn a_step_that_is_not_finite_changes_nothing() {
    [OPTIONS, MUON].into_iter().for_each(a_step_that_is_not_finite);
}

fn a_step_that_is_not_finite(options: OptimizerOptions) {
    let model = plain_model();
    let spoiled = model.specs().iter().position(|spec| spec.name.contains("blocks.1.")).expect("a block");
    let mut parameters = Parameters::initialize(model.specs(), 1);
    parameters.values[spoiled][0] = f32::INFINITY;
    let task = Task { options, ..task(SHAPE[0], Carry::Marked, true) };
    let mut learner = learner(&model, parameters, task, &device()).expect("a learner");
    let before = bits(&*learner);
    let batch = batch(1, model.config().vocab_size);
    for step in 0..3 {
        let learned = learner.step(std::slice::from_ref(&batch), step, RATE).expect("a step");
        assert!(!learned.is_finite(), "{learned:?}");
        let culprit = learner.find_non_finite().expect("a search").expect("a culprit");
        assert!(culprit.scope.contains("blocks.1"), "{culprit:?}");
        assert!(!culprit.backward, "{culprit:?}");
    }
    assert!(before == bits(&*learner), "something has changed");
}

#[test]
fn going_on_from_a_snapshot_is_going_on() {
    let model = model();
    let batches: Vec<Batch> = (0..6).map(|i| batch(i, model.config().vocab_size)).collect();
    let steps = |learner: &mut dyn Learner, range: std::ops::Range<usize>| {
        for step in range {
            let learned = learner.step(&batches[step..=step], step as u64, RATE).expect("a step");
            assert!(learned.is_finite(), "{learned:?}");
        }
    };
    for task in [task(SHAPE[0], Carry::Carried, true), muon_task(true)] {
        let mut first = new(&model, task);
        steps(&mut *first, 0..3);
        let snapshot = first.snapshot().expect("a snapshot");
        let mut second = new(&model, task);
        second.restore(snapshot, 3).expect("restored");
        steps(&mut *first, 3..6);
        steps(&mut *second, 3..6);
        assert!(bits(&*first) == bits(&*second), "the snapshot went another way");
    }
}

#[test]
fn a_graph_gives_the_bits_of_its_kernels() {
    if !on_gpu() {
        return;
    }
    let model = model();
    let batches: Vec<Batch> = (0..2).map(|i| batch(i, model.config().vocab_size)).collect();
    let run = |task| {
        let mut learner = new(&model, task);
        (0..5).for_each(|step| _ = learner.step(&batches, step, RATE).expect("a step"));
        bits(&*learner)
    };
    let plain = |captured| task(SHAPE[0], Carry::Carried, captured);
    assert!(run(plain(true)) == run(plain(false)));
    assert!(run(muon_task(true)) == run(muon_task(false)));
}

/// The same batch again and again: after 25 steps Muon has learned most of it, to the same bits each time.
#[test]
fn muon_learns() {
    let model = plain_model();
    let batch = batch(1, model.config().vocab_size);
    let run = || {
        let mut learner = new(&model, Task { options: MUON, ..task(SHAPE[0], Carry::Fresh, true) });
        let losses: Vec<f64> = (0..25)
            .map(|step| {
                let learned = learner.step(std::slice::from_ref(&batch), step, 5e-3).expect("a step");
                assert!(learned.is_finite(), "{learned:?}");
                learned.loss
            })
            .collect();
        (losses, bits(&*learner))
    };
    let (losses, first) = run();
    assert!(losses[24] < losses[0] - 1.0, "{losses:?}");
    let (again, second) = run();
    assert!(losses == again && first == second, "another way");
}
