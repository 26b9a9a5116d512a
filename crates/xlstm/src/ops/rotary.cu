// Rotary positions, as in rotary.rs: pairs of features i and N/2 + i, turned.

/// Cosines, then sines (tokens, 2 half), a thread a pair. The angle, which may be large, is
/// reduced in double precision.
extern "C" __global__ void rotary_angles(
    const float *position, float *angles, long long n, int half, float log_base
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    long long token = i / half;
    int pair = i % half;
    double angle = (double)position[token] * exp(-(double)log_base * pair / half);
    const double turn = 6.283185307179586;
    float rest = (float)(angle - turn * floor(angle / turn));
    angles[token * 2 * half + pair] = cosf(rest);
    angles[token * 2 * half + half + pair] = sinf(rest);
}

/// Where a pair lies, and its angle. Thread i has pair i of (tokens, D / 2).
struct Pair {
    long long low, high;
    float cosine, sine;
};
__device__ __forceinline__ Pair pair_of(const float *angles, long long i, int D, int N) {
    int half = N / 2;
    long long token = i / (D / 2);
    int place = i % (D / 2), pair = place % half;
    long long low = token * D + place / half * N + pair;
    const float *own = angles + token * N;
    return {low, low + half, own[pair], own[half + pair]};
}

extern "C" __global__ void rotary_forward(
    const element_t *x, const float *angles, element_t *y, long long n, int D, int N
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    Pair p = pair_of(angles, i, D, N);
    float low = load(x + p.low), high = load(x + p.high);
    store(y + p.low, low * p.cosine - high * p.sine);
    store(y + p.high, high * p.cosine + low * p.sine);
}

/// dx += dy turned back. Launched as forward.
extern "C" __global__ void rotary_backward(
    const element_t *dy, const float *angles, element_t *dx, long long n, int D, int N
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    Pair p = pair_of(angles, i, D, N);
    float low = load(dy + p.low), high = load(dy + p.high);
    add(dx + p.low, low * p.cosine + high * p.sine);
    add(dx + p.high, high * p.cosine - low * p.sine);
}
