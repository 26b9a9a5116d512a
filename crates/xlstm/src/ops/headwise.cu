// y_h = W_h x_h + b_h for small blocks; W (heads, outer, inner). Outputs and their gradients are
// elements, or f32 in the kernels called `full`.

#define ROWS 64

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

/// parts (tiles, heads outer inner) = the sums of dy x^T over tiles of ROWS rows.
/// grid (ceil(heads outer inner / 128), tiles), block 128.
extern "C" __global__ void headwise_parts(
    const element_t *dy, const element_t *x, float *parts, int rows, int heads, int outer, int inner
) {
    int element = blockIdx.x * 128 + threadIdx.x, count = heads * outer * inner, first = blockIdx.y * ROWS;
    if (element >= count) return;
    int row_out = element / inner, column_in = row_out / outer * inner + element % inner;
    float sum = 0.0f;
#pragma unroll 4
    for (int row = first; row < min(rows, first + ROWS); row++)
        sum = fmaf(
            load(dy + (long long)row * heads * outer + row_out), load(x + (long long)row * heads * inner + column_in),
            sum
        );
    parts[(long long)blockIdx.y * count + element] = sum;
}

// ---- Blocks of 4 x 4, the mLSTM's: a thread keeps two of them and goes over ROWS rows ----

struct Blocks {
    float w[2][4][4];
};
/// The weights of the heads of columns `column` to `column + 7`, zero beyond the last.
__device__ __forceinline__ Blocks load_blocks(const element_t *w, int column, int width) {
    Blocks blocks;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        Wide wide = load_wide(w + (long long)column * 4 + i * WIDE, 4 * (width - column) - i * WIDE);
        EACH_WIDE(j) blocks.w[i / 2][i % 2 * 2 + j / 4][j % 4] = wide.x[j];
    }
    return blocks;
}

/// grid (ceil(width / 1024), tiles), block 128.
extern "C" __global__ void __launch_bounds__(128) headwise_forward_4(
    const element_t *x, const element_t *w, const float *bias, element_t *y, int rows, int width
) {
    int column = (blockIdx.x * 128 + threadIdx.x) * WIDE, first = blockIdx.y * ROWS, count = width - column;
    if (count <= 0) return;
    Blocks blocks = load_blocks(w, column, width);
    Wide start = {};
    if (bias) start = load_wide(bias + column, count);
    for (int row = first; row < min(rows, first + ROWS); row++) {
        long long at = (long long)row * width + column;
        Wide in = load_wide(x + at, count), sum = start;
#pragma unroll
        for (int j = 0; j < 4; j++)
            EACH_WIDE(o) sum.x[o] = fmaf(blocks.w[o / 4][o % 4][j], in.x[o / 4 * 4 + j], sum.x[o]);
        store_wide(y + at, sum, count);
    }
}

/// dx += W^T dy, and as headwise_parts; dx and parts may be null.
/// grid (ceil(width / 1024), tiles), block 128.
extern "C" __global__ void __launch_bounds__(128) headwise_backward_4(
    const element_t *dy, const element_t *x, const element_t *w, element_t *dx, float *parts, int rows, int width
) {
    int column = (blockIdx.x * 128 + threadIdx.x) * WIDE, first = blockIdx.y * ROWS, count = width - column;
    if (count <= 0) return;
    Blocks blocks = load_blocks(w, column, width), sums = {};
    for (int row = first; row < min(rows, first + ROWS); row++) {
        long long at = (long long)row * width + column;
        Wide out = load_wide(dy + at, count);
        if (dx) {
            Wide sum = {};
#pragma unroll
            for (int o = 0; o < 4; o++)
                EACH_WIDE(j) sum.x[j] = fmaf(blocks.w[j / 4][o][j % 4], out.x[j / 4 * 4 + o], sum.x[j]);
            add_wide(dx + at, sum, count);
        }
        if (parts) {
            Wide in = load_wide(x + at, count);
#pragma unroll
            for (int j = 0; j < 4; j++)
                EACH_WIDE(o) {
                    float *sum = &sums.w[o / 4][o % 4][j];
                    *sum = fmaf(out.x[o], in.x[o / 4 * 4 + j], *sum);
                }
        }
    }
    if (!parts) return;
    parts += (long long)blockIdx.y * width * 4 + column * 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        Wide wide;
        EACH_WIDE(j) wide.x[j] = sums.w[i / 2][i % 2 * 2 + j / 4][j % 4];
        store_wide(parts + i * WIDE, wide, 4 * count - i * WIDE);
    }
}
