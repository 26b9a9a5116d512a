// The one form that the products of pairs and states have, by chunks of 128 tokens: a pass.
//
// Four warps have 64 rows X of a chunk. They walk over slices of 64 features for S = X Y^T and
// H = X State, weigh S and add S Z, for a slice of the result's features.
//
//   outputs   X = Q, Y = K, State = C,     Z = V     h_t  = (s e_t H + sum_j A_tj v_j) / N_t
//   values    X = K, Y = Q, State = dC,    Z = dH    dv_j = w_j H + sum_t A_tj dh_t / N_t
//   queries   X = dH, Y = V, State = C^T,  Z = K     dq_t = s e_t (H / N_t + dd_t n) + sum_j R_tj k_j
//   keys      X = V, Y = dH, State = dC^T, Z = Q     dk_j = w_j (H + dn) + sum_t R_tj q_t
//   A_tj = W_tj s q_t . k_j, R_tj = s W_tj (dh_t . v_j / N_t + dd_t)

#ifdef ELEMENT_BF16

// All stages are under way at once. Where there is no WARPGROUP, shared memory may be small, and OUT is L.
#ifdef WARPGROUP
#define PASS_STAGES(GROUPS) (GROUPS + 1)
#else
#define PASS_STAGES(GROUPS) 2
#endif

/// The matrices of a pass.
struct Sides {
    Rows rows, columns, state, second, own;
    /// Which half of the chunk this group's rows are, its first row, and that of the other, if it is seen.
    int side, row, other;
    bool both;
    /// Features that S runs over, and the first of the result's.
    int inner, out;
};

