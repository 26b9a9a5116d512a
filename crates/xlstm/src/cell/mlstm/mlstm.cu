// The mLSTM cell on a GPU: the chunkwise form, forward and backward, and the decode step.
//
// The equations are those of chunkwise.rs and chunkwise_backward.rs, with two differences of
// shape. Chunks have L = 64 tokens at fixed places; a reset inside one clears the weights that
// would cross it (W_tj, e_t, w_j = 0) instead of ending the chunk. And the work is spread over
// all chunks at once: only the stabiliser and the states walk along the sequence.
//
//   forward    mlstm_gates -> mlstm_scores -> mlstm_states -> mlstm_outputs
//   one token  mlstm_step
//   backward   mlstm_backward_tokens -> mlstm_backward_scores -> mlstm_states (last states null)
//              -> mlstm_backward_states -> mlstm_backward_values, mlstm_backward_keys
//              -> mlstm_backward_gates -> mlstm_backward_unwind
//
// Sizes: B sequences, S tokens, NH heads, dqk, dhv >= 1, all free; N = ceil(S / 64) chunks;
// TQ = ceil(dqk / 64), TV = ceil(dhv / 64) tiles. The grid's y and z limits ask for
// B NH <= 65535 and N <= 65535. No kernel uses dynamic shared memory. Everything is ordered by
// sequence first, so that a caller may run any slice of the sequences with a smaller work space.
//
// Tensors (row-major): q, k, dq, dk (B, S, NH, dqk), v, h, dh, dv (B, S, NH, dhv): element_t.
// ~i, ~f and their gradients (B, S, NH): gate_t. marks (B, S) u32 or null. C0 (B, NH, dqk, dhv),
// n0 (B, NH, dqk), m0 (B, NH): f32, all three null for an empty state. Saved, f32:
// stabilizers m and denominators d (B, NH, S).
// Work space, f32, in forward and backward:
//   scores    A (B, NH, N, 64, 64)
//   w, e      (B, NH, N, 64) each
//   states    C before every chunk (B, NH, N, dqk, dhv)
//   normals   n before every chunk (B, NH, N, dqk)
// and in backward alone:
//   pairs     s W P (B, NH, N, 64, 64)
//   dstates, dnormals  dC, dn after every chunk, as states and normals
//   inverse, dd, dm    1 / normaliser, gradients of d and m (B, NH, N, 64) each
//   di, df    (B, NH, N, 64) each
//   arriving, leaving  (TQ, B, NH, N, 64) each
//   crossing  (TQ, B, NH, N)
//   inner_last, inner_first  (B, NH, TQ TV) each
// flags: 1 sigmoid input gate, 2 exponential forget gate, 4 divide by the normaliser.
// Every output is written whole; gradients are added to what is there; a null gradient is not
// wanted (given: is zero).

#define L 64
#define DEPTH 32
#define PITCH 68
#define THREADS 256
#define SIGMOID_INPUT 1
#define EXPONENTIAL_FORGET 2
#define NORMALIZE 4

typedef float Tile[DEPTH][PITCH];

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

