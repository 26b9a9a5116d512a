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

/// y = x mask / (1 - rate), or y += with accumulate: backward is the same map. kept: 1 / (1 - rate);
/// threshold: rate 2^32.
extern "C" __global__ void dropout(
    const unsigned *seed, const element_t *x, element_t *y, long long n, unsigned site, unsigned threshold,
    float kept, int accumulate
) {
    int count;
    long long i = my_elements(n, &count);
    if (count <= 0) return;
    unsigned key = absorb(0x243f6a88u, seed, site), other = absorb(0x85a308d3u, seed, site);
    Wide values = load_wide(x + i, count);
    EACH_WIDE(j) values.x[j] *= mix((unsigned)(i + j) ^ key, other) < threshold ? 0.0f : kept;
    if (accumulate) add_wide(y + i, values, count);
    else store_wide(y + i, values, count);
}
