// y = a + b. One thread an element.

extern "C" __global__ void add_forward(const element_t *a, const element_t *b, element_t *y, long long n) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) store(y + i, load(a + i) + load(b + i));
}

/// dx += dy.
extern "C" __global__ void add_backward(const element_t *dy, element_t *dx, long long n) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) add(dx + i, load(dy + i));
}
