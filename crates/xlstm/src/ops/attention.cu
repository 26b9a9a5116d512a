// Causal attention with a window, as in attention.rs, in f32 or where the kernels on tensor cores
// (attention/attention_tiles.cuh) do not fit: tiles of 32 queries and 32 keys, a warp four
// rows of one, a lane a row of the other. Sums run in a fixed order; nothing is added atomically.
//
// Sizes: S tokens, C rows of the cache (0 without one), H heads of N <= 128 features, D = H N.
// q, k, v, y and their gradients (B, S, D), keys and values of the cache and theirs (B, C, D): element_t.
// First, position (B, S), logs, shares (B, H, S): f32. A token u < 0 has row (position + u) mod C of the
// cache, with the position of the first token. Grids: (tiles, B H), block 256; shared memory: tiles of 32 rows, N | 1 floats apart.

#define TILE 32
#define MAX_SIZE 128
#define PARTS (MAX_SIZE / 32)
#define WARPS 8
/// Rows of a warp.
#define OWN (TILE / WARPS)
#define THREADS (32 * WARPS)
#define EACH_OWN(r) _Pragma("unroll") for (int r = 0; r < OWN; r++)
#define EACH_PART(p) _Pragma("unroll") for (int p = 0; p < PARTS; p++)

extern __shared__ float space[];

/// A gradient is written where it is the first to come, else added.
template <class T> __device__ __forceinline__ void give(T *to, float x, bool fresh) {
    if (fresh) store(to, x);
    else add(to, x);
}

/// The row of the cache that the token after it goes to; `position` is of the sequence.
__device__ __forceinline__ int next_row(const float *position, int C) { return C ? (int)position[0] % C : 0; }
/// The row of token u, from -C on to -1.
__device__ __forceinline__ int ring_row(int u, int next, int C) { return next + u < 0 ? next + u + C : next + u; }

/// Keys or values of one head of one sequence.
struct Rows {
    const element_t *tokens, *cache;
    int C, D, next;
    __device__ __forceinline__ float at(int u, int d) const {
        return load(u >= 0 ? tokens + (long long)u * D + d : cache + (long long)ring_row(u, next, C) * D + d);
    }
};
/// `next` is the row of the token numbered 0.
__device__ __forceinline__ Rows rows_of(
    const element_t *tokens, const element_t *cache, int S, int C, int H, int N, int next = 0
) {
    long long D = (long long)H * N, b = blockIdx.y / H, column = (long long)(blockIdx.y % H) * N;
    return {tokens + b * S * D + column, cache ? cache + b * C * D + column : cache, C, (int)D, next};
}

/// Rows start.. of a tile, zero outside low..high.
__device__ __forceinline__ void load_tile(float *to, const Rows &rows, int start, int low, int high, int N) {
    for (int i = threadIdx.x; i < TILE * N; i += THREADS) {
        int row = i / N, d = i % N, u = start + row;
        to[row * (N | 1) + d] = u >= low && u < high ? rows.at(u, d) : 0.0f;
    }
}

/// The first token that token t sees; beyond the end, as of a pad.
__device__ __forceinline__ int first_of(const float *first, int t, int S) { return t < S ? (int)first[t] : t + 1; }
__device__ __forceinline__ bool is_pad(const float *first, int u) { return u >= 0 && (int)first[u] > u; }

