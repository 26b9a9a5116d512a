// y = cap tanh(z / cap) or z; nll_i = ln sum_v e^(y_iv) - y_i,target; loss = scale sum_i nll_i. A block a
// row.

#define IGNORE 0xffffffffu

__device__ float block_reduce(float x, bool maximum) {
    __shared__ float parts[32];
    for (int step = 16; step > 0; step >>= 1) {
        float other = __shfl_xor_sync(0xffffffffu, x, step);
        x = maximum ? fmaxf(x, other) : x + other;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = parts[0];
    for (int i = 1; i < (int)blockDim.x / 32; i++) x = maximum ? fmaxf(x, parts[i]) : x + parts[i];
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
__device__ __forceinline__ void add_scaled_to(const T *x, float factor, T *gradient, unsigned long long n, int fresh) {
    int count;
    long long first = my_elements(n, &count);
    if (count <= 0) return;
    Wide wide = load_wide(x + first, count);
    EACH_WIDE(j) wide.x[j] *= factor;
    give_wide(gradient + first, wide, count, fresh);
}

/// gradient += dloss x, or = where it is fresh. Wide, of elements.
extern "C" __global__ void __launch_bounds__(256) add_scaled(
    const element_t *x, const float *dloss, element_t *gradient, unsigned long long n, int fresh
) {
    add_scaled_to(x, *dloss, gradient, n, fresh);
}

/// The same of f32.
extern "C" __global__ void __launch_bounds__(256) add_scaled_full(
    const float *x, const float *dloss, float *gradient, unsigned long long n, int fresh
) {
    add_scaled_to(x, *dloss, gradient, n, fresh);
}

// ---- Rows that a block keeps in shared memory, so that memory is read and written once ----

#ifdef ELEMENT_BF16
#define KEPT_THREADS 512

/// tanh to about 1e-7, by the fast exponential: 1 at infinity, NaN at NaN.
__device__ __forceinline__ float fast_tanh(float x) { return 1.0f - __fdividef(2.0f, __expf(2.0f * x) + 1.0f); }

/// Eight numbers of -1 to 1 as 16-bit integers: 1.5e-5 apart at most, finer than what they came from.
__device__ __forceinline__ uint4 pack_units(const Wide &wide) {
    unsigned pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int low = __float2int_rn(wide.x[2 * i] * 32767.0f), high = __float2int_rn(wide.x[2 * i + 1] * 32767.0f);
        pairs[i] = (low & 0xffff) | high << 16;
    }
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}
__device__ __forceinline__ Wide unpack_units(const uint4 &raw) {
    unsigned pairs[4] = {raw.x, raw.y, raw.z, raw.w};
    Wide wide;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        wide.x[2 * i] = (float)(short)(pairs[i] & 0xffff) * (1.0f / 32767.0f);
        wide.x[2 * i + 1] = (float)((int)pairs[i] >> 16) * (1.0f / 32767.0f);
    }
    return wide;
}

/// As head_loss_rows in training, for a vocabulary that is a multiple of eight. With a cap, tanh(z / cap) is
/// kept, no maximum is needed, and exponentials are taken once in each direction.
template <bool CAPPED>
__device__ __forceinline__ void keep_row(
    element_t *logits, const unsigned *targets, const float *scale, float *nll, int vocabulary, float cap
) {
    extern __shared__ uint4 kept[];
    element_t *z = logits + (long long)blockIdx.x * vocabulary;
    uint4 *raws = (uint4 *)z;
    unsigned target = targets[blockIdx.x];
    int count = vocabulary / WIDE;
    if (target == IGNORE) {
        if (threadIdx.x == 0) nll[blockIdx.x] = 0.0f;
        for (int i = threadIdx.x; i < count; i += KEPT_THREADS) raws[i] = make_uint4(0, 0, 0, 0);
        return;
    }
    float inverse = CAPPED ? 1.0f / cap : 0.0f;
    float chosen = target < vocabulary ? load(z + target) : __int_as_float(0x7fc00000);
    if (CAPPED) chosen = cap * fast_tanh(chosen * inverse);
    float mine = CAPPED ? cap : NEG_INFINITY, sum = 0.0f;
    for (int start = threadIdx.x; start < count; start += 4 * KEPT_THREADS) {
        uint4 raw[4] = {};
#pragma unroll
        for (int u = 0; u < 4; u++)
            if (start + u * KEPT_THREADS < count) raw[u] = raws[start + u * KEPT_THREADS];
#pragma unroll
        for (int u = 0; u < 4; u++) {
            int i = start + u * KEPT_THREADS;
            if (i >= count) break;
            Wide wide = unpack(raw[u]);
            if (CAPPED) {
                EACH_WIDE(j) {
                    wide.x[j] = fast_tanh(wide.x[j] * inverse);
                    sum += __expf(cap * (wide.x[j] - 1.0f));
                }
                raw[u] = pack_units(wide);
            } else {
                float before = mine, part = 0.0f;
                EACH_WIDE(j) mine = fmaxf(mine, wide.x[j]);
                float shift = mine == NEG_INFINITY ? 0.0f : mine;
                EACH_WIDE(j) part += __expf(wide.x[j] - shift);
                sum = fmaf(sum, __expf(before - shift), part);
            }
            kept[i] = raw[u];
        }
    }
    float largest = CAPPED ? cap : block_reduce(mine, true);
    if (!CAPPED && mine != NEG_INFINITY) sum *= __expf(mine - largest);
    float log_sum = largest + logf(block_reduce(sum, false));
    if (threadIdx.x == 0) nll[blockIdx.x] = log_sum - chosen;
    float weight = target < vocabulary ? *scale : __int_as_float(0x7fc00000);
    // A thread reads what it has kept itself.
    for (int i = threadIdx.x; i < count; i += KEPT_THREADS) {
        Wide wide = CAPPED ? unpack_units(kept[i]) : unpack(kept[i]);
        EACH_WIDE(j) {
            float t = wide.x[j], y = CAPPED ? cap * t : t, slope = CAPPED ? fmaf(-t, t, 1.0f) : 1.0f;
            wide.x[j] = weight * slope * (__expf(y - log_sum) - (i * WIDE + j == target ? 1.0f : 0.0f));
        }
        store_whole((element_t *)(raws + i), wide);
    }
}

/// grid (rows), block KEPT_THREADS; dynamic shared memory: 2 vocabulary bytes.
extern "C" __global__ void __launch_bounds__(KEPT_THREADS, 2) head_loss_kept(
    element_t *logits, const unsigned *targets, const float *scale, float *nll, int vocabulary, float cap
) {
    keep_row<false>(logits, targets, scale, nll, vocabulary, cap);
}
extern "C" __global__ void __launch_bounds__(KEPT_THREADS, 2) head_loss_kept_capped(
    element_t *logits, const unsigned *targets, const float *scale, float *nll, int vocabulary, float cap
) {
    keep_row<true>(logits, targets, scale, nll, vocabulary, cap);
}
#endif
