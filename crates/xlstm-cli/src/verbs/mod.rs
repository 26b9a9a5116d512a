//! One file per verb: its arguments and `run`.

pub mod bench;
pub mod convert;
pub mod doctor;
pub mod eval;
pub mod generate;
pub mod init;
pub mod inspect;
pub mod model;
pub mod prepare;
#[cfg(feature = "download")]
pub mod pull;
pub mod text;
pub mod train;