__device__ __forceinline__ float warp_max(float x) {
    for (int step = 16; step > 0; step >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
__device__ __forceinline__ int warp_min(int x) {
    for (int step = 16; step > 0; step >>= 1) x = min(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
/// The lowest multiple of TILE from which a tile holds u.
__device__ __forceinline__ int tile_start(int u) { return u & ~(TILE - 1); }

/// The lowest key that a tile of queries sees; S where there is none.
__device__ __forceinline__ int lowest_key(const float *first, int start, int S, int C) {
    int t = start + threadIdx.x % 32, seen = first_of(first, t, S);
    return max(warp_min(seen <= t ? seen : S), -C);
}

/// sums[r] = row r of this warp of a · the lane's row of b.
__device__ __forceinline__ void scores(float *sums, const float *a, const float *b, int N) {
    int pitch = N | 1, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    EACH_OWN(r) sums[r] = 0.0f;
    for (int d = 0; d < N; d++) {
        float own = b[lane * pitch + d];
        EACH_OWN(r) sums[r] = fmaf(a[(warp * OWN + r) * pitch + d], own, sums[r]);
    }
}

/// sums[r] (N, a lane every 32nd) += the lanes' weights[r] times their rows of b.
__device__ __forceinline__ void add_rows(float sums[OWN][PARTS], const float *weights, const float *b, int N) {
    int pitch = N | 1, lane = threadIdx.x % 32;
    for (int j = 0; j < 32; j++) {
        float value[PARTS];
        EACH_PART(p) value[p] = p * 32 + lane < N ? b[j * pitch + p * 32 + lane] : 0.0f;
        EACH_OWN(r) {
            float weight = __shfl_sync(0xffffffffu, weights[r], j);
            EACH_PART(p) sums[r][p] = fmaf(weight, value[p], sums[r][p]);
        }
    }
}

/// grid (ceil(S / 32), B H); shared: 2 tiles.
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_forward(
    const element_t *q, const element_t *k, const element_t *v, const element_t *cache_k, const element_t *cache_v,
    const float *first, const float *position, element_t *y, float *logs, int S, int C, int H, int N
) {
    float *queries = space, *keys = space + TILE * (N | 1);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, start = blockIdx.x * TILE;
    first += (long long)(blockIdx.y / H) * S;
    int next = next_row(position + (long long)(blockIdx.y / H) * S, C);
    Rows all_q = rows_of(q, nullptr, S, 0, H, N), all_k = rows_of(k, cache_k, S, C, H, N, next);
    Rows all_v = rows_of(v, cache_v, S, C, H, N, next);
    float scale = rsqrtf((float)N), high[OWN], sum[OWN], result[OWN][PARTS];
    int seen[OWN];
    EACH_OWN(r) {
        seen[r] = first_of(first, start + warp * OWN + r, S);
        high[r] = NEG_INFINITY;
        sum[r] = 0.0f;
        EACH_PART(p) result[r][p] = 0.0f;
    }
    load_tile(queries, all_q, start, 0, S, N);
    int low = lowest_key(first, start, S, C), end = min(S, start + TILE);
    for (int tile = tile_start(low); tile < end; tile += TILE) {
        int u = tile + lane;
        bool is_key = u >= low && u < end && !is_pad(first, u);
        float weights[OWN];
        __syncthreads();
        load_tile(keys, all_k, tile, low, end, N);
        __syncthreads();
        scores(weights, queries, keys, N);
        __syncthreads();
        load_tile(keys, all_v, tile, low, end, N);
        __syncthreads();
        EACH_OWN(r) {
            bool sees = is_key && u <= start + warp * OWN + r && u >= seen[r];
            float score = sees ? weights[r] * scale : NEG_INFINITY;
            float higher = fmaxf(high[r], warp_max(score));
            if (higher == NEG_INFINITY) {
                weights[r] = sees ? score : 0.0f;
                continue;
            }
            weights[r] = sees ? expf(score - higher) : 0.0f;
            float shrink = expf(high[r] - higher);
            sum[r] = fmaf(sum[r], shrink, warp_sum(weights[r]));
            high[r] = higher;
            EACH_PART(p) result[r][p] *= shrink;
        }
        add_rows(result, weights, keys, N);
    }
    EACH_OWN(r) {
        int t = start + warp * OWN + r;
        if (t >= S) continue;
        bool pad = seen[r] > t;
        element_t *to = y + ((long long)(blockIdx.y / H) * S + t) * H * N + (long long)(blockIdx.y % H) * N;
        EACH_PART(p) if (p * 32 + lane < N) store(to + p * 32 + lane, pad ? 0.0f : result[r][p] / sum[r]);
        if (lane == 0) logs[(long long)blockIdx.y * S + t] = pad ? 0.0f : high[r] + logf(sum[r]);
    }
}

/// rows (B, C, D) = the cache in the order of its tokens, the newest last, zero where the document has none:
/// what the kernels on tensor cores read. A thread has eight columns of UNROLLED rows.
/// grid (ceil(B C / UNROLLED), ceil(D / 8 / block)).
#define UNROLLED 4
extern "C" __global__ void __launch_bounds__(256) attention_unroll(
    const element_t *cache, const float *position, element_t *rows, int n, int S, int C, int D
) {
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * WIDE, count = D - column;
    if (count <= 0) return;
#pragma unroll
    for (int i = 0; i < UNROLLED; i++) {
        int row = blockIdx.x * UNROLLED + i;
        if (row >= n) break;
        int b = row / C, u = row % C - C, before = (int)position[(long long)b * S];
        Wide value = {};
        if (-u <= before)
            value = load_wide(cache + ((long long)b * C + ring_row(u, before % C, C)) * D + column, count);
        store_wide(rows + (long long)row * D + column, value, count);
    }
}

/// shares (B, H, S) = rowsum(dy y) of each head; a warp a row. grid ceil(n / 8), block 256.
extern "C" __global__ void attention_shares(
    const element_t *y, const element_t *dy, float *shares, long long n, int S, int H, int N
) {
    long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= n) return;
    long long t = row % S, task = row / S, at = (task / H * S + t) * H * N + task % H * N;
    float sum = 0.0f;
    for (int d = threadIdx.x % 32; d < N; d += 32) sum = fmaf(load(y + at + d), load(dy + at + d), sum);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) shares[row] = sum;
}

/// dq += dS k, or = with bit 0 of `fresh`. grid (ceil(S / 32), B H); shared: 4 tiles.
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_queries(
    const element_t *q, const element_t *k, const element_t *v, const element_t *cache_k, const element_t *cache_v,
    const float *first, const float *position, const float *logs, const float *shares, const element_t *dy, element_t *dq, int S, int C,
    int H, int N, unsigned fresh
) {
    int size = TILE * (N | 1);
    float *queries = space, *slopes = space + size, *keys = space + 2 * size, *values = space + 3 * size;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, start = blockIdx.x * TILE;
    first += (long long)(blockIdx.y / H) * S;
    logs += (long long)blockIdx.y * S;
    shares += (long long)blockIdx.y * S;
    int next = next_row(position + (long long)(blockIdx.y / H) * S, C);
    Rows all_k = rows_of(k, cache_k, S, C, H, N, next), all_v = rows_of(v, cache_v, S, C, H, N, next);
    float scale = rsqrtf((float)N), log[OWN], share[OWN], result[OWN][PARTS];
    int seen[OWN];
    EACH_OWN(r) {
        int t = start + warp * OWN + r;
        seen[r] = first_of(first, t, S);
        log[r] = t < S ? logs[t] : 0.0f;
        share[r] = t < S ? shares[t] : 0.0f;
        EACH_PART(p) result[r][p] = 0.0f;
    }
    load_tile(queries, rows_of(q, nullptr, S, 0, H, N), start, 0, S, N);
    load_tile(slopes, rows_of(dy, nullptr, S, 0, H, N), start, 0, S, N);
    int low = lowest_key(first, start, S, C), end = min(S, start + TILE);
    for (int tile = tile_start(low); tile < end; tile += TILE) {
        int u = tile + lane;
        bool is_key = u >= low && u < end && !is_pad(first, u);
        float weights[OWN], ds[OWN];
        __syncthreads();
        load_tile(keys, all_k, tile, low, end, N);
        load_tile(values, all_v, tile, low, end, N);
        __syncthreads();
        scores(weights, queries, keys, N);
        scores(ds, slopes, values, N);
        EACH_OWN(r) {
            bool sees = is_key && u <= start + warp * OWN + r && u >= seen[r];
            float weight = sees ? expf(weights[r] * scale - log[r]) : 0.0f;
            ds[r] = sees ? weight * (ds[r] - share[r]) * scale : 0.0f;
        }
        add_rows(result, ds, keys, N);
    }
    EACH_OWN(r) {
        int t = start + warp * OWN + r;
        if (t >= S) continue;
        element_t *to = dq + ((long long)(blockIdx.y / H) * S + t) * H * N + (long long)(blockIdx.y % H) * N;
        EACH_PART(p) if (p * 32 + lane < N) give(to + p * 32 + lane, result[r][p], fresh & 1);
    }
}

/// Gives a row to a gradient, where that is wanted.
template <class T>
__device__ __forceinline__ void give_row(T *to, long long at, const float *row, int N, bool fresh) {
    if (!to) return;
    int lane = threadIdx.x % 32;
    EACH_PART(p) if (p * 32 + lane < N) give(to + at + p * 32 + lane, row[p], fresh);
}

/// dk += dS^T q, dv += P^T dy, of tokens and of the cache, or = with bits 1 to 4 of `fresh`.
/// grid (ceil(C / 32) + ceil(S / 32), B H), the cache's tiles first; shared: 4 tiles. Here a warp has four
/// keys and a lane a query.
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_keys(
    const element_t *q, const element_t *k, const element_t *v, const element_t *cache_k, const element_t *cache_v,
    const float *first, const float *position, const float *logs, const float *shares, const element_t *dy, element_t *dk, element_t *dv,
    element_t *dcache_k, element_t *dcache_v, int S, int C, int H, int N, unsigned fresh
) {
    int size = TILE * (N | 1), of_cache = (C + TILE - 1) / TILE;
    float *queries = space, *slopes = space + size, *keys = space + 2 * size, *values = space + 3 * size;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int tile = ((int)blockIdx.x - of_cache) * TILE, low = max(tile, -C), end = min(tile + TILE, S);
    first += (long long)(blockIdx.y / H) * S;
    logs += (long long)blockIdx.y * S;
    shares += (long long)blockIdx.y * S;
    Rows all_q = rows_of(q, nullptr, S, 0, H, N), all_dy = rows_of(dy, nullptr, S, 0, H, N);
    float scale = rsqrtf((float)N), of_key[OWN][PARTS], of_value[OWN][PARTS];
    bool is_key[OWN];
    EACH_OWN(r) {
        int u = tile + warp * OWN + r;
        is_key[r] = u >= low && u < end && !is_pad(first, u);
        EACH_PART(p) of_key[r][p] = of_value[r][p] = 0.0f;
    }
    int next = next_row(position + (long long)(blockIdx.y / H) * S, C);
    load_tile(keys, rows_of(k, cache_k, S, C, H, N, next), tile, low, end, N);
    load_tile(values, rows_of(v, cache_v, S, C, H, N, next), tile, low, end, N);
    for (int start = max(0, tile); start < S; start += TILE) {
        int t = start + lane, seen = first_of(first, t, S);
        // The same in every warp.
        if (!__any_sync(0xffffffffu, seen <= t && seen < end)) continue;
        float log = t < S ? logs[t] : 0.0f, share = t < S ? shares[t] : 0.0f, weights[OWN], ds[OWN];
        __syncthreads();
        load_tile(queries, all_q, start, 0, S, N);
        load_tile(slopes, all_dy, start, 0, S, N);
        __syncthreads();
        scores(weights, keys, queries, N);
        scores(ds, values, slopes, N);
        EACH_OWN(r) {
            int u = tile + warp * OWN + r;
            bool sees = is_key[r] && u <= t && u >= seen;
            weights[r] = sees ? expf(weights[r] * scale - log) : 0.0f;
            ds[r] = sees ? weights[r] * (ds[r] - share) * scale : 0.0f;
        }
        add_rows(of_key, ds, queries, N);
        add_rows(of_value, weights, slopes, N);
    }
    EACH_OWN(r) {
        int u = tile + warp * OWN + r;
        if (u < low || u >= end) continue;
        long long b = blockIdx.y / H, column = (long long)(blockIdx.y % H) * N, D = (long long)H * N;
        if (u >= 0) {
            give_row(dk, (b * S + u) * D + column, of_key[r], N, fresh & 2);
            give_row(dv, (b * S + u) * D + column, of_value[r], N, fresh & 4);
        } else {
            long long row = b * C + ring_row(u, next, C);
            give_row(dcache_k, row * D + column, of_key[r], N, fresh & 8);
            give_row(dcache_v, row * D + column, of_value[r], N, fresh & 16);
        }
    }
}
