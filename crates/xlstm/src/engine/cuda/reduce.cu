// Sums over rows in two stages: fixed tiles of rows, then the tiles in order; and rows that
// start as a bias.

/// Eight columns of a tile of rows, the loads of eight rows under way at once.
template <class T> __device__ __forceinline__ void sum_rows(const T *x, float *parts, int rows, int width) {
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * WIDE, count = width - column;
    if (count <= 0) return;
    int row = blockIdx.x * TILE_ROWS, end = min(rows, row + TILE_ROWS);
    Wide sum = {};
    if (width % WIDE == 0)
        for (; row + 8 <= end; row += 8) {
            decltype(load_raw(x)) raw[8];
#pragma unroll
            for (int r = 0; r < 8; r++) raw[r] = load_raw(x + (long long)(row + r) * width + column);
#pragma unroll
            for (int r = 0; r < 8; r++) {
                Wide other = unpack(raw[r]);
                EACH_WIDE(j) sum.x[j] += other.x[j];
            }
        }
    for (; row < end; row++) {
        Wide other = load_wide(x + (long long)row * width + column, count);
        EACH_WIDE(j) sum.x[j] += other.x[j];
    }
    store_wide(parts + (long long)blockIdx.x * width + column, sum, count);
}

/// parts (tiles, width) = the sum of each tile of rows of x (rows, width).
/// grid (tiles, ceil(width / 8 / block)).
extern "C" __global__ void __launch_bounds__(256) row_parts(const element_t *x, float *parts, int rows, int width) {
    sum_rows(x, parts, rows, width);
}
extern "C" __global__ void __launch_bounds__(256) row_parts_full(const float *x, float *parts, int rows, int width) {
    sum_rows(x, parts, rows, width);
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

/// Rows that a thread fills.
#define FILLED 16

template <class T> __device__ __forceinline__ void fill(const float *bias, T *y, int rows, int width) {
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * WIDE, count = width - column;
    if (count <= 0) return;
    int row = blockIdx.x * FILLED, end = min(rows, row + FILLED);
    Wide wide = load_wide(bias + column, count);
    for (; row < end; row++) store_wide(y + (long long)row * width + column, wide, count);
}

/// y (rows, width) = bias in every row, eight columns a thread. grid (ceil(rows / FILLED), ceil(width / 8 / block)).
extern "C" __global__ void __launch_bounds__(256) fill_rows(const float *bias, element_t *y, int rows, int width) {
    fill(bias, y, rows, width);
}
extern "C" __global__ void __launch_bounds__(256) fill_rows_full(const float *bias, float *y, int rows, int width) {
    fill(bias, y, rows, width);
}

/// y = x, rounded.
extern "C" __global__ void to_elements(const float *x, element_t *y, long long n) {
    int count;
    long long i = my_elements(n, &count);
    if (count > 0) store_wide(y + i, load_wide(x + i, count), count);
}
