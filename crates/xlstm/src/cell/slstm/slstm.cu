// The sLSTM and LSTM cells on a GPU by f32 FMA, forward and backward: a block a (few sequences, head), one
// token after the other. In bf16 slstm_wide.cuh is faster, for the head sizes that it takes.
//
// raw = gates + R h_{t-1} + b in the order i, f, z, o, then as in mod.rs and, backward, as in slstm.cuh.
//
//   forward    slstm_transpose (once for each R) -> slstm_forward
//   backward   slstm_backward -> slstm_bias, slstm_before, and by the caller, per head, the product
//              dR (4 DH, DH) += draw^T (4 DH, B S) before (B S, DH)
//              with draw's rows NH 4 DH and before's rows NH DH apart
//
// Sizes: B sequences, S tokens >= 1, NH heads <= 65535, DH <= 1024 features a head (fastest as a
// multiple of 4).
// Blocks hold ROWS sequences (4, or -DROWS=1, 2, 8). Gates ~i, ~f, ~z, ~o and their gradients
// (B, S, NH DH), R (NH, 4 DH, DH), b (4, NH DH): f32. h, dh (B, S, NH DH): element_t.
// States h, c, n, m and their gradients (B, NH DH): f32; initial ones null: zeros; an LSTM has no n
// and m (null). marks (B, S) u32 or null: at RESET the state is zero before the token, a PAD
// passes it on, and a reset on it counts for nothing. record: what slstm.cuh says is left behind, of
// B S NH DH elements; null where there is no backward.
// Work space, f32: transposed (NH, DH, 4 DH), draw (B, S, NH, 4, DH), before (B, S, NH, DH).
// flags: 1 sigmoid input gate, 2 exponential forget gate, 4 LSTM, 8 gradient cut, 16 R in shared
// memory, 32 << g in backward: the gradient of gate g is written, not added. Launch (forward and backward):
// grid (ceil(B / ROWS), NH), block min(1024, 4 DH rounded up to 32), dynamic shared memory
// ROWS 48 DH + (flags & 16 ? 4 DH DH 4 : 0) bytes, above 48 KB by the function's attribute.
// Outputs are written whole, gradients but for those of gates added to what is there; null gradients are not
// wanted (given: zero).

#ifndef ROWS
#define ROWS 4
#endif
#define R_SHARED 16
/// Functions in the precision of the activations.
#define FAST (sizeof(element_t) == 2)

/// R of each head (4 DH, DH) -> (DH, 4 DH).
/// grid (ceil(DH / 32), ceil(4 DH / 32), NH), block (32, 8).
extern "C" __global__ void __launch_bounds__(256) slstm_transpose(const float *R, float *transposed, int DH) {
    __shared__ float tile[32][33];
    int k = blockIdx.x * 32 + threadIdx.x, j = blockIdx.y * 32 + threadIdx.x;
    long long from = (long long)blockIdx.z * 4 * DH * DH;
    for (int y = threadIdx.y; y < 32; y += 8) {
        int row = blockIdx.y * 32 + y;
        if (row < 4 * DH && k < DH) tile[y][threadIdx.x] = R[from + (long long)row * DH + k];
    }
    __syncthreads();
    for (int y = threadIdx.y; y < 32; y += 8) {
        int row = blockIdx.x * 32 + y;
        if (row < DH && j < 4 * DH) transposed[from + (long long)row * 4 * DH + j] = tile[threadIdx.x][y];
    }
}

/// sum[row] += sum_k x[row][k] matrix[k][column], k < count; x in shared memory, rows `pitch` apart.
__device__ __forceinline__ void multiply(
    const float *x, int pitch, const float *matrix, int width, int column, int count, float sum[ROWS]
) {
    if (pitch % 4 || count % 4) {
        for (int k = 0; k < count; k++) {
            float m = load(matrix + (long long)k * width + column);
#pragma unroll
            for (int row = 0; row < ROWS; row++) sum[row] = fmaf(x[row * pitch + k], m, sum[row]);
        }
        return;
    }
#pragma unroll 2
    for (int k = 0; k < count; k += 4) {
        float m[4];
#pragma unroll
        for (int i = 0; i < 4; i++) m[i] = matrix[(long long)(k + i) * width + column];
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            float4 a = *(const float4 *)(x + row * pitch + k);
            sum[row] = fmaf(a.w, m[3], fmaf(a.z, m[2], fmaf(a.y, m[1], fmaf(a.x, m[0], sum[row]))));
        }
    }
}

