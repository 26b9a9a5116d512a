// Layer norm and root-mean-square norm of groups of a row, fused with what stands before and behind:
// s = x + added, y = sigmoid(gate) norm(s). saved (rows, groups, 2): mean and 1 / std.
//
// A row that fits is kept in registers by one warp: of chunk c of 256 columns, a lane has eight. Its
// groups are the whole row, whole chunks, or a power of two of neighbouring lanes. Other rows are read
// several times, a group by one warp.

/// What all kernels have. s and added are null where nothing is added, gate where there is none, b where
/// there is no bias; s is x itself for backward. offset: 1 where the scale is 1 + w.
#define SHAPE int rows, int width, int groups, int layer, float offset

/// x as it is stored: what backward will read.
__device__ __forceinline__ Wide as_stored(Wide wide) {
#ifdef ELEMENT_BF16
    EACH_WIDE(j) {
        bf16_t bits;
        store(&bits, wide.x[j]);
        wide.x[j] = load(&bits);
    }
#endif
    return wide;
}

/// The sum over each group of what its lanes and chunks have, in all of them.
template <int CHUNKS> __device__ __forceinline__ void group_sums(float (&x)[CHUNKS], int groups, int size) {
    if (groups == 1) {
        float sum = 0.0f;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) sum += x[c];
        sum = warp_sum(sum);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) x[c] = sum;
        return;
    }
    int reach = min(16, size / 16), each = max(1, size / 256);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
        for (int step = reach; step > 0; step >>= 1) x[c] += __shfl_xor_sync(0xffffffffu, x[c], step);
    if (each == 1) return;
    float sums[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        sums[c] = 0.0f;
#pragma unroll
        for (int other = 0; other < CHUNKS; other++)
            if (other / each == c / each) sums[c] += x[other];
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) x[c] = sums[c];
}

/// A warp a row.
template <int CHUNKS>
__device__ __forceinline__ void row_forward(
    const element_t *x, const element_t *added, const element_t *gate, const float *w, const float *b, element_t *s,
    element_t *y, float *saved, SHAPE, float eps
) {
    int lane = threadIdx.x % 32, row = blockIdx.x * 8 + threadIdx.x / 32, size = width / groups;
    if (row >= rows) return;
    long long start = (long long)row * width;
    Wide own[CHUNKS];
    Raw first[CHUNKS] = {}, more[CHUNKS] = {}, open[CHUNKS] = {};
    float mean[CHUNKS], inverse[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        int column = (32 * c + lane) * WIDE;
        if (column < width) first[c] = load_raw(x + start + column);
        if (added && column < width) more[c] = load_raw(added + start + column);
        if (gate && column < width) open[c] = load_raw(gate + start + column);
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        int column = (32 * c + lane) * WIDE;
        own[c] = unpack(first[c]);
        if (added && column < width) {
            Wide other = unpack(more[c]);
            EACH_WIDE(j) own[c].x[j] += other.x[j];
            own[c] = as_stored(own[c]);
            store_whole(s + start + column, own[c]);
        }
        mean[c] = 0.0f;
        if (layer) EACH_WIDE(j) mean[c] += own[c].x[j];
    }
    if (layer) group_sums(mean, groups, size);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        mean[c] /= size;
        inverse[c] = 0.0f;
        EACH_WIDE(j) {
            float d = (32 * c + lane) * WIDE < width ? own[c].x[j] - mean[c] : 0.0f;
            inverse[c] = fmaf(d, d, inverse[c]);
        }
    }
    group_sums(inverse, groups, size);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        int column = (32 * c + lane) * WIDE;
        if (column >= width) continue;
        inverse[c] = 1.0f / sqrtf(inverse[c] / size + eps);
        Wide scale = load_whole(w + column);
        EACH_WIDE(j) own[c].x[j] = (own[c].x[j] - mean[c]) * inverse[c] * (scale.x[j] + offset);
        if (b) {
            Wide bias = load_whole(b + column);
            EACH_WIDE(j) own[c].x[j] += bias.x[j];
        }
        if (gate) {
            Wide slots = unpack(open[c]);
            EACH_WIDE(j) own[c].x[j] *= sigmoid(slots.x[j]);
        }
        store_whole(y + start + column, own[c]);
        if (column % size == 0) {
            float *to = saved + 2 * ((long long)row * groups + column / size);
            to[0] = mean[c];
            to[1] = inverse[c];
        }
    }
}

