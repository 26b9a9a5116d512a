// Notes on numbers that are not finite, for a step that the host does not watch.

/// note = 1 where some x is not finite. Threads that write all write the same.
/// grid (up to 256), block 256.
extern "C" __global__ void note_non_finite(const element_t *x, long long n, unsigned *note) {
    bool found = false;
    for (long long i = (long long)blockIdx.x * 256 + threadIdx.x; i < n; i += (long long)gridDim.x * 256)
        found |= !isfinite(load(x + i));
    if (found) *note = 1;
}
