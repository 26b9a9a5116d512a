//! Models that run on the weights in their files give what they give on widened copies.

use std::sync::Arc;

use super::threads;
use xlstm::engine::{Code, Device, Format, Storable};
use xlstm::folder::convert::{Conversion, Target, convert};
use xlstm::folder::{ModelFolder, write_with};
use xlstm::model::{Logits, Runner, storable_parameters};
use xlstm::nn::{Parameters, Weights};

#[test]
fn a_model_in_16_bits_is_the_model_of_the_widened_weights() {
    let model = threads::model();
    let device = Device::cpu(2).expect("threads");
    let parameters = Parameters::<f32>::initialize(model.specs(), 3);
    let vocabulary = model.config().vocab_size;
    for format in [Format::F32, Format::Bf16, Format::F16] {
        let path =
            std::env::temp_dir().join(format!("xlstm-stored-{}-{}", format.name(), std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder");
        write_with(&path, &model, None, format, |index, _| parameters.values[index].as_slice().into())
            .expect("written");
        let folder = ModelFolder::load(&path).expect("a model");
        assert_eq!(folder.files.format(), format);
        assert_eq!(folder.files.bytes(), model.parameter_count() * format.bytes());
        assert_eq!(folder.fingerprint(), ModelFolder::load(&path).expect("again").fingerprint());
        let wide = Weights::new(Arc::new(folder.parameters()), &device).expect("weights");
        let stored = folder.weights(&device).expect("weights");
        let Weights::Stored(numbers) = &stored else { panic!("weights on the processor stay in the file") };
        let storable = storable_parameters(&model).expect("a model");
        let copied: usize = numbers.iter().map(xlstm::engine::Stored::copied_bytes).sum();
        let counts = model.specs().iter().map(|spec| spec.shape.iter().product::<usize>());
        let widened: usize =
            counts.zip(&storable).filter(|(_, s)| **s == Storable::Wide).map(|(n, _)| 4 * n).sum();
        assert_eq!(copied, if format == Format::F32 { 0 } else { widened });
        let mut runners = [wide, stored].map(|w| Runner::new(model.clone(), w, device.clone()));
        // A prompt, a token at a time, three sequences, more than a piece.
        for (batch, lengths) in [(1, vec![37, 1, 1]), (3, vec![2, 1]), (1, vec![530])] {
            runners.iter_mut().for_each(|runner| runner.reset(batch));
            for length in lengths {
                let tokens: Vec<u32> = (0..batch * length).map(|i| (i * 31 % vocabulary) as u32).collect();
                let [want, got] = runners.each_mut().map(|r| r.read(&tokens, Logits::All).expect("logits"));
                for (got, want) in got.iter().zip(&want) {
                    let bound = if format == Format::F32 { 0.0 } else { 2e-5 * (1.0 + want.abs()) };
                    assert!((got - want).abs() <= bound, "{format:?} {batch}x{length}: {got} and {want}");
                }
            }
        }
        std::fs::remove_dir_all(&path).expect("removed");
    }
}

/// Quantised folders hold what their codes say, whichever way they are read; other programs get
/// none; and back in f32 they are what they stood for.
#[test]
fn a_quantised_model_is_the_model_of_its_codes() {
    let model = threads::model();
    let device = Device::cpu(2).expect("threads");
    let parameters = Parameters::<f32>::initialize(model.specs(), 3);
    let vocabulary = model.config().vocab_size;
    let root = std::env::temp_dir().join(format!("xlstm-quantised-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&root);
    let plain = root.join("f32");
    std::fs::create_dir_all(&plain).expect("a folder");
    write_with(&plain, &model, None, Format::F32, |index, _| parameters.values[index].as_slice().into())
        .expect("written");
    let plain = ModelFolder::load(&plain).expect("a model");
    for (code, step) in [(Code::Int8, 0.005), (Code::Int4, 0.08)] {
        let path = root.join(code.name());
        let conversion = Conversion { quantize: Some(code), ..Conversion::to(Target::Ours) };
        convert(&plain, &conversion, &path, &mut |_| {}).expect("converted");
        let folder = ModelFolder::load(&path).expect("a model");
        assert_eq!((folder.files.code(), folder.files.format()), (Some(code), Format::F32));
        let wide = folder.parameters();
        let storable = storable_parameters(&model).expect("a model");
        let mut quantised = 0;
        for ((spec, storable), (got, want)) in
            model.specs().iter().zip(&storable).zip(wide.values.iter().zip(&parameters.values))
        {
            let matrix = *storable == Storable::Quantized && spec.shape.len() == 2;
            if matrix && spec.shape[1].is_multiple_of(32) {
                quantised += got.len();
                let most = want.iter().fold(0.0_f32, |most, w| most.max(w.abs()));
                assert!(
                    got.iter().zip(want).all(|(a, b)| (a - b).abs() <= most * step * 2.0),
                    "{}",
                    spec.name
                );
            } else {
                assert_eq!(got, want, "{}", spec.name);
            }
        }
        assert!(2 * quantised > model.parameter_count(), "most weights are quantised");
        let kept = 4 * (model.parameter_count() - quantised);
        assert_eq!(folder.files.bytes(), kept + code.bytes(quantised));

        // Long inputs go through widened tiles; single tokens also round the activations.
        let weights = [
            Weights::new(Arc::new(wide.clone()), &device).expect("weights"),
            folder.weights(&device).expect("weights"),
        ];
        let mut runners = weights.map(|w| Runner::new(model.clone(), w, device.clone()));
        for (length, bound) in [(40, 2e-5), (1, 0.02), (1, 0.02), (3, 0.02)] {
            let tokens: Vec<u32> = (0..length).map(|i| (i * 31 % vocabulary) as u32).collect();
            let [want, got] = runners.each_mut().map(|r| r.read(&tokens, Logits::All).expect("logits"));
            let most = want.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
            let worst = got.iter().zip(&want).fold(0.0_f32, |worst, (a, b)| worst.max((a - b).abs()));
            assert!(worst <= bound * most, "{code:?} {length}: {worst} of {most}");
        }

        let theirs = Conversion { quantize: Some(code), ..Conversion::to(Target::HuggingFace) };
        let error = convert(&plain, &theirs, &root.join("hf"), &mut |_| {}).expect_err("no such model");
        assert!(!root.join("hf").exists(), "{error}");
        let back = root.join(format!("{}-back", code.name()));
        convert(&folder, &Conversion::to(Target::Ours), &back, &mut |_| {}).expect("converted");
        assert_eq!(ModelFolder::load(&back).expect("a model").parameters().values, wide.values);
    }
    std::fs::remove_dir_all(&root).expect("removed");
}
