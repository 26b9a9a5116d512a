//! Golden files: a safetensors file and a JSON file a case, from the folder that
//! `XLSTM_GOLDEN` names or else from `tests/golden`.

use std::path::PathBuf;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// The folder with the golden files.
pub fn folder() -> PathBuf {
    match std::env::var_os("XLSTM_GOLDEN") {
        Some(folder) => folder.into(),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden"),
    }
}

/// One case.
pub struct Golden {
    pub name: String,
    /// Configuration, equations, and what the reference itself loses in f32.
    pub json: Value,
    bytes: Vec<u8>,
}

impl Golden {
    pub fn load(name: &str) -> Golden {
        let read = |extension: &str| {
            let path = folder().join(format!("{name}.{extension}"));
            std::fs::read(&path).unwrap_or_else(|e| panic!("cannot read {}: {e}", path.display()))
        };
        // Python writes infinities bare, which is not JSON.
        let text = String::from_utf8(read("json"))
            .expect("UTF-8")
            .replace(": Infinity", ": null")
            .replace(": NaN", ": null");
        let json = serde_json::from_str(&text).expect("golden JSON");
        Golden { name: name.to_owned(), json, bytes: read("safetensors") }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("golden safetensors")
    }

    pub fn has(&self, tensor: &str) -> bool {
        self.tensors().tensor(tensor).is_ok()
    }

    /// Shape and values of a tensor of f32, f64 or i64.
    pub fn tensor(&self, tensor: &str) -> (Vec<usize>, Vec<f64>) {
        let tensors = self.tensors();
        let view = tensors.tensor(tensor).unwrap_or_else(|e| panic!("{}: {tensor}: {e}", self.name));
        let data = view.data();
        let values = match view.dtype() {
            Dtype::F32 => data.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
            Dtype::F64 => data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
            Dtype::I64 => data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
            other => panic!("{}: {tensor} is {other:?}", self.name),
        };
        (view.shape().to_vec(), values)
    }

    /// The values alone.
    pub fn values(&self, tensor: &str) -> Vec<f64> {
        self.tensor(tensor).1
    }

    /// [`f32_error`](Golden::f32_error), which Python writes as Infinity or NaN where the
    /// reference overflows.
    pub fn f32_error_or_infinite(&self) -> f64 {
        self.json["f32_torch_error_rel_to_max"]["worst_rel"].as_f64().unwrap_or(f64::INFINITY)
    }

    /// The error that the reference itself makes in f32, relative to a tensor's maximum.
    pub fn f32_error(&self) -> f64 {
        self.json["f32_torch_error_rel_to_max"]["worst_rel"].as_f64().expect("worst_rel")
    }
}

/// Asserts that every element is within `tolerance` times the largest |want|.
#[track_caller]
pub fn assert_close(name: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{name}: number of elements");
    let scale = want.iter().fold(f64::MIN_POSITIVE, |m: f64, x| m.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (got - want).abs() / scale;
        assert!(
            error <= tolerance,
            "{name}[{i}]: got {got}, want {want}, error {error:.2e} > {tolerance:.2e}"
        );
    }
}