/// m before the first token. Called by one whole warp.
__device__ float initial_stabilizer(const float *n0, const float *m0, int bh, int dqk, int flags) {
    if (!m0) return empty_stabilizer(flags);
    if (flags & SIGMOID_INPUT) {
        bool filled = false;
        for (int r = threadIdx.x & 31; r < dqk; r += 32) filled |= n0[(long long)bh * dqk + r] != 0.0f;
        if (!__any_sync(0xffffffffu, filled)) return empty_stabilizer(flags);
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
    const gate_t *i, const gate_t *f, const unsigned *marks, int b, int head, int t, int S, int NH, int flags
) {
    if (t >= S) return {NEG_INFINITY, 0.0f, PAD};
    long long token = (long long)b * S + t;
    unsigned mark = marks ? marks[token] : 0;
    if (is_pad(mark)) return {NEG_INFINITY, 0.0f, mark};
    return {log_input(load(i + token * NH + head), flags), log_forget(load(f + token * NH + head), flags), mark};
}

/// decay = log f + m_{t-1} - m_t and entry = log i - m_t of a token, given both m.
__device__ __forceinline__ void exponents(Gate gate, float before, float m, int flags, float *decay, float *entry) {
    if (is_reset(gate.mark)) before = empty_stabilizer(flags);
    *decay = __fsub_rn(__fadd_rn(gate.log_f, before), m);
    *entry = __fsub_rn(gate.log_i, m);
}

/// W (64 x 65 in shared memory, zero above the diagonal), w (its last row) and e of a chunk; the
/// exponents are sums from each token on, never differences. Called by all 256 threads; a barrier
/// at the end.
__device__ void chunk_weights(
    const gate_t *i, const gate_t *f, const unsigned *marks, const float *n0, const float *m0,
    const float *stabilizers, float (*W)[L + 1], float *w, float *e, int bh, int chunk, int S, int NH, int dqk,
    int flags
) {
    __shared__ float decay[L], entry[L];
    __shared__ unsigned char cleared[L];
    int tid = threadIdx.x, start = chunk * L;
    if (tid < L) {
        float first = chunk == 0 ? initial_stabilizer(n0, m0, bh, dqk, flags) : 0.0f;
        int t = start + tid;
        Gate gate = gate_of(i, f, marks, bh / NH, bh % NH, t, S, NH, flags);
        const float *m = stabilizers + (long long)bh * S;
        float g = 0.0f, a = NEG_INFINITY;
        if (t < S) exponents(gate, t > 0 ? m[t - 1] : first, m[t], flags, &g, &a);
        decay[tid] = g;
        entry[tid] = a;
        cleared[tid] = is_reset(gate.mark);
    }
    __syncthreads();
    if (tid <= L) {
        // Column j of W, and for j = L what is left of the state.
        bool state = tid == L;
        float exponent = 0.0f;
        for (int t = 0; t < L; t++) {
            exponent = cleared[t] && (state || t > tid) ? NEG_INFINITY : exponent + decay[t];
            if (!state && t == tid) exponent = entry[t];
            float weight = state || t >= tid ? expf(exponent) : 0.0f;
            if (state) e[t] = weight;
            else W[t][tid] = weight;
        }
        if (!state) w[tid] = W[L - 1][tid];
    }
    __syncthreads();
}

// ---- Tiles ----

/// Some rows of a matrix; zero outside.
template <class T> struct Rows {
    const T *from;
    long long stride;
    int rows, width;
    __device__ __forceinline__ float at(int row, int column) const {
        return row < rows && column < width ? load(from + row * stride + column) : 0.0f;
    }
};

/// The tokens of a chunk, of one head; none of a null tensor.
template <class T>
__device__ __forceinline__ Rows<T> tokens(const T *x, int bh, int chunk, int S, int NH, int width) {
    if (!x) return {x, 0, 0, 0};
    int start = chunk * L;
    long long stride = (long long)NH * width;
    long long at = ((long long)(bh / NH) * S + start) * stride + (long long)(bh % NH) * width;
    return {x + at, stride, min(L, S - start), width};
}

/// tile[k][c] = value(k, c), neighbouring threads at neighbouring c.
template <class F> __device__ __forceinline__ void fill(Tile tile, F value) {
    for (int x = threadIdx.x; x < DEPTH * L; x += THREADS) tile[x / L][x % L] = value(x / L, x % L);
}
/// tile[k][c] = value(k, c), neighbouring threads at neighbouring k.
template <class F> __device__ __forceinline__ void fill_transposed(Tile tile, F value) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int block = warp; block < 64; block += THREADS / 32) {
        int k = block % 4 * 8 + lane % 8, c = block / 4 * 4 + lane / 8;
        tile[k][c] = value(k, c);
    }
}
/// sum += left^T right: a thread holds rows 4 (tid / 16) + r, columns 4 (tid % 16) + c of 64 x 64.
__device__ __forceinline__ void multiply(const Tile left, const Tile right, float sum[4][4]) {
    int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
#pragma unroll 8
    for (int k = 0; k < DEPTH; k++) {
        float4 a = *(const float4 *)&left[k][row], b = *(const float4 *)&right[k][column];
        float x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int r = 0; r < 4; r++)
#pragma unroll
            for (int c = 0; c < 4; c++) sum[r][c] = fmaf(x[r], y[c], sum[r][c]);
    }
}
#define EACH(r, c)                                                                                         \
    _Pragma("unroll") for (int r = 0; r < 4; r++) _Pragma("unroll") for (int c = 0; c < 4; c++)
#define ROW(r) ((int)threadIdx.x / 16 * 4 + (r))
#define COLUMN(c) ((int)threadIdx.x % 16 * 4 + (c))

/// sum = Q K^T over all features.
__device__ __forceinline__ void query_keys(
    Rows<element_t> q, Rows<element_t> k, int dqk, Tile left, Tile right, float sum[4][4]
) {
    for (int at = 0; at < dqk; at += DEPTH) {
        __syncthreads();
        fill_transposed(left, [&](int x, int t) { return q.at(t, at + x); });
        fill_transposed(right, [&](int x, int j) { return k.at(j, at + x); });
        __syncthreads();
        multiply(left, right, sum);
    }
}

/// Sum over the block, valid in thread 0; fixed order.
__device__ float block_sum(float x) {
    __shared__ float parts[THREADS / 32];
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0.0f;
    for (int i = 0; i < THREADS / 32; i++) total += parts[i];
    return total;
}

// ---- Forward ----

/// m_t = max(log f_t + m_{t-1}, log i_t) of every token, and the last one.
/// grid (B NH), block 32. Out: stabilizers (B, NH, S), m (B, NH).
extern "C" __global__ void __launch_bounds__(32) mlstm_gates(
    const gate_t *i, const gate_t *f, const unsigned *marks, const float *n0, const float *m0,
    float *stabilizers, float *m_last, int S, int NH, int dqk, int flags
) {
    int bh = blockIdx.x, lane = threadIdx.x;
    float m = initial_stabilizer(n0, m0, bh, dqk, flags);
    for (int start = 0; start < S; start += 32) {
        Gate gate = gate_of(i, f, marks, bh / NH, bh % NH, start + lane, S, NH, flags);
        unsigned resets = __ballot_sync(0xffffffffu, is_reset(gate.mark));
        float mine = 0.0f;
        for (int t = 0; t < 32; t++) {
            float log_f = __shfl_sync(0xffffffffu, gate.log_f, t);
            float log_i = __shfl_sync(0xffffffffu, gate.log_i, t);
            if (resets >> t & 1) m = empty_stabilizer(flags);
            m = fmaxf(__fadd_rn(log_f, m), log_i);
            if (t == lane) mine = m;
        }
        if (start + lane < S) stabilizers[(long long)bh * S + start + lane] = mine;
    }
    if (lane == 0) m_last[bh] = m;
}

