// y (batch, 1, width) = the last token of x (batch, length, width) that is not a pad, or zero. marks
// (batch, length) may be null. One thread an element of y.

/// The place of the last token of sequence b among all, or -1.
__device__ __forceinline__ long long last_place(const unsigned *marks, long long b, int length) {
    int t = length - 1;
    if (marks) {
        while (t >= 0 && marks[b * length + t] & PAD) t--;
    }
    return t < 0 ? -1 : b * length + t;
}

extern "C" __global__ void last_token_forward(
    const element_t *x, const unsigned *marks, element_t *y, long long n, int length, int width
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    long long place = last_place(marks, i / width, length);
    store(y + i, place < 0 ? 0.0f : load(x + place * width + i % width));
}

extern "C" __global__ void last_token_backward(
    const element_t *dy, const unsigned *marks, element_t *dx, long long n, int length, int width
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    long long place = last_place(marks, i / width, length);
    if (place >= 0) add(dx + place * width + i % width, load(dy + i));
}
