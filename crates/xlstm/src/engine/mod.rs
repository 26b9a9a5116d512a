//! The engine: shapes, the tape, the memory plan and the executor that replays it.
//!
//! The tape knows no operation; an operation (see [`crate::ops`]) knows no tape. What
//! lies between is [`operation`]: a name, a shape rule, forward and backward.

pub mod bf16_products;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod executor;
pub mod integer_products;
pub mod matrix;
pub mod narrow;
pub mod operation;
pub mod plan;
pub mod precision;
pub mod profile;
pub mod program;
pub mod projection;
pub mod quantized;
pub mod scalar;
pub mod shape;
pub mod stored;
pub mod tape;
pub mod vector;

pub use device::{Device, DeviceChoice};
pub use executor::Executor;
pub use matrix::{MatMut, MatRef, product};
pub use operation::{Backward, Forward, Gradient, Kernel, Operation, Slots};
pub use precision::Precision;
pub use profile::OperationTime;
pub use program::{Gradients, Program, Values};
pub use quantized::Code;
pub use scalar::Scalar;
pub use shape::Shape;
pub use stored::{Format, Storable, Stored};
pub use tape::{Ids, Mode, Tape, Var};
