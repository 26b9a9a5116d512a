//! Integration tests.

// Golden files and how to compare with them.
mod golden;

// The sLSTM and LSTM cells against the official ones.
mod golden_slstm;
