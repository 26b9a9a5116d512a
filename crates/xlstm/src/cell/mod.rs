//! The cells of the paper as parameter-free functions of their gate pre-activations and
//! states: sLSTM, LSTM and mLSTM, forward and backward, each with the operation that puts
//! it on a tape.

pub mod mlstm;
pub mod slstm;

use serde::{Deserialize, Serialize};

use crate::engine::Scalar;

/// What becomes of the input gate's pre-activation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InputGate {
    /// i = exp(~i): the paper's.
    #[default]
    Exponential,
    /// i = sigmoid(~i).
    Sigmoid,
}

/// What becomes of the forget gate's pre-activation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ForgetGate {
    /// f = sigmoid(~f): the one that published models use.
    #[default]
    Sigmoid,
    /// f = exp(~f).
    Exponential,
}

impl InputGate {
    /// log i.
    #[inline(always)]
    pub(crate) fn log<T: Scalar>(self, x: T) -> T {
        match self {
            InputGate::Exponential => x,
            InputGate::Sigmoid => x.log_sigmoid(),
        }
    }

    /// d log i / d ~i.
    #[inline(always)]
    pub(crate) fn log_derivative<T: Scalar>(self, x: T) -> T {
        match self {
            InputGate::Exponential => T::ONE,
            InputGate::Sigmoid => (-x).sigmoid(),
        }
    }
}

impl ForgetGate {
    /// log f.
    #[inline(always)]
    pub(crate) fn log<T: Scalar>(self, x: T) -> T {
        match self {
            ForgetGate::Sigmoid => x.log_sigmoid(),
            ForgetGate::Exponential => x,
        }
    }

    /// d log f / d ~f.
    #[inline(always)]
    pub(crate) fn log_derivative<T: Scalar>(self, x: T) -> T {
        match self {
            ForgetGate::Sigmoid => (-x).sigmoid(),
            ForgetGate::Exponential => T::ONE,
        }
    }
}