/// A = W ∘ s Q K^T, w_j = W_Lj and e_t of every chunk.
/// grid (N, B NH), block 256.
extern "C" __global__ void __launch_bounds__(THREADS) mlstm_scores(
    const element_t *q, const element_t *k, const gate_t *i, const gate_t *f, const unsigned *marks,
    const float *n0, const float *m0, const float *stabilizers, float *scores, float *w, float *e, int S, int NH,
    int dqk, int flags
) {
    __shared__ __align__(16) Tile left, right;
    __shared__ float W[L][L + 1], last[L], state[L];
    int chunk = blockIdx.x, bh = blockIdx.y, tid = threadIdx.x;
    long long at = (long long)bh * gridDim.x + chunk;
    chunk_weights(i, f, marks, n0, m0, stabilizers, W, last, state, bh, chunk, S, NH, dqk, flags);
    if (tid < L) {
        w[at * L + tid] = last[tid];
        e[at * L + tid] = state[tid];
    }
    float sum[4][4] = {};
    query_keys(tokens(q, bh, chunk, S, NH, dqk), tokens(k, bh, chunk, S, NH, dqk), dqk, left, right, sum);
    float scale = 1.0f / sqrtf((float)dqk);
    EACH(r, c) scores[(at * L + ROW(r)) * L + COLUMN(c)] = W[ROW(r)][COLUMN(c)] * scale * sum[r][c];
}

/// C and n before every chunk, C' = e_L C + (w ∘ K)^T V, n' = e_L n + (w ∘ K)^T 1, and the last ones.
/// grid (TV, TQ, B NH), block 256: a block walks one 64 x 64 tile of C along the sequence.
/// Out: states, normals; C_last (B, NH, dqk, dhv), n_last (B, NH, dqk) or null.
extern "C" __global__ void __launch_bounds__(THREADS, 2) mlstm_states(
    const element_t *k, const element_t *v, const float *w, const float *e, const float *C0, const float *n0,
    float *states, float *normals, float *C_last, float *n_last, int S, int NH, int dqk, int dhv
) {
    __shared__ __align__(16) Tile left, right;
    int bh = blockIdx.z, tid = threadIdx.x, r0 = blockIdx.y * L, c0 = blockIdx.x * L;
    int chunks = (S + L - 1) / L;
    bool with_n = blockIdx.x == 0 && tid < L && r0 + tid < dqk;
    long long size = (long long)dqk * dhv;
    float C[4][4] = {}, n = with_n && n0 ? n0[(long long)bh * dqk + r0 + tid] : 0.0f;
    EACH(r, c) {
        int x = r0 + ROW(r), y = c0 + COLUMN(c);
        if (C0 && x < dqk && y < dhv) C[r][c] = C0[bh * size + (long long)x * dhv + y];
    }
    for (int chunk = 0; chunk <= chunks; chunk++) {
        bool end = chunk == chunks;
        long long at = (long long)bh * chunks + chunk;
        float *C_to = end ? C_last + bh * size : states + at * size;
        float *n_to = end ? n_last + (long long)bh * dqk : normals + at * dqk;
        if (!end || C_last) {
            EACH(r, c) {
                int x = r0 + ROW(r), y = c0 + COLUMN(c);
                if (x < dqk && y < dhv) C_to[(long long)x * dhv + y] = C[r][c];
            }
            if (with_n) n_to[r0 + tid] = n;
        }
        if (end || (chunk == chunks - 1 && !C_last)) break;
        const float *weight = w + at * L;
        float kept = e[at * L + L - 1];
        EACH(r, c) C[r][c] *= kept;
        n *= kept;
        Rows<element_t> keys = tokens(k, bh, chunk, S, NH, dqk), values = tokens(v, bh, chunk, S, NH, dhv);
        for (int j0 = 0; j0 < L; j0 += DEPTH) {
            __syncthreads();
            fill(left, [&](int j, int x) { return weight[j0 + j] * keys.at(j0 + j, r0 + x); });
            fill(right, [&](int j, int y) { return values.at(j0 + j, c0 + y); });
            __syncthreads();
            multiply(left, right, C);
            if (with_n)
                for (int j = 0; j < DEPTH; j++) n += left[j][tid];
        }
    }
}

