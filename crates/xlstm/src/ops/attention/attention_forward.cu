// Attention forward on tensor cores: see attention_tiles.cuh, and attention.rs for the equations.

#ifdef ELEMENT_BF16

/// y and logs. Shared memory: the queries, and twice keys, values and what the keys' tokens see.
template <int W, int MT>
__device__ __forceinline__ void forward(
    const bf16_t *q, const bf16_t *k, const bf16_t *v, const bf16_t *cache_k, const bf16_t *cache_v,
    const float *first, bf16_t *y, float *logs, int S, int C, int H, int N
) {
    const int QUERIES = MT * 16 * WARPS, TILE = tile_bytes<W>(OTHERS), NT = OTHERS / 8;
    unsigned queries = shared_address(space), others = queries + tile_bytes<W>(QUERIES);
    float *seen_by = (float *)(space + tile_bytes<W>(QUERIES) + 4 * TILE);
    // The longest first.
    int start = (gridDim.y - 1 - blockIdx.y) * QUERIES;
    first += (long long)(blockIdx.x / H) * S;
    logs += (long long)blockIdx.x * S;
    Rows all_q = rows_of(q, S, H, N), all_k = rows_of(k, cache_k, S, C, H, N);
    Rows all_v = rows_of(v, cache_v, S, C, H, N);
    int end = min(S, start + QUERIES), low = lowest_key<QUERIES>(first, start, S, C);
    int tile = tile_of(low), tiles = low < end ? tile_of(end - 1) + 1 : tile;
    auto bring = [&](int tile, int stage) {
        fetch<W, OTHERS>(others + stage * TILE, all_k, tile * OTHERS);
        fetch<W, OTHERS>(others + (2 + stage) * TILE, all_v, tile * OTHERS);
        fetch_numbers(seen_by + stage * OTHERS, first, tile * OTHERS, S);
    };
    fetch<W, QUERIES>(queries, all_q, start);
    if (tile < tiles) bring(tile, 0);
    commit();

    Sight<MT> sight(first, start + WARP * MT * 16, S);
    Reader<W> down(true), across(false);
    float scale = rsqrtf((float)N), factor = scale * LOG2_E, high[MT][2], sum[MT][2], result[MT][W / 8][4];
    EACH(m, MT) {
        EACH(half, 2) high[m][half] = NEG_INFINITY, sum[m][half] = 0.0f;
        EACH(n, W / 8) EACH(i, 4) result[m][n][i] = 0.0f;
    }
    arrive();
    Kept<W, MT> own;
    own.keep(Own<W, MT>(queries));
    for (int stage = 0; tile < tiles; tile++, stage ^= 1) {
        if (tile + 1 < tiles) bring(tile + 1, stage ^ 1);
        commit();
        int u = tile * OTHERS;
        if (sight.reaches(u, OTHERS)) {
            float weights[MT][NT][4];
            scores<W, MT, NT>(weights, own, across, others + stage * TILE, 0);
            sight.mask(weights, u, pads_of(seen_by + stage * OTHERS, u));
            EACH(m, MT) EACH(half, 2) {
                float top = high[m][half];
                EACH(n, NT) top = fmaxf(top, fmaxf(weights[m][n][half * 2], weights[m][n][half * 2 + 1]));
                top = quad_max(top);
                // Before anything is seen, all weights are 0.
                float base = top == NEG_INFINITY ? 0.0f : top * factor;
                float shrink = power_of_2(fmaf(high[m][half], factor, -base)), add = 0.0f;
                EACH(n, NT) EACH(i, 2) {
                    float &weight = weights[m][n][half * 2 + i];
                    weight = power_of_2(fmaf(weight, factor, -base));
                    add += weight;
                }
                high[m][half] = top;
                sum[m][half] = fmaf(sum[m][half], shrink, add);
                EACH(n, W / 8) EACH(i, 2) result[m][n][half * 2 + i] *= shrink;
            }
            add_weighted<W, MT, NT>(result, weights, down, others + (2 + stage) * TILE, 0);
        }
        arrive();
    }
    EACH(m, MT) EACH(half, 2) {
        int t = sight.row(m, half);
        bool pad = sight.is_pad(m, half);
        float all = quad_sum(sum[m][half]);
        sum[m][half] = pad ? 0.0f : 1.0f / all;
        if (t < S && LANE % 4 == 0) logs[t] = pad ? 0.0f : fmaf(high[m][half], scale, logf(all));
    }
    put<W, MT>(rows_of(y, S, H, N), sight.start, result, true, [&](int m, int half) { return sum[m][half]; });
}

#define FORWARD(W, MT, BLOCKS)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_forward_##W(                      \
        const bf16_t *q, const bf16_t *k, const bf16_t *v, const bf16_t *cache_k, const bf16_t *cache_v,      \
        const float *first, bf16_t *y, float *logs, int S, int C, int H, int N                                \
    ) {                                                                                                       \
        forward<W, MT>(q, k, v, cache_k, cache_v, first, y, logs, S, C, H, N);                                \
    }
// All, or those of one WIDTH.
#if !defined(WIDTH) || WIDTH == 32
FORWARD(32, 2, 2)
#endif
#if !defined(WIDTH) || WIDTH == 64
FORWARD(64, 2, 2)
#endif
#if !defined(WIDTH) || WIDTH == 96
FORWARD(96, 1, 2)
#endif
#if !defined(WIDTH) || WIDTH == 128
FORWARD(128, 1, 2)
#endif

#endif
