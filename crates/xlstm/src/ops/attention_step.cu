// Causal attention of one new token a sequence, as in attention.rs: what generation asks for. The tokens that it sees
// are cut into pieces, a block each, so that a long cache is read by the whole card; a piece's part of the result is
// relative to its own largest score, and a second kernel puts the parts together in order.
//
// Sizes as in attention.cu, with S = 1: q, k, v, y (B, D) element_t; keys and values of the cache (B, C, D), first (B),
// logs (B, H): f32. N and pointers: multiples of 4 numbers. Piece p has the tokens from -p PIECE down, of which 0 is
// the new one. parts (B H, P, N + 2), f32: of a piece the sum of weights times values, their sum, the largest score.

#define PIECE 128
#define THREADS 128
#define MAX_SIZE 128
/// Lanes that share a key, and keys that a block works on at once.
#define SHARE 8
#define AT_ONCE (THREADS / SHARE)

/// Keys or values of one head of one sequence.
struct Seen {
    const element_t *token;
    const float *cache;
    int C, D;
    __device__ __forceinline__ Four at(int u, int d) const {
        return u >= 0 ? unpack(load_four(token + d)) : unpack(*(const float4 *)(cache + (long long)(C + u) * D + d));
    }
};
__device__ __forceinline__ Seen seen_of(const element_t *x, const float *cache, int C, int H, int N) {
    long long D = (long long)H * N, b = blockIdx.y / H, column = (long long)(blockIdx.y % H) * N;
    return {x + b * D + column, cache ? cache + b * C * D + column : cache, C, (int)D};
}

/// The lowest token that is seen; 1 of a pad.
__device__ __forceinline__ int lowest_of(const float *first, int H, int C) {
    return max((int)first[blockIdx.y / H], -C);
}

/// The largest, and the sum, over a block.
template <bool SUM> __device__ __forceinline__ float over_block(float x, float *space) {
    for (int step = 16; step > 0; step >>= 1) {
        float other = __shfl_xor_sync(0xffffffffu, x, step);
        x = SUM ? x + other : fmaxf(x, other);
    }
    if (threadIdx.x % 32 == 0) space[threadIdx.x / 32] = x;
    __syncthreads();
    x = space[0];
    for (int warp = 1; warp < THREADS / 32; warp++) x = SUM ? x + space[warp] : fmaxf(x, space[warp]);
    __syncthreads();
    return x;
}

/// grid (P, B H), block 128.
extern "C" __global__ void __launch_bounds__(THREADS) attention_step_parts(
    const element_t *q, const element_t *k, const element_t *v, const float *cache_k, const float *cache_v,
    const float *first, float *parts, int C, int H, int N
) {
    __shared__ float weights[PIECE], space[THREADS / 32];
    __shared__ float4 sums[THREADS];
    int newest = -(int)blockIdx.x * PIECE, count = min(PIECE, newest - lowest_of(first, H, C) + 1);
    if (count <= 0) return;
    Seen keys = seen_of(k, cache_k, C, H, N), values = seen_of(v, cache_v, C, H, N);
    const element_t *query = seen_of(q, nullptr, 0, H, N).token;
    int lane = threadIdx.x % SHARE, group = threadIdx.x / SHARE;
    Four own[MAX_SIZE / (4 * SHARE)];
#pragma unroll
    for (int i = 0; i < MAX_SIZE / (4 * SHARE); i++) {
        int d = 4 * (lane + i * SHARE);
        own[i] = d < N ? unpack(load_four(query + d)) : Four{};
    }
    float scale = rsqrtf((float)N);
#pragma unroll 4
    for (int start = 0; start < PIECE; start += AT_ONCE) {
        int place = start + group;
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < MAX_SIZE / (4 * SHARE); i++) {
            int d = 4 * (lane + i * SHARE);
            if (d < N && place < count) {
                Four key = keys.at(newest - place, d);
                EACH_FOUR(j) score = fmaf(own[i].x[j], key.x[j], score);
            }
        }
        for (int step = SHARE / 2; step > 0; step >>= 1) score += __shfl_xor_sync(0xffffffffu, score, step);
        if (lane == 0) weights[place] = place < count ? score * scale : NEG_INFINITY;
    }
    __syncthreads();
    float score = weights[threadIdx.x], high = over_block<false>(score, space);
    // Of no token, 0; of no number, none.
    float weight = threadIdx.x < count ? expf(score - high) : 0.0f;
    weights[threadIdx.x] = weight;
    float sum = over_block<true>(weight, space);

    int columns = N / 4, groups = THREADS / columns, own_group = threadIdx.x / columns, d = threadIdx.x % columns * 4;
    Four total = {};
    if (own_group < groups)
#pragma unroll 4
        for (int place = own_group; place < count; place += groups) {
            Four value = values.at(newest - place, d);
            float weight = weights[place];
            EACH_FOUR(j) total.x[j] = fmaf(weight, value.x[j], total.x[j]);
        }
    sums[threadIdx.x] = make_float4(total.x[0], total.x[1], total.x[2], total.x[3]);
    __syncthreads();
    float *to = parts + ((long long)blockIdx.y * gridDim.x + blockIdx.x) * (N + 2);
    if (own_group == 0) {
        for (int other = 1; other < groups; other++) {
            Four more = unpack(sums[other * columns + threadIdx.x]);
            EACH_FOUR(j) total.x[j] += more.x[j];
        }
        EACH_FOUR(j) to[d + j] = total.x[j];
    }
    if (threadIdx.x == 0) to[N] = sum, to[N + 1] = high;
}

/// y and logs of `pieces` parts; 0 of a pad. grid (1, B H), block 128.
extern "C" __global__ void __launch_bounds__(THREADS) attention_step(
    const float *parts, const float *first, element_t *y, float *logs, int pieces, int C, int H, int N
) {
    int task = blockIdx.y, lowest = lowest_of(first, H, C), d = threadIdx.x;
    int filled = lowest > 0 ? 0 : min(pieces, -lowest / PIECE + 1);
    parts += (long long)task * pieces * (N + 2);
    float high = NEG_INFINITY, sum = 0.0f, total = 0.0f;
    for (int piece = 0; piece < filled; piece++) high = fmaxf(high, parts[piece * (N + 2) + N + 1]);
#pragma unroll 4
    for (int piece = 0; piece < filled; piece++) {
        const float *part = parts + piece * (N + 2);
        float weight = expf(part[N + 1] - high);
        sum = fmaf(weight, part[N], sum);
        if (d < N) total = fmaf(weight, part[d], total);
    }
    if (d < N) store(y + (long long)task * N + d, filled ? total / sum : 0.0f);
    if (d == 0) logs[task] = filled ? high + logf(sum) : 0.0f;
}