/// d = A 1 + s e ∘ (Q n), h = (A V + (s e ∘ Q) C) / normaliser; 0 at pads.
/// grid (TV, N, B NH), block 256. Out: h (B, S, NH, dhv), denominators (B, NH, S).
extern "C" __global__ void __launch_bounds__(THREADS) mlstm_outputs(
    const element_t *q, const element_t *v, const unsigned *marks, const float *stabilizers, const float *scores,
    const float *e, const float *states, const float *normals, element_t *h, float *denominators, int S, int NH,
    int dqk, int dhv, int flags, float eps
) {
    __shared__ __align__(16) Tile left, right;
    __shared__ float factor[L];
    int bh = blockIdx.z, chunk = blockIdx.y, tid = threadIdx.x, c0 = blockIdx.x * L;
    long long at = (long long)bh * gridDim.y + chunk;
    const float *C = states + at * dqk * dhv, *n = normals + at * dqk, *A = scores + at * L * L;
    Rows<element_t> queries = tokens(q, bh, chunk, S, NH, dqk), values = tokens(v, bh, chunk, S, NH, dhv);
    float sum[4][4] = {}, d = 0.0f;
    for (int x0 = 0; x0 < dqk; x0 += DEPTH) {
        __syncthreads();
        fill_transposed(left, [&](int x, int t) { return queries.at(t, x0 + x); });
        fill(right, [&](int x, int y) {
            return x0 + x < dqk && c0 + y < dhv ? C[(long long)(x0 + x) * dhv + c0 + y] : 0.0f;
        });
        __syncthreads();
        multiply(left, right, sum);
        if (tid < L)
            for (int x = 0; x < min(DEPTH, dqk - x0); x++) d = fmaf(left[x][tid], n[x0 + x], d);
    }
    float scale = 1.0f / sqrtf((float)dqk);
    if (tid < L) {
        factor[tid] = scale * e[at * L + tid];
        d *= factor[tid];
    }
    __syncthreads();
    EACH(r, c) sum[r][c] *= factor[ROW(r)];
    for (int j0 = 0; j0 < L; j0 += DEPTH) {
        __syncthreads();
        fill_transposed(left, [&](int j, int t) { return A[t * L + j0 + j]; });
        fill(right, [&](int j, int y) { return values.at(j0 + j, c0 + y); });
        __syncthreads();
        multiply(left, right, sum);
        if (tid < L)
            for (int j = 0; j < DEPTH; j++) d += left[j][tid];
    }
    int t = chunk * L + tid;
    if (tid < L && t < S) {
        bool pad = marks && is_pad(marks[(long long)(bh / NH) * S + t]);
        factor[tid] = pad ? 0.0f : 1.0f / normalizer(d, stabilizers[(long long)bh * S + t], eps, flags);
        if (blockIdx.x == 0) denominators[(long long)bh * S + t] = pad ? 0.0f : d;
    }
    __syncthreads();
    EACH(r, c) {
        int t = ROW(r), y = c0 + COLUMN(c);
        if (t < values.rows && y < dhv) {
            long long to = (((long long)(bh / NH) * S + chunk * L + t) * NH + bh % NH) * dhv + y;
            store(h + to, factor[t] == 0.0f ? 0.0f : sum[r][c] * factor[t]);
        }
    }
}

/// One token (S = 1), one pass over C: the recurrent form.
/// grid (TV, B NH), block 256. C_last, n_last, m_last must not be C0, n0, m0.
/// Out: h (B, 1, NH, dhv), C_last, n_last, m_last, stabilizers and denominators (B, NH, 1).
extern "C" __global__ void __launch_bounds__(THREADS) mlstm_step(
    const element_t *q, const element_t *k, const element_t *v, const gate_t *i, const gate_t *f,
    const unsigned *marks, const float *C0, const float *n0, const float *m0, element_t *h, float *C_last,
    float *n_last, float *m_last, float *stabilizers, float *denominators, int NH, int dqk, int dhv, int flags,
    float eps
) {
    __shared__ float parts[4][L];
    int bh = blockIdx.y, tid = threadIdx.x, column = tid % L, group = tid / L, y = blockIdx.x * L + column;
    Gate gate = gate_of(i, f, marks, bh / NH, bh % NH, 0, 1, NH, flags);
    bool reset = is_reset(gate.mark), pad = is_pad(gate.mark);
    float before = initial_stabilizer(n0, m0, bh, dqk, flags);
    if (reset) before = empty_stabilizer(flags);
    float kept = __fadd_rn(gate.log_f, before), m = fmaxf(kept, gate.log_i);
    float forget = expf(kept - m), input = expf(gate.log_i - m), scale = 1.0f / sqrtf((float)dqk);
    bool given = C0 && !reset;
    const element_t *query = q + (long long)bh * dqk, *key = k + (long long)bh * dqk;
    long long size = (long long)dqk * dhv;
    float value = y < dhv ? load(v + (long long)bh * dhv + y) : 0.0f, sum = 0.0f, d = 0.0f;
    if (y < dhv)
        for (int x = group; x < dqk; x += 4) {
            long long at = bh * size + (long long)x * dhv + y;
            float c = given ? C0[at] : 0.0f;
            if (!pad) c = fmaf(forget, c, input * load(key + x) * value);
            C_last[at] = c;
            sum = fmaf(load(query + x), c, sum);
        }
    for (int x = tid; x < dqk; x += THREADS) {
        float n = given ? n0[(long long)bh * dqk + x] : 0.0f;
        if (!pad) n = fmaf(forget, n, input * load(key + x));
        if (blockIdx.x == 0) n_last[(long long)bh * dqk + x] = n;
        d = fmaf(load(query + x), n, d);
    }
    parts[group][column] = sum;
    d = pad ? 0.0f : scale * block_sum(d);
    if (group == 0 && y < dhv) {
        sum = scale * (parts[0][column] + parts[1][column] + parts[2][column] + parts[3][column]);
        store(h + (long long)bh * dhv + y, pad ? 0.0f : sum * (1.0f / normalizer(d, m, eps, flags)));
    }
    if (blockIdx.x == 0 && tid == 0) {
        m_last[bh] = m;
        stabilizers[bh] = m;
        denominators[bh] = d;
    }
}

