// Attention backward on tensor cores: see attention_tiles.cuh, and attention.rs for the equations. Weights are worked
// out again from q, k and logs. The queries' kernel comes first: it finds shares = rowsum(dy ∘ y). Bits of `fresh`: the gradients of q, k, v and the cache's
// k and v that are written instead of added to.

#ifdef ELEMENT_BF16

/// Tokens of the other side that are worked on at once.
#define AT_ONCE 32
#define NT (AT_ONCE / 8)

/// shares of a warp's rows, also into memory.
template <int W, int MT>
__device__ __forceinline__ void find_shares(const Rows &y, const Rows &dy, int start, float *to, float *shares) {
    // Lanes of a row, 16 bytes each.
    const int LANES = W > 64 ? 16 : W / 8;
    EACH(i, MT * 16 * LANES / 32) {
        int row = i * (32 / LANES) + LANE / LANES, piece = LANE % LANES, t = start + row;
        float sum = 0.0f;
        if (t < y.S && piece * 8 < y.N) {
            Wide a = load_whole(y.at(t) + piece * 8), b = load_whole(dy.at(t) + piece * 8);
            EACH_WIDE(j) sum = fmaf(a.x[j], b.x[j], sum);
        }
        for (int step = LANES / 2; step > 0; step >>= 1) sum += __shfl_xor_sync(ALL, sum, step);
        if (piece == 0) {
            to[row] = sum;
            if (t < y.S) shares[t] = sum;
        }
    }
    __syncwarp();
}

/// dq = dS k, or dq += dS k, and shares; dq may be null. Shared memory: q and dy of the queries, twice keys,
/// values and what the keys' tokens see, and the shares.
template <int W, int MT>
__device__ __forceinline__ void queries_backward(
    const bf16_t *q, const bf16_t *k, const bf16_t *v, const bf16_t *cache_k, const bf16_t *cache_v,
    const float *first, const bf16_t *y, const float *logs, const bf16_t *dy, float *shares, bf16_t *dq, int S,
    int C, int H, int N, unsigned fresh
) {
    const int QUERIES = MT * 16 * WARPS, OWN = tile_bytes<W>(QUERIES), TILE = tile_bytes<W>(OTHERS);
    unsigned own_q = shared_address(space), own_dy = own_q + OWN, others = own_dy + OWN;
    float *seen_by = (float *)(space + 2 * OWN + 4 * TILE), *own_shares = seen_by + 2 * OTHERS;
    // The longest first.
    int start = (gridDim.y - 1 - blockIdx.y) * QUERIES;
    first += (long long)(blockIdx.x / H) * S;
    logs += (long long)blockIdx.x * S;
    shares += (long long)blockIdx.x * S;
    Rows all_k = rows_of(k, cache_k, S, C, H, N), all_v = rows_of(v, cache_v, S, C, H, N);
    Rows all_dy = rows_of(dy, S, H, N);
    int end = min(S, start + QUERIES), low = lowest_key<QUERIES>(first, start, S, C);
    int tile = tile_of(low), tiles = low < end ? tile_of(end - 1) + 1 : tile;
    auto bring = [&](int tile, int stage) {
        fetch<W, OTHERS>(others + stage * TILE, all_k, tile * OTHERS);
        fetch<W, OTHERS>(others + (2 + stage) * TILE, all_v, tile * OTHERS);
        fetch_numbers(seen_by + stage * OTHERS, first, tile * OTHERS, S);
    };
    fetch<W, QUERIES>(own_q, rows_of(q, S, H, N), start);
    fetch<W, QUERIES>(own_dy, all_dy, start);
    if (tile < tiles) bring(tile, 0);
    commit();

    Sight<MT> sight(first, start + WARP * MT * 16, S);
    own_shares += WARP * MT * 16;
    find_shares<W, MT>(rows_of(y, S, H, N), all_dy, sight.start, own_shares, shares);
    Reader<W> down(true), across(false);
    Own<W, MT> left_q(own_q), left_dy(own_dy);
    float scale = rsqrtf((float)N), factor = scale * LOG2_E, log[MT][2], share[MT][2], result[MT][W / 8][4];
    EACH(m, MT) {
        EACH(half, 2) {
            int t = sight.row(m, half);
            log[m][half] = t < S ? logs[t] * LOG2_E : 0.0f;
            share[m][half] = own_shares[t - sight.start];
        }
        EACH(n, W / 8) EACH(i, 4) result[m][n][i] = 0.0f;
    }
    arrive();
    for (int stage = 0; tile < tiles; tile++, stage ^= 1) {
        if (tile + 1 < tiles) bring(tile + 1, stage ^ 1);
        commit();
        unsigned keys = others + stage * TILE, values = keys + 2 * TILE;
        unsigned long long pads = pads_of(seen_by + stage * OTHERS, tile * OTHERS);
#pragma unroll 1
        for (int from = 0; from < OTHERS; from += AT_ONCE, pads >>= AT_ONCE) {
            int u = tile * OTHERS + from;
            if (!sight.reaches(u, AT_ONCE)) continue;
            float weights[MT][NT][4], slopes[MT][NT][4];
            scores<W, MT, NT>(weights, left_q, across, keys, from);
            scores<W, MT, NT>(slopes, left_dy, across, values, from);
            sight.mask(weights, u, pads);
            EACH(m, MT) EACH(n, NT) EACH(i, 4) {
                float weight = power_of_2(fmaf(weights[m][n][i], factor, -log[m][i / 2]));
                slopes[m][n][i] = weight * (slopes[m][n][i] - share[m][i / 2]);
            }
            add_weighted<W, MT, NT>(result, slopes, down, keys, from);
        }
        arrive();
    }
    if (dq) put<W, MT>(rows_of(dq, S, H, N), sight.start, result, fresh & 1, [&](int, int) { return scale; });
}

