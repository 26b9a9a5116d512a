// Inverted dropout; the hash is that of dropout.rs, so that every device drops the same elements.

__device__ __forceinline__ unsigned mix(unsigned x, unsigned key) {
    x ^= x >> 17;
    x *= 0xed5ad4bbu;
    x ^= x >> 11;
    x = (x + key) * 0xac4c1b51u;
    x ^= x >> 15;
    x *= 0x31848babu;
    return x ^ x >> 14;
}

/// seed (4): low, high, step, micro-batch.
__device__ __forceinline__ unsigned absorb(unsigned key, const unsigned *seed, unsigned site) {
    for (int i = 0; i < 4; i++) key = mix(seed[i] ^ key, key);
    return mix(site ^ key, key);
}

/// y = x mask / (1 - rate), or y += with accumulate: backward is the same map. One thread an
/// element. kept: 1 / (1 - rate); threshold: rate 2^32.
extern "C" __global__ void dropout(
    const unsigned *seed, const element_t *x, element_t *y, long long n, unsigned site, unsigned threshold,
    float kept, int accumulate
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    unsigned key = absorb(0x243f6a88u, seed, site), other = absorb(0x85a308d3u, seed, site);
    float factor = mix((unsigned)i ^ key, other) < threshold ? 0.0f : kept, value = load(x + i) * factor;
    if (accumulate) add(y + i, value);
    else store(y + i, value);
}
