// y = (norm(h) + skip x) silu(z), with a norm of each of a row's `groups` heads; skip and the norm's weight w are
// one number a column. saved (rows, groups, 2): mean and 1 / std.
//
// A head of up to 512 columns is kept in registers by `lanes` neighbours of one warp, a power of two: of chunk c a
// lane has four columns from 4 (c lanes + lane) on. Other heads are read several times, one by a warp.

/// What all kernels have. layer: whether the mean is taken off; offset: 1 where the norm's scale is 1 + w.
#define SHAPE int rows, int width, int groups, int layer, float offset
#define FORWARD \
    const element_t *h, const float *w, const float *skip, const element_t *x, const element_t *z, element_t *y, \
        float *saved

/// With a = dy silu(z), n = (h - mean) / std, g = a scale: dh = (g - mean(g) - n mean(g n)) / std, without mean(g)
/// for the root-mean-square norm; dx = a skip, dz = dy (n scale + skip x) silu'(z); or added where bit 0, 3 or 4 of
/// `fresh` is not set. Each may be null, for nobody asks, and so may w_parts (tiles, width) and skip_parts: the sums
/// of a n and of a x over the rows of a tile.
#define GRADIENTS \
    const element_t *dy, const element_t *h, const float *w, const float *skip, const element_t *x, \
        const element_t *z, const float *saved, element_t *dh, element_t *dx, element_t *dz, float *w_parts, \
        float *skip_parts

// ---- Heads in registers: grid (groups ceil(rows / units)), or fewer for backward; units = block / lanes ----

#define EACH_CHUNK(c) _Pragma("unroll") for (int c = 0; c < CHUNKS; c++)

/// The column of a head where this thread's part of chunk c begins.
#define COLUMN(c) ((((c) << bits) + lane) * 4)

/// Threads of a block of backward: THREADS of skip_norm.rs; and the blocks that a multiprocessor shall hold.
#define THREADS 128
#ifdef ELEMENT_BF16
#define RESIDENT 4
#else
#define RESIDENT 3
#endif

