// The last C tokens that a next token could see, as in window.rs.

/// No row: zeros.
#define NONE 0x7fffffff

/// rows (B, C): where each row of the new cache comes from: a token, a row of the old cache
/// numbered -C..0, or NONE. A warp a sequence; tokens are walked over backwards, 32 at a time.
/// grid B, block 32.
extern "C" __global__ void window_sources(const float *position, const float *first, int *rows, int S, int C) {
    int b = blockIdx.x, lane = threadIdx.x;
    position += (long long)b * S;
    first += (long long)b * S;
    rows += (long long)b * C;
    int row = C, lowest = 0;
    bool found = false;
    for (int start = (S - 1) / 32 * 32; start >= 0 && row > 0; start -= 32) {
        int t = start + lane;
        int seen = t < S ? (int)first[t] : t + 1;
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
        if (found && start <= lowest) break;
    }
    int held = !found || lowest < 0 ? min((int)position[0], C) : 0;
    // Rows below `row` take the newest rows of the old cache.
    for (int i = lane; i < row; i += 32) {
        int source = i - row;
        rows[i] = -source <= held ? source : NONE;
    }
}

/// A thread an element of the new cache.
extern "C" __global__ void window_forward(
    const int *rows, const element_t *x, const float *cache, float *after, long long n, int S, int C, int D
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    long long row = i / D, b = row / C;
    int d = i % D, source = rows[row];
    float value = 0.0f;
    if (source != NONE) {
        if (source >= 0) value = load(x + (b * S + source) * D + d);
        else if (cache) value = cache[(b * C + C + source) * D + d];
    }
    after[i] = value;
}

/// dx, dcache += the gradients of the rows that came from them. Launched as forward.
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
