// The sLSTM and LSTM cells on a GPU, forward and backward: a block a (few sequences, head), one
// token after the other.
//
// raw = gates + R h_{t-1} + b in the order i, f, z, o, then as in mod.rs and pointwise.rs. Backward
// treats m as constant: it cancels, and only g = dm - c dc - n dn of the last state goes to log f of
// each token until the one whose log i set m.
//
//   forward    slstm_transpose (once for each R) -> slstm_forward
//   backward   slstm_backward -> slstm_bias, and by the caller, per head, the product
//              dR (4 DH, DH) += draw^T (4 DH, B S) before (B S, DH)
//              with draw's rows NH 4 DH and before's rows NH DH apart
//
// Sizes: B sequences, S tokens >= 1, NH heads <= 65535, DH <= 1024 features a head (fastest as a
// multiple of 4).
// Blocks hold ROWS sequences (4, or -DROWS=1, 2, 8). Gates ~i, ~f, ~z, ~o and their gradients
// (B, S, NH DH), R (NH, 4 DH, DH), b (4, NH DH): f32. h, dh (B, S, NH DH): element_t.
// States h, c, n, m and their gradients (B, NH DH): f32; initial ones null: zeros; an LSTM has no n
// and m (null). marks (B, S) u32 or null: at RESET the state is zero before the token, a PAD
// passes it on, and a reset on it counts for nothing. Saved in training, f32, else null:
//   before (B, S, NH, DH)           h_{t-1} of each token, 0 at pads
//   record (B, S, NH, PARTS, DH)    sLSTM (PARTS 8): c_{t-1}, n_{t-1}, i', f', tanh ~z, sigmoid ~o,
//                                   d log f / d ~f, d log i / d ~i
//                                   LSTM (PARTS 5): c_{t-1}, i, f, tanh ~z, o
// Work space, f32: transposed (NH, DH, 4 DH), draw (B, S, NH, 4, DH).
// flags: 1 sigmoid input gate, 2 exponential forget gate, 4 LSTM, 8 gradient cut, 16 R in shared
// memory. Launch (forward and backward): grid (ceil(B / ROWS), NH), block
// min(1024, 4 DH rounded up to 32), dynamic shared memory ROWS 48 DH + (flags & 16 ? 4 DH DH
// 4 : 0) bytes, above 48 KB by the function's attribute.
// Outputs are written whole, gradients added to what is there; null gradients are not wanted
// (given: zero).

#ifndef ROWS
#define ROWS 4
#endif
#define SIGMOID_INPUT 1
#define EXPONENTIAL_FORGET 2
#define LSTM 4
#define GRADIENT_CUT 8
#define R_SHARED 16

__device__ __forceinline__ int parts_of(int flags) { return flags & LSTM ? 5 : 8; }
/// 1 at most; a NaN stays.
__device__ __forceinline__ float at_most_one(float x) { return x > 1.0f ? 1.0f : x; }

