// The cache of the last C tokens that a next token could see, a ring, as in window.rs.
//
// x, dx (B, S, D), caches and their gradients (B, C, D): element_t; position, first (B, S): f32.

#define ALL 0xffffffffu

/// What a piece makes of one sequence's cache: see Turn of window.rs.
struct Turn {
    const float *position, *first;
    int S, C, lowest, before, after;

    __device__ __forceinline__ Turn(const float *positions, const float *firsts, int S, int C) : S(S), C(C) {
        position = positions + (long long)blockIdx.y * S;
        first = firsts + (long long)blockIdx.y * S;
        before = (int)position[0];
        lowest = -C, after = before;
        // Each warp looks for the last token, which only pads are behind.
        int lane = threadIdx.x % 32;
        for (int start = (S - 1) / 32 * 32; start >= 0; start -= 32) {
            int t = start + lane;
            unsigned reals = __ballot_sync(ALL, t < S && (int)first[min(t, S - 1)] <= t);
            if (reals) {
                int last = start + 31 - __clz(reals);
                lowest = (int)first[last], after = (int)position[last] + 1;
                break;
            }
        }
    }
    /// The row that token t goes to; -1 where it does not stay.
    __device__ __forceinline__ int row_of(int t) const {
        return t >= lowest && (int)first[t] <= t ? (int)position[t] % C : -1;
    }
    /// The newest token of the document with this row, by its number in the document; below 0 without one.
    __device__ __forceinline__ int newest(int row) const {
        int back = (after - 1 - row) % C;
        return after - 1 - (back < 0 ? back + C : back);
    }
    /// Whether a row with that newest token, of 0 or more, has it from before the piece.
    __device__ __forceinline__ bool is_old(int newest) const { return lowest < 0 && newest < before; }
    __device__ __forceinline__ bool empties() const { return lowest >= 0 && after < C; }
};

/// Loops over the columns of a row, eight at a time.
#define EACH_COLUMN(c, D) for (int c = threadIdx.x * WIDE; c < (D); c += blockDim.x * WIDE)

/// after = the cache after the piece; in place where it is the cache, of which only rows that change are
/// touched then. grid (any, B), block 64.
extern "C" __global__ void __launch_bounds__(64, 8) window_forward(
    const float *position, const float *first, const element_t *x, const element_t *cache, element_t *after,
    unsigned in_place, int S, int C, int D
) {
    wait_for_previous();
    Turn turn(position, first, S, C);
    long long b = blockIdx.y;
    for (int t = blockIdx.x; t < S; t += gridDim.x) {
        int row = turn.row_of(t);
        if (row < 0) continue;
        EACH_COLUMN(c, D) store_wide(after + (b * C + row) * D + c, load_wide(x + (b * S + t) * D + c, D - c), D - c);
    }
    if (in_place && !turn.empties()) return;
    for (int row = blockIdx.x; row < C; row += gridDim.x) {
        int newest = turn.newest(row);
        bool old = newest >= 0 && turn.is_old(newest);
        if (old ? in_place : newest >= 0) continue;
        EACH_COLUMN(c, D) {
            Wide value = {};
            if (old && cache) value = load_wide(cache + (b * C + row) * D + c, D - c);
            store_wide(after + (b * C + row) * D + c, value, D - c);
        }
    }
}

/// dx, dcache += the gradients of the rows that came from them, where they are asked for. grid (any, B),
/// block 64.
extern "C" __global__ void __launch_bounds__(64, 8) window_backward(
    const float *position, const float *first, const element_t *dafter, element_t *dx, element_t *dcache, int S,
    int C, int D
) {
    Turn turn(position, first, S, C);
    long long b = blockIdx.y;
    for (int t = blockIdx.x; dx && t < S; t += gridDim.x) {
        int row = turn.row_of(t);
        if (row < 0) continue;
        EACH_COLUMN(c, D) add_wide(dx + (b * S + t) * D + c, load_wide(dafter + (b * C + row) * D + c, D - c), D - c);
    }
    for (int row = blockIdx.x; dcache && row < C; row += gridDim.x) {
        int newest = turn.newest(row);
        if (newest < 0 || !turn.is_old(newest)) continue;
        long long at = (b * C + row) * D;
        EACH_COLUMN(c, D) add_wide(dcache + at + c, load_wide(dafter + at + c, D - c), D - c);
    }
}
