//! One file per verb: its arguments and `run`.

pub mod bench;
pub mod doctor;
pub mod eval;
pub mod generate;
pub mod init;
pub mod inspect;
pub mod prepare;
pub mod text;
pub mod train;
