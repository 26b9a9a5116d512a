// The last C tokens that a next token could see, as in window.rs.

/// No row: zeros.
#define NONE 0x7fffffff

/// Tokens, by the warp's 32, whose firsts are under way at once.
#define TOGETHER 8

/// rows (B, C): where each row of the new cache comes from: a token, a row of the old cache
/// numbered -C..0, or NONE. A warp a sequence; tokens are walked over backwards, 32 at a time.
/// grid B, block 32.
extern "C" __global__ void window_sources(const float *position, const float *first, int *rows, int S, int C) {
    int b = blockIdx.x, lane = threadIdx.x;
    position += (long long)b * S;
    first += (long long)b * S;
    rows += (long long)b * C;
    int row = C, lowest = 0;
    bool found = false, done = false;
    for (int last = (S - 1) / 32 * 32; last >= 0 && row > 0 && !done; last -= 32 * TOGETHER) {
        int firsts[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            int t = last - 32 * i + lane;
            firsts[i] = t >= 0 && t < S ? (int)first[t] : t + 1;
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            int start = last - 32 * i, t = start + lane, seen = firsts[i];
            if (start < 0 || row == 0 || done) continue;
            unsigned reals = __ballot_sync(0xffffffffu, seen <= t);
            if (!found && reals) {
                lowest = __shfl_sync(0xffffffffu, seen, 31 - __clz(reals));
                found = true;
            }
            bool kept = seen <= t && t >= lowest;
            unsigned keeps = __ballot_sync(0xffffffffu, kept);
            // The newest has the highest row.
            int own = row - 1 - __popc(keeps >> lane >> 1);
            if (kept && own >= 0) rows[own] = t;
            row = max(0, row - __popc(keeps));
            done = found && start <= lowest;
        }
    }
    int held = !found || lowest < 0 ? min((int)position[0], C) : 0;
    // Rows below `row` take the newest rows of the old cache.
    for (int i = lane; i < row; i += 32) {
        int source = i - row;
        rows[i] = -source <= held ? source : NONE;
    }
}

/// A thread has eight columns of ROWS rows of the new cache, n in all. grid (ceil(n / ROWS), ceil(D / 8 / block)).
#define ROWS 4

extern "C" __global__ void __launch_bounds__(256) window_forward(
    const int *rows, const element_t *x, const float *cache, float *after, int n, int S, int C, int D
) {
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * WIDE, count = D - column;
    if (count <= 0) return;
    int row = blockIdx.x * ROWS, end = min(n, row + ROWS);
#pragma unroll
    for (int i = 0; i < ROWS; i++, row++) {
        if (row >= end) break;
        long long b = row / C;
        int source = rows[row];
        Wide value = {};
        if (source != NONE) {
            if (source >= 0) value = load_wide(x + (b * S + source) * D + column, count);
            else if (cache) value = load_wide(cache + (b * C + C + source) * D + column, count);
        }
        store_wide(after + (long long)row * D + column, value, count);
    }
}

/// dx, dcache += the gradients of the rows that came from them. A thread an element of the new cache.
extern "C" __global__ void window_backward(
    const int *rows, const float *dafter, element_t *dx, float *dcache, long long n, int S, int C, int D
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    long long row = i / D, b = row / C;
    int d = i % D, source = rows[row];
    if (source == NONE) return;
    if (source >= 0) {
        if (dx) add(dx + (b * S + source) * D + d, dafter[i]);
    } else if (dcache) {
        dcache[(b * C + C + source) * D + d] += dafter[i];
    }
}
