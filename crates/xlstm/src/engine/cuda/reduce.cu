// Sums over rows in two stages: fixed tiles of rows, then the tiles in order; and rows that
// start as a bias.

/// parts (tiles, width) = the sum of each tile of rows of x (rows, width).
/// grid (ceil(width / 128), tiles), block 128.
extern "C" __global__ void row_parts(const element_t *x, float *parts, int rows, int width) {
    sum_tile(parts, rows, width, [=](int, int, long long i) { return load(x + i); });
}
extern "C" __global__ void row_parts_full(const float *x, float *parts, int rows, int width) {
    sum_tile(parts, rows, width, [=](int, int, long long i) { return load(x + i); });
}

/// sums (width) += the sum over parts (count, width), or = where they are fresh: 32 threads a column take every 32nd part,
/// and their sums are added in order. grid (ceil(width / 32)), block (32, 32).
extern "C" __global__ void __launch_bounds__(1024) add_parts(
    const float *parts, float *sums, int count, int width, int fresh
) {
    __shared__ float partial[32][33];
    int column = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    if (column < width)
        for (int i = threadIdx.y; i < count; i += 32) sum += parts[(long long)i * width + column];
    partial[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || column >= width) return;
    sum = 0.0f;
    for (int i = 0; i < 32; i++) sum += partial[i][threadIdx.x];
    sums[column] = fresh ? sum : sums[column] + sum;
}

/// y (rows, width) = bias in every row. One thread an element.
extern "C" __global__ void fill_rows(const float *bias, element_t *y, long long n, int width) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) store(y + i, bias[i % width]);
}
extern "C" __global__ void fill_rows_full(const float *bias, float *y, long long n, int width) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = bias[i % width];
}

/// y = x, rounded.
extern "C" __global__ void to_elements(const float *x, element_t *y, long long n) {
    int count;
    long long i = my_elements(n, &count);
    if (count > 0) store_wide(y + i, load_wide(x + i, count), count);
}
