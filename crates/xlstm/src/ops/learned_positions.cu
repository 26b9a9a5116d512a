// y = x + the row of w that each token's position names.

__device__ __forceinline__ int row_of(float position, int rows) { return min((int)position, rows - 1); }

/// A thread has eight columns and goes over ROWS tokens. grid (ceil(tokens / ROWS), ceil(D / 8 / block)).
#define ROWS 8

extern "C" __global__ void __launch_bounds__(256) learned_positions_forward(
    const element_t *x, const float *w, const float *position, element_t *y, int tokens, int rows, int D
) {
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * WIDE, count = D - column;
    if (count <= 0) return;
    int token = blockIdx.x * ROWS, end = min(tokens, token + ROWS);
#pragma unroll 4
    for (; token < end; token++) {
        long long at = (long long)token * D + column;
        Wide sum = load_wide(x + at, count);
        Wide row = load_wide(w + (long long)row_of(position[token], rows) * D + column, count);
        EACH_WIDE(j) sum.x[j] += row.x[j];
        store_wide(y + at, sum, count);
    }
}

/// dx += dy, or = where it is fresh.
extern "C" __global__ void learned_positions_dx(const element_t *dy, element_t *dx, long long n, int fresh) {
    int count;
    long long i = my_elements(n, &count);
    if (count > 0) give_wide(dx + i, load_wide(dy + i, count), count, fresh);
}

/// dw[position] += dy, or = where it is fresh; tokens in order. A block has a row of dw and looks for its tokens
/// among 256 at a time, a thread has eight columns. grid (rows, ceil(D / 2048)), block 256.
extern "C" __global__ void __launch_bounds__(256) learned_positions_dw(
    const element_t *dy, const float *position, float *dw, int tokens, int rows, int D, int fresh
) {
    __shared__ unsigned found[8];
    int row = blockIdx.x, column = (blockIdx.y * 256 + threadIdx.x) * WIDE, count = D - column;
    Wide sum = {};
    for (int start = 0; start < tokens; start += 256) {
        int own = start + threadIdx.x;
        bool hit = own < tokens && row_of(position[own], rows) == row;
        unsigned hits = __ballot_sync(0xffffffffu, hit);
        // Nobody reads the words of an earlier round any more: this is a barrier.
        if (!__syncthreads_or(hit)) continue;
        if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = hits;
        __syncthreads();
        for (int word = 0; word < 8; word++)
            for (unsigned left = found[word]; left; left &= left - 1) {
                int token = start + word * 32 + __ffs(left) - 1;
                if (count <= 0) continue;
                Wide other = load_wide(dy + (long long)token * D + column, count);
                EACH_WIDE(j) sum.x[j] += other.x[j];
            }
    }
    if (count > 0) give_wide(dw + (long long)row * D + column, sum, count, fresh);
}
