// The mLSTM cell backward; mlstm.cuh says what the arguments are.

/// inverse = 1 / N_t, dd_t = -(dh_t . h_t) / N_t sign(d_t) where |d_t| is above its floor, and the
/// gradient of m_t through eps; all 0 at pads and past the end.
/// grid (ceil(N 64 / 8), B NH), block 256: a warp a token.
extern "C" __global__ void __launch_bounds__(256) mlstm_backward_tokens(
    const element_t *h, const element_t *dh, const unsigned *marks, const float *stabilizers,
    const float *denominators, float *inverse, float *dd, float *dm, int S, int NH, int dhv, int flags, float eps
) {
    int bh = blockIdx.y, t = blockIdx.x * 8 + threadIdx.x / 32, whole = (S + L - 1) / L * L;
    if (t >= whole) return;
    float out[3] = {0.0f, 0.0f, 0.0f};
    bool pad = t >= S || (marks && is_pad(marks[(long long)(bh / NH) * S + t]));
    if (!pad) {
        const element_t *a = h + token_at(bh, t, S, NH, dhv), *b = dh + token_at(bh, t, S, NH, dhv);
        float dh_h = 0.0f;
        if (is_aligned(h, dhv) && is_aligned(dh, dhv))
            for (int y = LANE * IN_VECTOR; y < dhv; y += 32 * IN_VECTOR)
                dh_h = dot(read((const Vector *)(a + y)), read((const Vector *)(b + y)), dh_h);
        else
            for (int y = LANE; y < dhv; y += 32) dh_h = fmaf(load(b + y), load(a + y), dh_h);
        dh_h = warp_sum(dh_h);
        float d = denominators[(long long)bh * S + t], m = stabilizers[(long long)bh * S + t];
        float norm = normalizer(d, m, eps, flags), slope = -dh_h / norm;
        out[0] = 1.0f / norm;
        if (flags & NORMALIZE) {
            out[1] = fabsf(d) > expf(-m) ? (d > 0.0f ? slope : -slope) : 0.0f;
            out[2] = flags & SIGMOID_INPUT ? 0.0f : slope * eps;
        }
    }
    if (LANE == 0) {
        long long to = (long long)bh * whole + t;
        inverse[to] = out[0];
        dd[to] = out[1];
        dm[to] = out[2];
    }
}

