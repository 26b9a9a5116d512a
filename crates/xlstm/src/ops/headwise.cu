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

/// dx_h += W_h^T dy_h. One thread an input.
extern "C" __global__ void headwise_backward(
    const element_t *dy, const element_t *w, element_t *dx, long long n, int heads, int outer, int inner
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int column = i % (heads * inner), head = column / inner;
    const element_t *from = dy + i / (heads * inner) * (heads * outer) + head * outer;
    const element_t *weights = w + (long long)head * outer * inner + column % inner;
    float sum = 0.0f;
    for (int j = 0; j < outer; j++) sum = fmaf(load(weights + j * inner), load(from + j), sum);
    add(dx + i, sum);
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

// ---- Blocks of 4 x 4, the mLSTM's: a thread keeps two of them and goes over rows, the loads of
// TOGETHER of which are under way at once ----

#define TOGETHER 4

/// [head][output][input], or with inputs and outputs exchanged.
struct Blocks {
    float w[2][4][4];
};
/// The weights, or with `transposed` their transposes, of the heads of columns `column` to
/// `column + 7`, zero beyond the last.
template <bool transposed>
__device__ __forceinline__ Blocks load_blocks(const element_t *w, int column, int width) {
    Blocks blocks;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        Wide wide = load_wide(w + (long long)column * 4 + i * WIDE, 4 * (width - column) - i * WIDE);
        EACH_WIDE(j) {
            int o = i % 2 * 2 + j / 4;
            blocks.w[i / 2][transposed ? j % 4 : o][transposed ? o : j % 4] = wide.x[j];
        }
    }
    return blocks;
}

/// to = start + the blocks' products with `from`, added to what is there where `accumulate`, for
/// 4 TOGETHER rows.
template <bool accumulate>
__device__ __forceinline__ void multiply(
    const Blocks &blocks, const element_t *from, const Wide &start, element_t *to, int rows, int width, int count
) {
    int row = blockIdx.y * 4 * TOGETHER, end = min(rows, row + 4 * TOGETHER);
    for (; row < end; row += TOGETHER) {
        Wide in[TOGETHER], sum[TOGETHER];
#pragma unroll
        for (int r = 0; r < TOGETHER; r++) {
            long long at = (long long)min(row + r, end - 1) * width;
            in[r] = load_wide(from + at, count);
            if (accumulate) sum[r] = load_wide(to + at, count);
            else sum[r] = start;
        }
#pragma unroll
        for (int r = 0; r < TOGETHER; r++) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                EACH_WIDE(o) sum[r].x[o] = fmaf(blocks.w[o / 4][o % 4][i], in[r].x[o / 4 * 4 + i], sum[r].x[o]);
            if (row + r < end) store_wide(to + (long long)(row + r) * width, sum[r], count);
        }
    }
}

/// grid (ceil(width / 1024), ceil(rows / (4 TOGETHER))), block 128.
extern "C" __global__ void __launch_bounds__(128) headwise_forward_4(
    const element_t *x, const element_t *w, const float *bias, element_t *y, int rows, int width
) {
    int column = (blockIdx.x * 128 + threadIdx.x) * WIDE, count = width - column;
    if (count <= 0) return;
    Wide start = {};
    if (bias) start = load_wide(bias + column, count);
    multiply<false>(load_blocks<false>(w, column, width), x + column, start, y + column, rows, width, count);
}

/// dx += W^T dy. Launched as forward.
extern "C" __global__ void __launch_bounds__(128) headwise_backward_4(
    const element_t *dy, const element_t *w, element_t *dx, int rows, int width
) {
    int column = (blockIdx.x * 128 + threadIdx.x) * WIDE, count = width - column;
    if (count <= 0) return;
    multiply<true>(load_blocks<true>(w, column, width), dy + column, {}, dx + column, rows, width, count);
}

/// As headwise_parts. grid (ceil(width / 1024), tiles), block 128.
extern "C" __global__ void __launch_bounds__(128) headwise_parts_4(
    const element_t *dy, const element_t *x, float *parts, int rows, int width
) {
    int column = (blockIdx.x * 128 + threadIdx.x) * WIDE, count = width - column;
    if (count <= 0) return;
    int row = blockIdx.y * TILE_ROWS, end = min(rows, row + TILE_ROWS);
    Blocks sums = {};
    for (; row < end; row += TOGETHER) {
        Wide in[TOGETHER] = {}, out[TOGETHER] = {};
#pragma unroll
        for (int r = 0; r < TOGETHER; r++) {
            if (row + r >= end) break;
            long long at = (long long)(row + r) * width + column;
            in[r] = load_wide(x + at, count);
            out[r] = load_wide(dy + at, count);
        }
#pragma unroll
        for (int r = 0; r < TOGETHER; r++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                EACH_WIDE(o) {
                    float *sum = &sums.w[o / 4][o % 4][i];
                    *sum = fmaf(out[r].x[o], in[r].x[o / 4 * 4 + i], *sum);
                }
    }
    parts += (long long)blockIdx.y * width * 4 + column * 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        Wide wide;
        EACH_WIDE(j) wide.x[j] = sums.w[i / 2][i % 2 * 2 + j / 4][j % 4];
        store_wide(parts + i * WIDE, wide, 4 * count - i * WIDE);
    }
}
