// y = the row of the weight that each token id names. The caller validates ids.

/// A warp a token. grid (ceil(tokens / 8)), block 256.
extern "C" __global__ void __launch_bounds__(256) embedding_forward(
    const element_t *weight, const unsigned *ids, element_t *y, int tokens, int width
) {
    int token = blockIdx.x * 8 + threadIdx.x / 32;
    if (token >= tokens) return;
    const element_t *from = weight + (long long)ids[token] * width;
    element_t *to = y + (long long)token * width;
    for (int i = threadIdx.x % 32 * WIDE; i < width; i += 32 * WIDE)
        store_wide(to + i, load_wide(from + i, width - i), width - i);
}

#define CHUNKS 4

/// dW[id] += dy. grid (tokens, ceil(width / 1024)), block 256: the block of the first token of an id adds the
/// rows of all of its tokens. A warp looks through every eighth 32 ids from there on and adds rows in the
/// order of tokens; the warps' sums are added in order.
extern "C" __global__ void __launch_bounds__(256) embedding_backward(
    const element_t *dy, const unsigned *ids, float *dw, int tokens, int width
) {
    __shared__ float sums[8][32 * WIDE];
    unsigned id = ids[blockIdx.x];
    bool seen = false;
#pragma unroll 8
    for (int before = threadIdx.x; before < (int)blockIdx.x; before += 256) seen |= ids[before] == id;
    if (__syncthreads_or(seen)) return;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.y * CHUNKS * 32 * WIDE + lane * WIDE;
    Wide sum[CHUNKS] = {};
    for (int start = blockIdx.x / 32 * 32 + 32 * warp; start < tokens; start += 256) {
        int token = start + lane;
        unsigned here = __ballot_sync(0xffffffffu, token < tokens && ids[token] == id);
        for (; here; here &= here - 1) {
            const element_t *row = dy + (long long)(start + __ffs(here) - 1) * width;
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                int column = first + chunk * 32 * WIDE;
                if (column >= width) continue;
                Wide more = load_wide(row + column, width - column);
                EACH_WIDE(j) sum[chunk].x[j] += more.x[j];
            }
        }
    }
    float *to = dw + (long long)id * width;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        EACH_WIDE(j) sums[warp][j * 32 + lane] = sum[chunk].x[j];
        __syncthreads();
        // Thread j * 32 + lane has the column lane * WIDE + j.
        int column = (blockIdx.y * CHUNKS + chunk) * 32 * WIDE + lane * WIDE + warp;
        if (column < width) {
            float total = 0.0f;
            for (int i = 0; i < 8; i++) total += sums[i][threadIdx.x];
            to[column] += total;
        }
        __syncthreads();
    }
}
