// The mLSTM cell forward; mlstm.cuh says what the arguments are.

/// What some tokens make of the stabiliser before them: max(a + m, b).
struct Climb {
    float a, b;
    __device__ __forceinline__ float from(float m) const { return fmaxf(a + m, b); }
    /// After `first`.
    __device__ __forceinline__ Climb after(Climb first) const { return {first.a + a, from(first.b)}; }
};
__device__ __forceinline__ Climb scan(Climb climb) {
    for (int step = 1; step < 32; step <<= 1) {
        Climb left = {__shfl_up_sync(ALL, climb.a, step), __shfl_up_sync(ALL, climb.b, step)};
        if (LANE >= step) climb = climb.after(left);
    }
    return climb;
}

/// m_t = max(log f_t + m_{t-1}, log i_t) of every token, and the last one.
/// grid (B NH), block 1024: 1024 tokens a round. Out: stabilizers (B, NH, S), m (B, NH).
extern "C" __global__ void __launch_bounds__(1024) mlstm_gates(
    const float *i, const float *f, const unsigned *marks, const float *n0, const float *m0, float *stabilizers,
    float *m_last, int S, int NH, int dqk, int flags
) {
    __shared__ float a[32], b[32];
    int bh = blockIdx.x, tid = threadIdx.x, warp = tid / 32;
    float m = initial_stabilizer(n0, m0, bh, dqk, flags);
    for (int start = 0; start < S; start += 1024) {
        int t = start + tid;
        Gate gate = gate_of(i, f, marks, bh / NH, bh % NH, t, S, NH, flags);
        Climb climb = {gate.log_f, gate.log_i};
        if (is_reset(gate.mark)) climb = {NEG_INFINITY, climb.from(empty_stabilizer(flags))};
        climb = scan(climb);
        if (LANE == 31) a[warp] = climb.a, b[warp] = climb.b;
        __syncthreads();
        Climb warps = scan({a[LANE], b[LANE]});
        __syncthreads();
        float before = __shfl_sync(ALL, warps.from(m), max(warp - 1, 0));
        if (t < S) stabilizers[(long long)bh * S + t] = climb.from(warp ? before : m);
        m = __shfl_sync(ALL, warps.from(m), 31);
    }
    if (tid == 0) m_last[bh] = m;
}

/// A = W ∘ s Q K^T and its row sums, e_t, and the weighted keys with their sum.
/// grid (N, B NH), block 128.
struct Scores {
    Tile q[STAGES], k[STAGES];
    Column w;
    Weights weights;
};
static_assert(sizeof(Scores) <= SCORES_SHARED);
extern "C" __global__ void __launch_bounds__(GROUP, 3) mlstm_scores(
    const element_t *q, const element_t *k, const float *i, const float *f, const unsigned *marks,
    const float *n0, const float *m0, const float *stabilizers, element_t *scores, element_t *keys, float *sums,
    float *e, float *normals, int S, int NH, int dqk, int flags
) {
    extern __shared__ Vector shared[];
    Scores &s = *(Scores *)shared;
    int chunk = blockIdx.x, bh = blockIdx.y, tid = threadIdx.x;
    long long at = (long long)bh * gridDim.x + chunk;
    Rows queries = tokens(q, bh, chunk, S, NH, dqk), rows = tokens(k, bh, chunk, S, NH, dqk);
    float sum[32] = {};
    int tiles = (dqk + L - 1) / L;
    auto pipeline = start<STAGES>(tiles, [&](int step, int stage) {
        fetch(s.q[stage], queries, 0, step * L);
        fetch(s.k[stage], rows, 0, step * L);
    });
    chunk_weights({i, f, marks, n0, m0, stabilizers}, s.weights, bh, chunk, S, NH, dqk, flags);
    if (tid < L) {
        s.w.set(tid, s.weights.w[tid]);
        e[at * L + tid] = s.weights.e[tid];
    }
    for (int step = 0; step < tiles; step++) {
        int stage = pipeline.arrive(step), x = step * L;
        multiply<false, true>(s.q[stage], s.k[stage], sum);
        copy_weighted(s.k[stage], s.weights.w, keys + at * L * padded(dqk), x, dqk);
        ColumnSum total;
        multiply<true>(s.k[stage], s.w, total);
        put(total, [&](int row, float sum) {
            if (x + row < dqk) normals[at * dqk + x + row] = sum;
        });
    }
    float scale = 1.0f / sqrtf((float)dqk);
    EACH(i) s.weights.W[ROW(i)][COLUMN(i)] = sum[i] *= scale * s.weights.W[ROW(i)][COLUMN(i)];
    put<false>(sum, stored(scores, at, L, L), 0, 0);
    __syncthreads();
    if (tid < L) {
        float total = 0.0f;
        for (int j = 0; j < L; j++) total += s.weights.W[tid][j];
        sums[at * L + tid] = total;
    }
}

