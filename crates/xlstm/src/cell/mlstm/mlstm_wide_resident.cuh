// A head's state in the registers of one block; mlstm_resident_backward.cu says for what.

#ifdef WARPGROUP

/// C, or its gradient, of KEYS tiles of rows by two of columns, and n. A side of the block has a tile's rows, and
/// their part of n; of a single one it has half of the columns, and the first side has n.
template <int KEYS> struct ResidentState {
    static const int COLUMNS = KEYS * L;
    StateTile<COLUMNS> tile;
    int row, column;
    bool with_n;
    __device__ __forceinline__ ResidentState(int side)
        : row(KEYS == 2 ? side * L : 0), column(KEYS == 2 ? 0 : side * L), with_n(KEYS == 2 || side == 0) {}

    /// f(number, row, column) for each.
    template <class F> __device__ __forceinline__ void each(F f) {
        tile.each([&](float &x, int r, int c) { f(x, row + r, column + c); });
    }
    /// f(sum, row) for the part of n of this side.
    template <class F> __device__ __forceinline__ void each_normal(F f) {
        if (with_n) put(tile.normal, [&](int r, float x) { f(x, row + r); });
    }
    /// From C (B, NH, dqk, dhv) and n (B, NH, dqk), null: zero.
    __device__ __forceinline__ void read(const float *C, const float *n, int bh, int dqk, int dhv) {
        each([&](float &x, int r, int c) {
            x = C && r < dqk && c < dhv ? C[((long long)bh * dqk + r) * dhv + c] : 0.0f;
        });
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int r = row + WARP * 16 + half * 8 + LANE / 4;
            tile.normal.set(half, n && r < dqk ? n[(long long)bh * dqk + r] : 0.0f);
        }
    }
    /// Into C and n; either may be null.
    __device__ __forceinline__ void write(float *C, float *n, int bh, int dqk, int dhv) {
        if (C) each([&](float &x, int r, int c) {
            if (r < dqk && c < dhv) C[((long long)bh * dqk + r) * dhv + c] = x;
        });
        if (n) each_normal([&](float x, int r) {
            if (r < dqk) n[(long long)bh * dqk + r] = x;
        });
    }
    /// f(two neighbours, where they are in tiles by columns and rows) for all.
    template <class F> __device__ __forceinline__ void each_pair(Tile (*tiles)[KEYS], F f) {
        // Hidden from the compiler, which else keeps the places for all chunks in registers.
        int r = WARP * 16 + LANE / 4, c = LANE % 4 * 2;
        asm volatile("" : "+r"(r), "+r"(c));
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                f(&tile.sum[n][half * 2], (Pair *)tiles[column / L + n / 8][row / L].at(r + half * 8, n % 8 * 8 + c));
    }
    /// Rounded into tiles, and n, by normal(row, number).
    template <class Normal> __device__ __forceinline__ void show(Tile (*tiles)[KEYS], Normal normal) {
        each_pair(tiles, [&](const float *x, Pair *to) { *to = pair_of(x[0], x[1]); });
        each_normal([&](float x, int r) { normal(r, x); });
    }
    /// n again from where show() put it, so that it takes no registers in between.
    __device__ __forceinline__ void set_normal(const float *n) {
#pragma unroll
        for (int half = 0; half < 2; half++)
            tile.normal.set(half, with_n ? n[row + WARP * 16 + half * 8 + LANE / 4] : 0.0f);
    }
    __device__ __forceinline__ void scale(float by) {
        each([&](float &x, int, int) { x *= by; });
#pragma unroll
        for (int i = 0; i < 4; i++) tile.normal.x[i] *= by;
    }
    /// C += (factor left)^T right, n += (normal_factor left)^T 1, of a chunk.
    __device__ __forceinline__ void
    add(Tile (*left)[KEYS], Tile (*right)[2], const float *factor, const float *normal_factor) {
#pragma unroll
        for (int half = 0; half < 2; half++)
            tile.add(left[half][row / L], &right[half][column / L], factor + half * L, normal_factor + half * L, with_n);
    }
};

#endif
