// nll_i = ln sum_v e^(x_iv) - x_i,target; loss = scale sum_i nll_i. A block a row.

#define IGNORE 0xffffffffu

__device__ float block_reduce(float x, bool maximum) {
    __shared__ float parts[8];
    for (int step = 16; step > 0; step >>= 1) {
        float other = __shfl_xor_sync(0xffffffffu, x, step);
        x = maximum ? fmaxf(x, other) : x + other;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = parts[0];
    for (int i = 1; i < 8; i++) x = maximum ? fmaxf(x, parts[i]) : x + parts[i];
    return x;
}

/// grid (rows), block 256.
extern "C" __global__ void __launch_bounds__(256) cross_entropy_forward(
    const element_t *logits, const unsigned *targets, float *nll, float *log_sum, int vocabulary
) {
    const element_t *x = logits + (long long)blockIdx.x * vocabulary;
    unsigned target = targets[blockIdx.x];
    if (target == IGNORE) {
        if (threadIdx.x == 0) nll[blockIdx.x] = log_sum[blockIdx.x] = 0.0f;
        return;
    }
    // In one pass: a sum of exponentials follows the largest number seen so far. A NaN passes the
    // maximum and shows in the sum.
    float mine = NEG_INFINITY, sum = 0.0f;
    for (int i = threadIdx.x * WIDE; i < vocabulary; i += 256 * WIDE) {
        Wide wide = load_wide(x + i, vocabulary - i);
        float before = mine, part = 0.0f;
        EACH_WIDE(j) if (i + j < vocabulary) mine = fmaxf(mine, wide.x[j]);
        // No number yet but minus infinity: any shift will do.
        float shift = mine == NEG_INFINITY ? 0.0f : mine;
        EACH_WIDE(j) if (i + j < vocabulary) part += expf(wide.x[j] - shift);
        sum = fmaf(sum, expf(before - shift), part);
    }
    float largest = block_reduce(mine, true);
    sum = block_reduce(mine == NEG_INFINITY ? sum : sum * expf(mine - largest), false);
    if (threadIdx.x == 0) {
        float log = largest + logf(sum);
        log_sum[blockIdx.x] = log;
        nll[blockIdx.x] = log - (target < vocabulary ? load(x + target) : __int_as_float(0x7fc00000));
    }
}

/// to = or += scale sum_i nll_i; with accumulate dscale += dloss sum_i nll_i. grid (1), block 256.
extern "C" __global__ void __launch_bounds__(256) cross_entropy_sum(
    const float *nll, const float *scale, float *to, int rows, int accumulate
) {
    __shared__ double sums[256];
    double sum = 0.0;
    for (int i = threadIdx.x; i < rows; i += 256) sum += nll[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = 128; half > 0; half >>= 1) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) *to = (accumulate ? *to : 0.0f) + (float)(*scale * sums[0]);
}

/// dx += (softmax(x) - e_target) (scale dloss + dnll). dloss and dnll may be null. grid (rows),
/// block 256.
extern "C" __global__ void __launch_bounds__(256) cross_entropy_backward(
    const element_t *logits, const unsigned *targets, const float *scale, const float *log_sum, const float *dloss,
    const float *dnll, element_t *dx, int vocabulary
) {
    unsigned target = targets[blockIdx.x];
    if (target == IGNORE) return;
    const element_t *x = logits + (long long)blockIdx.x * vocabulary;
    dx += (long long)blockIdx.x * vocabulary;
    float weight = (dloss ? *scale * *dloss : 0.0f) + (dnll ? dnll[blockIdx.x] : 0.0f), log = log_sum[blockIdx.x];
    if (target >= vocabulary) weight = __int_as_float(0x7fc00000);
    for (int i = threadIdx.x * WIDE; i < vocabulary; i += 256 * WIDE) {
        Wide wide = load_wide(x + i, vocabulary - i);
        EACH_WIDE(j) wide.x[j] = weight * (expf(wide.x[j] - log) - (i + j == target ? 1.0f : 0.0f));
        add_wide(dx + i, wide, vocabulary - i);
    }
}