/// C and n before every chunk, C' = e_L C + (w ∘ K)^T V, n' = e_L n + (w ∘ K)^T 1, and the last ones.
/// grid (TV, TQ, B NH), block 128: a block walks one 64 x 64 tile of C along the sequence.
/// Out: states, normals; C_last (B, NH, dqk, dhv), n_last (B, NH, dqk) or null.
extern "C" __global__ void __launch_bounds__(GROUP, 3) mlstm_states(
    const element_t *keys, const element_t *v, const float *e, const float *C0, const float *n0,
    element_t *states, float *normals, float *C_last, float *n_last, int S, int NH, int dqk, int dhv
) {
    extern __shared__ Vector shared[];
    States &s = *(States *)shared;
    int bh = blockIdx.z, tid = threadIdx.x, r0 = blockIdx.y * L, c0 = blockIdx.x * L;
    int chunks = (S + L - 1) / L;
    long long first = (long long)bh * chunks, size = (long long)dqk * dhv;
    bool with_n = blockIdx.x == 0 && tid < L && r0 + tid < dqk;
    float *normal = normals + first * dqk + r0 + tid;
    const float *keep = e + first * L + L - 1;
    float C[32] = {}, n = with_n && n0 ? n0[(long long)bh * dqk + r0 + tid] : 0.0f;
    if (C0) EACH(i) {
        int x = r0 + ROW(i), y = c0 + COLUMN(i);
        if (x < dqk && y < dhv) C[i] = C0[bh * size + (long long)x * dhv + y];
    }
    // What the next chunk needs is read a chunk ahead.
    float kept = keep[0], added = with_n ? normal[0] : 0.0f;
    int additions = C_last ? chunks : chunks - 1;
    auto pipeline = start<STATE_STAGES>(additions, [&](int chunk, int stage) {
        fetch(s.left[stage], stored(keys, first + chunk, L, dqk), 0, r0);
        fetch(s.right[stage], tokens(v, bh, chunk, S, NH, dhv), 0, c0);
    });
    for (int chunk = 0; chunk < chunks; chunk++) {
        int stage = pipeline.arrive(chunk);
        float factor = kept, sum = added;
        if (chunk + 1 < chunks) {
            kept = keep[(chunk + 1) * L];
            if (with_n) added = normal[(long long)(chunk + 1) * dqk];
        }
        put<false>(C, stored(states, first + chunk, dqk, dhv), r0, c0);
        if (with_n) normal[(long long)chunk * dqk] = n;
        if (chunk == additions) return;
        EACH(i) C[i] *= factor;
        n = fmaf(factor, n, sum);
        multiply<true, false>(s.left[stage], s.right[stage], C);
    }
    EACH(i) {
        int x = r0 + ROW(i), y = c0 + COLUMN(i);
        if (x < dqk && y < dhv) C_last[bh * size + (long long)x * dhv + y] = C[i];
    }
    if (with_n) n_last[(long long)bh * dqk + r0 + tid] = n;
}

