// The global norm of the gradients in a fixed order, and AdamW with clipping folded in.

#define TILE 8192

/// parts[i] = the sum of squares of tile i. grid (tiles), block 256.
extern "C" __global__ void __launch_bounds__(256) square_parts(const float *g, double *parts, int total) {
    __shared__ double sums[256];
    long long first = (long long)blockIdx.x * TILE;
    double sum = 0.0;
    for (int i = threadIdx.x; i < TILE; i += 256)
        if (first + i < total) sum += (double)g[first + i] * g[first + i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = 128; half > 0; half >>= 1) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) parts[blockIdx.x] = sums[0];
}

/// outcome = norm, clipping factor min(1, clip / (norm + 1e-6)), 1 where the norm is finite.
/// grid (1), block 32.
extern "C" __global__ void global_norm(const double *parts, float *outcome, int count, float clip) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += 32) sum += parts[i];
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x) return;
    double norm = sqrt(sum);
    outcome[0] = (float)norm;
    outcome[1] = (float)fmin(1.0, (double)clip / (norm + 1e-6));
    outcome[2] = isfinite(norm) ? 1.0f : 0.0f;
}

// What a parameter is, a number a block of 64 elements.
#define DECAY 1u
#define BORDER 2u
#define MATRICES 4u

/// One thread an element, but of matrices, which Muon updates. rates: rate / (1 - b1^t), 1 / sqrt(1 - b2^t),
/// 1 - rate decay, rate, and the first and third at the border's rate. copy: w in bf16, or null. Nothing
/// changes where the norm is not finite.
extern "C" __global__ void adamw(
    float *w, bf16_t *copy, const float *g, float *m, float *v, const unsigned *kinds, const float *rates,
    const float *outcome, int total, float b1, float b2, float rest_1, float rest_2, float eps
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= total || outcome[2] == 0.0f) return;
    unsigned kind = kinds[i / 64];
    if (kind & MATRICES) return;
    float rate = kind & BORDER ? rates[4] : rates[0];
    float keep = kind & DECAY ? (kind & BORDER ? rates[5] : rates[2]) : 1.0f;
    float gradient = g[i] * outcome[1];
    float first = b1 * m[i] + rest_1 * gradient;
    float second = b2 * v[i] + rest_2 * gradient * gradient;
    m[i] = first;
    v[i] = second;
    float updated = w[i] * keep - rate * first / (sqrtf(second) * rates[1] + eps);
    w[i] = updated;
    if (copy) store(copy + i, updated);
}
