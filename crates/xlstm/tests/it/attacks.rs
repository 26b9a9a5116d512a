//! Files and folders made to mislead: each is refused with an error that names the file, what
//! was expected and what was found. The files are a few lines each and written here.

use std::path::{Path, PathBuf};

use xlstm::engine::Storable;
use xlstm::folder::tensors::{TensorFile, TensorFiles};
use xlstm::folder::weights::{Recipe, WeightFiles};
use xlstm::nn::{Builder, Init, ParameterSpec};

/// A folder of its own for one test, removed with it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("xlstm-attack-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).expect("a folder");
        Folder(path)
    }

    fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, content).expect("written");
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A file with this header and so many bytes after it.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 1);
    bytes
}

fn tensor(dtype: &str, shape: &str, begin: u64, end: u64) -> String {
    format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
}

/// Every text is in the error, and there is a hint.
fn says(error: &xlstm::Error, texts: &[&str]) {
    let message = error.to_string();
    for text in texts {
        assert!(message.contains(text), "expected {text:?} in: {message}");
    }
    assert!(error.hint_text().is_some(), "no hint: {message}");
}

#[test]
fn lying_headers_are_refused() {
    let folder = Folder::new("headers");
    let one = |entry: String| format!(r#"{{"w":{entry}}}"#);
    let two = |a: String, b: String| format!(r#"{{"a":{a},"b":{b}}}"#);
    let huge = "[4294967296,4294967296,4294967296]";
    let mut longest = file("{}", 0);
    longest[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("empty", vec![], &["at least 8 bytes", "found 0"]),
        ("short", vec![1; 7], &["at least 8 bytes", "found 7"]),
        ("length", longest, &["header claims 18446744073709551615 bytes", "2 follow"]),
        ("cut", file("{}", 0)[..9].to_vec(), &["header claims 2 bytes", "1 follow"]),
        ("json", file("{\"w\":", 0), &["no JSON of tensors"]),
        ("array", file("[]", 0), &["no JSON of tensors"]),
        ("text", vec![8, 0, 0, 0, 0, 0, 0, 0, 255, 254, 255, 254, 1, 2, 3, 4], &["no JSON of tensors"]),
        ("entry", file(r#"{"w":{"dtype":"F32"}}"#, 0), &["tensor w", "shape"]),
        ("negative", file(&one(tensor("F32", "[-1]", 0, 4)), 4), &["tensor w", "-1"]),
        ("dtype", file(&one(tensor("F33", "[1]", 0, 4)), 4), &["tensor w", "F33"]),
        ("beyond", file(&one(tensor("F32", "[2]", 0, 8)), 4), &["tensor w", "within 4 bytes", "0..8"]),
        ("backward", file(&one(tensor("F32", "[1]", 4, 0)), 8), &["tensor w", "4..0"]),
        ("wrong size", file(&one(tensor("F32", "[3]", 0, 8)), 8), &["tensor w", "takes 12 bytes", "has 8"]),
        ("overflow", file(&one(tensor("F32", huge, 0, 4)), 4), &["tensor w", "more bytes than"]),
        (
            "overlap",
            file(&two(tensor("F32", "[2]", 0, 8), tensor("F32", "[2]", 4, 12)), 12),
            &["tensor b overlaps", "at byte 8", "found 4"],
        ),
        (
            "same place",
            file(&two(tensor("F32", "[2]", 0, 8), tensor("F32", "[2]", 0, 8)), 8),
            &["tensor b overlaps", "at byte 8", "found 0"],
        ),
        (
            "hole",
            file(&two(tensor("F32", "[1]", 0, 4), tensor("F32", "[1]", 8, 12)), 12),
            &["tensor b leaves a hole", "at byte 4", "found 8"],
        ),
        ("more", file(&one(tensor("F32", "[1]", 0, 4)), 9), &["take 4 bytes", "9 follow"]),
        (
            "twice",
            file(&format!(r#"{{"w":{0},"w":{0}}}"#, tensor("F32", "[1]", 0, 4)), 4),
            &["tensor w is there twice"],
        ),
        ("metadata", file(r#"{"__metadata__":{"a":1}}"#, 0), &["metadata"]),
    ];
    for (name, bytes, texts) in cases {
        let path = folder.write(&format!("{name}.safetensors"), &bytes);
        let error = TensorFile::open(&path).expect_err(name);
        says(&error, texts);
        says(&error, &[&format!("{name}.safetensors")]);
    }
    let sound = file(&two(tensor("BF16", "[2,2]", 0, 8), tensor("F32", "[0,7]", 8, 8)), 8);
    let sound = TensorFile::open(&folder.write("sound.safetensors", &sound)).expect("a sound file");
    assert_eq!(sound.get("a").expect("a tensor").to_f32().expect("numbers").len(), 4);
    assert!(TensorFile::open(&folder.0).is_err(), "a folder is no file");
}

#[test]
fn an_index_reads_nothing_outside_its_folder() {
    let folder = Folder::new("index");
    let model = folder.0.join("model");
    std::fs::create_dir(&model).expect("a folder");
    let sound = file(&format!(r#"{{"w":{}}}"#, tensor("F32", "[1]", 0, 4)), 4);
    let outside = folder.write("outside.safetensors", &sound);
    std::fs::write(model.join("part.safetensors"), &sound).expect("written");
    std::fs::create_dir(model.join("inner")).expect("a folder");
    std::fs::write(model.join("inner/part.safetensors"), &sound).expect("written");
    let index = |map: &str| {
        let text = format!(r#"{{"weight_map":{map}}}"#);
        std::fs::write(model.join("model.safetensors.index.json"), text).expect("written");
        TensorFiles::open(&model)
    };
    let absolute = format!(r#"{{"w":"{}"}}"#, outside.display());
    for map in
        [r#"{"w":"../outside.safetensors"}"#, r#"{"w":"inner/part.safetensors"}"#, &absolute, r#"{"w":".."}"#]
    {
        says(&index(map).expect_err(map), &["model", "expected a file in this folder"]);
    }
    says(&index(r#"{"w":"gone.safetensors"}"#).expect_err("a missing file"), &["gone.safetensors"]);
    says(&index(r#"{"w":"part.safetensors","v":"part.safetensors"}"#).expect_err("missing"), &["tensor v"]);
    says(&index("{}").expect_err("no files"), &["index.json", "names no tensor"]);
    says(&index("[]").expect_err("no index"), &["index.json", "no index of tensors"]);
    let names: Vec<String> =
        index(r#"{"w":"part.safetensors"}"#).expect("a model").names().map(str::to_owned).collect();
    assert_eq!(names, ["w"]);
    let more = file(&format!(r#"{{"v":{}}}"#, tensor("F32", "[1]", 0, 4)), 4);
    std::fs::write(model.join("more.safetensors"), more).expect("written");
    let error = index(r#"{"v":"part.safetensors","w":"more.safetensors"}"#).expect_err("swapped");
    says(&error, &["part.safetensors", "tensor v", "more.safetensors does"]);
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(&outside, model.join("link.safetensors")).expect("a link");
        says(
            &index(r#"{"w":"link.safetensors"}"#).expect_err("a link"),
            &["link.safetensors", "outside.safetensors"],
        );
        std::os::unix::fs::symlink("inner/part.safetensors", model.join("good.safetensors")).expect("a link");
        index(r#"{"w":"good.safetensors"}"#).expect("a link within the folder");
    }
}

/// The Hub's cache keeps the files of a model beside its snapshots and links to them.
#[cfg(unix)]
#[test]
fn links_into_the_hub_cache_are_followed() {
    let folder = Folder::new("hub");
    let snapshot = folder.0.join("models--a--b/snapshots/1");
    let blobs = folder.0.join("models--a--b/blobs");
    std::fs::create_dir_all(&snapshot).expect("a folder");
    std::fs::create_dir_all(&blobs).expect("a folder");
    let sound = file(&format!(r#"{{"w":{}}}"#, tensor("F32", "[1]", 0, 4)), 4);
    std::fs::write(blobs.join("hash"), &sound).expect("written");
    folder.write("stray", &sound);
    let link = snapshot.join("model.safetensors");
    std::os::unix::fs::symlink("../../blobs/hash", &link).expect("a link");
    TensorFiles::open(&snapshot).expect("a model");
    std::fs::remove_file(&link).expect("removed");
    std::os::unix::fs::symlink("../../../stray", &link).expect("a link");
    says(&TensorFiles::open(&snapshot).expect_err("elsewhere"), &["model.safetensors is a link to", "stray"]);
}

#[test]
fn numbered_files_are_one_model_and_hold_each_tensor_once() {
    let folder = Folder::new("numbered");
    says(&TensorFiles::open(&folder.0).expect_err("nothing"), &["holds no weights", "model_N.safetensors"]);
    let of = |name: &str| file(&format!(r#"{{"{name}":{}}}"#, tensor("F32", "[1]", 0, 4)), 4);
    folder.write("model_0.safetensors", &of("a"));
    folder.write("model_10.safetensors", &of("b"));
    assert_eq!(TensorFiles::open(&folder.0).expect("a model").names().count(), 2);
    folder.write("model_2.safetensors", &of("b"));
    let error = TensorFiles::open(&folder.0).expect_err("twice");
    says(&error, &["model_10.safetensors", "model_2.safetensors", "both hold tensor b"]);
}

fn specs(shape: &[usize]) -> std::sync::Arc<[ParameterSpec]> {
    let mut builder = Builder::new();
    builder.parameter("w", shape, Init::Constant(0.0));
    builder.finish()
}

fn placed(path: &Path, shape: &[usize], recipe: Recipe) -> xlstm::Result<WeightFiles> {
    let files = TensorFiles::open(path).expect("sound files");
    WeightFiles::new(path, &files, &specs(shape), |_| recipe.clone())
}

#[test]
fn weights_that_do_not_fit_are_refused_before_they_are_read() {
    let folder = Folder::new("weights");
    let header = format!(r#"{{"f":{},"i":{}}}"#, tensor("F16", "[4,3]", 0, 24), tensor("I64", "[3]", 24, 48));
    folder.write("model.safetensors", &file(&header, 48));
    let fails = |shape: &[usize], recipe: Recipe| placed(&folder.0, shape, recipe).expect_err("refused");
    says(&fails(&[4, 3], Recipe::tensor("w")), &["model.safetensors", "lacks the tensor w", "[4, 3]"]);
    says(&fails(&[3, 4], Recipe::tensor("f")), &["model.safetensors", "[3, 4]", "parameter w", "f [4, 3]"]);
    says(&fails(&[3], Recipe::tensor("i")), &["model.safetensors", "tensor i is I64", "F32, BF16 or F16"]);
    says(&fails(&[3, 3], Recipe::rows("f", 2..5)), &["model.safetensors", "rows 2..5", "has 4"]);
    says(&fails(&[9, 3], Recipe::stacked(["f", "f"])), &["[9, 3]", "f [4, 3], f [4, 3]"]);
    let whole = placed(&folder.0, &[4, 3], Recipe::tensor("f")).expect("a model");
    assert_eq!(whole.unused(), ["i"]);
    let all = whole.parameters().values.remove(0);
    let rows = placed(&folder.0, &[2, 3], Recipe::rows("f", 1..3)).expect("a model");
    assert_eq!(rows.parameters().values[0], all[3..9]);
    let twice = placed(&folder.0, &[8, 3], Recipe::stacked(["f", "f"])).expect("a model");
    assert_eq!(twice.parameters().values[0], [&all[..], &all[..]].concat());
    // One piece stays where it is; two are copied, in 16 bits.
    assert_eq!(rows.stored(&[Storable::Half])[0].copied_bytes(), 0);
    assert_eq!(twice.stored(&[Storable::Half])[0].copied_bytes(), 48);
    assert_eq!(twice.stored(&[Storable::Wide])[0].copied_bytes(), 96);
}

#[test]
fn quantised_weights_come_with_the_scales_of_all_groups() {
    let folder = Folder::new("quantised");
    let fails = |entries: &[String], bytes: usize, texts: &[&str]| {
        folder.write("model.safetensors", &file(&format!("{{{}}}", entries.join(",")), bytes));
        let error = placed(&folder.0, &[2, 64], Recipe::tensor("w")).expect_err("refused");
        says(&error, &[&["model.safetensors", "tensor w is int8"], texts].concat());
    };
    let codes = format!(r#""w":{}"#, tensor("I8", "[2,64]", 0, 128));
    fails(std::slice::from_ref(&codes), 128, &["no tensor w.scales"]);
    let scales = |dtype: &str, shape: &str, end: u64| {
        [codes.clone(), format!(r#""w.scales":{}"#, tensor(dtype, shape, 128, end))]
    };
    fails(&scales("BF16", "[2,1]", 132), 132, &["BF16 [2, 2]", "found w.scales [2, 1]"]);
    fails(&scales("F16", "[2,2]", 136), 136, &["BF16 [2, 2]"]);
    // Rows that are no whole number of groups.
    let ragged = [
        format!(r#""w":{}"#, tensor("I8", "[2,40]", 0, 80)),
        format!(r#""w.scales":{}"#, tensor("BF16", "[2,1]", 80, 84)),
    ];
    fails(&ragged, 84, &["a matrix of whole groups"]);
    let sound = scales("BF16", "[2,2]", 136);
    folder.write("model.safetensors", &file(&format!("{{{}}}", sound.join(",")), 136));
    let whole = placed(&folder.0, &[2, 64], Recipe::tensor("w")).expect("a matrix");
    assert!(whole.unused().is_empty());
    assert!(whole.stored(&[Storable::Quantized])[0].copied_bytes() <= 8, "codes stay in the file");
    assert_eq!(whole.stored(&[Storable::Half])[0].copied_bytes(), 512);
    let row = placed(&folder.0, &[1, 64], Recipe::rows("w", 1..2)).expect("a row");
    assert_eq!(row.parameters().values[0], whole.parameters().values[0][64..]);
}
