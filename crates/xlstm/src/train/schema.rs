//! The JSON Schema of the configuration, `docs/config.schema.json`: generated, and held to the file.
//!
//! Only tests need it, so its dependency is one of the tests. After a change of a key,
//! `XLSTM_WRITE_SCHEMA=1 cargo test -p xlstm --lib schema` writes the file anew.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::StrDeserializer;
use serde::{Deserialize, de};
use serde_json::Value;

use super::{Paths, RunConfig, TextSource, TokenizerChoice};
use crate::cell::slstm::CellFunction;
use crate::cell::{ForgetGate, InputGate};
use crate::data::Batching;
use crate::engine::{DeviceChoice, Precision};
use crate::model::SlstmAt;
use crate::ops::activation::Activation;
use crate::optim::{Decay, MatrixUpdate};

/// What a type that reads itself from YAML takes.
macro_rules! schema {
    ($type:ident, $schema:expr) => {
        impl JsonSchema for $type {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                $schema
            }
        }
    };
}

schema!(InputGate, one_of_words::<InputGate>());
schema!(ForgetGate, one_of_words::<ForgetGate>());
schema!(CellFunction, one_of_words::<CellFunction>());
schema!(Activation, one_of_words::<Activation>());
schema!(Precision, one_of_words::<Precision>());
schema!(Batching, one_of_words::<Batching>());
schema!(Decay, one_of_words::<Decay>());
schema!(MatrixUpdate, one_of_words::<MatrixUpdate>());
schema!(DeviceChoice, json_schema!({ "type": "string", "pattern": "^(auto|cpu|cuda(:[0-9]+)?)$" }));
schema!(TokenizerChoice, json_schema!({ "type": "string", "minLength": 1 }));
schema!(Paths, one_or_more_paths());
schema!(TextSource, one_or_more_paths());
schema!(
    SlstmAt,
    json_schema!({
        "anyOf": [
            { "type": "array", "items": { "type": "integer", "minimum": 0 } },
            { "enum": ["all", "none"] },
            { "type": "string", "pattern": "^[0-9]+:[0-9]+$" },
            { "type": "array", "items": { "type": "string", "pattern": "^[0-9]+:[0-9]+$" }, "maxItems": 1 },
        ]
    })
);

fn one_or_more_paths() -> Schema {
    json_schema!({
        "anyOf": [
            { "type": "string", "minLength": 1 },
            { "type": "array", "items": { "type": "string" }, "minItems": 1 },
        ]
    })
}

/// The words of an enum without fields: those that its reader lists when it is given none of them.
fn one_of_words<T: Deserialize<'static>>() -> Schema {
    let words = T::deserialize(StrDeserializer::<Words>::new("")).err().map_or(&[][..], |words| words.0);
    json_schema!({ "type": "string", "enum": words })
}

/// The error of a reader, of which only the words that it expected are kept.
#[derive(Debug)]
struct Words(&'static [&'static str]);

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "expected one of {:?}", self.0)
    }
}

impl std::error::Error for Words {}

impl de::Error for Words {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Words(&[])
    }

    fn unknown_variant(_: &str, expected: &'static [&'static str]) -> Self {
        Words(expected)
    }
}

fn generated() -> Value {
    let mut schema = schemars::schema_for!(RunConfig);
    schema.insert("title".into(), "Configuration of an xlstm training run".into());
    schema.to_value()
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Collects the dotted keys of `value` that `schema`, a part of `root`, does not know.
fn unknown_keys(root: &Value, schema: &Value, value: &Value, path: &str, found: &mut Vec<String>) {
    let reference = schema["$ref"].as_str().and_then(|place| root.pointer(place.trim_start_matches('#')));
    let schema = reference.unwrap_or(schema);
    let Some(map) = value.as_object() else { return };
    for (key, value) in map {
        match schema["properties"].get(key) {
            Some(inner) => unknown_keys(root, inner, value, &format!("{path}{key}."), found),
            None => found.push(format!("{path}{key}")),
        }
    }
}

#[test]
fn the_file_is_what_the_types_say() {
    let path = repository().join("docs/config.schema.json");
    let schema = generated();
    if std::env::var_os("XLSTM_WRITE_SCHEMA").is_some() {
        std::fs::write(&path, serde_json::to_string_pretty(&schema).unwrap() + "\n").unwrap();
    }
    let file: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    assert!(
        file == schema,
        "docs/config.schema.json is not of this configuration; write it anew with\n  \
         XLSTM_WRITE_SCHEMA=1 cargo test -p xlstm --lib schema"
    );
}

#[test]
fn every_key_is_in_the_schema() {
    let schema = generated();
    let built_in = repository().join("crates/xlstm-cli/configs/shakespeare.yaml");
    let built_in: Value = serde_saphyr::from_str(&std::fs::read_to_string(built_in).unwrap()).unwrap();
    let all = serde_json::to_value(RunConfig::default()).unwrap();
    for config in [built_in, all] {
        let mut unknown = Vec::new();
        unknown_keys(&schema, &schema, &config, "", &mut unknown);
        assert!(unknown.is_empty(), "{unknown:?}");
    }
    assert_eq!(schema["additionalProperties"], false);
    assert_eq!(
        schema.pointer("/$defs/ScheduleConfig/properties/decay/enum"),
        Some(&serde_json::json!(["cosine", "linear", "constant"]))
    );
}
