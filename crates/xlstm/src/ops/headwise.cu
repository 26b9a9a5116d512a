// y_h = W_h x_h + b_h for small blocks; W (heads, outer, inner).

#define ROWS 64

/// One thread an output.
extern "C" __global__ void headwise_forward(
    const element_t *x, const float *w, const float *bias, element_t *y, long long n, int heads, int outer,
    int inner
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int column = i % (heads * outer), head = column / outer;
    const element_t *from = x + i / (heads * outer) * (heads * inner) + head * inner;
    const float *weights = w + (long long)column * inner;
    float sum = bias ? bias[column] : 0.0f;
    for (int j = 0; j < inner; j++) sum = fmaf(weights[j], load(from + j), sum);
    store(y + i, sum);
}

/// dx_h += W_h^T dy_h. One thread an input.
extern "C" __global__ void headwise_backward(
    const element_t *dy, const float *w, element_t *dx, long long n, int heads, int outer, int inner
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int column = i % (heads * inner), head = column / inner;
    const element_t *from = dy + i / (heads * inner) * (heads * outer) + head * outer;
    const float *weights = w + (long long)head * outer * inner + column % inner;
    float sum = 0.0f;
    for (int j = 0; j < outer; j++) sum = fmaf(weights[j * inner], load(from + j), sum);
    add(dx + i, sum);
}

/// parts (tiles, heads outer inner) = the sums of dy x^T over tiles of ROWS rows.
/// grid (ceil(heads outer inner / 128), tiles), block 128.
extern "C" __global__ void headwise_parts(
    const element_t *dy, const element_t *x, float *parts, int rows, int heads, int outer, int inner
) {
    int element = blockIdx.x * 128 + threadIdx.x, count = heads * outer * inner, first = blockIdx.y * ROWS;
    if (element >= count) return;
    int row_out = element / inner, column_in = row_out / outer * inner + element % inner;
    float sum = 0.0f;
    for (int row = first; row < min(rows, first + ROWS); row++)
        sum = fmaf(
            load(dy + (long long)row * heads * outer + row_out), load(x + (long long)row * heads * inner + column_in),
            sum
        );
    parts[(long long)blockIdx.y * count + element] = sum;
}