/// With dn = dy sigmoid(gate), n = (s - mean) / std, g = dn scale: ds = (g - mean(g) - n mean(g n)) / std + ds
/// of other readers, without mean(g) for the root-mean-square norm; dx and dadded += ds, dgate += dy y / open
/// (the gate's slope); parts (blocks, width) = the sums of dn n over the rows of a block, bias_parts of dn. Where
/// `fresh` has bit 0, 1, 2, dx, dadded, dgate are written, not added to. Null gradients are not asked for.
/// A warp takes every row that is as many warps further.
#define GRADIENTS \
    const element_t *dy, const element_t *ds, const element_t *s, const element_t *gate, const float *w, \
        const float *b, const float *saved, element_t *dx, element_t *dadded, element_t *dgate, float *parts, \
        float *bias_parts

/// Warps of a block of row_backward.
#define WARPS 4

/// The sums of the warps, in order, to 256 columns of parts.
__device__ __forceinline__ void add_warps(const Wide &wide, float *to, int count) {
    __shared__ float sums[WARPS][32 * WIDE];
    __syncthreads();
    EACH_WIDE(j) sums[threadIdx.x / 32][threadIdx.x % 32 * WIDE + j] = wide.x[j];
    __syncthreads();
    for (int column = threadIdx.x; column < min(count, 32 * WIDE); column += 32 * WARPS) {
        float sum = 0.0f;
        for (int i = 0; i < WARPS; i++) sum += sums[i][column];
        to[column] = sum;
    }
}

/// p = wide where it is fresh, else p += wide; aligned and whole.
__device__ __forceinline__ void give_whole(element_t *p, const Wide &wide, bool fresh) {
    Wide sum = wide;
    if (!fresh) {
        Wide before = load_whole(p);
        EACH_WIDE(j) sum.x[j] += before.x[j];
    }
    store_whole(p, sum);
}

template <int CHUNKS, bool BIAS>
__device__ __forceinline__ void row_backward(GRADIENTS, SHAPE, int fresh) {
    int lane = threadIdx.x % 32, size = width / groups;
    Wide dw[CHUNKS] = {}, db[BIAS ? CHUNKS : 1] = {};
    for (int row = blockIdx.x * WARPS + threadIdx.x / 32; row < rows; row += gridDim.x * WARPS) {
        long long start = (long long)row * width;
        Raw of_s[CHUNKS] = {}, of_dy[CHUNKS] = {}, of_ds[CHUNKS] = {}, of_gate[CHUNKS] = {};
        float mean[CHUNKS] = {}, inverse[CHUNKS] = {}, g_sum[CHUNKS] = {}, gn_sum[CHUNKS] = {};
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            int column = (32 * c + lane) * WIDE;
            if (column < width) {
                of_s[c] = load_raw(s + start + column);
                of_dy[c] = load_raw(dy + start + column);
                const float *from = saved + 2 * ((long long)row * groups + column / size);
                mean[c] = from[0];
                inverse[c] = from[1];
            }
            if (ds && column < width) of_ds[c] = load_raw(ds + start + column);
            if (gate && column < width) of_gate[c] = load_raw(gate + start + column);
        }
        Wide n[CHUNKS], d[CHUNKS];
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            int column = (32 * c + lane) * WIDE;
            n[c] = unpack(of_s[c]);
            d[c] = unpack(of_dy[c]);
            if (column >= width) continue;
            Wide scale = load_whole(w + column);
            EACH_WIDE(j) n[c].x[j] = (n[c].x[j] - mean[c]) * inverse[c];
            if (gate) {
                Wide open = unpack(of_gate[c]), bias = {};
                if (b) bias = load_whole(b + column);
                EACH_WIDE(j) {
                    float value = sigmoid(open.x[j]), normed = fmaf(n[c].x[j], scale.x[j] + offset, bias.x[j]);
                    open.x[j] = d[c].x[j] * normed * value * (1.0f - value);
                    d[c].x[j] *= value;
                }
                if (dgate) give_whole(dgate + start + column, open, fresh & 4);
            }
            EACH_WIDE(j) {
                float g = d[c].x[j] * (scale.x[j] + offset);
                g_sum[c] += g;
                gn_sum[c] = fmaf(g, n[c].x[j], gn_sum[c]);
                dw[c].x[j] = fmaf(d[c].x[j], n[c].x[j], dw[c].x[j]);
                if (BIAS) db[c].x[j] += d[c].x[j];
            }
        }
        if (layer) group_sums(g_sum, groups, size);
        group_sums(gn_sum, groups, size);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            int column = (32 * c + lane) * WIDE;
            if (column >= width) continue;
            float g_mean = layer ? g_sum[c] / size : 0.0f, gn_mean = gn_sum[c] / size;
            Wide scale = load_whole(w + column), more = unpack(of_ds[c]);
            EACH_WIDE(j) {
                float g = d[c].x[j] * (scale.x[j] + offset);
                d[c].x[j] = fmaf(inverse[c], g - g_mean - n[c].x[j] * gn_mean, more.x[j]);
            }
            if (dx) give_whole(dx + start + column, d[c], fresh & 1);
            if (dadded) give_whole(dadded + start + column, d[c], fresh & 2);
        }
    }
    long long tile = (long long)blockIdx.x * width;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        add_warps(dw[c], parts + tile + 256 * c, width - 256 * c);
        if (BIAS) add_warps(db[c], bias_parts + tile + 256 * c, width - 256 * c);
    }
}

