// y (batch, 1, width) = the last token of x (batch, length, width). One thread an element of y.

extern "C" __global__ void last_token_forward(
    const element_t *x, element_t *y, long long n, int length, int width
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[(i / width * length + length - 1) * width + i % width];
}

extern "C" __global__ void last_token_backward(
    const element_t *dy, element_t *dx, long long n, int length, int width
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) add(dx + (i / width * length + length - 1) * width + i % width, load(dy + i));
}