/// The sum over 2^bits lanes, in all of them.
__device__ __forceinline__ float lane_sum(float x, int bits) {
    for (int step = 1 << bits >> 1; step > 0; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ __forceinline__ Four full_four(const float *p) { return unpack(*(const float4 *)p); }

/// p = four where it is fresh, else p += four.
__device__ __forceinline__ void give_four(element_t *p, Four four, bool fresh) {
    if (!fresh) {
        Four before = unpack(load_four(p));
        EACH_FOUR(j) four.x[j] += before.x[j];
    }
    store_four(p, four);
}

template <int CHUNKS> __device__ __forceinline__ void head_forward(FORWARD, SHAPE, float eps, int bits) {
    int lane = threadIdx.x & ((1 << bits) - 1), size = width / groups, head = blockIdx.x % groups;
    int row = blockIdx.x / groups * (blockDim.x >> bits) + (threadIdx.x >> bits);
    long long start = (long long)row * width + head * size;
    RawFour of_h[CHUNKS] = {}, of_x[CHUNKS] = {}, of_z[CHUNKS] = {};
    EACH_CHUNK(c) {
        if (row >= rows || COLUMN(c) >= size) continue;
        of_h[c] = load_four(h + start + COLUMN(c));
        of_x[c] = load_four(x + start + COLUMN(c));
        of_z[c] = load_four(z + start + COLUMN(c));
    }
    float mean = 0.0f, square = 0.0f;
    if (layer) {
        EACH_CHUNK(c) {
            Four own = unpack(of_h[c]);
            EACH_FOUR(j) mean += own.x[j];
        }
        mean = lane_sum(mean, bits) / size;
    }
    EACH_CHUNK(c) {
        Four own = unpack(of_h[c]);
        EACH_FOUR(j) {
            float d = COLUMN(c) < size ? own.x[j] - mean : 0.0f;
            square = fmaf(d, d, square);
        }
    }
    float inverse = 1.0f / sqrtf(lane_sum(square, bits) / size + eps);
    if (row >= rows) return;
    EACH_CHUNK(c) {
        if (COLUMN(c) >= size) continue;
        Four sum = unpack(of_h[c]), xs = unpack(of_x[c]), gates = unpack(of_z[c]);
        Four scale = full_four(w + head * size + COLUMN(c)), s = full_four(skip + head * size + COLUMN(c));
        EACH_FOUR(j) {
            float normed = (sum.x[j] - mean) * inverse * (scale.x[j] + offset);
            sum.x[j] = fmaf(s.x[j], xs.x[j], normed) * (gates.x[j] * quick_sigmoid(gates.x[j]));
        }
        store_four(y + start + COLUMN(c), sum);
    }
    if (lane == 0) {
        float *to = saved + 2 * ((long long)row * groups + head);
        to[0] = mean;
        to[1] = inverse;
    }
}

/// The sums of what the threads of a block have for one chunk of a head, in order, to its columns of parts.
__device__ __forceinline__ void add_units(const Four &own, float *to, int count, int bits) {
    __shared__ float4 sums[THREADS];
    __syncthreads();
    sums[threadIdx.x] = make_float4(own.x[0], own.x[1], own.x[2], own.x[3]);
    __syncthreads();
    int column = threadIdx.x * 4;
    if (threadIdx.x >> bits || column >= count) return;
    Four sum = {};
    for (int i = threadIdx.x; i < THREADS; i += 1 << bits) {
        Four other = unpack(sums[i]);
        EACH_FOUR(j) sum.x[j] += other.x[j];
    }
    store_four(to + column, sum);
}

/// A block has one head and takes every tile of `units` rows that is as many tiles further as there are blocks of
/// that head: a tile of parts.
template <int CHUNKS> __device__ __forceinline__ void head_backward(GRADIENTS, SHAPE, unsigned fresh, int bits) {
    int lane = threadIdx.x & ((1 << bits) - 1), size = width / groups, head = blockIdx.x % groups;
    int tile = blockIdx.x / groups, tiles = gridDim.x / groups, units = THREADS >> bits;
    w += head * size;
    skip += head * size;
    Four dw[CHUNKS] = {}, dskip[CHUNKS] = {};
    // The same number of rounds for every lane of a warp: they sum together.
    for (int first = tile * units; first < rows; first += tiles * units) {
        int row = first + (threadIdx.x >> bits);
        long long start = (long long)row * width + head * size;
        RawFour of_dy[CHUNKS] = {}, of_h[CHUNKS] = {}, of_x[CHUNKS] = {}, of_z[CHUNKS] = {};
        float mean = 0.0f, inverse = 0.0f, g_sum = 0.0f, gn_sum = 0.0f;
        if (row < rows) {
            EACH_CHUNK(c) {
                if (COLUMN(c) >= size) continue;
                of_dy[c] = load_four(dy + start + COLUMN(c));
                of_h[c] = load_four(h + start + COLUMN(c));
                of_x[c] = load_four(x + start + COLUMN(c));
                of_z[c] = load_four(z + start + COLUMN(c));
            }
            float2 statistics = *(const float2 *)(saved + 2 * ((long long)row * groups + head));
            mean = statistics.x;
            inverse = statistics.y;
        }
        Four g[CHUNKS];
        EACH_CHUNK(c) {
            g[c] = unpack(of_dy[c]);
            if (row >= rows || COLUMN(c) >= size) continue;
            Four own = unpack(of_h[c]), xs = unpack(of_x[c]), gates = unpack(of_z[c]);
            Four scale = full_four(w + COLUMN(c)), s = full_four(skip + COLUMN(c));
            EACH_FOUR(j) {
                float gate = gates.x[j], open = quick_sigmoid(gate), value = gate * open;
                float n = (own.x[j] - mean) * inverse, factor = scale.x[j] + offset;
                gates.x[j] = g[c].x[j] * fmaf(value, 1.0f - open, open) * fmaf(s.x[j], xs.x[j], n * factor);
                float a = g[c].x[j] * value;
                dw[c].x[j] = fmaf(a, n, dw[c].x[j]);
                dskip[c].x[j] = fmaf(a, xs.x[j], dskip[c].x[j]);
                xs.x[j] = a * s.x[j];
                g[c].x[j] = a * factor;
                g_sum += g[c].x[j];
                gn_sum = fmaf(g[c].x[j], n, gn_sum);
            }
            if (dx) give_four(dx + start + COLUMN(c), xs, fresh & 8);
            if (dz) give_four(dz + start + COLUMN(c), gates, fresh & 16);
        }
        g_sum = layer ? lane_sum(g_sum, bits) / size : 0.0f;
        gn_sum = lane_sum(gn_sum, bits) / size;
        if (!dh || row >= rows) continue;
        EACH_CHUNK(c) {
            if (COLUMN(c) >= size) continue;
            Four own = unpack(of_h[c]);
            EACH_FOUR(j) g[c].x[j] = inverse * (g[c].x[j] - g_sum - (own.x[j] - mean) * inverse * gn_sum);
            give_four(dh + start + COLUMN(c), g[c], fresh & 1);
        }
    }
    long long place = (long long)tile * width + head * size;
    EACH_CHUNK(c) {
        int column = 4 * (c << bits);
        if (w_parts) add_units(dw[c], w_parts + place + column, size - column, bits);
        if (skip_parts) add_units(dskip[c], skip_parts + place + column, size - column, bits);
    }
}

/// Forward: block 256; backward: block THREADS.
#define HEAD_KERNELS(CHUNKS) \
    extern "C" __global__ void __launch_bounds__(256) skip_norm_head_forward_##CHUNKS( \
        FORWARD, SHAPE, float eps, int bits \
    ) { \
        head_forward<CHUNKS>(h, w, skip, x, z, y, saved, rows, width, groups, layer, offset, eps, bits); \
    } \
    extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) skip_norm_head_backward_##CHUNKS( \
        GRADIENTS, SHAPE, unsigned fresh, int bits \
    ) { \
        head_backward<CHUNKS>( \
            dy, h, w, skip, x, z, saved, dh, dx, dz, w_parts, skip_parts, rows, width, groups, layer, offset, fresh, \
            bits \
        ); \
    }
