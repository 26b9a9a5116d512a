// y = cap tanh(z / cap) or z; nll_i = ln sum_v e^(y_iv) - y_i,target; loss = scale sum_i nll_i. A block a
// row.

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

/// z -> nll of its target; z becomes its gradient where there is training. cap 0 is none.
/// grid (rows), block 256.
extern "C" __global__ void __launch_bounds__(256) head_loss_rows(
    element_t *logits, const unsigned *targets, const float *scale, float *nll, int vocabulary, float cap, int train
) {
    element_t *z = logits + (long long)blockIdx.x * vocabulary;
    unsigned target = targets[blockIdx.x];
    if (target == IGNORE) {
        if (threadIdx.x == 0) nll[blockIdx.x] = 0.0f;
        Wide zero = {};
        if (train) for (int i = threadIdx.x * WIDE; i < vocabulary; i += 256 * WIDE) store_wide(z + i, zero, vocabulary - i);
        return;
    }
    float inverse = cap > 0.0f ? 1.0f / cap : 0.0f;
    float chosen = target < vocabulary ? load(z + target) : __int_as_float(0x7fc00000);
    if (cap > 0.0f) chosen = cap * tanhf(chosen * inverse);
    // In one pass: a sum of exponentials follows the largest number seen so far. A NaN passes the
    // maximum and shows in the sum.
    float mine = NEG_INFINITY, sum = 0.0f;
    for (int i = threadIdx.x * WIDE; i < vocabulary; i += 256 * WIDE) {
        Wide wide = load_wide(z + i, vocabulary - i);
        if (cap > 0.0f) EACH_WIDE(j) wide.x[j] = cap * tanhf(wide.x[j] * inverse);
        float before = mine, part = 0.0f;
        EACH_WIDE(j) if (i + j < vocabulary) mine = fmaxf(mine, wide.x[j]);
        // No number yet but minus infinity: any shift will do.
        float shift = mine == NEG_INFINITY ? 0.0f : mine;
        EACH_WIDE(j) if (i + j < vocabulary) part += expf(wide.x[j] - shift);
        sum = fmaf(sum, expf(before - shift), part);
    }
    float largest = block_reduce(mine, true);
    sum = block_reduce(mine == NEG_INFINITY ? sum : sum * expf(mine - largest), false);
    float log_sum = largest + logf(sum);
    if (threadIdx.x == 0) nll[blockIdx.x] = log_sum - chosen;
    if (!train) return;
    float weight = target < vocabulary ? *scale : __int_as_float(0x7fc00000);
    for (int i = threadIdx.x * WIDE; i < vocabulary; i += 256 * WIDE) {
        Wide wide = load_wide(z + i, vocabulary - i);
        EACH_WIDE(j) {
            float y = cap > 0.0f ? cap * tanhf(wide.x[j] * inverse) : wide.x[j];
            float slope = fmaf(y * inverse, -(y * inverse), 1.0f);
            wide.x[j] = weight * slope * (expf(y - log_sum) - (i + j == target ? 1.0f : 0.0f));
        }
        store_wide(z + i, wide, vocabulary - i);
    }
}

/// to = or += scale sum_i nll_i; with accumulate dscale += dloss sum_i nll_i. grid (1), block 256.
extern "C" __global__ void __launch_bounds__(256) head_loss_sum(
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

template <class T>
__device__ __forceinline__ void add_scaled_to(const T *x, float factor, T *gradient, unsigned long long n) {
    int count;
    long long first = my_elements(n, &count);
    if (count <= 0) return;
    Wide wide = load_wide(x + first, count);
    EACH_WIDE(j) wide.x[j] *= factor;
    add_wide(gradient + first, wide, count);
}

/// gradient += dloss x. Wide, of elements.
extern "C" __global__ void __launch_bounds__(256) add_scaled(
    const element_t *x, const float *dloss, element_t *gradient, unsigned long long n
) {
    add_scaled_to(x, *dloss, gradient, n);
}

/// The same of f32.
extern "C" __global__ void __launch_bounds__(256) add_scaled_full(
    const float *x, const float *dloss, float *gradient, unsigned long long n
) {
    add_scaled_to(x, *dloss, gradient, n);
}