/// The matrix of a head, copied to shared memory where it shall lie there.
__device__ __forceinline__ const float *place(const float *from, float *end_of_floats, int DH, int flags) {
    from += (long long)blockIdx.y * 4 * DH * DH;
    if (!(flags & R_SHARED)) return from;
    float *to = (float *)end_of_floats;
    for (int x = threadIdx.x; x < 4 * DH * DH; x += blockDim.x) to[x] = from[x];
    return to;
}

/// All tokens of ROWS sequences of one head.
/// Out: h, the last state, and where given record.
extern "C" __global__ void __launch_bounds__(1024) slstm_forward(
    const float *gate_i, const float *gate_f, const float *gate_z, const float *gate_o,
    const float *transposed, const float *bias, const float *h0, const float *c0, const float *n0,
    const float *m0, const unsigned *marks, element_t *h, float *h_last, float *c_last, float *n_last,
    float *m_last, void *record, int B, int S, int NH, int DH, int flags
) {
    extern __shared__ __align__(16) float shared[];
    float *hidden = shared, *state = hidden + ROWS * DH, *raw = state + ROWS * 3 * DH;
    const float *matrix = place(transposed, raw + ROWS * 4 * DH, DH, flags);
    int first = blockIdx.x * ROWS, head = blockIdx.y, width = NH * DH, column = head * DH;
    const float *gates[4] = {gate_i, gate_f, gate_z, gate_o};
    bool lstm = flags & LSTM;
    long long n = (long long)B * S * width;

    for (int x = threadIdx.x; x < ROWS * DH; x += blockDim.x) {
        int row = x / DH, d = x % DH;
        long long at = (long long)(first + row) * width + column + d;
        bool given = first + row < B;
        hidden[x] = given && h0 ? h0[at] : 0.0f;
        float *mine = state + row * 3 * DH + d;
        mine[0] = given && c0 ? c0[at] : 0.0f;
        mine[DH] = given && n0 ? n0[at] : 0.0f;
        mine[2 * DH] = given && m0 ? m0[at] : 0.0f;
        if (given && marks && resets(marks[(long long)(first + row) * S])) hidden[x] = 0.0f;
    }
    __syncthreads();
    for (int t = 0; t < S; t++) {
        for (int j = threadIdx.x; j < 4 * DH; j += blockDim.x) {
            int gate = j / DH, d = j % DH;
            const float *from = gate == 0 ? gates[0] : gate == 1 ? gates[1] : gate == 2 ? gates[2] : gates[3];
            float own[ROWS], sum[ROWS] = {};
            float b = bias[gate * width + column + d];
#pragma unroll
            for (int row = 0; row < ROWS; row++)
                own[row] = first + row < B ? from[((long long)(first + row) * S + t) * width + column + d] : 0.0f;
            multiply(hidden, DH, matrix, 4 * DH, j, DH, sum);
#pragma unroll
            for (int row = 0; row < ROWS; row++) raw[row * 4 * DH + j] = own[row] + b + sum[row];
        }
        __syncthreads();
        for (int x = threadIdx.x; x < ROWS * DH; x += blockDim.x) {
            int row = x / DH, d = x % DH;
            if (first + row >= B) continue;
            long long token = (long long)(first + row) * S + t;
            unsigned mark = marks ? marks[token] : 0u, next = marks && t + 1 < S ? marks[token + 1] : 0u;
            float *mine = state + row * 3 * DH + d;
            if (resets(mark)) mine[0] = mine[DH] = mine[2 * DH] = 0.0f;
            long long at = token * width + column + d;
            if (mark & PAD) {
                store(h + at, 0.0f);
            } else {
                const float *mine_raw = raw + row * 4 * DH + d;
                float raws[1][4] = {{mine_raw[0], mine_raw[DH], mine_raw[2 * DH], mine_raw[3 * DH]}}, y[1], forget[1];
                State after[1] = {{mine[0], mine[DH], mine[2 * DH]}};
                Saved saved[1];
                bool is_empty = n0 && mine[DH] == 0.0f && !resets(mark);
                cell_forward<FAST, 1>(raws, after, y, saved, forget, flags);
                mine[0] = after[0].c;
                mine[DH] = after[0].n;
                mine[2 * DH] = after[0].m;
                if (record) {
                    leave(record, n, at, saved[0], flags);
                    // Of an initial state that is empty, but given: backward has no other way to it.
                    if (is_empty)
                        first_forget(record, n, SAVED_WORDS)[(long long)(first + row) * width + column + d] = forget[0];
                }
                hidden[x] = y[0];
                store(h + at, y[0]);
            }
            if (t + 1 == S) {
                long long at = (long long)(first + row) * width + column + d;
                h_last[at] = hidden[x];
                c_last[at] = mine[0];
                if (!lstm) {
                    n_last[at] = mine[DH];
                    m_last[at] = mine[2 * DH];
                }
            }
            // The next token's product reads it.
            if (resets(next)) hidden[x] = 0.0f;
        }
        __syncthreads();
    }
}

