// The token of every sequence, as draw.rs says. A block a sequence; ids in tiles of 8192, of which a
// thread has eight that lie together. Sums have a fixed order.

#define THREADS 1024
#define TILE (THREADS * WIDE)
/// Tiles of the largest vocabulary.
#define MOST_TILES 2048

/// Logits of one tile that count, else minus infinity.
__device__ __forceinline__ Wide logits_of(const element_t *logits, int tile, int limit) {
    int first = tile * TILE + threadIdx.x * WIDE;
    Wide wide = load_wide(logits + min(first, limit), max(0, min(WIDE, limit - first)));
    EACH_WIDE(j) if (first + j >= limit) wide.x[j] = NEG_INFINITY;
    return wide;
}

/// The largest of the block, the lowest id first among equals; a NaN is larger than all.
struct Best {
    float value;
    int id;
};
__device__ __forceinline__ Best better(Best a, Best b) {
    if (isnan(a.value) || isnan(b.value)) return isnan(a.value) ? a : b;
    bool first = a.value > b.value || (a.value == b.value && a.id < b.id);
    return first ? a : b;
}
__device__ __forceinline__ Best block_best(Best mine) {
    __shared__ Best parts[32];
    for (int step = 16; step > 0; step >>= 1)
        mine = better(mine, {__shfl_xor_sync(0xffffffffu, mine.value, step), __shfl_xor_sync(0xffffffffu, mine.id, step)});
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = mine;
    __syncthreads();
    Best best = parts[0];
    for (int i = 1; i < THREADS / 32; i++) best = better(best, parts[i]);
    return best;
}

/// Sum of the threads before this one; *all: of all threads.
__device__ __forceinline__ float sum_before(float mine, float *all) {
    __shared__ float parts[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sum = mine;
    for (int step = 1; step < 32; step <<= 1) {
        float left = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += left;
    }
    __syncthreads();
    if (lane == 31) parts[warp] = sum;
    __syncthreads();
    float before = 0.0f, total = 0.0f;
    for (int i = 0; i < 32; i++) {
        if (i == warp) before = total;
        total += parts[i];
    }
    *all = total;
    return before + sum - mine;
}

/// grid (B), block 1024. logits (B, V); settings (B, 3): u, temperature, limit; token (B).
extern "C" __global__ void __launch_bounds__(THREADS) draw_token(
    const element_t *logits, const float *settings, float *token, int V
) {
    __shared__ float sums[MOST_TILES];
    __shared__ int chosen;
    logits += (long long)blockIdx.x * V;
    settings += 3 * blockIdx.x;
    float u = settings[0], temperature = settings[1];
    int limit = min(V, (int)settings[2]), tiles = (limit + TILE - 1) / TILE;
    Best best = {NEG_INFINITY, limit};
    for (int tile = 0; tile < tiles; tile++) {
        Wide wide = logits_of(logits, tile, limit);
        EACH_WIDE(j) best = better(best, {wide.x[j], tile * TILE + (int)threadIdx.x * WIDE + j});
    }
    best = block_best(best);
    if (isnan(best.value) || temperature == 0.0f) {
        if (threadIdx.x == 0) token[blockIdx.x] = isnan(best.value) ? best.value : (float)best.id;
        return;
    }
    float inverse = 1.0f / temperature, all = 0.0f;
    auto weights = [&](int tile) {
        Wide wide = logits_of(logits, tile, limit);
        EACH_WIDE(j) wide.x[j] = expf((wide.x[j] - best.value) * inverse);
        return wide;
    };
    for (int tile = 0; tile < tiles; tile++) {
        Wide wide = weights(tile);
        float mine = 0.0f, sum;
        EACH_WIDE(j) mine += wide.x[j];
        sum_before(mine, &sum);
        if (threadIdx.x == 0) sums[tile] = sum;
        all += sum;
    }
    if (threadIdx.x == 0) chosen = limit - 1;
    __syncthreads();
    // The tile in which the running sum passes the mark, then the thread, then the id.
    float mark = u * all, before = 0.0f;
    int tile = 0;
    while (tile + 1 < tiles && before + sums[tile] <= mark) before += sums[tile++];
    Wide wide = weights(tile);
    float mine = 0.0f, sum;
    EACH_WIDE(j) mine += wide.x[j];
    float running = before + sum_before(mine, &sum);
    int first = tile * TILE + threadIdx.x * WIDE, own = limit;
    EACH_WIDE(j) {
        running += wide.x[j];
        if (running > mark && own == limit && wide.x[j] > 0.0f) own = first + j;
    }
    // Of all whose sum is beyond the mark, the lowest: whole numbers, in any order.
    if (own < limit) atomicMin(&chosen, own);
    __syncthreads();
    if (threadIdx.x == 0) token[blockIdx.x] = (float)chosen;
}