/// A / N, the weighted keys and queries with their sums, w and e; P = dnum V^T + dd 1^T with
/// dnum = dh / N; pairs = s W ∘ P; G = A ∘ P and its share of the gate gradients,
/// di_j = sum_t G_tj, df_u = sum_{t>=u} sum_{j<u} G_tj.
/// grid (N, B NH), block 256: Q K^T and dh V^T.
struct BackwardScores {
    Tile left[2][SCORE_STAGES], right[2][SCORE_STAGES];
    /// s e / N, 1 / N and dd.
    float query[L], inverse[L], dd[L];
    Column columns[2];
    Weights weights;
};
static_assert(sizeof(BackwardScores) <= BACKWARD_SCORES_SHARED);
extern "C" __global__ void __launch_bounds__(2 * GROUP, BLOCKS) mlstm_backward_scores(
    const element_t *q, const element_t *k, const element_t *v, const element_t *dh, const float *i,
    const float *f, const unsigned *marks, const float *n0, const float *m0, const float *stabilizers,
    const float *inverse, const float *dd, element_t *scores, element_t *pairs, element_t *queries, element_t *keys,
    float *w, float *e, float *normals, float *dnormals, float *di, float *df, int S, int NH, int dqk, int dhv,
    int flags
) {
    extern __shared__ Vector shared[];
    BackwardScores &s = *(BackwardScores *)shared;
    int chunk = blockIdx.x, bh = blockIdx.y, tid = threadIdx.x, side = SIDE;
    long long at = (long long)bh * gridDim.x + chunk;
    float scale = 1.0f / sqrtf((float)dqk);
    Rows left = side ? tokens(dh, bh, chunk, S, NH, dhv) : tokens(q, bh, chunk, S, NH, dqk);
    Rows right = side ? tokens(v, bh, chunk, S, NH, dhv) : tokens(k, bh, chunk, S, NH, dqk);
    int width = side ? dhv : dqk;
    float sum[32] = {};
    auto pipeline = start<SCORE_STAGES>((max(dqk, dhv) + L - 1) / L, [&](int step, int stage) {
        if (step * L >= width) return;
        fetch(s.left[side][stage], left, 0, step * L);
        fetch(s.right[side][stage], right, 0, step * L);
    });
    chunk_weights({i, f, marks, n0, m0, stabilizers}, s.weights, bh, chunk, S, NH, dqk, flags);
    if (tid < L) {
        float state = scale * s.weights.e[tid], factor = inverse[at * L + tid], gradient = dd[at * L + tid];
        w[at * L + tid] = s.weights.w[tid];
        e[at * L + tid] = s.weights.e[tid];
        s.inverse[tid] = factor;
        s.dd[tid] = gradient;
        s.query[tid] = state * factor;
        s.columns[0].set(tid, state * gradient);
        s.columns[1].set(tid, s.weights.w[tid]);
    }
    for (int step = 0; step < pipeline.steps; step++) {
        int stage = pipeline.arrive(step), x = step * L;
        if (x < width) multiply<false, true>(s.left[side][stage], s.right[side][stage], sum);
        if (x >= dqk) continue;
        // One side weighs the queries, the other the keys.
        Tile &tile = side ? s.right[0][stage] : s.left[0][stage];
        copy_weighted(tile, side ? s.weights.w : s.query, (side ? keys : queries) + at * L * padded(dqk), x, dqk);
        float *to = (side ? normals : dnormals) + at * dqk + x;
        ColumnSum total;
        multiply<true>(tile, s.columns[side], total);
        put(total, [&](int row, float sum) {
            if (x + row < dqk) to[row] = sum;
        });
    }
    float (*W)[L + 1] = s.weights.W;
    float other[32];
    EACH(i) {
        int t = ROW(i);
        float weight = scale * W[t][COLUMN(i)];
        other[i] = side ? weight * fmaf(s.inverse[t], sum[i], s.dd[t]) : weight * sum[i] * s.inverse[t];
    }
    put<false>(other, stored(side ? pairs : scores, at, L, L), 0, 0);
    __syncthreads();
    if (side) EACH(i) W[ROW(i)][COLUMN(i)] = other[i];
    __syncthreads();
    if (!side) EACH(i) W[ROW(i)][COLUMN(i)] *= sum[i];
    __syncthreads();
    if (tid < L) {
        float total = 0.0f;
        for (int t = L - 1; t >= 0; t--) W[t][tid] = total += W[t][tid];
        di[at * L + tid] = total;
    }
    __syncthreads();
    if (tid < L) {
        float total = 0.0f;
        for (int j = 0; j < tid; j++) total += W[tid][j];
        df[at * L + tid] = total;
    }
}

