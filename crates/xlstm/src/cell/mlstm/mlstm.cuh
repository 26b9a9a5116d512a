// The mLSTM cell on a GPU: the chunkwise form, forward and backward, and the decode step.
//
// The equations are those of chunkwise.rs and chunkwise_backward.rs, with two differences of
// shape. Chunks have L = 64 tokens at fixed places; a reset inside one clears the weights that
// would cross it (W_tj, e_t, w_j = 0) instead of ending the chunk. And the work is spread over
// all chunks at once: only the stabiliser and the states walk along the sequence.
//
// In bf16 head sizes that are multiples of 8 take the kernels of mlstm_wide.cuh instead, but for one
// token.
//
//   forward    mlstm_gates -> mlstm_scores -> mlstm_states -> mlstm_outputs
//   one token  mlstm_step
//   backward   mlstm_backward_tokens -> mlstm_backward_scores -> mlstm_states (last states null)
//              -> mlstm_backward_states -> mlstm_backward_values, mlstm_backward_keys
//              -> mlstm_backward_gates -> mlstm_backward_unwind
//
// Sizes: B sequences, S tokens, NH heads, dqk, dhv >= 1, all free; N = ceil(S / 64) chunks;
// TQ = ceil(dqk / 64), TV = ceil(dhv / 64) tiles. The grid's y and z limits ask for
// B NH <= 65535 and N <= 65535. Everything is ordered by sequence first, so that a caller may
// run any slice of the sequences with a smaller work space.
//
// Tensors (row-major): q, k, dq, dk (B, S, NH, dqk), v, h, dh, dv (B, S, NH, dhv): element_t.
// ~i, ~f and their gradients (B, S, NH): f32. marks (B, S) u32 or null. C0 (B, NH, dqk, dhv),
// n0 (B, NH, dqk), m0 (B, NH): f32, all three null for an empty state. Saved, f32:
// stabilizers m and denominators d (B, NH, S).
// Work space of element_t, operands of products; [x] is x rounded up to a multiple of 8:
//   scores    A (B, NH, N, 64, 64); in backward A / normaliser
//   keys      w K (B, NH, N, 64, [dqk])
//   states    C before every chunk (B, NH, N, dqk, [dhv])
// and in backward alone:
//   queries   s e / normaliser Q, as keys
//   pairs     s W P, as scores
//   dstates   dC after every chunk, as states
// Work space of f32, in forward and backward:
//   e         (B, NH, N, 64)
//   normals   n before every chunk (B, NH, N, dqk); until mlstm_states, what a chunk adds to it
// in forward alone:
//   sums      A 1 (B, NH, N, 64)
// and in backward alone:
//   dnormals  dn after every chunk; until mlstm_backward_states, what a chunk adds to it
//   w         (B, NH, N, 64)
//   inverse, dd, dm    1 / normaliser, gradients of d and m (B, NH, N, 64) each
//   di, df    (B, NH, N, 64) each
//   arriving, leaving  (TQ, B, NH, N, 64) each
//   crossing  (TQ, B, NH, N)
//   inner_last, inner_first  (B, NH, TQ TV) each
// flags: 1 sigmoid input gate, 2 exponential forget gate, 4 divide by the normaliser.
// Every output is written whole; gradients are added to what is there; a null gradient is not
// wanted (given: is zero, but for dh, which is there).
//
// In bf16 what is rounded is q, k, v, h, their gradients and the operands above. The normaliser
// is a sum with much cancellation that h is divided by, so all of n and d is f32.
//
// The floors, of a chunk of one head (dqk = d, dhv = v): forward has 128 (d + v) 64 + 256 d v
// operations (two products a state, two a pair of tokens) and moves 2 d v numbers of states and
// 64 (5 d + 3 v) of tokens; backward 128 (3 d + 2 v) 64 + 640 d v, and 5 d v of states. At 2 bytes a
// number that is some 64 operations a byte of states, a fifth of what a tensor core does while a
// byte arrives: memory is the limit, the states most of it. Hence states in bf16, written
// and read in whole sectors, and every pass over them shared by as many products as there are.

#define L 64
#define SIGMOID_INPUT 1
#define EXPONENTIAL_FORGET 2
#define NORMALIZE 4
#define ALL 0xffffffffu

// ---- Gates and the stabiliser ----