// ---- Backward ----

/// inverse = 1 / N_t, dd_t = -(dh_t . h_t) / N_t sign(d_t) where |d_t| is above its floor, and the
/// gradient of m_t through eps; all 0 at pads and past the end.
/// grid (ceil(N 64 / 8), B NH), block 256: a warp a token.
extern "C" __global__ void __launch_bounds__(THREADS) mlstm_backward_tokens(
    const element_t *h, const element_t *dh, const unsigned *marks, const float *stabilizers,
    const float *denominators, float *inverse, float *dd, float *dm, int S, int NH, int dhv, int flags, float eps
) {
    int bh = blockIdx.y, t = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    int padded = (S + L - 1) / L * L;
    if (t >= padded) return;
    float out[3] = {0.0f, 0.0f, 0.0f};
    bool pad = t >= S || (marks && is_pad(marks[(long long)(bh / NH) * S + t]));
    if (!pad && dh) {
        long long at = (((long long)(bh / NH) * S + t) * NH + bh % NH) * dhv;
        float dh_h = 0.0f;
        for (int y = lane; y < dhv; y += 32) dh_h = fmaf(load(dh + at + y), load(h + at + y), dh_h);
        dh_h = warp_sum(dh_h);
        float d = denominators[(long long)bh * S + t], m = stabilizers[(long long)bh * S + t];
        float norm = normalizer(d, m, eps, flags), slope = -dh_h / norm;
        out[0] = 1.0f / norm;
        if (flags & NORMALIZE) {
            out[1] = fabsf(d) > expf(-m) ? (d > 0.0f ? slope : -slope) : 0.0f;
            out[2] = flags & SIGMOID_INPUT ? 0.0f : slope * eps;
        }
    }
    if (lane == 0) {
        long long to = (long long)bh * padded + t;
        inverse[to] = out[0];
        dd[to] = out[1];
        dm[to] = out[2];
    }
}

/// A and w, e again; P = dnum V^T + dd 1^T with dnum = dh / N; pairs = s W ∘ P; G = A ∘ P and its
/// share of the gate gradients, di_j = sum_t G_tj, df_u = sum_{t>=u} sum_{j<u} G_tj.
/// grid (N, B NH), block 256.
extern "C" __global__ void __launch_bounds__(THREADS) mlstm_backward_scores(
    const element_t *q, const element_t *k, const element_t *v, const element_t *dh, const gate_t *i,
    const gate_t *f, const unsigned *marks, const float *n0, const float *m0, const float *stabilizers,
    const float *inverse, const float *dd, float *scores, float *pairs, float *w, float *e, float *di, float *df,
    int S, int NH, int dqk, int dhv, int flags
) {
    __shared__ __align__(16) Tile left, right;
    __shared__ float W[L][L + 1], last[L], state[L];
    int chunk = blockIdx.x, bh = blockIdx.y, tid = threadIdx.x;
    long long at = (long long)bh * gridDim.x + chunk;
    chunk_weights(i, f, marks, n0, m0, stabilizers, W, last, state, bh, chunk, S, NH, dqk, flags);
    if (tid < L) {
        w[at * L + tid] = last[tid];
        e[at * L + tid] = state[tid];
    }
    float A[4][4] = {}, P[4][4] = {};
    query_keys(tokens(q, bh, chunk, S, NH, dqk), tokens(k, bh, chunk, S, NH, dqk), dqk, left, right, A);
    Rows<element_t> gradients = tokens(dh, bh, chunk, S, NH, dhv), values = tokens(v, bh, chunk, S, NH, dhv);
    const float *inverses = inverse + at * L;
    for (int y0 = 0; y0 < dhv; y0 += DEPTH) {
        __syncthreads();
        fill_transposed(left, [&](int y, int t) { return inverses[t] * gradients.at(t, y0 + y); });
        fill_transposed(right, [&](int y, int j) { return values.at(j, y0 + y); });
        __syncthreads();
        multiply(left, right, P);
    }
    float scale = 1.0f / sqrtf((float)dqk);
    EACH(r, c) {
        int t = ROW(r), j = COLUMN(c);
        float weight = scale * W[t][j], p = P[r][c] + dd[at * L + t], a = weight * A[r][c];
        scores[(at * L + t) * L + j] = a;
        pairs[(at * L + t) * L + j] = weight * p;
        W[t][j] = a * p;
    }
    __syncthreads();
    if (tid < L) {
        float sum = 0.0f;
        for (int t = L - 1; t >= 0; t--) W[t][tid] = sum += W[t][tid];
        di[at * L + tid] = sum;
    }
    __syncthreads();
    if (tid < L) {
        float sum = 0.0f;
        for (int j = 0; j < tid; j++) sum += W[tid][j];
        df[at * L + tid] = sum;
    }
}