HEAD_KERNELS(2)
HEAD_KERNELS(3)
HEAD_KERNELS(4)

// ---- Heads of any width ----

/// A warp a head: grid (ceil(rows groups / 8)), block 256.
extern "C" __global__ void __launch_bounds__(256) skip_norm_forward(FORWARD, SHAPE, float eps) {
    long long head = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    int lane = threadIdx.x % 32, size = width / groups;
    if (head >= (long long)rows * groups) return;
    long long start = head * size;
    w += head % groups * size;
    skip += head % groups * size;
    h += start;
    float2 statistics = warp_statistics(h, size, layer, eps);
    float mean = statistics.x, inverse = statistics.y;
    for (int i = lane * WIDE; i < size; i += 32 * WIDE) {
        int count = size - i;
        Wide sum = load_wide(h + i, count), xs = load_wide(x + start + i, count);
        Wide gates = load_wide(z + start + i, count), scale = load_wide(w + i, count), s = load_wide(skip + i, count);
        EACH_WIDE(j) {
            float normed = (sum.x[j] - mean) * inverse * (scale.x[j] + offset);
            sum.x[j] = fmaf(s.x[j], xs.x[j], normed) * (gates.x[j] * quick_sigmoid(gates.x[j]));
        }
        store_wide(y + start + i, sum, count);
    }
    if (lane == 0) {
        saved[2 * head] = mean;
        saved[2 * head + 1] = inverse;
    }
}

/// All but the parts. Launched as forward.
extern "C" __global__ void __launch_bounds__(256) skip_norm_backward(GRADIENTS, SHAPE, unsigned fresh) {
    long long head = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    int lane = threadIdx.x % 32, size = width / groups;
    if (head >= (long long)rows * groups) return;
    long long start = head * size;
    w += head % groups * size;
    skip += head % groups * size;
    float mean = saved[2 * head], inverse = saved[2 * head + 1], g_sum = 0.0f, gn_sum = 0.0f;
    for (int i = lane * WIDE; i < size; i += 32 * WIDE) {
        int count = size - i;
        Wide a = load_wide(dy + start + i, count), own = load_wide(h + start + i, count);
        Wide xs = load_wide(x + start + i, count), gates = load_wide(z + start + i, count);
        Wide scale = load_wide(w + i, count), s = load_wide(skip + i, count);
        // Beyond the end, dy is zero.
        EACH_WIDE(j) {
            float gate = gates.x[j], open = quick_sigmoid(gate), value = gate * open;
            float n = (own.x[j] - mean) * inverse, factor = scale.x[j] + offset;
            gates.x[j] = a.x[j] * fmaf(value, 1.0f - open, open) * fmaf(s.x[j], xs.x[j], n * factor);
            a.x[j] *= value;
            xs.x[j] = a.x[j] * s.x[j];
            float g = a.x[j] * factor;
            g_sum += g;
            gn_sum = fmaf(g, n, gn_sum);
        }
        if (dx) give_wide(dx + start + i, xs, count, fresh & 8);
        if (dz) give_wide(dz + start + i, gates, count, fresh & 16);
    }
    g_sum = layer ? warp_sum(g_sum) / size : 0.0f;
    gn_sum = warp_sum(gn_sum) / size;
    if (!dh) return;
    for (int i = lane * WIDE; i < size; i += 32 * WIDE) {
        int count = size - i;
        Wide a = load_wide(dy + start + i, count), own = load_wide(h + start + i, count);
        Wide gates = load_wide(z + start + i, count), scale = load_wide(w + i, count);
        EACH_WIDE(j) {
            float n = (own.x[j] - mean) * inverse, value = gates.x[j] * quick_sigmoid(gates.x[j]);
            a.x[j] = inverse * (a.x[j] * value * (scale.x[j] + offset) - g_sum - n * gn_sum);
        }
        give_wide(dh + start + i, a, count, fresh & 1);
    }
}

/// The parts of tiles of TILE_ROWS rows. grid (ceil(width / 128), tiles), block 128.
extern "C" __global__ void skip_norm_parts(
    const element_t *dy, const element_t *h, const element_t *x, const element_t *z, const float *saved,
    float *w_parts, float *skip_parts, int rows, int width, int groups
) {
    int size = width / groups;
    auto a = [=](long long i) {
        float gate = load(z + i);
        return load(dy + i) * (gate * quick_sigmoid(gate));
    };
    if (w_parts)
        sum_tile(w_parts, rows, width, [=](int row, int column, long long i) {
            const float *from = saved + 2 * ((long long)row * groups + column / size);
            return a(i) * from[1] * (load(h + i) - from[0]);
        });
    if (skip_parts) sum_tile(skip_parts, rows, width, [=](int, int, long long i) { return a(i) * load(x + i); });
}