/// dC and dn after every chunk, dC <- e_L dC + (s e ∘ Q)^T dnum, dn <- e_L dn + (s e ∘ Q)^T dd, from
/// those of the last state to those of the first; and C . dC + n . dn of both states, by tile.
/// grid (TV, TQ, B NH), block 128. In: dC_last, dn_last (null: zero), C_last, n_last (forward's
/// outputs; read where dC_last or dn_last is given), C0, n0 (null: zero). Added to: dC0, dn0.
extern "C" __global__ void __launch_bounds__(GROUP, 3) mlstm_backward_states(
    const element_t *queries, const element_t *dh, const float *e, const float *C0, const float *n0,
    const float *C_last, const float *n_last, const float *dC_last, const float *dn_last, element_t *dstates,
    float *dnormals, float *inner_last, float *inner_first, float *dC0, float *dn0, int S, int NH, int dqk, int dhv
) {
    extern __shared__ Vector shared[];
    States &s = *(States *)shared;
    int bh = blockIdx.z, tid = threadIdx.x, r0 = blockIdx.y * L, c0 = blockIdx.x * L;
    int chunks = (S + L - 1) / L;
    bool with_n = blockIdx.x == 0 && tid < L && r0 + tid < dqk;
    long long first = (long long)bh * chunks, size = (long long)dqk * dhv, n_at = (long long)bh * dqk + r0 + tid;
    long long tile = (long long)bh * gridDim.x * gridDim.y + blockIdx.y * gridDim.x + blockIdx.x;
    float *normal = dnormals + first * dqk + r0 + tid;
    const float *keep = e + first * L + L - 1;
    float dC[32] = {}, dn = with_n && dn_last ? dn_last[n_at] : 0.0f, inner = 0.0f;
    if (dC_last) EACH(i) {
        int x = r0 + ROW(i), y = c0 + COLUMN(i);
        long long at = bh * size + (long long)x * dhv + y;
        if (x < dqk && y < dhv) {
            dC[i] = dC_last[at];
            inner = fmaf(C_last[at], dC[i], inner);
        }
    }
    if (with_n && dn_last) inner = fmaf(n_last[n_at], dn, inner);
    inner = block_sum(inner);
    if (tid == 0) inner_last[tile] = inner;
    float kept = keep[(chunks - 1) * L], added = with_n ? normal[(long long)(chunks - 1) * dqk] : 0.0f;
    // The gradient of the first state is wanted only where there is one.
    int additions = C0 || dC0 || dn0 ? chunks : chunks - 1;
    auto pipeline = start<STATE_STAGES>(additions, [&](int step, int stage) {
        int chunk = chunks - 1 - step;
        fetch(s.left[stage], stored(queries, first + chunk, L, dqk), 0, r0);
        fetch(s.right[stage], tokens(dh, bh, chunk, S, NH, dhv), 0, c0);
    });
    for (int chunk = chunks - 1; chunk >= 0; chunk--) {
        int stage = pipeline.arrive(chunks - 1 - chunk);
        float factor = kept, sum = added;
        if (chunk > 0) {
            kept = keep[(chunk - 1) * L];
            if (with_n) added = normal[(long long)(chunk - 1) * dqk];
        }
        put<false>(dC, stored(dstates, first + chunk, dqk, dhv), r0, c0);
        if (with_n) normal[(long long)chunk * dqk] = dn;
        if (chunks - 1 - chunk == additions) break;
        EACH(i) dC[i] *= factor;
        dn = fmaf(factor, dn, sum);
        multiply<true, false>(s.left[stage], s.right[stage], dC);
    }
    inner = 0.0f;
    if (C0 || dC0) EACH(i) {
        int x = r0 + ROW(i), y = c0 + COLUMN(i);
        long long at = bh * size + (long long)x * dhv + y;
        if (x < dqk && y < dhv) {
            if (C0) inner = fmaf(C0[at], dC[i], inner);
            if (dC0) dC0[at] += dC[i];
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
/// grid (TV, N, B NH), block 128. Not needed where nobody wants dv.
struct BackwardValues {
    Tile left[STAGES], right[STAGES];
};
static_assert(sizeof(BackwardValues) <= OUTPUTS_SHARED);
extern "C" __global__ void __launch_bounds__(GROUP, 4) mlstm_backward_values(
    const element_t *keys, const element_t *dh, const element_t *scores, const element_t *dstates, element_t *dv,
    int S, int NH, int dqk, int dhv
) {
    extern __shared__ Vector shared[];
    BackwardValues &s = *(BackwardValues *)shared;
    // From the last sequence on, whose states were written last.
    int bh = gridDim.z - 1 - blockIdx.z, chunk = blockIdx.y, c0 = blockIdx.x * L, tiles = (dqk + L - 1) / L;
    long long at = (long long)bh * gridDim.y + chunk;
    Rows K = stored(keys, at, L, dqk), dC = stored(dstates, at, dqk, dhv);
    float sum[32] = {};
    auto pipeline = start<STAGES>(tiles + 1, [&](int step, int stage) {
        if (step < tiles) {
            fetch(s.left[stage], K, 0, step * L);
            fetch(s.right[stage], dC, step * L, c0);
        } else {
            fetch(s.left[stage], stored(scores, at, L, L), 0, 0);
            fetch(s.right[stage], tokens(dh, bh, chunk, S, NH, dhv), 0, c0);
        }
    });
    for (int step = 0; step < tiles; step++) {
        int stage = pipeline.arrive(step);
        multiply<false, false>(s.left[stage], s.right[stage], sum);
    }
    int stage = pipeline.arrive(tiles);
    multiply<true, false>(s.left[stage], s.right[stage], sum);
    put<true>(sum, tokens(dv, bh, chunk, S, NH, dhv), 0, c0);
}

/// With Z = dnum C^T + dd n^T and Y = V dC^T + 1 dn^T:
/// dQ += (s W ∘ P) K + s e ∘ Z, dK += (s W ∘ P)^T Q + w ∘ Y, and by tile of features
/// arriving_t = s e_t q_t . Z_t, leaving_j = w_j k_j . Y_j, crossing = e_L (C . dC + n . dn).
/// grid (TQ, N, B NH), block 256: a side for Z, a side for Y. dq and dk may be null.
struct BackwardKeys {
    Tile left[2][STAGES], right[2][STAGES];
    /// n and dn; their factors in Z and Y; those of dh and V.
    float normal[2][L], gradient[2][L], factor[2][L];
    float sums[2][2][L];
};
static_assert(sizeof(BackwardKeys) <= BACKWARD_KEYS_SHARED);
extern "C" __global__ void __launch_bounds__(2 * GROUP, BLOCKS) mlstm_backward_keys(
    const element_t *q, const element_t *k, const element_t *v, const element_t *dh, const float *inverse,
    const float *dd, const element_t *pairs, const float *w, const float *e, const element_t *states,
    const float *normals, const element_t *dstates, const float *dnormals, element_t *dq, element_t *dk,
    float *arriving, float *leaving, float *crossing, int S, int NH, int dqk, int dhv
) {
    extern __shared__ Vector shared[];
    BackwardKeys &s = *(BackwardKeys *)shared;
    int bh = blockIdx.z, chunk = blockIdx.y, tid = threadIdx.x, r0 = blockIdx.x * L, side = SIDE, member = MEMBER;
    long long at = (long long)bh * gridDim.y + chunk, all = (long long)gridDim.z * gridDim.y;
    if (member < L) {
        float normal = r0 + member < dqk ? (side ? dnormals : normals)[at * dqk + r0 + member] : 0.0f;
        s.normal[side][member] = normal;
        float factor = side ? w[at * L + member] : e[at * L + member] / sqrtf((float)dqk);
        s.gradient[side][member] = side ? factor : factor * dd[at * L + member];
        s.factor[side][member] = side ? factor : factor * inverse[at * L + member];
    }
    Rows left = tokens(side ? v : dh, bh, chunk, S, NH, dhv), state = stored(side ? dstates : states, at, dqk, dhv);
    int tiles = (dhv + L - 1) / L;
    float sum[32] = {}, inner = 0.0f;
    auto pipeline = start<STAGES>(tiles + 1, [&](int step, int stage) {
        if (step < tiles) {
            fetch(s.left[side][stage], left, 0, step * L);
            fetch(s.right[side][stage], state, r0, step * L);
        } else {
            fetch(s.left[side][stage], stored(pairs, at, L, L), 0, 0);
            fetch(s.right[side][stage], tokens(side ? q : k, bh, chunk, S, NH, dqk), 0, r0);
        }
    });
    for (int step = 0; step < tiles; step++) {
        int stage = pipeline.arrive(step);
        multiply<false, true>(s.left[side][stage], s.right[side][stage], sum);
        for (int piece = tid; piece < L * L / IN_VECTOR; piece += 2 * GROUP) {
            int r = piece / (L / IN_VECTOR), c = piece % (L / IN_VECTOR) * IN_VECTOR;
            const element_t *C = s.right[0][stage].at(r, c), *dC = s.right[1][stage].at(r, c);
            inner = dot(read((const Vector *)C), read((const Vector *)dC), inner);
        }
    }
    int stage = pipeline.arrive(tiles);
    EACH(i) {
        int t = ROW(i), x = COLUMN(i);
        sum[i] = fmaf(s.gradient[side][t], s.normal[side][x], s.factor[side][t] * sum[i]);
    }
    Tile &opposite = s.right[1 - side][stage];
    add_rows([&](int i) { return load(opposite.at(ROW(i), COLUMN(i))) * sum[i]; }, s.sums[side]);
    if (side) multiply<true, false>(s.left[side][stage], s.right[side][stage], sum);
    else multiply<false, false>(s.left[side][stage], s.right[side][stage], sum);
    element_t *to = side ? dk : dq;
    if (to) put<true>(sum, tokens(to, bh, chunk, S, NH, dqk), 0, r0);
    if (tid < L) inner = fmaf(s.normal[0][tid], s.normal[1][tid], inner);
    inner = block_sum(inner);
    if (tid == 0) crossing[blockIdx.x * all + at] = e[at * L + L - 1] * inner;
    if (member < L)
        (side ? leaving : arriving)[(blockIdx.x * all + at) * L + member] =
            s.sums[side][0][member] + s.sums[side][1][member];
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

/// What some tokens make of the gradient that comes to them from the right: a + b x; b is 0 or 1,
/// and where it is 0, x is dropped whatever it is.
struct Descent {
    float a, b;
    __device__ __forceinline__ float from(float x) const { return b != 0.0f ? a + x : a; }
    /// Before `right`, that is nearer to the start.
    __device__ __forceinline__ Descent before(Descent right) const { return {from(right.a), b * right.b}; }
};
__device__ __forceinline__ Descent scan_back(Descent descent) {
    for (int step = 1; step < 32; step <<= 1) {
        Descent right = {__shfl_down_sync(ALL, descent.a, step), __shfl_down_sync(ALL, descent.b, step)};
        if (LANE + step < 32) descent = descent.before(right);
    }
    return descent;
}

/// The gradient of m walks back along the maxima that made it, from the last state and from every
/// token (dm), to log i where the token set a new maximum, else to log f and the m before; then
/// through the gates' activations. Pads get nothing.
/// grid (B NH), block 1024: 1024 tokens a round. tiles: TQ TV; whole: tokens of all chunks, of which
/// dm, di and df have each a number. In: dm_last (B, NH) or null. Added to: dm0 (B, NH), and
/// di_out, df_out (B, S, NH) where fresh (1 di_out, 2 df_out) does not say that they are to be
/// written whole; each or null.
extern "C" __global__ void __launch_bounds__(1024) mlstm_backward_unwind(
    const float *i, const float *f, const unsigned *marks, const float *n0, const float *m0,
    const float *stabilizers, const float *dm, const float *di, const float *df, const float *dm_last,
    const float *inner_last, const float *inner_first, float *di_out, float *df_out, float *dm0, int fresh, int S,
    int whole, int NH, int dqk, int flags, int tiles
) {
    __shared__ float a[32], b[32];
    int bh = blockIdx.x, tid = threadIdx.x, warp = tid / 32;
    float first = initial_stabilizer(n0, m0, bh, dqk, flags), last = 0.0f, before = 0.0f;
    for (int tile = LANE; tile < tiles; tile += 32) {
        last += inner_last[(long long)bh * tiles + tile];
        before += inner_first[(long long)bh * tiles + tile];
    }
    // The gradient that comes to a round from the right.
    float carried = (dm_last ? dm_last[bh] : 0.0f) - warp_sum(last);
    before = warp_sum(before);
    for (int start = (S - 1) / 1024 * 1024; start >= 0; start -= 1024) {
        int t = start + tid;
        Gate gate = gate_of(i, f, marks, bh / NH, bh % NH, t, S, NH, flags);
        const float *m = stabilizers + (long long)bh * S;
        float decay = 0.0f, entry = NEG_INFINITY, own = 0.0f;
        if (t < S) {
            exponents(gate, t > 0 ? m[t - 1] : first, m[t], flags, &decay, &entry);
            own = dm[(long long)bh * whole + t];
        }
        bool kept = decay >= entry, passes = kept && !is_reset(gate.mark);
        // Out of token t to the left; then out of all from t to the warp's end.
        Descent descent = scan_back({passes ? own : 0.0f, passes ? 1.0f : 0.0f});
        if (LANE == 0) a[warp] = descent.a, b[warp] = descent.b;
        __syncthreads();
        Descent warps = scan_back({a[LANE], b[LANE]});
        __syncthreads();
        float arrived = warps.from(carried), after = __shfl_sync(ALL, arrived, min(warp + 1, 31));
        if (warp == 31) after = carried;
        float right = __shfl_down_sync(ALL, descent.from(after), 1);
        float here = own + (LANE == 31 ? after : right);
        carried = __shfl_sync(ALL, arrived, 0);
        if (t < S) {
            bool seen = !is_pad(gate.mark);
            long long from = (long long)bh * whole + t, to = ((long long)(bh / NH) * S + t) * NH + bh % NH;
            if (di_out) {
                float slope = flags & SIGMOID_INPUT ? sigmoid(-i[to]) : 1.0f;
                float change = seen ? slope * (di[from] + (kept ? 0.0f : here)) : 0.0f;
                di_out[to] = (fresh & 1 ? 0.0f : di_out[to]) + change;
            }
            if (df_out) {
                float slope = flags & EXPONENTIAL_FORGET ? 1.0f : sigmoid(-f[to]);
                float change = seen ? slope * (df[from] + (kept ? here : 0.0f)) : 0.0f;
                df_out[to] = (fresh & 2 ? 0.0f : df_out[to]) + change;
            }
        }
    }
    if (dm0 && tid == 0) dm0[bh] += carried + before;
}