/// Whether the state is zero before a token with this mark.
__device__ __forceinline__ bool resets(unsigned mark) { return (mark & (RESET | PAD)) == RESET; }

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
/// Out: h, the last state, and where given before and record.
extern "C" __global__ void __launch_bounds__(1024) slstm_forward(
    const float *gate_i, const float *gate_f, const float *gate_z, const float *gate_o,
    const float *transposed, const float *bias, const float *h0, const float *c0, const float *n0,
    const float *m0, const unsigned *marks, element_t *h, float *h_last, float *c_last, float *n_last,
    float *m_last, float *before, float *record, int B, int S, int NH, int DH, int flags
) {
    extern __shared__ __align__(16) float shared[];
    float *hidden = shared, *state = hidden + ROWS * DH, *raw = state + ROWS * 3 * DH;
    const float *matrix = place(transposed, raw + ROWS * 4 * DH, DH, flags);
    int first = blockIdx.x * ROWS, head = blockIdx.y, width = NH * DH, column = head * DH;
    const float *gates[4] = {gate_i, gate_f, gate_z, gate_o};
    bool lstm = flags & LSTM;
    int parts = parts_of(flags);

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
            float h_before = hidden[x], c_before = mine[0], n_before = mine[DH], m_before = mine[2 * DH];
            float *saved = record + (token * NH + head) * parts * DH + d;
            if (mark & PAD) {
                store(h + token * width + column + d, 0.0f);
                if (before) before[token * width + column + d] = 0.0f;
                if (record)
                    for (int part = 0; part < parts; part++) saved[part * DH] = 0.0f;
            } else {
                const float *mine_raw = raw + row * 4 * DH + d;
                float raw_i = mine_raw[0], raw_f = mine_raw[DH], z = tanhf(mine_raw[2 * DH]);
                float o = sigmoid(mine_raw[3 * DH]), i, f, c, y;
                if (lstm) {
                    i = sigmoid(raw_i);
                    f = sigmoid(raw_f);
                    c = fmaf(f, c_before, i * z);
                    y = o * tanhf(c);
                    if (record) {
                        saved[0] = c_before;
                        saved[DH] = i;
                        saved[2 * DH] = f;
                        saved[3 * DH] = z;
                        saved[4 * DH] = o;
                    }
                } else {
                    float log_i = flags & SIGMOID_INPUT ? log_sigmoid(raw_i) : raw_i;
                    float log_f = flags & EXPONENTIAL_FORGET ? raw_f : log_sigmoid(raw_f);
                    float old = log_f + m_before;
                    float m = n_before == 0.0f ? log_i : fmaxf(log_i, old);
                    i = at_most_one(expf(log_i - m));
                    f = at_most_one(expf(old - m));
                    c = fmaf(f, c_before, i * z);
                    float n = fmaf(f, n_before, i);
                    y = o * c / n;
                    mine[DH] = n;
                    mine[2 * DH] = m;
                    if (record) {
                        saved[0] = c_before;
                        saved[DH] = n_before;
                        saved[2 * DH] = i;
                        saved[3 * DH] = f;
                        saved[4 * DH] = z;
                        saved[5 * DH] = o;
                        saved[6 * DH] = flags & EXPONENTIAL_FORGET ? 1.0f : sigmoid(-raw_f);
                        saved[7 * DH] = flags & SIGMOID_INPUT ? sigmoid(-raw_i) : 1.0f;
                    }
                }
                mine[0] = c;
                if (before) before[token * width + column + d] = h_before;
                hidden[x] = y;
                store(h + token * width + column + d, y);
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
    const float *R, const float *record, const unsigned *marks, const float *c0, const float *n0,
    const float *c_last, const float *n_last, const element_t *dh, const float *dh_last, const float *dc_last,
    const float *dn_last, const float *dm_last, float *draw, float *dgate_i, float *dgate_f, float *dgate_z,
    float *dgate_o, float *dh0, float *dc0, float *dn0, float *dm0, float clip, int B, int S, int NH, int DH,
    int flags
) {
    extern __shared__ __align__(16) float shared[];
    // Carried: dh, dc, dn, g. The gates' gradients of a token. Their product with R, in four parts.
    float *carry = shared, *raw = carry + ROWS * 4 * DH, *product = raw + ROWS * 4 * DH;
    const float *matrix = place(R, product + ROWS * 4 * DH, DH, flags);
    int first = blockIdx.x * ROWS, head = blockIdx.y, width = NH * DH, column = head * DH;
    bool lstm = flags & LSTM;
    int parts = parts_of(flags);

    for (int x = threadIdx.x; x < ROWS * DH; x += blockDim.x) {
        int row = x / DH, d = x % DH;
        long long at = (long long)(first + row) * width + column + d;
        bool given = first + row < B;
        float *mine = carry + row * 4 * DH + d;
        float dc = given && dc_last ? dc_last[at] : 0.0f, dn = given && !lstm && dn_last ? dn_last[at] : 0.0f;
        float g = given && !lstm && dm_last ? dm_last[at] : 0.0f;
        if (given && !lstm) g = g - c_last[at] * dc - n_last[at] * dn;
        mine[0] = given && dh_last ? dh_last[at] : 0.0f;
        mine[DH] = dc;
        mine[2 * DH] = dn;
        mine[3 * DH] = g;
        for (int gate = 0; gate < 4; gate++) raw[row * 4 * DH + gate * DH + d] = 0.0f;
    }
    __syncthreads();
    for (int t = S - 1; t >= 0; t--) {
        for (int x = threadIdx.x; x < ROWS * DH; x += blockDim.x) {
            int row = x / DH, d = x % DH;
            if (first + row >= B) continue;
            long long token = (long long)(first + row) * S + t;
            float *mine = carry + row * 4 * DH + d, *to = raw + row * 4 * DH + d;
            float di = 0.0f, df = 0.0f, dz = 0.0f, d_o = 0.0f;
            if (!(marks && marks[token] & PAD)) {
                const float *saved = record + (token * NH + head) * parts * DH + d;
                long long at = token * width + column + d;
                float dy = mine[0] + (dh ? load(dh + at) : 0.0f);
                float c_before = saved[0];
                if (lstm) {
                    float i = saved[DH], f = saved[2 * DH], z = saved[3 * DH], o = saved[4 * DH];
                    float y = tanhf(fmaf(f, c_before, i * z));
                    d_o = dy * y * o * (1.0f - o);
                    float dc = mine[DH] + dy * o * (1.0f - y * y);
                    di = dc * z * i * (1.0f - i);
                    df = dc * c_before * f * (1.0f - f);
                    dz = dc * i * (1.0f - z * z);
                    mine[DH] = f * dc;
                } else {
                    float n_before = saved[DH], i = saved[2 * DH], f = saved[3 * DH], z = saved[4 * DH];
                    float o = saved[5 * DH], g = mine[3 * DH];
                    float n = fmaf(f, n_before, i), ratio = fmaf(f, c_before, i * z) / n;
                    float dc = dy * o / n;
                    d_o = dy * ratio * o * (1.0f - o);
                    float dn = mine[2 * DH] - dc * ratio;
                    dc += mine[DH];
                    bool set_here = i == 1.0f;
                    float to_i = set_here ? g : 0.0f, to_f = set_here ? 0.0f : g;
                    di = saved[7 * DH] * (i * (z * dc + dn) + to_i);
                    df = saved[6 * DH] * (f * (c_before * dc + n_before * dn) + to_f);
                    dz = dc * i * (1.0f - z * z);
                    mine[DH] = f * dc;
                    mine[2 * DH] = f * dn;
                    mine[3 * DH] = to_f;
                }
                mine[0] = 0.0f;
                if (dgate_i) dgate_i[at] += di;
                if (dgate_f) dgate_f[at] += df;
                if (dgate_z) dgate_z[at] += dz;
                if (dgate_o) dgate_o[at] += d_o;
            }
            float *out = draw + (token * NH + head) * 4 * DH + d;
            out[0] = to[0] = di;
            out[DH] = to[DH] = df;
            out[2 * DH] = to[2 * DH] = dz;
            out[3 * DH] = to[3 * DH] = d_o;
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
        if (dc0) dc0[at] += mine[DH];
        if (lstm) continue;
        if (dn0) dn0[at] += mine[2 * DH];
        // What a scale of the whole state would change.
        float scale = 0.0f;
        if (c0) scale = c0[at] * mine[DH];
        if (n0) scale += n0[at] * mine[2 * DH];
        if (dm0) dm0[at] += mine[3 * DH] + scale;
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