/// Forward: grid (ceil(rows / 8)), block 256; backward: grid (up to ceil(rows / WARPS)), block 32 WARPS.
#define ROW_KERNELS(CHUNKS) \
    extern "C" __global__ void __launch_bounds__(256) norm_row_forward_##CHUNKS( \
        const element_t *x, const element_t *added, const element_t *gate, const float *w, const float *b, \
        element_t *s, element_t *y, float *saved, SHAPE, float eps \
    ) { \
        row_forward<CHUNKS>(x, added, gate, w, b, s, y, saved, rows, width, groups, layer, offset, eps); \
    } \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) norm_row_backward_##CHUNKS(GRADIENTS, SHAPE, int fresh) { \
        row_backward<CHUNKS, false>( \
            dy, ds, s, gate, w, b, saved, dx, dadded, dgate, parts, bias_parts, rows, width, groups, layer, offset, \
            fresh \
        ); \
    } \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) norm_row_backward_bias_##CHUNKS(GRADIENTS, SHAPE, int fresh) { \
        row_backward<CHUNKS, true>( \
            dy, ds, s, gate, w, b, saved, dx, dadded, dgate, parts, bias_parts, rows, width, groups, layer, offset, \
            fresh \
        ); \
    }
ROW_KERNELS(1)
ROW_KERNELS(2)
ROW_KERNELS(3)
ROW_KERNELS(4)

// ---- Rows of any width ----

/// A warp a group: grid (ceil(rows groups / 8)), block 256.
extern "C" __global__ void __launch_bounds__(256) norm_forward(
    const element_t *x, const element_t *added, const element_t *gate, const float *w, const float *b, element_t *s,
    element_t *y, float *saved, SHAPE, float eps
) {
    long long group = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    int lane = threadIdx.x % 32, size = width / groups;
    if (group >= (long long)rows * groups) return;
    long long start = group * size;
    w += group % groups * size;
    if (b) b += group % groups * size;
    x += start;
    if (added) {
        s += start;
        for (int i = lane * WIDE; i < size; i += 32 * WIDE) {
            Wide wide = load_wide(x + i, size - i), more = load_wide(added + start + i, size - i);
            EACH_WIDE(j) wide.x[j] += more.x[j];
            store_wide(s + i, wide, size - i);
        }
        // A lane reads what it has written itself.
        x = s;
    }
    float2 statistics = warp_statistics(x, size, layer, eps);
    float mean = statistics.x, inverse = statistics.y;
    for (int i = lane * WIDE; i < size; i += 32 * WIDE) {
        Wide wide = load_wide(x + i, size - i), scale = load_wide(w + i, size - i);
        EACH_WIDE(j) wide.x[j] = (wide.x[j] - mean) * inverse * (scale.x[j] + offset);
        if (b) {
            Wide bias = load_wide(b + i, size - i);
            EACH_WIDE(j) wide.x[j] += bias.x[j];
        }
        if (gate) {
            Wide open = load_wide(gate + start + i, size - i);
            EACH_WIDE(j) wide.x[j] *= sigmoid(open.x[j]);
        }
        store_wide(y + start + i, wide, size - i);
    }
    if (lane == 0) {
        saved[2 * group] = mean;
        saved[2 * group + 1] = inverse;
    }
}

