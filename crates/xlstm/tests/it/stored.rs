//! Models that run on the weights in their files give what they give on widened copies.

use std::sync::Arc;

use super::threads;
use xlstm::engine::{Device, Format};
use xlstm::folder::{ModelFolder, write_with};
use xlstm::model::{Logits, Runner, narrow_parameters};
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
        let narrow = narrow_parameters(&model).expect("a model");
        let copied: usize = numbers.iter().map(xlstm::engine::Stored::copied_bytes).sum();
        let counts = model.specs().iter().map(|spec| spec.shape.iter().product::<usize>());
        let widened: usize = counts.zip(&narrow).filter(|(_, narrow)| !**narrow).map(|(n, _)| 4 * n).sum();
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