__device__ __forceinline__ float empty_stabilizer(int flags) {
    return flags & SIGMOID_INPUT ? -1e30f : 0.0f;
}
__device__ __forceinline__ float log_input(float x, int flags) {
    return flags & SIGMOID_INPUT ? log_sigmoid(x) : x;
}
__device__ __forceinline__ float log_forget(float x, int flags) {
    return flags & EXPONENTIAL_FORGET ? x : log_sigmoid(x);
}
__device__ __forceinline__ bool is_reset(unsigned mark) { return (mark & (RESET | PAD)) == RESET; }
__device__ __forceinline__ bool is_pad(unsigned mark) { return mark & PAD; }

/// m before the first token. Called by whole warps.
__device__ float initial_stabilizer(const float *n0, const float *m0, int bh, int dqk, int flags) {
    if (!m0) return empty_stabilizer(flags);
    if (flags & SIGMOID_INPUT) {
        bool filled = false;
        for (int r = threadIdx.x & 31; r < dqk; r += 32) filled |= n0[(long long)bh * dqk + r] != 0.0f;
        if (!__any_sync(ALL, filled)) return empty_stabilizer(flags);
    }
    return m0[bh];
}

/// The normaliser, given d and m.
__device__ __forceinline__ float normalizer(float d, float m, float eps, int flags) {
    float low = expf(-m);
    if (!(flags & NORMALIZE)) return low;
    return fmaxf(fabsf(d), low) + (flags & SIGMOID_INPUT ? eps * low : eps);
}

/// One token's log i, log f and mark; a token past the end is a pad.
struct Gate {
    float log_i, log_f;
    unsigned mark;
};
__device__ __forceinline__ Gate gate_of(
    const float *i, const float *f, const unsigned *marks, int b, int head, int t, int S, int NH, int flags
) {
    if (t >= S) return {NEG_INFINITY, 0.0f, PAD};
    long long token = (long long)b * S + t;
    unsigned mark = marks ? marks[token] : 0;
    if (is_pad(mark)) return {NEG_INFINITY, 0.0f, mark};
    return {log_input(i[token * NH + head], flags), log_forget(f[token * NH + head], flags), mark};
}

/// decay = log f + m_{t-1} - m_t and entry = log i - m_t of a token, given both m.
__device__ __forceinline__ void exponents(Gate gate, float before, float m, int flags, float *decay, float *entry) {
    if (is_reset(gate.mark)) before = empty_stabilizer(flags);
    *decay = __fsub_rn(__fadd_rn(gate.log_f, before), m);
    *entry = __fsub_rn(gate.log_i, m);
}

/// What the gates and the stabiliser are read from.
struct Gates {
    const float *i, *f;
    const unsigned *marks;
    const float *n0, *m0, *stabilizers;
};
/// The weights of a chunk.
struct Weights {
    /// Zero above the diagonal.
    float W[L][L + 1];
    /// The last row of W, and e.
    float w[L], e[L];
    float decay[L], entry[L];
};
/// The exponents are sums from each token on, never differences. A barrier at the end.
__device__ void chunk_weights(const Gates &gates, Weights &to, int bh, int chunk, int S, int NH, int dqk, int flags) {
    int tid = threadIdx.x, start = chunk * L;
    if (tid < L) {
        float first = chunk == 0 ? initial_stabilizer(gates.n0, gates.m0, bh, dqk, flags) : 0.0f;
        int t = start + tid;
        Gate gate = gate_of(gates.i, gates.f, gates.marks, bh / NH, bh % NH, t, S, NH, flags);
        const float *m = gates.stabilizers + (long long)bh * S;
        float g = 0.0f, a = NEG_INFINITY;
        if (t < S) exponents(gate, t > 0 ? m[t - 1] : first, m[t], flags, &g, &a);
        to.decay[tid] = is_reset(gate.mark) ? NEG_INFINITY : g;
        to.entry[tid] = a;
    }
    __syncthreads();
    if (tid <= L) {
        // Column j of W, and for j = L what is left of the state.
        bool state = tid == L;
        float exponent = 0.0f, entry = state ? 0.0f : to.entry[tid], weight = 0.0f;
        float *at = state ? to.e : &to.W[0][tid];
#pragma unroll 8
        for (int t = 0; t < L; t++) {
            exponent = t == tid ? entry : exponent + to.decay[t];
            weight = state || t >= tid ? expf(exponent) : 0.0f;
            at[state ? t : t * (L + 1)] = weight;
        }
        if (!state) to.w[tid] = weight;
    }
    __syncthreads();
}