/// d = A 1 + s e ∘ (Q n), h = (A V + (s e ∘ Q) C) / normaliser; 0 at pads.
/// grid (TV, N, B NH), block 128. Out: h (B, S, NH, dhv), denominators (B, NH, S).
struct Outputs {
    Tile left[STAGES], right[STAGES];
    Column n[STAGES];
    float factor[L], d[L];
};
static_assert(sizeof(Outputs) <= OUTPUTS_SHARED);
extern "C" __global__ void __launch_bounds__(GROUP, 4) mlstm_outputs(
    const element_t *q, const element_t *v, const unsigned *marks, const float *stabilizers,
    const element_t *scores, const float *sums, const float *e, const element_t *states, const float *normals,
    element_t *h, float *denominators, int S, int NH, int dqk, int dhv, int flags, float eps
) {
    extern __shared__ Vector shared[];
    Outputs &s = *(Outputs *)shared;
    // From the last sequence on, whose states were written last.
    int bh = gridDim.z - 1 - blockIdx.z, chunk = blockIdx.y, tid = threadIdx.x, c0 = blockIdx.x * L;
    int tiles = (dqk + L - 1) / L;
    long long at = (long long)bh * gridDim.y + chunk;
    Rows queries = tokens(q, bh, chunk, S, NH, dqk), values = tokens(v, bh, chunk, S, NH, dhv);
    Rows A = stored(scores, at, L, L), C = stored(states, at, dqk, dhv);
    auto normal = [&](int x) { return tid < L && x + tid < dqk ? normals[at * dqk + x + tid] : 0.0f; };
    if (tid < L) s.factor[tid] = e[at * L + tid] / sqrtf((float)dqk);
    float sum[32] = {}, n = normal(0);
    ColumnSum d;
    auto pipeline = start<STAGES>(tiles + 1, [&](int step, int stage) {
        if (step < tiles) {
            fetch(s.left[stage], queries, 0, step * L);
            fetch(s.right[stage], C, step * L, c0);
            if (tid < L) s.n[stage].set(tid, n);
            n = normal((step + 1) * L);
        } else {
            fetch(s.left[stage], A, 0, 0);
            fetch(s.right[stage], values, 0, c0);
        }
    });
    for (int step = 0; step < tiles; step++) {
        int stage = pipeline.arrive(step);
        multiply<false>(s.left[stage], s.n[stage], d);
        multiply<false, false>(s.left[stage], s.right[stage], sum);
    }
    int stage = pipeline.arrive(tiles);
    EACH(i) sum[i] *= s.factor[ROW(i)];
    multiply<false, false>(s.left[stage], s.right[stage], sum);
    put(d, [&](int row, float x) { s.d[row] = x; });
    __syncthreads();
    int t = chunk * L + tid;
    if (tid < L) {
        bool pad = t >= S || (marks && is_pad(marks[(long long)(bh / NH) * S + t]));
        float d = fmaf(s.factor[tid], s.d[tid], sums[at * L + tid]);
        s.d[tid] = pad ? 0.0f : 1.0f / normalizer(d, stabilizers[(long long)bh * S + t], eps, flags);
        if (blockIdx.x == 0 && t < S) denominators[(long long)bh * S + t] = pad ? 0.0f : d;
    }
    __syncthreads();
    EACH(i) {
        float factor = s.d[ROW(i)];
        sum[i] = factor == 0.0f ? 0.0f : sum[i] * factor;
    }
    put<false>(sum, tokens(h, bh, chunk, S, NH, dhv), 0, c0);
}

#define STEP_THREADS 256

