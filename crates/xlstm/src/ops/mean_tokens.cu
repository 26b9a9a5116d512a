// y = sum' / count' over the tokens of a sequence since its last reset, those before this batch
// included. x, y, dx, dy: element_t. sum (batch, width), count (batch) and their gradients: f32.
// marks (batch, length) may be null, and so may what is before and any gradient.

/// Where tokens begin to count; `goes_on` where no reset is among them.
__device__ __forceinline__ int start_of(const unsigned *marks, int length, bool *goes_on) {
    *goes_on = true;
    if (!marks) return 0;
    for (int t = length - 1; t >= 0; t--) {
        if (!(marks[t] & PAD) && marks[t] & RESET) {
            *goes_on = false;
            return t;
        }
    }
    return 0;
}

__device__ __forceinline__ bool counts(const unsigned *marks, int t) { return !marks || !(marks[t] & PAD); }

__device__ __forceinline__ float share_of(float count) { return count > 0.0f ? 1.0f / count : 0.0f; }

/// A thread a column: grid (ceil(width / 128), batch), block 128.
extern "C" __global__ void mean_tokens_forward(
    const element_t *x, const float *sum, const float *count, const unsigned *marks, element_t *y, float *sum_last,
    float *count_last, int length, int width
) {
    int i = blockIdx.x * 128 + threadIdx.x;
    long long b = blockIdx.y;
    if (i >= width) return;
    if (marks) marks += b * length;
    bool goes_on;
    int first = start_of(marks, length, &goes_on);
    float total = goes_on && sum ? sum[b * width + i] : 0.0f, tokens = goes_on && count ? count[b] : 0.0f;
    for (int t = first; t < length; t++) {
        if (!counts(marks, t)) continue;
        total += load(x + (b * length + t) * width + i);
        tokens += 1.0f;
    }
    store(y + b * width + i, total * share_of(tokens));
    sum_last[b * width + i] = total;
    if (i == 0) count_last[b] = tokens;
}

/// As forward; dx, dsum += dsum_last + dy / count'.
extern "C" __global__ void mean_tokens_backward(
    const element_t *dy, const float *dsum_last, const float *count_last, const unsigned *marks, element_t *dx,
    float *dsum, int length, int width
) {
    int i = blockIdx.x * 128 + threadIdx.x;
    long long b = blockIdx.y;
    if (i >= width) return;
    if (marks) marks += b * length;
    bool goes_on;
    int first = start_of(marks, length, &goes_on);
    float gradient = dsum_last ? dsum_last[b * width + i] : 0.0f;
    if (dy) gradient += load(dy + b * width + i) * share_of(count_last[b]);
    if (dx) {
        for (int t = first; t < length; t++) {
            if (counts(marks, t)) add(dx + (b * length + t) * width + i, gradient);
        }
    }
    if (dsum && goes_on) dsum[b * width + i] += gradient;
}

/// dcount += dcount_last - sum_i dy_i sum'_i / count'^2. A warp a sequence: grid (batch), block 32.
extern "C" __global__ void mean_tokens_count(
    const element_t *dy, const float *dcount_last, const float *sum_last, const float *count_last,
    const unsigned *marks, float *dcount, int length, int width
) {
    long long b = blockIdx.x;
    if (marks) marks += b * length;
    bool goes_on;
    start_of(marks, length, &goes_on);
    if (!goes_on) return;
    float product = 0.0f, share = share_of(count_last[b]);
    if (dy) {
        for (int i = threadIdx.x; i < width; i += 32) product += load(dy + b * width + i) * sum_last[b * width + i];
    }
    product = warp_sum(product);
    if (threadIdx.x == 0) dcount[b] += (dcount_last ? dcount_last[b] : 0.0f) - product * share * share;
}