/// dC and dn after every chunk, dC <- e_L dC + (s e ∘ Q)^T dnum, dn <- e_L dn + (s e ∘ Q)^T dd, from
/// those of the last state to those of the first; and C . dC + n . dn of both states, by tile.
/// grid (TV, TQ, B NH), block 256. In: dC_last, dn_last (null: zero), C_last, n_last (forward's
/// outputs; read where dC_last or dn_last is given), C0, n0 (null: zero). Added to: dC0, dn0.
extern "C" __global__ void __launch_bounds__(THREADS, 2) mlstm_backward_states(
    const element_t *q, const element_t *dh, const float *inverse, const float *dd, const float *e,
    const float *C0, const float *n0, const float *C_last, const float *n_last, const float *dC_last,
    const float *dn_last, float *dstates, float *dnormals, float *inner_last, float *inner_first, float *dC0,
    float *dn0, int S, int NH, int dqk, int dhv
) {
    __shared__ __align__(16) Tile left, right;
    int bh = blockIdx.z, tid = threadIdx.x, r0 = blockIdx.y * L, c0 = blockIdx.x * L;
    int chunks = (S + L - 1) / L;
    bool with_n = blockIdx.x == 0 && tid < L && r0 + tid < dqk;
    long long size = (long long)dqk * dhv, n_at = (long long)bh * dqk + r0 + tid;
    long long tile = (long long)bh * gridDim.x * gridDim.y + blockIdx.y * gridDim.x + blockIdx.x;
    float scale = 1.0f / sqrtf((float)dqk);
    float dC[4][4] = {}, dn = with_n && dn_last ? dn_last[n_at] : 0.0f, inner = 0.0f;
    EACH(r, c) {
        int x = r0 + ROW(r), y = c0 + COLUMN(c);
        long long at = bh * size + (long long)x * dhv + y;
        if (dC_last && x < dqk && y < dhv) {
            dC[r][c] = dC_last[at];
            inner = fmaf(C_last[at], dC[r][c], inner);
        }
    }
    if (with_n && dn_last) inner = fmaf(n_last[n_at], dn, inner);
    inner = block_sum(inner);
    if (tid == 0) inner_last[tile] = inner;
    for (int chunk = chunks - 1; chunk >= 0; chunk--) {
        long long at = (long long)bh * chunks + chunk;
        EACH(r, c) {
            int x = r0 + ROW(r), y = c0 + COLUMN(c);
            if (x < dqk && y < dhv) dstates[at * size + (long long)x * dhv + y] = dC[r][c];
        }
        if (with_n) dnormals[at * dqk + r0 + tid] = dn;
        const float *state = e + at * L, *inverses = inverse + at * L, *gradient = dd + at * L;
        float kept = state[L - 1];
        EACH(r, c) dC[r][c] *= kept;
        dn *= kept;
        Rows<element_t> queries = tokens(q, bh, chunk, S, NH, dqk), gradients = tokens(dh, bh, chunk, S, NH, dhv);
        for (int t0 = 0; t0 < L; t0 += DEPTH) {
            __syncthreads();
            fill(left, [&](int t, int x) { return scale * state[t0 + t] * queries.at(t0 + t, r0 + x); });
            fill(right, [&](int t, int y) { return inverses[t0 + t] * gradients.at(t0 + t, c0 + y); });
            __syncthreads();
            multiply(left, right, dC);
            if (with_n)
                for (int t = 0; t < DEPTH; t++) dn = fmaf(left[t][tid], gradient[t0 + t], dn);
        }
    }
    inner = 0.0f;
    EACH(r, c) {
        int x = r0 + ROW(r), y = c0 + COLUMN(c);
        if (x < dqk && y < dhv) {
            long long at = bh * size + (long long)x * dhv + y;
            if (C0) inner = fmaf(C0[at], dC[r][c], inner);
            if (dC0) dC0[at] += dC[r][c];
        }
    }
    if (with_n) {
        if (n0) inner = fmaf(n0[n_at], dn, inner);
        if (dn0) dn0[n_at] += dn;
    }
    inner = block_sum(inner);
    if (tid == 0) inner_first[tile] = inner;
}

/// dV += A^T dnum + (w ∘ K) dC.
/// grid (TV, N, B NH), block 256. Not needed where nobody wants dv.
extern "C" __global__ void __launch_bounds__(THREADS) mlstm_backward_values(
    const element_t *k, const element_t *dh, const float *inverse, const float *scores, const float *w,
    const float *dstates, element_t *dv, int S, int NH, int dqk, int dhv
) {
    __shared__ __align__(16) Tile left, right;
    int bh = blockIdx.z, chunk = blockIdx.y, c0 = blockIdx.x * L;
    long long at = (long long)bh * gridDim.y + chunk;
    const float *dC = dstates + at * dqk * dhv, *A = scores + at * L * L, *inverses = inverse + at * L;
    Rows<element_t> keys = tokens(k, bh, chunk, S, NH, dqk), gradients = tokens(dh, bh, chunk, S, NH, dhv);
    float sum[4][4] = {};
    for (int x0 = 0; x0 < dqk; x0 += DEPTH) {
        __syncthreads();
        fill_transposed(left, [&](int x, int j) { return keys.at(j, x0 + x); });
        fill(right, [&](int x, int y) {
            return x0 + x < dqk && c0 + y < dhv ? dC[(long long)(x0 + x) * dhv + c0 + y] : 0.0f;
        });
        __syncthreads();
        multiply(left, right, sum);
    }
    EACH(r, c) sum[r][c] *= w[at * L + ROW(r)];
    for (int t0 = 0; t0 < L; t0 += DEPTH) {
        __syncthreads();
        fill(left, [&](int t, int j) { return A[(t0 + t) * L + j]; });
        fill(right, [&](int t, int y) { return inverses[t0 + t] * gradients.at(t0 + t, c0 + y); });
        __syncthreads();
        multiply(left, right, sum);
    }
    EACH(r, c) {
        int j = ROW(r), y = c0 + COLUMN(c);
        if (j < keys.rows && y < dhv)
            add(dv + (((long long)(bh / NH) * S + chunk * L + j) * NH + bh % NH) * dhv + y, sum[r][c]);
    }
}

