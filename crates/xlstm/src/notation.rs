//! The symbols of the paper as the code uses them, and what the papers call them.
//!
//! This module holds no code. Names are full words everywhere but in the equations of
//! [`cell`](crate::cell), the layers of [`nn`](crate::nn) and the formulas of backward
//! passes; there only the symbols below are used. The paper is Beck et al.,
//! "xLSTM: Extended Long Short-Term Memory", 2024, arXiv 2405.04517.
//!
//! # Sizes
//!
//! | Symbol | Meaning |
//! |---|---|
//! | B | sequences in a batch |
//! | S | tokens in a sequence, or in the piece of it that a pass sees |
//! | V | token ids in the vocabulary |
//! | D | width of the residual stream: `embedding_dim` |
//! | E | inner width of an mLSTM layer: `proj_factor` D, rounded up |
//! | F | inner width of a feed-forward layer, rounded up |
//! | NH | heads |
//! | DH | width of a head: D / NH in an sLSTM, E / NH in an mLSTM |
//! | dqk, dhv | width of a head's queries and keys, and of its values and outputs; both are DH in the small family |
//! | KS | taps of the causal convolution: `conv1d_kernel_size`; K in its formulas, where no keys are near |
//! | L | tokens in a chunk: `chunk_size`, fewer at an end or before a reset |
//!
//! Activations are (B, S, features), features contiguous; a head is a block of columns.
//!
//! # Both cells
//!
//! | Symbol | Meaning | Shape |
//! |---|---|---|
//! | t, j | a token; a token at or before it | |
//! | ~i, ~f | pre-activations of the input and the forget gate | sLSTM (B, S, D), mLSTM (B, S, NH) |
//! | i, f | the gates: i = exp(~i) or σ(~i), f = σ(~f) or exp(~f) | as ~i, ~f |
//! | m | stabiliser: the running maximum of the exponents, m_t = max(log f_t + m_{t-1}, log i_t); in an sLSTM log i_t where n_{t-1} = 0 | sLSTM (B, D), mLSTM (B, NH) |
//! | h | output of the cell; in the sLSTM it is part of the state | (B, S, D) or (B, S, E) |
//! | dx | gradient of the loss with respect to x | as x |
//! | σ, ∘, . | logistic sigmoid; element-wise product; inner product | |
//!
//! # sLSTM
//!
//! | Symbol | Meaning | Shape |
//! |---|---|---|
//! | ~z, ~o | pre-activations of the cell input and the output gate | (B, S, D) |
//! | R | recurrent weights, a block a head | (NH, 4 DH, DH) |
//! | b | biases of the gates, in the order i, f, z, o | (4 D) |
//! | i', f' | stabilised gates: i' = exp(log i_t - m_t), f' = exp(log f_t + m_{t-1} - m_t) | (B, D) |
//! | c | cell state: c_t = f' c_{t-1} + i' tanh(~z_t) | (B, D) |
//! | n | normaliser: n_t = f' n_{t-1} + i' | (B, D) |
//! | h | h_t = σ(~o_t) c_t / n_t | (B, D) |
//!
//! In the LSTM, both gates being sigmoids, n and m are absent: c_t = f c_{t-1} + i tanh(~z_t)
//! and h_t = σ(~o_t) tanh(c_t).
//!
//! # mLSTM
//!
//! | Symbol | Meaning | Shape |
//! |---|---|---|
//! | q, k, v | query, key, value | (B, S, NH dqk), the same, (B, S, NH dhv) |
//! | s | scale dqk^(-1/2). The paper scales k; here q is scaled where it is used, so that states hold k as it is | |
//! | C | matrix memory: C_t = f' C_{t-1} + i' k_t v_t^T (19; there it is the transpose) | (B, NH, dqk, dhv) |
//! | n | normaliser: n_t = f' n_{t-1} + i' k_t | (B, NH, dqk) |
//! | d | what the normaliser gives a query: d_t = s q_t . n_t | (B, NH, S) |
//! | eps | added to the normaliser of h | |
//! | N | that normaliser: max(\|d_t\|, exp(-m_t)) + eps | (B, NH, S) |
//! | h | h_t = s q_t^T C_t / N_t (21; its output gate is the layer's SiLU(z)) | (B, S, NH dhv) |
//!
//! Of the parallel and the chunkwise form:
//!
//! | Symbol | Meaning | Shape, a head |
//! |---|---|---|
//! | log D | log of the weight of token j at token t, not stabilised: log f_{j+1} + … + log f_t + log i_j | (S, S) |
//! | g, a | decay log f_t + m_{t-1} - m_t and entry log i_t - m_t: the stabilised exponents, both ≤ 0 | (L) |
//! | W | stabilised weights exp(g_{j+1} + … + g_t + a_j) | (L, L) |
//! | e | weight of the state before the chunk: exp(g_1 + … + g_t) | (L) |
//! | A | W ∘ s Q K^T | (L, L) |
//! | Q, K, V | the queries, keys and values of a chunk, a row a token | (L, dqk), the same, (L, dhv) |
//!
//! # Layers
//!
//! | Symbol | Meaning | Shape |
//! |---|---|---|
//! | x, y | input and output of a layer or an operation | (B, S, D) |
//! | a, z | the two halves of the up-projection: the path through the cell, and its gate | (B, S, E) |
//! | c | the convolved path SiLU(conv(a)), from which q and k are made | (B, S, E) |
//! | W_…, b_… | weights (rows are outputs) and biases of a projection | (out, in), (out) |
