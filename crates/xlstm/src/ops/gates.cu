// The pre-activations of both gates of the mLSTM: y_g = cap([x_1; x_2; ...] W_g^T + b_g), g = 0, 1, few
// outputs of long rows. x is read once, W from the cache. The products of cuBLAS would read x again and
// write dx by way of wide tiles of which nearly all is padding.
//
// Up to PARTS parts x_i (rows, w_i), those not given of width 0: element_t. W_g (heads, sum w_i): element_t.
// b_g, y_g and their gradients, dW_g: f32. Output o of 2 heads is output o % heads of gate o / heads.

#define PARTS 4
/// Rows whose loads are under way at once.
#define TOGETHER 4

#define GIVEN \
    const element_t *x0, const element_t *x1, const element_t *x2, const element_t *x3, int w0, int w1, int w2, int w3

/// A part, and its first column of W.
struct Part {
    const element_t *x;
    int width, first;
};
/// The part that has column `column` of W, which is less than sum w_i.
__device__ __forceinline__ Part part_at(int column, GIVEN) {
    Part part = {x0, w0, 0};
    if (column >= part.first + part.width) part = {x1, w1, part.first + part.width};
    if (column >= part.first + part.width) part = {x2, w2, part.first + part.width};
    if (column >= part.first + part.width) part = {x3, w3, part.first + part.width};
    return part;
}

/// Where output o of both gates has its row.
template <class T> __device__ __forceinline__ T *row_of(T *first, T *second, int o, int heads, long long size) {
    return o < heads ? first + o * size : second + (o - heads) * size;
}

/// A warp takes TOGETHER rows and OUTPUTS outputs from o0 on. Without a cap, cap is 0. b_g may be null.
template <int OUTPUTS>
__device__ __forceinline__ void forward_of(
    GIVEN, const element_t *first, const element_t *second, const float *b0, const float *b1, float *y0, float *y1,
    int rows, int heads, float cap
) {
    const element_t *const parts[PARTS] = {x0, x1, x2, x3};
    const int widths[PARTS] = {w0, w1, w2, w3};
    int lane = threadIdx.x % 32, row0 = (blockIdx.x * 8 + threadIdx.x / 32) * TOGETHER, o0 = blockIdx.y * OUTPUTS;
    if (row0 >= rows) return;
    int total = w0 + w1 + w2 + w3, outputs = min(OUTPUTS, 2 * heads - o0), given = min(TOGETHER, rows - row0);
    float sum[TOGETHER][OUTPUTS] = {};
    int before = 0;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        int width = widths[part];
        for (int i = lane * WIDE; i < width; i += 32 * WIDE) {
            Wide x[TOGETHER];
#pragma unroll
            for (int r = 0; r < TOGETHER; r++)
                x[r] = load_wide(parts[part] + (long long)(row0 + min(r, given - 1)) * width + i, width - i);
#pragma unroll
            for (int o = 0; o < OUTPUTS; o++) {
                if (o >= outputs) break;
                Wide weights = load_wide(row_of(first, second, o0 + o, heads, total) + before + i, width - i);
#pragma unroll
                for (int r = 0; r < TOGETHER; r++)
                    EACH_WIDE(j) sum[r][o] = fmaf(x[r].x[j], weights.x[j], sum[r][o]);
            }
        }
        before += width;
    }
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
        for (int r = 0; r < TOGETHER; r++) {
            float all = warp_sum(sum[r][o]);
            // One lane writes each, so that a row's outputs go out together.
            if (lane != (r * OUTPUTS + o) % 32 || r >= given || o >= outputs) continue;
            int head = (o0 + o) % heads;
            const float *bias = o0 + o < heads ? b0 : b1;
            if (bias) all += bias[head];
            if (cap != 0.0f) all = cap * tanhf(all / cap);
            (o0 + o < heads ? y0 : y1)[(long long)(row0 + r) * heads + head] = all;
        }
}