/// With Z = dnum C^T + dd n^T and Y = V dC^T + 1 dn^T:
/// dQ += (s W ∘ P) K + s e ∘ Z, dK += (s W ∘ P)^T Q + w ∘ Y, and by tile of features
/// arriving_t = s e_t q_t . Z_t, leaving_j = w_j k_j . Y_j, crossing = e_L (C . dC + n . dn).
/// grid (TQ, N, B NH), block 256. dq and dk may be null.
extern "C" __global__ void __launch_bounds__(THREADS) mlstm_backward_keys(
    const element_t *q, const element_t *k, const element_t *v, const element_t *dh, const float *inverse,
    const float *dd, const float *pairs, const float *w, const float *e, const float *states,
    const float *normals, const float *dstates, const float *dnormals, element_t *dq, element_t *dk,
    float *arriving, float *leaving, float *crossing, int S, int NH, int dqk, int dhv
) {
    __shared__ __align__(16) Tile left, right, left2, right2;
    int bh = blockIdx.z, chunk = blockIdx.y, tid = threadIdx.x, r0 = blockIdx.x * L;
    long long at = (long long)bh * gridDim.y + chunk, all = (long long)gridDim.z * gridDim.y;
    const float *C = states + at * dqk * dhv, *dC = dstates + at * dqk * dhv;
    const float *n = normals + at * dqk, *dn = dnormals + at * dqk, *inverses = inverse + at * L;
    Rows<element_t> queries = tokens(q, bh, chunk, S, NH, dqk), keys = tokens(k, bh, chunk, S, NH, dqk);
    Rows<element_t> gradients = tokens(dh, bh, chunk, S, NH, dhv), values = tokens(v, bh, chunk, S, NH, dhv);
    float Z[4][4] = {}, Y[4][4] = {}, inner = 0.0f;
    for (int y0 = 0; y0 < dhv; y0 += DEPTH) {
        __syncthreads();
        fill_transposed(left, [&](int y, int t) { return inverses[t] * gradients.at(t, y0 + y); });
        fill_transposed(left2, [&](int y, int j) { return values.at(j, y0 + y); });
        fill_transposed(right, [&](int y, int x) {
            return r0 + x < dqk && y0 + y < dhv ? C[(long long)(r0 + x) * dhv + y0 + y] : 0.0f;
        });
        fill_transposed(right2, [&](int y, int x) {
            return r0 + x < dqk && y0 + y < dhv ? dC[(long long)(r0 + x) * dhv + y0 + y] : 0.0f;
        });
        __syncthreads();
        multiply(left, right, Z);
        multiply(left2, right2, Y);
        for (int x = tid; x < DEPTH * L; x += THREADS) inner = fmaf(right[x / L][x % L], right2[x / L][x % L], inner);
    }
    if (tid < L && r0 + tid < dqk) inner = fmaf(n[r0 + tid], dn[r0 + tid], inner);
    inner = block_sum(inner);
    if (tid == 0) crossing[blockIdx.x * all + at] = e[at * L + L - 1] * inner;

    float scale = 1.0f / sqrtf((float)dqk);
#pragma unroll
    for (int r = 0; r < 4; r++) {
        int t = ROW(r);
        float state = scale * e[at * L + t], weight = w[at * L + t], gradient = dd[at * L + t];
        float query = 0.0f, key = 0.0f;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            int x = r0 + COLUMN(c);
            if (x < dqk) {
                Z[r][c] = state * fmaf(gradient, n[x], Z[r][c]);
                Y[r][c] = weight * (Y[r][c] + dn[x]);
                query = fmaf(queries.at(t, x), Z[r][c], query);
                key = fmaf(keys.at(t, x), Y[r][c], key);
            }
        }
        for (int step = 8; step > 0; step >>= 1) {
            query += __shfl_xor_sync(0xffffffffu, query, step);
            key += __shfl_xor_sync(0xffffffffu, key, step);
        }
        if (tid % 16 == 0) {
            arriving[(blockIdx.x * all + at) * L + t] = query;
            leaving[(blockIdx.x * all + at) * L + t] = key;
        }
    }
    const float *pair = pairs + at * L * L;
    for (int j0 = 0; j0 < L; j0 += DEPTH) {
        __syncthreads();
        fill_transposed(left, [&](int j, int t) { return pair[t * L + j0 + j]; });
        fill(right, [&](int j, int x) { return keys.at(j0 + j, r0 + x); });
        fill(left2, [&](int t, int j) { return pair[(j0 + t) * L + j]; });
        fill(right2, [&](int t, int x) { return queries.at(j0 + t, r0 + x); });
        __syncthreads();
        multiply(left, right, Z);
        multiply(left2, right2, Y);
    }
    EACH(r, c) {
        int t = ROW(r), x = r0 + COLUMN(c);
        if (t < queries.rows && x < dqk) {
            long long to = (((long long)(bh / NH) * S + chunk * L + t) * NH + bh % NH) * dqk + x;
            if (dq) add(dq + to, Z[r][c]);
            if (dk) add(dk + to, Y[r][c]);
        }
    }
}