/// A warp's rows of the cache's gradient, the first of them token `start`; token 0 would have row `next`.
template <int W, int MT>
__device__ __forceinline__ void put_cached(
    bf16_t *to, int next, int C, int H, int N, int start, const float (&sum)[MT][W / 8][4], bool fresh, float times
) {
    to += (long long)(blockIdx.x / H) * C * H * N + (long long)(blockIdx.x % H) * N;
    EACH(m, MT) EACH(n, W / 8) EACH(i, 4) {
        int u = start + m * 16 + i / 2 * 8 + LANE / 4, column = n * 8 + LANE % 4 * 2 + i % 2;
        if (u < -C || u >= 0 || column >= N) continue;
        bf16_t *at = to + (long long)(next + u < 0 ? next + u + C : next + u) * H * N + column;
        float x = sum[m][n][i] * times;
        store(at, fresh ? x : load(at) + x);
    }
}

/// dk = dS^T q and dv = P^T dy, or added, of tokens and of the cache: a block has keys, of which the first
/// blocks have those of the cache. Scores are transposed here: a row a key, a column a query.
/// Gradients may be null. Shared memory: the keys and values, and twice q, dy, first, logs and shares of queries.
template <int W, int MT>
__device__ __forceinline__ void keys_backward(
    const bf16_t *q, const bf16_t *k, const bf16_t *v, const bf16_t *cache_k, const bf16_t *cache_v,
    const float *first, const float *position, const float *logs, const bf16_t *dy, const float *shares, bf16_t *dk,
    bf16_t *dv, bf16_t *dcache_k, bf16_t *dcache_v, int S, int C, int H, int N, unsigned fresh
) {
    const int KEYS = MT * 16 * WARPS, OWN = tile_bytes<W>(KEYS), TILE = tile_bytes<W>(OTHERS);
    unsigned own_k = shared_address(space), own_v = own_k + OWN, others = own_v + OWN;
    float *numbers = (float *)(space + 2 * OWN + 4 * TILE);
    __shared__ int lasts[WARPS];
    int of_cache = (C + KEYS - 1) / KEYS, start = ((int)blockIdx.y - of_cache) * KEYS, end = min(start + KEYS, S);
    first += (long long)(blockIdx.x / H) * S;
    logs += (long long)blockIdx.x * S;
    shares += (long long)blockIdx.x * S;
    Rows all_q = rows_of(q, S, H, N), all_dy = rows_of(dy, S, H, N);
    auto bring = [&](int tile, int stage) {
        fetch<W, OTHERS, 2>(others + stage * TILE, all_q, tile * OTHERS);
        fetch<W, OTHERS, 2>(others + (2 + stage) * TILE, all_dy, tile * OTHERS);
        float *to = numbers + stage * 3 * OTHERS;
        fetch_numbers(to, first, tile * OTHERS, S);
        fetch_numbers(to + OTHERS, logs, tile * OTHERS, S);
        fetch_numbers(to + 2 * OTHERS, shares, tile * OTHERS, S);
    };
    int tile = tile_of(max(0, start));
    fetch<W, KEYS>(own_k, rows_of(k, cache_k, S, C, H, N), start);
    fetch<W, KEYS>(own_v, rows_of(v, cache_v, S, C, H, N), start);
    bring(tile, 0);
    commit();

    // The last query that sees one of the keys.
    int last = -1;
#pragma unroll 8
    for (int t = max(0, start) + threadIdx.x; t < S; t += THREADS) {
        int seen = (int)first[t];
        if (seen <= t && seen < end) last = t;
    }
    last = warp_max(last);
    if (LANE == 0) lasts[WARP] = last;

    int own = start + WARP * MT * 16;
    unsigned pads = 0;
    EACH(m, MT) EACH(half, 2) {
        int u = own + m * 16 + half * 8 + LANE / 4;
        if (u >= 0 && first_of(first, u, S) > u) pads |= 1 << (m * 2 + half);
    }
    bool padded = __any_sync(ALL, pads != 0);
    Reader<W> down(true), across(false);
    Own<W, MT> left_k(own_k), left_v(own_v);
    float scale = rsqrtf((float)N), factor = scale * LOG2_E, of_key[MT][W / 8][4], of_value[MT][W / 8][4];
    EACH(m, MT) EACH(n, W / 8) EACH(i, 4) of_key[m][n][i] = of_value[m][n][i] = 0.0f;
    arrive();
    EACH(warp, WARPS) last = max(last, lasts[warp]);
    int tiles = last < 0 ? tile : tile_of(last) + 1;
    for (int stage = 0; tile < tiles; tile++, stage ^= 1) {
        if (tile + 1 < tiles) bring(tile + 1, stage ^ 1);
        commit();
        unsigned queries = others + stage * TILE, slopes_of = queries + 2 * TILE;
#pragma unroll 1
        for (int from = 0; from < OTHERS; from += AT_ONCE) {
            int t = tile * OTHERS + from;
            const float *seen = numbers + stage * 3 * OTHERS + from, *log = seen + OTHERS, *share = log + OTHERS;
            int seen_here = (int)seen[LANE];
            if (t + AT_ONCE <= own || __all_sync(ALL, seen_here >= own + MT * 16)) continue;
            float weights[MT][NT][4], slopes[MT][NT][4];
            scores<W, MT, NT>(weights, left_k, across, queries, from);
            if (padded || t < own + MT * 16 - 1 || __any_sync(ALL, seen_here > own))
                EACH(m, MT) EACH(n, NT) EACH(i, 4) {
                    int u = own + m * 16 + i / 2 * 8 + LANE / 4, column = n * 8 + LANE % 4 * 2 + i % 2;
                    if (u > t + column || u < (int)seen[column] || pads >> (m * 2 + i / 2) & 1)
                        weights[m][n][i] = NEG_INFINITY;
                }
            scores<W, MT, NT>(slopes, left_v, across, slopes_of, from);
            EACH(n, NT) EACH(j, 2) {
                int column = n * 8 + LANE % 4 * 2 + j;
                float log_here = log[column] * LOG2_E, share_here = share[column];
                EACH(m, MT) EACH(half, 2) {
                    float &weight = weights[m][n][half * 2 + j], &slope = slopes[m][n][half * 2 + j];
                    weight = power_of_2(fmaf(weight, factor, -log_here));
                    slope = weight * (slope - share_here);
                }
            }
            add_weighted<W, MT, NT>(of_value, weights, down, slopes_of, from);
            add_weighted<W, MT, NT>(of_key, slopes, down, queries, from);
        }
        arrive();
    }
    if (start >= 0) {
        if (dk) put<W, MT>(rows_of(dk, S, H, N), own, of_key, fresh >> 1 & 1, [&](int, int) { return scale; });
        if (dv) put<W, MT>(rows_of(dv, S, H, N), own, of_value, fresh >> 2 & 1, [](int, int) { return 1.0f; });
    } else {
        int next = (int)position[(long long)(blockIdx.x / H) * S] % C;
        if (dcache_k) put_cached<W, MT>(dcache_k, next, C, H, N, own, of_key, fresh >> 3 & 1, scale);
        if (dcache_v) put_cached<W, MT>(dcache_v, next, C, H, N, own, of_value, fresh >> 4 & 1, 1.0f);
    }
}

