//! One file per verb: its arguments and `run`.

pub mod bench;
pub mod doctor;
pub mod eval;
pub mod generate;
pub mod inspect;
pub mod train;

use xlstm::{Error, ErrorKind};

/// The error of a verb whose engine part is not there yet.
fn not_linked(what: &str) -> Error {
    Error::new(ErrorKind::Config, format!("{what} is not linked into this build yet"))
        .hint("the configuration part of the command worked")
}