/// All tokens of ROWS sequences of one head, from the last to the first. clip: bound on the
/// gradient from a token's gates to the h before it, negative for none.
/// In: c_last, n_last as forward gave them (n_last null for an LSTM), c0, n0 as forward had them,
/// gradients of h and of the last state. Out: draw, 0 at pads. Added to: the gates' gradients and
/// those of the initial state.
extern "C" __global__ void __launch_bounds__(1024) slstm_backward(
    const float *R, const void *record, const unsigned *marks, const float *c0, const float *n0,
    const float *c_last, const float *n_last, const element_t *dh, const float *dh_last, const float *dc_last,
    const float *dn_last, const float *dm_last, float *draw, float *dgate_i, float *dgate_f, float *dgate_z,
    float *dgate_o, float *dh0, float *dc0, float *dn0, float *dm0, float clip, int B, int S, int NH, int DH,
    int flags
) {
    extern __shared__ __align__(16) float shared[];
    // Carried: dh, and those of r, l and g. The gates' gradients of a token. Their product with R, in four parts.
    float *carry = shared, *raw = carry + ROWS * 4 * DH, *product = raw + ROWS * 4 * DH;
    const float *matrix = place(R, product + ROWS * 4 * DH, DH, flags);
    int first = blockIdx.x * ROWS, head = blockIdx.y, width = NH * DH, column = head * DH;
    bool lstm = flags & LSTM;
    long long n = (long long)B * S * width;

    for (int x = threadIdx.x; x < ROWS * DH; x += blockDim.x) {
        int row = x / DH, d = x % DH;
        long long at = (long long)(first + row) * width + column + d;
        bool given = first + row < B;
        float *mine = carry + row * 4 * DH + d;
        auto value = [&](const float *gradient) { return given && gradient ? gradient[at] : 0.0f; };
        State last = {0.0f, 0.0f, 0.0f};
        if (given && !lstm) last = {c_last[at], n_last[at], 0.0f};
        Carry start = last_carry(last, value(dc_last), value(dn_last), value(dm_last), flags);
        mine[0] = value(dh_last);
        mine[DH] = start.r;
        mine[2 * DH] = start.l;
        mine[3 * DH] = start.g;
        for (int gate = 0; gate < 4; gate++) raw[row * 4 * DH + gate * DH + d] = 0.0f;
    }
    __syncthreads();
    for (int t = S - 1; t >= 0; t--) {
        for (int x = threadIdx.x; x < ROWS * DH; x += blockDim.x) {
            int row = x / DH, d = x % DH;
            if (first + row >= B) continue;
            long long token = (long long)(first + row) * S + t;
            float *mine = carry + row * 4 * DH + d, *to = raw + row * 4 * DH + d;
            float draws[4] = {};
            if (!(marks && marks[token] & PAD)) {
                long long at = token * width + column + d;
                Saved saved = left_at(record, n, at, flags);
                float dy = mine[0] + (dh ? load(dh + at) : 0.0f);
                Carry before = {mine[DH], mine[2 * DH], mine[3 * DH]}, now = before;
                cell_backward(saved, dy, now, draws, flags);
                long long start = (long long)(first + row) * width + column + d;
                const unsigned *own = marks + (long long)(first + row) * S;
                if (!lstm && n0 && n0[start] == 0.0f && !(marks && resets(own[t])) && comes_first(marks ? own : nullptr, t)) {
                    // All of such a state's gradient there is: it is no ratio.
                    float f = first_forget((void *)record, n, SAVED_WORDS)[start];
                    float dr = fmaf(dy, fabsf(saved.x[3]), before.r);
                    if (dc0) dc0[start] += f * dr;
                    if (dn0) dn0[start] += f * (before.l - dr * saved.x[1]);
                }
                mine[0] = 0.0f;
                mine[DH] = now.r;
                mine[2 * DH] = now.l;
                mine[3 * DH] = now.g;
            }
            float *out = draw + (token * NH + head) * 4 * DH + d;
            float *gates[4] = {dgate_i, dgate_f, dgate_z, dgate_o};
#pragma unroll
            for (int g = 0; g < 4; g++) {
                float *gradient = gates[g] + token * width + column + d;
                if (gates[g]) *gradient = draws[g] + (flags >> (FRESH_GATES + g) & 1 ? 0.0f : *gradient);
                out[g * DH] = to[g * DH] = draws[g];
            }
        }
        __syncthreads();
        // Part g of the product: sum_d draw[g][d] R[g][d][k].
        for (int j = threadIdx.x; j < 4 * DH; j += blockDim.x) {
            int gate = j / DH, k = j % DH;
            float sum[ROWS] = {};
            if (!(flags & GRADIENT_CUT))
                multiply(raw + gate * DH, 4 * DH, matrix + (long long)gate * DH * DH, DH, k, DH, sum);
#pragma unroll
            for (int row = 0; row < ROWS; row++) product[row * 4 * DH + j] = sum[row];
        }
        __syncthreads();
        for (int x = threadIdx.x; x < ROWS * DH; x += blockDim.x) {
            int row = x / DH, d = x % DH;
            if (first + row >= B) continue;
            unsigned mark = marks ? marks[(long long)(first + row) * S + t] : 0u;
            float *mine = carry + row * 4 * DH + d;
            const float *from = product + row * 4 * DH + d;
            float dh_before = mine[0] + (from[0] + from[DH] + from[2 * DH] + from[3 * DH]);
            if (resets(mark)) {
                dh_before = mine[DH] = mine[2 * DH] = mine[3 * DH] = 0.0f;
            } else if (clip >= 0.0f && !(mark & PAD)) {
                dh_before = fminf(clip, fmaxf(-clip, dh_before));
            }
            mine[0] = dh_before;
        }
        // Each thread goes on with what it wrote itself.
    }
    for (int x = threadIdx.x; x < ROWS * DH; x += blockDim.x) {
        int row = x / DH, d = x % DH;
        if (first + row >= B) continue;
        long long at = (long long)(first + row) * width + column + d;
        const float *mine = carry + row * 4 * DH + d;
        if (dh0) dh0[at] += mine[0];
        if (lstm) {
            if (dc0) dc0[at] += mine[DH];
            continue;
        }
        bool same = n0 && n0[at] == 0.0f && comes_first(marks ? marks + (long long)(first + row) * S : nullptr, S);
        give_initial({mine[DH], mine[2 * DH], mine[3 * DH]}, c0, n0, same ? dc_last : nullptr,
                     same ? dn_last : nullptr, at, dc0, dn0, dm0);
    }
}

