// Attention of few queries, as in generation, to a long cache: the keys that a query sees are shared out
// over blocks, each with a running maximum and sum (see attention.rs), and a second kernel joins what they
// found, in order. All sums have a fixed order, given by the sizes and by how many keys there are.
//
// Sizes: S queries, C rows of the cache, H heads of N <= 128 features, D = H N, P parts. q, k, v, y
// (B, S, D), cached keys and values (B, C, D): element_t. first, position (B, S), logs (B, H, S), parts
// (B H, S, P, N + 2): f32; a part is a maximum, a sum of exp(score - maximum), and the sum of values with
// these weights. Token u < 0 has row (position + u) mod C, with the position of the first token. The floor is
// the reading of the rows that are seen.

#define THREADS 256
#define WARPS (THREADS / 32)
#define MAX_SIZE 128
/// The most parts: MOST_PARTS of cuda.rs.
#define MOST_PARTS 512
/// A share of keys is a multiple of this.
#define LEAST 64
/// Keys whose loads are under way at once.
#ifdef ELEMENT_BF16
#define TOGETHER 4
#else
#define TOGETHER 2
#endif
#define ALL 0xffffffffu
#define EACH(i, n) _Pragma("unroll") for (int i = 0; i < (n); i++)

/// The keys of query t, from `low` on, and how many each of `parts` blocks has. A pad sees none. `first` is
/// of its sequence.
struct Share {
    int low, each, parts;
    __device__ __forceinline__ Share(const float *first, int t, int C, int P) {
        low = max((int)first[t], -C);
        int count = t + 1 - low;
        each = max(1, ((count + P - 1) / P + LEAST - 1) / LEAST) * LEAST;
        parts = (count + each - 1) / each;
    }
};

/// Eight numbers of a row, of which there are `count`.
template <bool WHOLE> __device__ __forceinline__ Raw take_some(const element_t *p, int count) {
    Raw raw = {};
    if (count > 0) raw = take<WHOLE>(p, count);
    return raw;
}

/// What is found of a block's keys: LANES lanes have a key at a time, eight features each.
template <int LANES, bool WHOLE>
__device__ __forceinline__ void few(
    const element_t *q, const element_t *k, const element_t *v, const element_t *cache_k, const element_t *cache_v,
    const float *first, const float *position, float *parts, int S, int C, int H, int N
) {
    __shared__ float highs[WARPS], sums[WARPS], results[WARPS][LANES * WIDE];
    wait_for_previous();
    const int UNITS = THREADS / LANES;
    int task = blockIdx.x, part = blockIdx.y, P = gridDim.y, t = blockIdx.z;
    int unit = threadIdx.x / LANES, column = threadIdx.x % LANES * WIDE, count = N - column;
    long long b = task / H, D = (long long)H * N, head = (long long)(task % H) * N + column;
    first += b * S;
    Share share(first, t, C, P);
    if (part >= share.parts) return;
    int from = share.low + part * share.each, to = min(from + share.each, t + 1);
    int next = (int)position[b * S] % C;
    const element_t *tokens_k = k + b * S * D + head, *tokens_v = v + b * S * D + head;
    const element_t *rows_k = cache_k + b * C * D + head, *rows_v = cache_v + b * C * D + head;

    Wide own = unpack(take_some<WHOLE>(q + (b * S + t) * D + head, count));
    float scale = rsqrtf((float)N), high = NEG_INFINITY, sum = 0.0f;
    EACH_WIDE(j) own.x[j] *= scale;
    Wide result = {};
    // As often in every thread: lanes of a warp exchange numbers.
    for (int start = from; start < to; start += UNITS * TOGETHER) {
        Raw keys[TOGETHER], values[TOGETHER];
        bool sees[TOGETHER];
        EACH(i, TOGETHER) {
            int u = start + i * UNITS + unit;
            sees[i] = u < to;
            u = min(u, to - 1);
            int row = next + u;
            if (row < 0) row += C;
            if (u >= 0) row = u, sees[i] = sees[i] && (int)first[u] <= u;
            keys[i] = take_some<WHOLE>((u < 0 ? rows_k : tokens_k) + row * D, count);
            values[i] = take_some<WHOLE>((u < 0 ? rows_v : tokens_v) + row * D, count);
        }
        float scores[TOGETHER], top = high;
        EACH(i, TOGETHER) {
            Wide key = unpack(keys[i]);
            float score = 0.0f;
            EACH_WIDE(j) score = fmaf(own.x[j], key.x[j], score);
            for (int step = LANES / 2; step > 0; step >>= 1) score += __shfl_xor_sync(ALL, score, step);
            scores[i] = sees[i] ? score : NEG_INFINITY;
            top = fmaxf(top, scores[i]);
        }
        // Before anything is seen, all weights are 0; NaN stays NaN.
        float base = top == NEG_INFINITY ? 0.0f : top, shrink = expf(high - base);
        sum *= shrink;
        EACH_WIDE(j) result.x[j] *= shrink;
        EACH(i, TOGETHER) {
            if (!sees[i]) continue;
            Wide value = unpack(values[i]);
            float weight = expf(scores[i] - base);
            sum += weight;
            EACH_WIDE(j) result.x[j] = fmaf(weight, value.x[j], result.x[j]);
        }
        high = top;
    }

    // The units of a warp, then the warps.
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float top = high;
    for (int step = LANES; step < 32; step <<= 1) top = fmaxf(top, __shfl_xor_sync(ALL, top, step));
    float shrink = expf(high - (top == NEG_INFINITY ? 0.0f : top));
    sum *= shrink;
    EACH_WIDE(j) result.x[j] *= shrink;
    for (int step = LANES; step < 32; step <<= 1) {
        sum += __shfl_xor_sync(ALL, sum, step);
        EACH_WIDE(j) result.x[j] += __shfl_xor_sync(ALL, result.x[j], step);
    }
    if (lane < LANES) EACH_WIDE(j) results[warp][column + j] = result.x[j];
    if (lane == 0) highs[warp] = top, sums[warp] = sum;
    __syncthreads();
    int d = threadIdx.x;
    if (d >= N) return;
    top = NEG_INFINITY, sum = 0.0f;
    EACH(i, WARPS) top = fmaxf(top, highs[i]);
    float base = top == NEG_INFINITY ? 0.0f : top, all = 0.0f;
    EACH(i, WARPS) {
        float weight = expf(highs[i] - base);
        sum = fmaf(weight, sums[i], sum);
        all = fmaf(weight, results[i][d], all);
    }
    parts += (((long long)task * S + t) * P + part) * (N + 2);
    parts[2 + d] = all;
    if (d == 0) parts[0] = top, parts[1] = sum;
}

