// Muon around its products: the momentum and its norm, the matrices of a batch gathered to be multiplied,
// and the update. A batch has matrices of one number n of elements, each (low, high) or, transposed,
// (high, low) with low <= high; what is multiplied is (low, high), its rows `step` elements apart.
//
// matrices: of each the first element in the flat buffers, and flags.

#define TILE 8192
#define TRANSPOSED 1u
#define DECAY 2u

/// m <- mu m + clip g, and parts[matrix][tile] = the sum of squares of clip g + mu m. grid (tiles, matrices),
/// block 256.
extern "C" __global__ void __launch_bounds__(256) muon_momentum(
    const float *__restrict__ g, float *__restrict__ m, const uint2 *matrices, double *parts, const float *outcome,
    int n, float mu
) {
    if (outcome[2] == 0.0f) return;
    __shared__ double sums[256];
    int before = blockIdx.x * TILE, count = min(TILE, n - before);
    long long first = (long long)matrices[blockIdx.y].x + before;
    float clip = outcome[1];
    double sum = 0.0;
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += 256) {
        float gradient = clip * g[first + i];
        float momentum = mu * m[first + i] + gradient;
        m[first + i] = momentum;
        float ahead = gradient + mu * momentum;
        sum += (double)ahead * ahead;
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = 128; half > 0; half >>= 1) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) parts[(long long)blockIdx.y * gridDim.x + blockIdx.x] = sums[0];
}

#define SIDE 64
#define STRIDE 4
/// A thread's rows of a square of SIDE x SIDE, its column being threadIdx.x.
#define EACH_ROW(r) for (int r = threadIdx.y; r < SIDE; r += STRIDE)

/// x (matrices, low, step) = (clip g + mu m) / (its norm + eps). grid (ceil(high / SIDE), ceil(low / SIDE),
/// matrices), block (SIDE, STRIDE).
extern "C" __global__ void __launch_bounds__(256) muon_gather(
    const float *g, const float *m, const uint2 *matrices, const double *parts, element_t *x, const float *outcome,
    int low, int high, int step, int tiles, float mu, float eps
) {
    if (outcome[2] == 0.0f) return;
    __shared__ float square[SIDE][SIDE + 1];
    __shared__ float inverse;
    uint2 matrix = matrices[blockIdx.z];
    if (threadIdx.y == 0 && threadIdx.x < 32) {
        double sum = 0.0;
        for (int i = threadIdx.x; i < tiles; i += 32) sum += parts[(long long)blockIdx.z * tiles + i];
        for (int half = 16; half > 0; half >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, half);
        if (threadIdx.x == 0) inverse = (float)(1.0 / (sqrt(sum) + (double)eps));
    }
    g += matrix.x;
    m += matrix.x;
    x += (long long)blockIdx.z * low * step;
    float clip = outcome[1];
    int top = blockIdx.y * SIDE, left = blockIdx.x * SIDE;
    bool transposed = matrix.y & TRANSPOSED;
    EACH_ROW(r) {
        // What is stored as row j, column i is row i, column j.
        int i = transposed ? top + threadIdx.x : top + r, j = transposed ? left + r : left + threadIdx.x;
        if (i >= low || j >= high) continue;
        long long at = transposed ? (long long)j * low + i : (long long)i * high + j;
        float ahead = clip * g[at] + mu * m[at];
        if (transposed)
            square[threadIdx.x][r] = ahead;
        else
            square[r][threadIdx.x] = ahead;
    }
    __syncthreads();
    EACH_ROW(r) {
        int i = top + r, j = left + threadIdx.x;
        if (i < low && j < high) store(x + (long long)i * step + j, square[r][threadIdx.x] * inverse);
    }
}

/// w <- keep w - rate scale x, and its copy in bf16 where there is one. rates: as adamw has them. grid and
/// block as above.
extern "C" __global__ void __launch_bounds__(256) muon_update(
    float *w, bf16_t *copy, const uint2 *matrices, const element_t *x, const float *rates, const float *outcome,
    int low, int high, int step, float scale
) {
    if (outcome[2] == 0.0f) return;
    __shared__ float square[SIDE][SIDE + 1];
    uint2 matrix = matrices[blockIdx.z];
    x += (long long)blockIdx.z * low * step;
    int top = blockIdx.y * SIDE, left = blockIdx.x * SIDE;
    EACH_ROW(r) {
        int i = top + r, j = left + threadIdx.x;
        if (i < low && j < high) square[r][threadIdx.x] = load(x + (long long)i * step + j);
    }
    __syncthreads();
    bool transposed = matrix.y & TRANSPOSED;
    float keep = matrix.y & DECAY ? rates[2] : 1.0f, rate = rates[3] * scale;
    EACH_ROW(r) {
        int i = transposed ? top + threadIdx.x : top + r, j = transposed ? left + r : left + threadIdx.x;
        if (i >= low || j >= high) continue;
        long long at = (long long)matrix.x + (transposed ? (long long)j * low + i : (long long)i * high + j);
        float direction = transposed ? square[threadIdx.x][r] : square[r][threadIdx.x];
        float updated = w[at] * keep - rate * direction;
        w[at] = updated;
        if (copy) store(copy + at, updated);
    }
}