/// dz (rows, 2 heads) = the gradients of both gates before the cap. dy_g may be null. A thread an element.
extern "C" __global__ void gates_slopes(
    const float *y0, const float *y1, const float *dy0, const float *dy1, float *dz, int rows, int heads, float cap
) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, row = i / (2 * heads), o = i % (2 * heads);
    if (row >= rows) return;
    long long at = (long long)row * heads + o % heads;
    const float *dy = o < heads ? dy0 : dy1;
    float d = dy ? dy[at] : 0.0f;
    if (cap != 0.0f) {
        float t = (o < heads ? y0 : y1)[at] / cap;
        d *= fmaf(-t, t, 1.0f);
    }
    dz[i] = d;
}

/// dx += dz W_i, with W_i from column `first` of W on, or = where it is fresh. A thread keeps eight columns of
/// OUTPUTS rows of W and takes 4 TOGETHER rows.
template <int OUTPUTS>
__device__ __forceinline__ void inputs_of(
    const float *dz, const element_t *w0, const element_t *w1, element_t *dx, int rows, int heads, int o0, int total,
    int first, int width, int fresh
) {
    int column = (blockIdx.x * 128 + threadIdx.x) * WIDE, count = width - column;
    int outputs = min(OUTPUTS, 2 * heads - o0);
    if (count <= 0) return;
    dz += o0;
    dx += column;
    Wide weights[OUTPUTS] = {};
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++)
        if (o < outputs) weights[o] = load_wide(row_of(w0, w1, o0 + o, heads, total) + first + column, count);
    int row = blockIdx.y * 4 * TOGETHER, end = min(rows, row + 4 * TOGETHER);
    for (; row < end; row += TOGETHER) {
        Wide sum[TOGETHER] = {};
        if (!fresh) {
#pragma unroll
            for (int r = 0; r < TOGETHER; r++)
                sum[r] = load_wide(dx + (long long)min(row + r, end - 1) * width, count);
        }
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) {
            if (o >= outputs) break;
#pragma unroll
            for (int r = 0; r < TOGETHER; r++) {
                float gradient = dz[(long long)min(row + r, end - 1) * 2 * heads + o];
                EACH_WIDE(j) sum[r].x[j] = fmaf(gradient, weights[o].x[j], sum[r].x[j]);
            }
        }
#pragma unroll
        for (int r = 0; r < TOGETHER; r++)
            if (row + r < end) store_wide(dx + (long long)(row + r) * width, sum[r], count);
    }
}

/// parts (tiles, 2 heads, total + 1) = dz^T [x_1; x_2; ...; 1] of each tile of TILE_ROWS rows. A thread takes
/// eight columns, which may lie in two parts, and OUTPUTS outputs.
template <int OUTPUTS>
__device__ __forceinline__ void weights_of(GIVEN, const float *dz, float *parts, int rows, int heads) {
    int total = w0 + w1 + w2 + w3, column = (blockIdx.x * 128 + threadIdx.x) * WIDE, o0 = blockIdx.z * OUTPUTS;
    int row0 = blockIdx.y * TILE_ROWS, end = min(rows, row0 + TILE_ROWS), count = total - column;
    int outer = 2 * heads, outputs = min(OUTPUTS, outer - o0);
    if (count <= 0) return;
    Part part = part_at(column, x0, x1, x2, x3, w0, w1, w2, w3);
    bool whole = column + min(count, WIDE) <= part.first + part.width;
    Wide sum[OUTPUTS] = {};
    float ones[OUTPUTS] = {};
    for (int row = row0; row < end; row += TOGETHER) {
        Wide values[TOGETHER] = {};
#pragma unroll
        for (int r = 0; r < TOGETHER; r++) {
            long long at = row + r;
            if (at >= end) break;
            if (whole) {
                values[r] = load_wide(part.x + at * part.width + column - part.first, count);
                continue;
            }
            EACH_WIDE(j) {
                if (j >= count) break;
                Part other = part_at(column + j, x0, x1, x2, x3, w0, w1, w2, w3);
                values[r].x[j] = load(other.x + at * other.width + column + j - other.first);
            }
        }
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) {
            if (o >= outputs) break;
#pragma unroll
            for (int r = 0; r < TOGETHER; r++) {
                float gradient = row + r < end ? dz[(long long)(row + r) * outer + o0 + o] : 0.0f;
                ones[o] += gradient;
                EACH_WIDE(j) sum[o].x[j] = fmaf(gradient, values[r].x[j], sum[o].x[j]);
            }
        }
    }
    parts += ((long long)blockIdx.y * outer + o0) * (total + 1) + column;
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++) {
        if (o >= outputs) break;
        store_wide(parts + (long long)o * (total + 1), sum[o], count);
        if (column == 0) parts[(long long)o * (total + 1) + total] = ones[o];
    }
}

