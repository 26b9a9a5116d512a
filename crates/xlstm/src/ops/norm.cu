// Layer norm and root-mean-square norm of groups of a row; a warp a group.
// saved (rows, groups, 2): mean and 1 / std.

/// grid (ceil(rows groups / 8)), block 256. offset: 1 where the scale is 1 + w. b may be null.
extern "C" __global__ void __launch_bounds__(256) norm_forward(
    const element_t *x, const float *w, const float *b, element_t *y, float *saved, long long count, int groups,
    int size, int layer, float offset, float eps
) {
    long long group = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (group >= count) return;
    x += group * size;
    y += group * size;
    w += group % groups * size;
    if (b) b += group % groups * size;
    float mean = 0.0f, square = 0.0f;
    // Three passes, of which the last two find x in the cache.
    if (layer) {
        for (int i = lane * WIDE; i < size; i += 32 * WIDE) {
            Wide wide = load_wide(x + i, size - i);
            EACH_WIDE(j) mean += wide.x[j];
        }
        mean = warp_sum(mean) / size;
    }
    for (int i = lane * WIDE; i < size; i += 32 * WIDE) {
        Wide wide = load_wide(x + i, size - i);
        EACH_WIDE(j) {
            float d = i + j < size ? wide.x[j] - mean : 0.0f;
            square = fmaf(d, d, square);
        }
    }
    float inverse = 1.0f / sqrtf(warp_sum(square) / size + eps);
    for (int i = lane * WIDE; i < size; i += 32 * WIDE) {
        Wide wide = load_wide(x + i, size - i), scale = load_wide(w + i, size - i);
        EACH_WIDE(j) wide.x[j] = (wide.x[j] - mean) * inverse * (scale.x[j] + offset);
        if (b) {
            Wide bias = load_wide(b + i, size - i);
            EACH_WIDE(j) wide.x[j] += bias.x[j];
        }
        store_wide(y + i, wide, size - i);
    }
    if (lane == 0) {
        saved[2 * group] = mean;
        saved[2 * group + 1] = inverse;
    }
}

/// With n = (x - mean) / std, g = dy scale: dx += (g - mean(g) - n mean(g n)) / std, without
/// mean(g) for the root-mean-square norm. Launched as forward.
extern "C" __global__ void __launch_bounds__(256) norm_backward(
    const element_t *dy, const element_t *x, const float *w, const float *saved, element_t *dx, long long count,
    int groups, int size, int layer, float offset
) {
    long long group = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (group >= count) return;
    x += group * size;
    dy += group * size;
    dx += group * size;
    w += group % groups * size;
    float mean = saved[2 * group], inverse = saved[2 * group + 1], g_sum = 0.0f, gn_sum = 0.0f;
    for (int i = lane * WIDE; i < size; i += 32 * WIDE) {
        Wide g = load_wide(dy + i, size - i), n = load_wide(x + i, size - i), scale = load_wide(w + i, size - i);
        // Beyond the end, dy is zero.
        EACH_WIDE(j) {
            float own = g.x[j] * (scale.x[j] + offset);
            g_sum += own;
            gn_sum = fmaf(own, (n.x[j] - mean) * inverse, gn_sum);
        }
    }
    g_sum = layer ? warp_sum(g_sum) / size : 0.0f;
    gn_sum = warp_sum(gn_sum) / size;
    for (int i = lane * WIDE; i < size; i += 32 * WIDE) {
        Wide g = load_wide(dy + i, size - i), n = load_wide(x + i, size - i), scale = load_wide(w + i, size - i);
        EACH_WIDE(j) {
            float normal = (n.x[j] - mean) * inverse;
            g.x[j] = inverse * (g.x[j] * (scale.x[j] + offset) - g_sum - normal * gn_sum);
        }
        add_wide(dx + i, g, size - i);
    }
}

/// parts (tiles, width) = the sums of dy n over tiles of rows. grid (ceil(width / 128), tiles),
/// block 128.
extern "C" __global__ void norm_parts(
    const element_t *dy, const element_t *x, const float *saved, float *parts, int rows, int width, int groups,
    int size
) {
    sum_tile(parts, rows, width, [=](int row, int column, long long i) {
        const float *s = saved + 2 * ((long long)row * groups + column / size);
        return load(dy + i) * s[1] * (load(x + i) - s[0]);
    });
}