/// The chunk's whole d log i and d log f, but for the stabiliser:
/// di_j += leaving_j, df_u += sum_{t>=u} arriving_t + crossing + sum_{j<u} leaving_j.
/// grid (N, B NH), block 64. tiles: TQ.
extern "C" __global__ void __launch_bounds__(L) mlstm_backward_gates(
    const float *arriving, const float *leaving, const float *crossing, float *di, float *df, int tiles
) {
    __shared__ float in[L], out[L];
    int t = threadIdx.x;
    long long at = (long long)blockIdx.y * gridDim.x + blockIdx.x, all = (long long)gridDim.y * gridDim.x;
    float a = 0.0f, b = 0.0f, cross = 0.0f;
    for (int tile = 0; tile < tiles; tile++) {
        a += arriving[(tile * all + at) * L + t];
        b += leaving[(tile * all + at) * L + t];
        cross += crossing[tile * all + at];
    }
    in[t] = a;
    out[t] = b;
    __syncthreads();
    float sum = 0.0f;
    for (int u = L - 1; u >= t; u--) sum += in[u];
    for (int j = 0; j < t; j++) cross += out[j];
    di[at * L + t] += b;
    df[at * L + t] += sum + cross;
}

/// The gradient of m walks back along the maxima that made it, from the last state and from every
/// token (dm), to log i where the token set a new maximum, else to log f and the m before; then
/// through the gates' activations. Pads get nothing.
/// grid (B NH), block 32. tiles: TQ TV. In: dm_last (B, NH) or null. Added to: di_out, df_out
/// (B, S, NH), dm0 (B, NH), each or null.
extern "C" __global__ void __launch_bounds__(32) mlstm_backward_unwind(
    const gate_t *i, const gate_t *f, const unsigned *marks, const float *n0, const float *m0,
    const float *stabilizers, const float *dm, const float *di, const float *df, const float *dm_last,
    const float *inner_last, const float *inner_first, gate_t *di_out, gate_t *df_out, float *dm0, int S, int NH,
    int dqk, int flags, int tiles
) {
    const unsigned ALL = 0xffffffffu;
    int bh = blockIdx.x, lane = threadIdx.x, padded = (S + L - 1) / L * L;
    float first = initial_stabilizer(n0, m0, bh, dqk, flags);
    float carried = dm_last ? dm_last[bh] : 0.0f, before = 0.0f;
    for (int tile = 0; tile < tiles; tile++) {
        carried -= inner_last[(long long)bh * tiles + tile];
        before += inner_first[(long long)bh * tiles + tile];
    }
    for (int start = (S + 31) / 32 * 32 - 32; start >= 0; start -= 32) {
        int t = start + lane;
        Gate gate = gate_of(i, f, marks, bh / NH, bh % NH, t, S, NH, flags);
        const float *m = stabilizers + (long long)bh * S;
        float decay = 0.0f, entry = NEG_INFINITY, own = 0.0f;
        if (t < S) {
            exponents(gate, t > 0 ? m[t - 1] : first, m[t], flags, &decay, &entry);
            own = dm[(long long)bh * padded + t];
        }
        // Leaving token t to the left: a + b x, x arriving from the right; then of tokens t and on.
        bool kept = decay >= entry, passes = kept && !is_reset(gate.mark);
        float a = passes ? own : 0.0f, b = passes ? 1.0f : 0.0f;
        for (int step = 1; step < 32; step <<= 1) {
            float right_a = __shfl_down_sync(ALL, a, step), right_b = __shfl_down_sync(ALL, b, step);
            if (lane + step < 32) {
                a = b != 0.0f ? a + right_a : a;
                b *= right_b;
            }
        }
        float right_a = __shfl_down_sync(ALL, a, 1), right_b = __shfl_down_sync(ALL, b, 1);
        float here = own + (lane == 31 ? carried : right_b != 0.0f ? right_a + carried : right_a);
        float left = b != 0.0f ? a + carried : a;
        carried = __shfl_sync(ALL, left, 0);
        if (t < S && !is_pad(gate.mark)) {
            long long from = (long long)bh * padded + t, to = ((long long)(bh / NH) * S + t) * NH + bh % NH;
            if (di_out) {
                float slope = flags & SIGMOID_INPUT ? sigmoid(-load(i + to)) : 1.0f;
                add(di_out + to, slope * (di[from] + (kept ? 0.0f : here)));
            }
            if (df_out) {
                float slope = flags & EXPONENTIAL_FORGET ? 1.0f : sigmoid(-load(f + to));
                add(df_out + to, slope * (df[from] + (kept ? here : 0.0f)));
            }
        }
    }
    if (dm0 && lane == 0) dm0[bh] += carried + before;
}
