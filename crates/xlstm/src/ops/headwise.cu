// y_h = W_h x_h + b_h for small blocks; W (heads, outer, inner). Outputs and their gradients are
// elements, or f32 in the kernels called `full`.

// ---- Blocks of any size ----

template <class T> __device__ __forceinline__ void forward(
    const element_t *x, const element_t *w, const float *bias, T *y, long long n, int heads, int outer, int inner
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int column = i % (heads * outer), head = column / outer;
    const element_t *from = x + i / (heads * outer) * (heads * inner) + head * inner;
    const element_t *weights = w + (long long)column * inner;
    float sum = bias ? bias[column] : 0.0f;
    for (int j = 0; j < inner; j++) sum = fmaf(load(weights + j), load(from + j), sum);
    store(y + i, sum);
}

/// One thread an output.
extern "C" __global__ void headwise_forward(
    const element_t *x, const element_t *w, const float *bias, element_t *y, long long n, int heads, int outer,
    int inner
) {
    forward(x, w, bias, y, n, heads, outer, inner);
}
extern "C" __global__ void headwise_forward_full(
    const element_t *x, const element_t *w, const float *bias, float *y, long long n, int heads, int outer,
    int inner
) {
    forward(x, w, bias, y, n, heads, outer, inner);
}

/// dx_h += W_h^T dy_h, or = with bit 0 of `fresh`. One thread an input.
extern "C" __global__ void headwise_backward(
    const element_t *dy, const element_t *w, element_t *dx, long long n, int heads, int outer, int inner,
    unsigned fresh
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int column = i % (heads * inner), head = column / inner;
    const element_t *from = dy + i / (heads * inner) * (heads * outer) + head * outer;
    const element_t *weights = w + (long long)head * outer * inner + column % inner;
    float sum = 0.0f;
    for (int j = 0; j < outer; j++) sum = fmaf(load(weights + j * inner), load(from + j), sum);
    if (fresh & 1) store(dx + i, sum);
    else add(dx + i, sum);
}

/// parts (tiles, heads outer inner) = the sums of dy x^T over tiles of TILE_ROWS rows.
/// grid (ceil(heads outer inner / 128), tiles), block 128.
extern "C" __global__ void headwise_parts(
    const element_t *dy, const element_t *x, float *parts, int rows, int heads, int outer, int inner
) {
    int element = blockIdx.x * 128 + threadIdx.x, count = heads * outer * inner, first = blockIdx.y * TILE_ROWS;
    if (element >= count) return;
    int row_out = element / inner, column_in = row_out / outer * inner + element % inner;
    float sum = 0.0f;
#pragma unroll 4
    for (int row = first; row < min(rows, first + TILE_ROWS); row++)
        sum = fmaf(
            load(dy + (long long)row * heads * outer + row_out), load(x + (long long)row * heads * inner + column_in),
            sum
        );
    parts[(long long)blockIdx.y * count + element] = sum;
}

// ---- Blocks of 4 x 4, the mLSTM's: a thread has one head and goes over ROWS rows, the loads of some of
// which are under way at once. block 128, grid (ceil(rows / ROWS), ceil(heads / 128)) ----

#define ROWS 64
#define EACH_ROW(r) _Pragma("unroll") for (int r = 0; r < TOGETHER; r++)
#define EACH_MAP(m) _Pragma("unroll") for (int m = 0; m < MAPS; m++)

/// A block's numbers in f32, row by row.
struct Block {
    float w[4][4];
};
__device__ __forceinline__ Block block_of(const element_t *w, int head) {
    Block block;
    EACH_FOUR(o) {
        Four row = unpack(load_four(w + (long long)head * 16 + o * 4));
        EACH_FOUR(i) block.w[o][i] = row.x[i];
    }
    return block;
}

