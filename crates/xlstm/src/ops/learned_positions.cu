// y = x + the row of w that each token's position names.

__device__ __forceinline__ int row_of(float position, int rows) { return min((int)position, rows - 1); }

/// A thread an element.
extern "C" __global__ void learned_positions_forward(
    const element_t *x, const float *w, const float *position, element_t *y, long long n, int rows, int D
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    store(y + i, load(x + i) + w[(long long)row_of(position[i / D], rows) * D + i % D]);
}

extern "C" __global__ void learned_positions_dx(const element_t *dy, element_t *dx, long long n) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) add(dx + i, load(dy + i));
}

/// dw[position] += dy, tokens in order, a thread an element of dw. grid (rows, ceil(D / 128)),
/// block 128.
extern "C" __global__ void learned_positions_dw(
    const element_t *dy, const float *position, float *dw, int tokens, int rows, int D
) {
    int row = blockIdx.x, d = blockIdx.y * 128 + threadIdx.x;
    if (d >= D) return;
    float sum = 0.0f;
    for (int token = 0; token < tokens; token++)
        if (row_of(position[token], rows) == row) sum += load(dy + (long long)token * D + d);
    dw[(long long)row * D + d] += sum;
}
