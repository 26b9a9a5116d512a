// y = the row of the weight that each token id names. The caller validates ids.

/// One thread an element.
extern "C" __global__ void embedding_forward(
    const float *weight, const unsigned *ids, element_t *y, long long n, int width
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) store(y + i, weight[(long long)ids[i / width] * width + i % width]);
}

/// dW[id] += dy, tokens in order. grid (vocabulary, ceil(width / 256)), block 256: a block looks
/// through all ids, 256 at a time, for its own.
extern "C" __global__ void __launch_bounds__(256) embedding_backward(
    const element_t *dy, const unsigned *ids, float *dw, int tokens, int width
) {
    __shared__ unsigned found[8];
    int column = blockIdx.y * 256 + threadIdx.x, lane = threadIdx.x % 32;
    float sum = 0.0f;
    bool any = false;
    for (int start = 0; start < tokens; start += 256) {
        int token = start + threadIdx.x;
        unsigned here = __ballot_sync(0xffffffffu, token < tokens && ids[token] == blockIdx.x);
        if (!__syncthreads_or(here)) continue;
        any = true;
        if (lane == 0) found[threadIdx.x / 32] = here;
        __syncthreads();
        for (int warp = 0; warp < 8; warp++)
            for (unsigned rest = found[warp]; rest; rest &= rest - 1) {
                int at = start + 32 * warp + __ffs(rest) - 1;
                if (column < width) sum += load(dy + (long long)at * width + column);
            }
        __syncthreads();
    }
    if (any && column < width) dw[(long long)blockIdx.x * width + column] += sum;
}
