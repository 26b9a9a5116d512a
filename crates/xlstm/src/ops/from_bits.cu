// y = the f32 numbers with these bits. A thread a number.

extern "C" __global__ void from_bits(const float *bits, element_t *y, long long n) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) store(y + i, bits[i]);
}
