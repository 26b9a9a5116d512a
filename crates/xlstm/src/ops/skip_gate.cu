// y = (h + s x) silu(z), s one number a column. A thread has eight columns and goes over ROWS rows, the loads of
// some of which are under way at once. grid (ceil(rows / ROWS), ceil(width / 8 / block)).

#define ROWS 32
#define EACH_ROW(r) _Pragma("unroll") for (int r = 0; r < TOGETHER; r++)

template <bool WHOLE>
__device__ __forceinline__ void forward(
    const element_t *h, const float *skip, const element_t *x, const element_t *z, element_t *y, int rows, int width
) {
    const int TOGETHER = 4;
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * WIDE, count = width - column;
    if (count <= 0) return;
    int row = blockIdx.x * ROWS, end = min(rows, row + ROWS);
    Wide s = load_wide(skip + column, count);
    for (; row < end; row += TOGETHER) {
        Raw of_h[TOGETHER], of_x[TOGETHER], of_z[TOGETHER];
        EACH_ROW(r) {
            long long at = (long long)min(row + r, end - 1) * width + column;
            of_h[r] = take<WHOLE>(h + at, count);
            of_x[r] = take<WHOLE>(x + at, count);
            of_z[r] = take<WHOLE>(z + at, count);
        }
        EACH_ROW(r) {
            if (row + r >= end) break;
            Wide sum = unpack(of_h[r]), xs = unpack(of_x[r]), gates = unpack(of_z[r]);
            EACH_WIDE(j) sum.x[j] = fmaf(s.x[j], xs.x[j], sum.x[j]) * (gates.x[j] * quick_sigmoid(gates.x[j]));
            give<WHOLE>(y + (long long)(row + r) * width + column, sum, count, true);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) skip_gate_forward(
    const element_t *h, const float *skip, const element_t *x, const element_t *z, element_t *y, int rows, int width
) {
    if (width % WIDE == 0) forward<true>(h, skip, x, z, y, rows, width);
    else forward<false>(h, skip, x, z, y, rows, width);
}

/// dh = a, dx = a s, dz = dy (h + s x) silu'(z), with a = dy silu(z), or added where their bits of `fresh` (0, 2, 3)
/// are not set; and parts (ceil(rows / ROWS), width) = the sums of a x. Each may be null.
template <bool WHOLE>
__device__ __forceinline__ void backward(
    const element_t *dy, const element_t *h, const float *skip, const element_t *x, const element_t *z, element_t *dh,
    element_t *dx, element_t *dz, float *parts, int rows, int width, unsigned fresh
) {
    const int TOGETHER = 2;
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * WIDE, count = width - column;
    if (count <= 0) return;
    int row = blockIdx.x * ROWS, end = min(rows, row + ROWS);
    Wide s = load_wide(skip + column, count), sums = {};
    for (; row < end; row += TOGETHER) {
        Raw of_dy[TOGETHER], of_h[TOGETHER], of_x[TOGETHER], of_z[TOGETHER];
        EACH_ROW(r) {
            long long at = (long long)min(row + r, end - 1) * width + column;
            of_dy[r] = take<WHOLE>(dy + at, count);
            of_h[r] = take<WHOLE>(h + at, count);
            of_x[r] = take<WHOLE>(x + at, count);
            of_z[r] = take<WHOLE>(z + at, count);
        }
        EACH_ROW(r) {
            if (row + r >= end) break;
            long long at = (long long)(row + r) * width + column;
            Wide a = unpack(of_dy[r]), hs = unpack(of_h[r]), xs = unpack(of_x[r]), gates = unpack(of_z[r]);
            EACH_WIDE(j) {
                float gate = gates.x[j], open = quick_sigmoid(gate), value = gate * open;
                gates.x[j] = a.x[j] * fmaf(value, 1.0f - open, open) * fmaf(s.x[j], xs.x[j], hs.x[j]);
                a.x[j] *= value;
                sums.x[j] = fmaf(a.x[j], xs.x[j], sums.x[j]);
            }
            if (dz) give<WHOLE>(dz + at, gates, count, fresh & 8);
            if (dh) give<WHOLE>(dh + at, a, count, fresh & 1);
            EACH_WIDE(j) a.x[j] *= s.x[j];
            if (dx) give<WHOLE>(dx + at, a, count, fresh & 4);
        }
    }
    if (parts) store_wide(parts + (long long)blockIdx.x * width + column, sums, count);
}

extern "C" __global__ void __launch_bounds__(256) skip_gate_backward(
    const element_t *dy, const element_t *h, const float *skip, const element_t *x, const element_t *z, element_t *dh,
    element_t *dx, element_t *dz, float *parts, int rows, int width, unsigned fresh
) {
    if (width % WIDE == 0) backward<true>(dy, h, skip, x, z, dh, dx, dz, parts, rows, width, fresh);
    else backward<false>(dy, h, skip, x, z, dh, dx, dz, parts, rows, width, fresh);
}