/// db += sum of draw over all tokens, in a fixed order.
/// grid (ceil(NH 4 DH / 32)), block (32, 32). tokens: B S.
extern "C" __global__ void __launch_bounds__(1024) slstm_bias(const float *draw, float *db, int tokens, int NH, int DH) {
    __shared__ float parts[32][33];
    int j = blockIdx.x * 32 + threadIdx.x, width = NH * 4 * DH;
    float sum = 0.0f;
    if (j < width)
        for (int t = threadIdx.y; t < tokens; t += 32) sum += draw[(long long)t * width + j];
    parts[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && j < width) {
        sum = 0.0f;
        for (int y = 0; y < 32; y++) sum += parts[y][threadIdx.x];
        int head = j / (4 * DH), gate = j / DH % 4, d = j % DH;
        db[gate * NH * DH + head * DH + d] += sum;
    }
}

/// before (B, S, NH DH) = the h before each token, 0 at pads, from h and h0 (null: zeros). For a
/// caller that did not save it. One thread an element; width: NH DH.
extern "C" __global__ void slstm_before(
    const element_t *h, const float *h0, const unsigned *marks, float *before, long long n, int S, int width
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    long long token = i / width, first = token / S * S;
    int t = (int)(token - first), column = (int)(i - token * width);
    unsigned mark = marks ? marks[token] : 0;
    float value = 0.0f;
    if (!(mark & (RESET | PAD))) {
        int u = t - 1;
        while (marks && u >= 0 && marks[first + u] & PAD) u--;
        value = u >= 0 ? load(h + (first + u) * width + column) : h0 ? h0[token / S * width + column] : 0.0f;
    }
    before[i] = value;
}
