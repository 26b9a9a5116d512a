// y = [x_1; x_2; ...] W^T + b for few outputs of long rows, the mLSTM's gates: x is read once, W from
// the cache. The products of cuBLAS would read x a second time and write dx by way of wide tiles of
// which nearly all is padding.
//
// Up to PARTS parts x_i (rows, w_i), those not given of width 0: element_t. W (outer, sum w_i):
// element_t. b, y and their gradients, dW: f32. Outputs are taken OUTPUTS at a time.

#define PARTS 4
#define OUTPUTS 8
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

/// A warp takes TOGETHER rows and OUTPUTS outputs.
/// grid (ceil(rows / 32), ceil(outer / OUTPUTS)), block 256. bias may be null.
extern "C" __global__ void __launch_bounds__(256) concat_linear_forward(
    GIVEN, const element_t *w, const float *bias, float *y, int rows, int outer
) {
    const element_t *const parts[PARTS] = {x0, x1, x2, x3};
    const int widths[PARTS] = {w0, w1, w2, w3};
    int lane = threadIdx.x % 32, row0 = (blockIdx.x * 8 + threadIdx.x / 32) * TOGETHER, o0 = blockIdx.y * OUTPUTS;
    if (row0 >= rows) return;
    int total = w0 + w1 + w2 + w3, outputs = min(OUTPUTS, outer - o0), given = min(TOGETHER, rows - row0);
    w += (long long)o0 * total;
    float sum[TOGETHER][OUTPUTS] = {};
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
                Wide weights = load_wide(w + (long long)o * total + i, width - i);
#pragma unroll
                for (int r = 0; r < TOGETHER; r++)
                    EACH_WIDE(j) sum[r][o] = fmaf(x[r].x[j], weights.x[j], sum[r][o]);
            }
        }
        w += width;
    }
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
        for (int r = 0; r < TOGETHER; r++) {
            float all = warp_sum(sum[r][o]);
            // One lane writes each, so that a row's outputs go out together.
            if (lane == r * OUTPUTS + o && r < given && o < outputs)
                y[(long long)(row0 + r) * outer + o0 + o] = all + (bias ? bias[o0 + o] : 0.0f);
        }
}

/// dx += dy W_i, with W_i from column `first` of W on. A thread keeps eight columns of OUTPUTS rows of
/// W and takes 4 TOGETHER rows. grid (ceil(width / 1024), ceil(rows / (4 TOGETHER))), block 128; once
/// for each part and each OUTPUTS outputs, from o0 on.
extern "C" __global__ void __launch_bounds__(128) concat_linear_inputs(
    const float *dy, const element_t *w, element_t *dx, int rows, int outer, int o0, int total, int first, int width
) {
    int column = (blockIdx.x * 128 + threadIdx.x) * WIDE, count = width - column, outputs = min(OUTPUTS, outer - o0);
    if (count <= 0) return;
    w += (long long)o0 * total + first + column;
    dy += o0;
    dx += column;
    Wide weights[OUTPUTS] = {};
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++)
        if (o < outputs) weights[o] = load_wide(w + (long long)o * total, count);
    int row = blockIdx.y * 4 * TOGETHER, end = min(rows, row + 4 * TOGETHER);
    for (; row < end; row += TOGETHER) {
        Wide sum[TOGETHER];
#pragma unroll
        for (int r = 0; r < TOGETHER; r++) sum[r] = load_wide(dx + (long long)min(row + r, end - 1) * width, count);
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) {
            if (o >= outputs) break;
#pragma unroll
            for (int r = 0; r < TOGETHER; r++) {
                float gradient = dy[(long long)min(row + r, end - 1) * outer + o];
                EACH_WIDE(j) sum[r].x[j] = fmaf(gradient, weights[o].x[j], sum[r].x[j]);
            }
        }
#pragma unroll
        for (int r = 0; r < TOGETHER; r++)
            if (row + r < end) store_wide(dx + (long long)(row + r) * width, sum[r], count);
    }
}

/// sums (tiles, outer, total) = dy^T [x_1; x_2; ...] of each tile of TILE_ROWS rows. A thread takes eight
/// columns, which may lie in two parts, and OUTPUTS outputs.
/// grid (ceil(total / 1024), tiles, ceil(outer / OUTPUTS)), block 128.
extern "C" __global__ void __launch_bounds__(128) concat_linear_weights(
    GIVEN, const float *dy, float *sums, int rows, int outer
) {
    int total = w0 + w1 + w2 + w3, column = (blockIdx.x * 128 + threadIdx.x) * WIDE, o0 = blockIdx.z * OUTPUTS;
    int row0 = blockIdx.y * TILE_ROWS, end = min(rows, row0 + TILE_ROWS), count = total - column;
    int outputs = min(OUTPUTS, outer - o0);
    if (count <= 0) return;
    Part part = part_at(column, x0, x1, x2, x3, w0, w1, w2, w3);
    bool whole = column + min(count, WIDE) <= part.first + part.width;
    Wide sum[OUTPUTS] = {};
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
                // Beyond the end, the values are zero.
                float gradient = dy[(long long)min(row + r, end - 1) * outer + o0 + o];
                EACH_WIDE(j) sum[o].x[j] = fmaf(gradient, values[r].x[j], sum[o].x[j]);
            }
        }
    }
    sums += ((long long)blockIdx.y * outer + o0) * total + column;
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++)
        if (o < outputs) store_wide(sums + (long long)o * total, sum[o], count);
}
