// Sums over rows in two stages: fixed tiles of ROWS rows, then the tiles in order.

#define ROWS 64

/// parts (tiles, width) = the sum of each tile of rows of x (rows, width).
/// grid (ceil(width / 128), tiles), block 128.
extern "C" __global__ void row_parts(const element_t *x, float *parts, int rows, int width) {
    int column = blockIdx.x * 128 + threadIdx.x, first = blockIdx.y * ROWS;
    if (column >= width) return;
    float sum = 0.0f;
    for (int row = first; row < min(rows, first + ROWS); row++) sum += load(x + (long long)row * width + column);
    parts[(long long)blockIdx.y * width + column] = sum;
}

/// sums (width) += the sum over parts (count, width). One thread a column.
extern "C" __global__ void add_parts(const float *parts, float *sums, int count, int width) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= width) return;
    float sum = 0.0f;
    for (int i = 0; i < count; i++) sum += parts[(long long)i * width + column];
    sums[column] += sum;
}

/// y (rows, width) = bias in every row. One thread an element.
extern "C" __global__ void fill_rows(const float *bias, element_t *y, long long n, int width) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) store(y + i, bias[i % width]);
}