/// All but the parts, which are null. Launched as forward.
extern "C" __global__ void __launch_bounds__(256) norm_backward(GRADIENTS, SHAPE, int fresh) {
    long long group = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    int lane = threadIdx.x % 32, size = width / groups;
    if (group >= (long long)rows * groups) return;
    long long start = group * size;
    w += group % groups * size;
    if (b) b += group % groups * size;
    float mean = saved[2 * group], inverse = saved[2 * group + 1], g_sum = 0.0f, gn_sum = 0.0f;
    for (int i = lane * WIDE; i < size; i += 32 * WIDE) {
        int count = size - i;
        Wide d = load_wide(dy + start + i, count), n = load_wide(s + start + i, count), scale = load_wide(w + i, count);
        EACH_WIDE(j) n.x[j] = (n.x[j] - mean) * inverse;
        if (gate) {
            Wide open = load_wide(gate + start + i, count), bias = {};
            if (b) bias = load_wide(b + i, count);
            EACH_WIDE(j) {
                float value = sigmoid(open.x[j]), normed = fmaf(n.x[j], scale.x[j] + offset, bias.x[j]);
                open.x[j] = d.x[j] * normed * value * (1.0f - value);
                d.x[j] *= value;
            }
            if (dgate) give_wide(dgate + start + i, open, count, fresh & 4);
        }
        // Beyond the end, dy is zero.
        EACH_WIDE(j) {
            float own = d.x[j] * (scale.x[j] + offset);
            g_sum += own;
            gn_sum = fmaf(own, n.x[j], gn_sum);
        }
    }
    g_sum = layer ? warp_sum(g_sum) / size : 0.0f;
    gn_sum = warp_sum(gn_sum) / size;
    for (int i = lane * WIDE; i < size; i += 32 * WIDE) {
        int count = size - i;
        Wide d = load_wide(dy + start + i, count), n = load_wide(s + start + i, count), scale = load_wide(w + i, count);
        Wide more = {};
        if (ds) more = load_wide(ds + start + i, count);
        if (gate) {
            Wide open = load_wide(gate + start + i, count);
            EACH_WIDE(j) d.x[j] *= sigmoid(open.x[j]);
        }
        EACH_WIDE(j) {
            float normal = (n.x[j] - mean) * inverse;
            d.x[j] = fmaf(inverse, d.x[j] * (scale.x[j] + offset) - g_sum - normal * gn_sum, more.x[j]);
        }
        if (dx) give_wide(dx + start + i, d, count, fresh & 1);
        if (dadded) give_wide(dadded + start + i, d, count, fresh & 2);
    }
}

/// parts (tiles, width) = the sums of dn n over tiles of rows, and of dn. grid (ceil(width / 128), tiles),
/// block 128. gate may be null.
extern "C" __global__ void norm_parts(
    const element_t *dy, const element_t *s, const element_t *gate, const float *saved, float *parts, int rows,
    int width, int groups
) {
    int size = width / groups;
    sum_tile(parts, rows, width, [=](int row, int column, long long i) {
        const float *from = saved + 2 * ((long long)row * groups + column / size);
        float open = gate ? sigmoid(load(gate + i)) : 1.0f;
        return load(dy + i) * open * from[1] * (load(s + i) - from[0]);
    });
}
extern "C" __global__ void norm_bias_parts(
    const element_t *dy, const element_t *gate, float *parts, int rows, int width
) {
    sum_tile(parts, rows, width, [=](int, int, long long i) {
        return load(dy + i) * (gate ? sigmoid(load(gate + i)) : 1.0f);
    });
}