// Grid (B H, P, S), block 256. Heads that are no multiple of eight features are `any`.
#define FEW(NAME, LANES, WHOLE, BLOCKS)                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_few_##NAME(                       \
        const element_t *q, const element_t *k, const element_t *v, const element_t *cache_k,                 \
        const element_t *cache_v, const float *first, const float *position, float *parts, int S, int C,      \
        int H, int N                                                                                          \
    ) {                                                                                                       \
        few<LANES, WHOLE>(q, k, v, cache_k, cache_v, first, position, parts, S, C, H, N);                     \
    }
FEW(32, 4, true, 4)
FEW(64, 8, true, 4)
FEW(128, 16, true, 4)
FEW(any, 16, false, 2)

/// y and logs, of the parts of each query. Grid (B H, S), block 256: groups of threads, one a feature, take
/// parts in turn.
extern "C" __global__ void __launch_bounds__(THREADS) attention_join(
    const float *first, const float *parts, element_t *y, float *logs, int S, int C, int H, int N, int P
) {
    __shared__ float weights[MOST_PARTS], highs[WARPS], sums[THREADS], results[THREADS];
    wait_for_previous();
    int task = blockIdx.x, t = blockIdx.y, thread = threadIdx.x;
    long long b = task / H;
    Share share(first + b * S, t, C, P);
    element_t *to = y + (b * S + t) * H * N + (long long)(task % H) * N;
    logs += (long long)task * S + t;
    if (share.parts <= 0) {
        // A pad.
        if (thread < N) store(to + thread, 0.0f);
        if (thread == 0) *logs = 0.0f;
        return;
    }
    int pitch = N + 2;
    parts += ((long long)task * S + t) * P * pitch;
    float top = NEG_INFINITY;
    for (int i = thread; i < share.parts; i += THREADS) top = fmaxf(top, parts[i * pitch]);
    for (int step = 16; step > 0; step >>= 1) top = fmaxf(top, __shfl_xor_sync(ALL, top, step));
    if (thread % 32 == 0) highs[thread / 32] = top;
    __syncthreads();
    EACH(i, WARPS) top = fmaxf(top, highs[i]);
    float base = top == NEG_INFINITY ? 0.0f : top;
    for (int i = thread; i < share.parts; i += THREADS) weights[i] = expf(parts[i * pitch] - base);
    __syncthreads();
    int width = (N + 31) / 32 * 32, groups = THREADS / width, group = thread / width, d = thread % width;
    float sum = 0.0f, result = 0.0f;
    if (group < groups && d < N)
#pragma unroll 8
        for (int i = group; i < share.parts; i += groups) {
            sum = fmaf(weights[i], parts[i * pitch + 1], sum);
            result = fmaf(weights[i], parts[i * pitch + 2 + d], result);
        }
    sums[thread] = sum, results[thread] = result;
    __syncthreads();
    if (thread >= N) return;
    for (int i = 1; i < groups; i++) sum += sums[i * width + thread], result += results[i * width + thread];
    store(to + thread, result / sum);
    if (thread == 0) *logs = top + logf(sum);
}