/// OUT: columns of the result. AFTER: a row sees the columns from its own on, else those up to its
/// own. TRANSPOSED: the state's rows are the result's features. OWN: with the own rows' features of the
/// result. GROUPS: of four warps, a half of the chunk each; two read together what both need.
template <int OUT, bool AFTER, bool TRANSPOSED, bool OWN, int GROUPS> struct Pass {
    static const int TILES = OUT / L, RING = PASS_STAGES(GROUPS), COLUMNS = GROUPS, STATE = GROUPS + 2;
    static const int IN_STAGE = OWN && 4 * TILES > STATE + TILES ? 4 * TILES : STATE + TILES;
    struct Shared {
        Tile stage[RING][IN_STAGE];
        float prefix[CHUNK], entry[CHUNK], inverse[CHUNK], slope[CHUNK];
        /// 2^(G_t - G_63) of the chunk's second half, 2^(G_63 - E_j) of its first.
        float high[L], low[L];
    };
    /// S with the block's own half of the chunk, then with the other; and H.
    float S[16][4], H[OUT / 8][4];

    /// Row within the half of S[][i] and H[][i], and column within eight.
    static __device__ __forceinline__ int row(int i) { return WARP * 16 + i / 2 * 8 + LANE / 4; }
    static __device__ __forceinline__ int column(int n, int i) { return n * 8 + LANE % 4 * 2 + i % 2; }
    static __device__ __forceinline__ bool sees(int n) { return AFTER ? n >= WARP : n <= WARP; }

    /// half: of a block of one group.
    static __device__ __forceinline__ Sides halves(Sides x, int half) {
        // By a shuffle the compiler knows that all of a warp agree.
        x.side = GROUPS == 2 ? __shfl_sync(ALL, SIDE, 0) : half;
        x.row = x.side * L;
        x.other = L - x.row;
        x.both = AFTER ? x.side == 0 && x.rows.rows > L : x.side == 1;
        return x;
    }
    /// Reads G, E, and in backward 1 / N and dd.
    static __device__ void weights(
        Shared &s, long long at, const float *prefix, const float *entry, const float *inverse, const float *dd
    ) {
        int tid = threadIdx.x;
        if (tid >= CHUNK) return;
        float G = prefix[at * CHUNK + tid], E = entry[at * CHUNK + tid], boundary = prefix[at * CHUNK + L - 1];
        s.prefix[tid] = G;
        s.entry[tid] = E;
        if (inverse) s.inverse[tid] = inverse[at * CHUNK + tid];
        if (dd) s.slope[tid] = dd[at * CHUNK + tid];
        if (tid < L) s.low[tid] = power(boundary - E);
        else s.high[tid - L] = power(G - boundary);
    }
    static __device__ __forceinline__ void fetch_step(Tile *tile, const Sides &x, int step, int steps) {
        int side = x.side;
        if (step < steps) {
            fetch(tile[GROUPS == 2 ? side : 0], x.rows, x.row, step * L);
            fetch(tile[COLUMNS + side], x.columns, x.row, step * L);
            if (GROUPS == 1 && x.both) fetch(tile[COLUMNS + 1 - side], x.columns, x.other, step * L);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                if (GROUPS == 2 && i != side) continue;
                if (TRANSPOSED) fetch(tile[STATE + i], x.state, x.out + i * L, step * L);
                else fetch(tile[STATE + i], x.state, step * L, x.out + i * L);
            }
        } else {
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                fetch(tile[side * TILES + i], x.second, x.row, x.out + i * L);
                if (GROUPS == 1 && x.both) fetch(tile[(1 - side) * TILES + i], x.second, x.other, x.out + i * L);
                if (OWN) fetch(tile[(2 + side) * TILES + i], x.own, x.row, x.out + i * L);
            }
        }
    }
    /// S and H. prologue() runs while the first tiles are under way, before_slice(step) before those of
    /// a slice are waited for, each_slice(step, tiles) beside its products, and where LEFT,
    /// each_left(a, feature) with each left operand. Returns the tiles of Z, then those of the own rows.
    template <bool LEFT, class Prologue, class Before, class Slice, class Left>
    __device__ __forceinline__ Tile *products(
        Shared &s, const Sides &x, Prologue prologue, Before before_slice, Slice each_slice, Left each_left
    ) {
        int steps = (x.inner + L - 1) / L;
        auto begin = [&](int step) {
            if (step <= steps) fetch_step(s.stage[step % RING], x, step, steps);
            asm volatile("cp.async.commit_group;" ::: "memory");
        };
        auto arrive = [&](int step) {
            asm volatile("cp.async.wait_group %0;" ::"n"(RING - 1) : "memory");
            publish_copies();
            __syncthreads();
            return s.stage[step % RING];
        };
        for (int step = 0; step < RING; step++) begin(step);
        prologue();
#pragma unroll
        for (int n = 0; n < 16; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) S[n][i] = 0.0f;
#pragma unroll
        for (int n = 0; n < OUT / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) H[n][i] = 0.0f;
        for (int step = 0; step < steps; step++) {
            before_slice(step);
            Tile *tile = arrive(step), &rows = tile[GROUPS == 2 ? x.side : 0];
#ifdef WARPGROUP
            unsigned long long left = tile_descriptor(rows), state = tile_descriptor(tile[STATE]);
            unsigned long long right = tile_descriptor(tile[COLUMNS + x.side]);
            unsigned long long other = tile_descriptor(tile[COLUMNS + 1 - x.side]);
            products_begin();
#pragma unroll
            for (int k = 0; k < 4; k++) {
                multiply_group<!TRANSPOSED>(H, left + k * ALONG, state + k * (TRANSPOSED ? ALONG : DOWN));
                multiply_group<0>(*(float (*)[8][4])S, left + k * ALONG, right + k * ALONG);
            }
            if (x.both) {
#pragma unroll
                for (int k = 0; k < 4; k++)
                    multiply_group<0>(*(float (*)[8][4])(S + 8), left + k * ALONG, other + k * ALONG);
            }
            products_commit();
            if (LEFT) {
#pragma unroll
                for (int k = 0; k < L; k += 16) {
                    unsigned a[4];
                    load_left<false>(a, rows, WARP * 16, k);
                    each_left(a, step * L + k);
                }
            }
            each_slice(step, tile);
            products_wait();
#else
            each_slice(step, tile);
#pragma unroll
            for (int k = 0; k < L; k += 16) {
                unsigned a[4], b[4];
                load_left<false>(a, rows, WARP * 16, k);
#pragma unroll
                for (int n = 0; n < 8; n++)
                    if (n < 4 ? sees(n) : x.both) {
                        load_right<true>(b, tile[COLUMNS + (n < 4 ? x.side : 1 - x.side)], k, n % 4 * 16);
                        multiply_add(S[2 * n], a, b[0], b[1]);
                        multiply_add(S[2 * n + 1], a, b[2], b[3]);
                    }
#pragma unroll
                for (int n = 0; n < OUT / 16; n++) {
                    load_right<TRANSPOSED>(b, tile[STATE + n / 4], k, n % 4 * 16);
                    multiply_add(H[2 * n], a, b[0], b[1]);
                    multiply_add(H[2 * n + 1], a, b[2], b[3]);
                }
                if (LEFT) each_left(a, step * L + k);
            }
#endif
            __syncthreads();
            begin(step + RING);
        }
        return arrive(steps);
    }
    /// S = f(S, row, column) W_tj, with the tokens' numbers in the chunk.
    template <class F> __device__ __forceinline__ void weigh(Shared &s, const Sides &x, F f) {
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int r = row(i), c = column(n, i), t = AFTER ? c : r, j = AFTER ? r : c;
                float weight = t >= j ? power(s.prefix[x.row + t] - s.entry[x.row + j]) : 0.0f;
                S[n][i] = f(S[n][i], x.row + r, x.row + c) * weight;
            }
        if (x.both) {
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int r = row(i), c = column(n, i), t = AFTER ? c : r, j = AFTER ? r : c;
                    S[8 + n][i] = f(S[8 + n][i], x.row + r, x.other + c) * (s.high[t] * s.low[j]);
                }
        }
    }
    /// H += S Z.
    __device__ __forceinline__ void attend(Tile *tile, const Sides &x) {
        // Rounded before the first product: products under way own H.
        unsigned a[8][4];
#pragma unroll
        for (int k = 0; k < 8; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[k][i] = pair_of(S[2 * k + i / 2][i % 2 * 2], S[2 * k + i / 2][i % 2 * 2 + 1]);
#ifdef WARPGROUP
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; k++) multiply_group<1>(H, a[k], tile_descriptor(tile[x.side * TILES]) + k * DOWN);
        if (x.both) {
#pragma unroll
            for (int k = 0; k < 4; k++) multiply_group<1>(H, a[4 + k], tile_descriptor(tile[(1 - x.side) * TILES]) + k * DOWN);
        }
        products_commit();
        products_wait();
#else
#pragma unroll
        for (int k = 0; k < 8; k++) {
            if (!(k < 4 ? sees(k) : x.both)) continue;
#pragma unroll
            for (int n = 0; n < OUT / 16; n++) {
                unsigned b[4];
                load_right<false>(b, tile[(k < 4 ? x.side : 1 - x.side) * TILES + n / 4], k % 4 * 16, n % 4 * 16);
                multiply_add(H[2 * n], a[k], b[0], b[1]);
                multiply_add(H[2 * n + 1], a[k], b[2], b[3]);
            }
        }
#endif
    }
    /// f(row, x . H) of the own rows.
    template <class F> __device__ __forceinline__ void dot_rows(Tile *tile, const Sides &x, F f) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < OUT / 8; n++) {
                Pair pair = *(const Pair *)tile[(2 + x.side) * TILES + n / 8].at(row(half * 2), n % 8 * 8 + LANE % 4 * 2);
                sum = fmaf(first(pair), H[n][half * 2], fmaf(second(pair), H[n][half * 2 + 1], sum));
            }
            sum += __shfl_xor_sync(ALL, sum, 1);
            sum += __shfl_xor_sync(ALL, sum, 2);
            if (LANE % 4 == 0) f(row(half * 2), sum);
        }
    }
};

#endif