/// One token (S = 1), one pass over C: the recurrent form. A block has `columns` columns of C, 16,
/// 32 or 64, four a thread: few for many blocks, many for long rows.
/// grid (ceil(dhv / columns), B NH), block 256. C_last, n_last, m_last must not be C0, n0, m0.
/// Out: h (B, 1, NH, dhv), C_last, n_last, m_last, stabilizers and denominators (B, NH, 1).
extern "C" __global__ void __launch_bounds__(STEP_THREADS) mlstm_step(
    const element_t *q, const element_t *k, const element_t *v, const float *i, const float *f,
    const unsigned *marks, const float *C0, const float *n0, const float *m0, element_t *h, float *C_last,
    float *n_last, float *m_last, float *stabilizers, float *denominators, int NH, int dqk, int dhv, int flags,
    float eps, int columns
) {
    const int WARPS = STEP_THREADS / 32, AHEAD = 4;
    __shared__ float parts[WARPS][L], d_parts[WARPS];
    int bh = blockIdx.y, tid = threadIdx.x, warp = tid / 32, across = columns / 4, groups = STEP_THREADS / across;
    int column = tid % across * 4, group = tid / across, y = blockIdx.x * columns + column;
    // The state on its way from memory; it is read when the kernel before has ended.
    for (long long x = group; C0 && x < dqk && y < dhv; x += groups)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(C0 + ((long long)bh * dqk + x) * dhv + y));
    release_next();
    wait_for_previous();
    Gate gate = gate_of(i, f, marks, bh / NH, bh % NH, 0, 1, NH, flags);
    bool reset = is_reset(gate.mark), pad = is_pad(gate.mark), given = C0 && !reset;
    float before = initial_stabilizer(n0, m0, bh, dqk, flags);
    if (reset) before = empty_stabilizer(flags);
    float kept = __fadd_rn(gate.log_f, before), m = fmaxf(kept, gate.log_i);
    float forget = pad ? 1.0f : expf(kept - m), input = pad ? 0.0f : expf(gate.log_i - m);
    const element_t *query = q + (long long)bh * dqk, *key = k + (long long)bh * dqk;
    const float *from = C0 + (long long)bh * dqk * dhv + y;
    float *to = C_last + (long long)bh * dqk * dhv + y;
    bool whole = dhv % 4 == 0 && ((unsigned long long)C0 | (unsigned long long)C_last) % 16 == 0;
    float value[4], sum[4] = {}, d = 0.0f;
#pragma unroll
    for (int c = 0; c < 4; c++) value[c] = y + c < dhv ? input * load(v + (long long)bh * dhv + y + c) : 0.0f;
    // Some rows are under way before the first is used.
    for (int x0 = group; x0 < dqk && y < dhv; x0 += groups * AHEAD) {
        float C[AHEAD][4] = {};
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            long long x = x0 + a * groups;
            if (x >= dqk || !given) continue;
            if (whole) *(float4 *)C[a] = *(const float4 *)(from + x * dhv);
            else
                for (int c = 0; c < 4; c++) C[a][c] = y + c < dhv ? from[x * dhv + c] : 0.0f;
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            long long x = x0 + a * groups;
            if (x >= dqk) continue;
            float key_x = load(key + x), query_x = load(query + x);
#pragma unroll
            for (int c = 0; c < 4; c++) {
                C[a][c] = pad ? C[a][c] : fmaf(forget, C[a][c], key_x * value[c]);
                sum[c] = fmaf(query_x, C[a][c], sum[c]);
            }
            if (whole) *(float4 *)(to + x * dhv) = *(const float4 *)C[a];
            else
                for (int c = 0; c < 4; c++)
                    if (y + c < dhv) to[x * dhv + c] = C[a][c];
        }
    }
    for (int x = tid; x < dqk; x += STEP_THREADS) {
        float n = given ? n0[(long long)bh * dqk + x] : 0.0f;
        if (!pad) n = fmaf(forget, n, input * load(key + x));
        if (blockIdx.x == 0) n_last[(long long)bh * dqk + x] = n;
        d = fmaf(load(query + x), n, d);
    }
    d = warp_sum(d);
    if (LANE == 0) d_parts[warp] = d;
#pragma unroll
    for (int c = 0; c < 4; c++) {
        for (int step = across; step < 32; step <<= 1) sum[c] += __shfl_xor_sync(ALL, sum[c], step);
        if (LANE < across) parts[warp][column + c] = sum[c];
    }
    __syncthreads();
    if (tid >= columns) return;
    float scale = 1.0f / sqrtf((float)dqk), total = 0.0f;
    d = 0.0f;
    for (int part = 0; part < WARPS; part++) {
        total += parts[part][tid];
        d += d_parts[part];
    }
    d = pad ? 0.0f : scale * d;
    y = blockIdx.x * columns + tid;
    if (y < dhv) store(h + (long long)bh * dhv + y, pad ? 0.0f : scale * total * (1.0f / normalizer(d, m, eps, flags)));
    if (blockIdx.x == 0 && tid == 0) {
        m_last[bh] = m;
        stabilizers[bh] = m;
        denominators[bh] = d;
    }
}
