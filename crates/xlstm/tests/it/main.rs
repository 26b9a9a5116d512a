//! Integration tests: one binary, a module a subject.

// Golden files and how to compare with them.
mod golden;
// A recorded pass on the device under test.
mod pass;

// The mLSTM cell against the official ones, in all forms.
mod golden_mlstm;
// The sLSTM and LSTM cells against the official ones.
mod golden_slstm;
// Layers, blocks, the stack and whole language models against the official ones.
mod golden_models;
// Language models of the 7B's family against the official ones: also prefill, steps, generation.
mod golden_large;
// Twenty steps of AdamW against PyTorch's.
mod golden_optimizer;

// The original's model: names, both directions, gradients of both blocks with both cells.
mod original;

// Cuts, resets, padding and neighbours in the batch change nothing, gradients included.
mod equivalence;
// Sequences of features and of unequal lengths; streams, and where their gradients end.
mod streams;
// The number of threads changes no bit; the seed does.
mod threads;
// Accumulation, steps that are not finite, snapshots, graphs.
mod learner;
// Steps of the optimizer, matrices by Muon, against f64.
mod optimizer;
// A step, once taken, is taken again without keeping new memory.
mod memory;
// Training runs, checkpoints, sessions and model folders.
mod training;
// Weights that stay in their files, and in 16 bits.
mod stored;
// Files of weights and folders made to mislead.
mod attacks;
// Folders of other programs: the same results, nothing lost, clear errors.
mod folders;
// Downloads that break off, redirect, or are refused.
#[cfg(feature = "download")]
mod download;
