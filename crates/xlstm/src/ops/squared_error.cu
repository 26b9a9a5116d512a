// e_i = sum_j (y_ij - t_ij)^2 over the targets that are asked for; loss = scale sum_i e_i. Targets are
// the bits of f32, or IGNORE.

#define IGNORE 0xffffffffu

__device__ __forceinline__ float difference(float y, unsigned target) {
    return target == IGNORE ? 0.0f : y - __uint_as_float(target);
}

/// A warp a row: grid (ceil(rows / 8)), block 256.
extern "C" __global__ void __launch_bounds__(256) squared_error_forward(
    const element_t *y, const unsigned *targets, float *errors, int rows, int width
) {
    int row = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= rows) return;
    y += (long long)row * width;
    targets += (long long)row * width;
    float sum = 0.0f;
    for (int j = threadIdx.x % 32; j < width; j += 32) {
        float d = difference(load(y + j), targets[j]);
        sum = fmaf(d, d, sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) errors[row] = sum;
}

/// to = or += scale sum_i e_i; with accumulate dscale += dloss sum_i e_i. grid (1), block 256.
extern "C" __global__ void __launch_bounds__(256) squared_error_sum(
    const float *errors, const float *scale, float *to, int rows, int accumulate
) {
    __shared__ double sums[256];
    double sum = 0.0;
    for (int i = threadIdx.x; i < rows; i += 256) sum += errors[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = 128; half > 0; half >>= 1) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) *to = (accumulate ? *to : 0.0f) + (float)(*scale * sums[0]);
}

/// dy += 2 (y - t) (scale dloss + de). dloss and de may be null. A thread an element.
extern "C" __global__ void squared_error_backward(
    const element_t *y, const unsigned *targets, const float *scale, const float *dloss, const float *derrors,
    element_t *dy, long long n, int width
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float weight = (dloss ? *scale * *dloss : 0.0f) + (derrors ? derrors[i / width] : 0.0f);
    add(dy + i, 2.0f * weight * difference(load(y + i), targets[i]));
}