/// dW_g and db_g += the sums of parts over the tiles: 32 threads a column take every 32nd tile, and their sums
/// are added in order. Null gradients are not asked for, and those of dW_0, dW_1, db_0, db_1 whose bit `fresh` has
/// are written, not added to. grid (ceil(2 heads (total + 1) / 32)), block (32, 32).
extern "C" __global__ void __launch_bounds__(1024) gates_sums(
    const float *parts, float *dw0, float *dw1, float *db0, float *db1, int tiles, int heads, int total,
    int fresh
) {
    __shared__ float partial[32][33];
    int width = 2 * heads * (total + 1), place = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    if (place < width)
        for (int i = threadIdx.y; i < tiles; i += 32) sum += parts[(long long)i * width + place];
    partial[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || place >= width) return;
    sum = 0.0f;
    for (int i = 0; i < 32; i++) sum += partial[i][threadIdx.x];
    int o = place / (total + 1), column = place % (total + 1);
    bool second = o >= heads;
    float *to = column == total ? (second ? db1 : db0) : (second ? dw1 : dw0);
    if (!to) return;
    to += column == total ? o % heads : (long long)(o % heads) * total + column;
    int bit = (column == total ? 2 : 0) + (second ? 1 : 0);
    *to = fresh >> bit & 1 ? sum : *to + sum;
}

/// forward: grid (ceil(rows / 32), ceil(2 heads / OUTPUTS)), block 256. inputs: grid (ceil(width / 1024),
/// ceil(rows / (4 TOGETHER))), block 128, once for each part and each OUTPUTS outputs. weights: grid
/// (ceil(total / 1024), tiles, ceil(2 heads / OUTPUTS)), block 128.
#define GATE_KERNELS(OUTPUTS) \
    extern "C" __global__ void __launch_bounds__(256, 1) gates_forward_##OUTPUTS( \
        GIVEN, const element_t *first, const element_t *second, const float *b0, const float *b1, float *y0, \
        float *y1, int rows, int heads, float cap \
    ) { \
        forward_of<OUTPUTS>(x0, x1, x2, x3, w0, w1, w2, w3, first, second, b0, b1, y0, y1, rows, heads, cap); \
    } \
    extern "C" __global__ void __launch_bounds__(128) gates_inputs_##OUTPUTS( \
        const float *dz, const element_t *w0, const element_t *w1, element_t *dx, int rows, int heads, int o0, \
        int total, int first, int width, int fresh \
    ) { \
        inputs_of<OUTPUTS>(dz, w0, w1, dx, rows, heads, o0, total, first, width, fresh); \
    } \
    extern "C" __global__ void __launch_bounds__(128) gates_weights_##OUTPUTS( \
        GIVEN, const float *dz, float *parts, int rows, int heads \
    ) { \
        weights_of<OUTPUTS>(x0, x1, x2, x3, w0, w1, w2, w3, dz, parts, rows, heads); \
    }
GATE_KERNELS(8)
GATE_KERNELS(12)