#define BACKWARD(W, MT, BLOCKS)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_queries_##W(                          \
        const bf16_t *q, const bf16_t *k, const bf16_t *v, const bf16_t *cache_k, const bf16_t *cache_v,          \
        const float *first, const bf16_t *y, const float *logs, const bf16_t *dy, float *shares, bf16_t *dq,      \
        int S, int C, int H, int N, unsigned fresh                                                                \
    ) {                                                                                                           \
        queries_backward<W, MT>(                                                                                  \
            q, k, v, cache_k, cache_v, first, y, logs, dy, shares, dq, S, C, H, N, fresh                          \
        );                                                                                                        \
    }                                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_keys_##W(                             \
        const bf16_t *q, const bf16_t *k, const bf16_t *v, const bf16_t *cache_k, const bf16_t *cache_v,          \
        const float *first, const float *position, const float *logs, const bf16_t *dy, const float *shares,      \
        bf16_t *dk, bf16_t *dv, bf16_t *dcache_k, bf16_t *dcache_v, int S, int C, int H, int N, unsigned fresh    \
    ) {                                                                                                           \
        keys_backward<W, MT>(                                                                                     \
            q, k, v, cache_k, cache_v, first, position, logs, dy, shares, dk, dv, dcache_k, dcache_v, S, C, H, N, \
            fresh                                                                                                 \
        );                                                                                                        \
    }
// All, or those of one WIDTH.
#if !defined(WIDTH) || WIDTH == 32
BACKWARD(32, 2, 2)
#endif
#if !defined(WIDTH) || WIDTH == 64
BACKWARD(64, 2, 2)
#endif
#if !defined(WIDTH) || WIDTH == 96
BACKWARD(96, 1, 2)
#endif
#if !defined(WIDTH) || WIDTH == 128
BACKWARD(128, 1, 2)
#endif

#endif