/// y = W x + b, of one map or two.
template <int MAPS>
__device__ __forceinline__ void forward_4(
    const element_t *x, const element_t *const (&w)[MAPS], const float *const (&bias)[MAPS], element_t *const (&y)[MAPS],
    int rows, int heads
) {
    const int TOGETHER = 8;
    int head = blockIdx.y * 128 + threadIdx.x, row = blockIdx.x * ROWS, end = min(rows, row + ROWS);
    if (head >= heads) return;
    Block block[MAPS];
    Four start[MAPS] = {};
    EACH_MAP(m) {
        block[m] = block_of(w[m], head);
        if (bias[m]) EACH_FOUR(o) start[m].x[o] = bias[m][head * 4 + o];
    }
    for (; row < end; row += TOGETHER) {
        RawFour in[TOGETHER];
        EACH_ROW(r) in[r] = load_four(x + ((long long)min(row + r, end - 1) * heads + head) * 4);
        EACH_ROW(r) {
            if (row + r >= end) break;
            Four from = unpack(in[r]);
            EACH_MAP(m) {
                Four to = start[m];
                EACH_FOUR(i) EACH_FOUR(o) to.x[o] = fmaf(block[m].w[o][i], from.x[i], to.x[o]);
                store_four(y[m] + ((long long)(row + r) * heads + head) * 4, to);
            }
        }
    }
}

/// w2 and all of the second map may be null.
extern "C" __global__ void __launch_bounds__(128) headwise_forward_4(
    const element_t *x, const element_t *w, const float *bias, element_t *y, const element_t *w2, const float *bias2,
    element_t *y2, int rows, int heads
) {
    if (w2) forward_4<2>(x, {w, w2}, {bias, bias2}, {y, y2}, rows, heads);
    else forward_4<1>(x, {w}, {bias}, {y}, rows, heads);
}

/// dx = sum of W^T dy, or added where bit 0 of `fresh` is not set; and parts (ceil(rows / ROWS), heads 16) = the sums
/// of dy x^T of each. All of them may be null.
template <int MAPS>
__device__ __forceinline__ void backward_4(
    const element_t *const (&dy)[MAPS], const element_t *x, const element_t *const (&w)[MAPS], element_t *dx,
    float *const (&parts)[MAPS], int rows, int heads, unsigned fresh
) {
    const int TOGETHER = MAPS == 1 ? 8 : 4;
    int head = blockIdx.y * 128 + threadIdx.x, row = blockIdx.x * ROWS, end = min(rows, row + ROWS);
    if (head >= heads) return;
    Block block[MAPS], sums[MAPS] = {};
    EACH_MAP(m) block[m] = block_of(w[m], head);
    bool adds = dx && !(fresh & 1);
    for (; row < end; row += TOGETHER) {
        RawFour out[TOGETHER][MAPS], in[TOGETHER], old[TOGETHER];
        EACH_ROW(r) {
            long long at = ((long long)min(row + r, end - 1) * heads + head) * 4;
            EACH_MAP(m) out[r][m] = load_four(dy[m] + at);
            in[r] = load_four(x + at);
            if (adds) old[r] = load_four(dx + at);
        }
        EACH_ROW(r) {
            if (row + r >= end) break;
            Four given = unpack(in[r]), to = {};
            if (adds) to = unpack(old[r]);
            EACH_MAP(m) {
                Four from = unpack(out[r][m]);
                EACH_FOUR(o) EACH_FOUR(i) {
                    to.x[i] = fmaf(block[m].w[o][i], from.x[o], to.x[i]);
                    sums[m].w[o][i] = fmaf(from.x[o], given.x[i], sums[m].w[o][i]);
                }
            }
            if (dx) store_four(dx + ((long long)(row + r) * heads + head) * 4, to);
        }
    }
    EACH_MAP(m) {
        if (!parts[m]) continue;
        float *to = parts[m] + ((long long)blockIdx.x * heads + head) * 16;
        EACH_FOUR(o) store_four(to + o * 4, {{sums[m].w[o][0], sums[m].w[o][1], sums[m].w[o][2], sums[m].w[o][3]}});
    }
}

/// dy2 and all of the second map may be null.
extern "C" __global__ void __launch_bounds__(128) headwise_backward_4(
    const element_t *dy, const element_t *dy2, const element_t *x, const element_t *w, const element_t *w2,
    element_t *dx, float *parts, float *parts2, int rows, int heads, unsigned fresh
) {
    if (dy2) backward_4<2>({dy, dy2}, x, {w, w2}, dx, {parts, parts2}, rows, heads, fresh);
    else backward_4<1>({dy}, x, {w}, dx, {parts}, rows, heads, fresh);
}
