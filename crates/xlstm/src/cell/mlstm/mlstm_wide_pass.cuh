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

/// What the tokens of a chunk weigh.
struct TokenWeights {
    float prefix[CHUNK], entry[CHUNK];
    /// 2^(G_t - G_63) of the chunk's second half, 2^(G_63 - E_j) of its first.
    float high[L], low[L];
};
/// And in backward, s / N and s dd.
struct TokenSlopes : TokenWeights {
    float inverse[CHUNK], slope[CHUNK];
};
/// Reads G and E of a chunk.
__device__ __forceinline__ void read_weights(TokenWeights &s, long long at, const float *prefix, const float *entry) {
    int tid = threadIdx.x;
    if (tid >= CHUNK) return;
    float G = prefix[at * CHUNK + tid], E = entry[at * CHUNK + tid], boundary = prefix[at * CHUNK + L - 1];
    s.prefix[tid] = G;
    s.entry[tid] = E;
    if (tid < L) s.low[tid] = power(boundary - E);
    else s.high[tid - L] = power(G - boundary);
}
/// And s / N and, where it is given, s dd.
__device__ __forceinline__ void read_weights(
    TokenSlopes &s, long long at, const float *prefix, const float *entry, const float *inverse, const float *dd,
    float scale
) {
    read_weights(s, at, prefix, entry);
    int tid = threadIdx.x;
    if (tid >= CHUNK) return;
    s.inverse[tid] = scale * inverse[at * CHUNK + tid];
    if (dd) s.slope[tid] = scale * dd[at * CHUNK + tid];
}

/// OUT: columns of the result. AFTER: a row sees the columns from its own on, else those up to its
/// own. TRANSPOSED: the state's rows are the result's features. OWN: with the own rows' features of the
/// result. GROUPS: of four warps, a half of the chunk each; two read together what both need.
template <int OUT, bool AFTER, bool TRANSPOSED, bool OWN, int GROUPS> struct Pass {
    static const int TILES = OUT / L, RING = PASS_STAGES(GROUPS), COLUMNS = GROUPS, STATE = GROUPS + 2;
    static const int IN_STAGE = OWN && 4 * TILES > STATE + TILES ? 4 * TILES : STATE + TILES;
    struct Shared {
        Tile stage[RING][IN_STAGE];
        TokenSlopes weights;
    };
    /// S with the block's own half of the chunk, then with the other; and H.
    float S[16][4], H[OUT / 8][4];
    /// S, weighed, as a left side: there before the first product of attend(), as products under way own H.
    unsigned left[8][4];

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
#ifdef WARPGROUP
    // Of tiles that are all there: rows and columns of each half of the chunk, of INNER slices; state by slices and,
    // TRANSPOSED, tiles of the result; else the other way round.

    /// S, beside() beside. Its own half is there; FAR: the other is under way.
    template <int INNER, bool FAR, class Beside>
    __device__ __forceinline__ void scores_of(Tile *rows, Tile *columns, const Sides &x, Beside beside) {
#pragma unroll
        for (int n = 0; n < 16; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) S[n][i] = 0.0f;
        const int SLICE = sizeof(Tile) >> 4;
        unsigned long long left = tile_descriptor(rows[x.side * INNER]);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int side = half ? 1 - x.side : x.side;
            unsigned long long right = tile_descriptor(columns[side * INNER]);
            products_begin();
#pragma unroll
            for (int k = 0; k < 4 * INNER; k++) {
                int at = k / 4 * SLICE + k % 4 * ALONG;
                multiply_group<0>(*(float (*)[8][4])(S + 8 * half), left + at, right + at);
            }
            products_commit();
        }
        beside();
        products_wait<FAR>();
    }
    /// H is under way, and nothing else.
    template <int INNER> __device__ __forceinline__ void states_of(Tile *rows, Tile *state, const Sides &x) {
#pragma unroll
        for (int n = 0; n < OUT / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) H[n][i] = 0.0f;
        const int SLICE = sizeof(Tile) >> 4, STATE_SLICE = TRANSPOSED ? TILES * SLICE : SLICE;
        unsigned long long left = tile_descriptor(rows[x.side * INNER]);
        unsigned long long right = tile_descriptor(state[0], TRANSPOSED ? 1 : INNER);
        products_begin();
#pragma unroll
        for (int k = 0; k < 4 * INNER; k++)
            multiply_group<!TRANSPOSED>(
                H, left + k / 4 * SLICE + k % 4 * ALONG, right + k / 4 * STATE_SLICE + k % 4 * (TRANSPOSED ? ALONG : DOWN)
            );
        products_commit();
        products_wait<1>();
    }
#endif
    /// left = W_tj (S times + plus) of the own half, of token t: times `scale` where TERMS is 0, else times s / N, and,
    /// where it is 2, plus s dd. sums: added to, of the thread's two rows.
    template <int TERMS>
    __device__ __forceinline__ void weigh_near(const TokenWeights &s, const Sides &x, float scale, float (&sums)[2]) {
        float of_row[2];
#pragma unroll
        for (int half = 0; half < 2; half++) of_row[half] = (AFTER ? s.entry : s.prefix)[x.row + row(half * 2)];
        // Hidden from the compiler, which else keeps what it compares from one pass to the next, bit by bit.
        int ahead = column(0, 0) - row(0);
        asm volatile("" : "+r"(ahead));
        weigh<TERMS>(s, x.row, x, scale, 0, sums, [&](float (&S)[4], int n) {
            float2 of = *(const float2 *)((AFTER ? s.prefix : s.entry) + x.row + column(n, 0));
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float other = i % 2 ? of.y : of.x, mine = of_row[i / 2];
                float weighed = S[i] * power(AFTER ? other - mine : mine - other);
                // Column less row.
                int distance = ahead + n * 8 + i % 2 - i / 2 * 8;
                S[i] = (AFTER ? distance >= 0 : distance <= 0) ? weighed : 0.0f;
            }
        });
    }
    /// The same of the other half, if it is seen.
    template <int TERMS>
    __device__ __forceinline__ void weigh_far(const TokenWeights &s, const Sides &x, float scale, float (&sums)[2]) {
        if (!x.both) return;
        float of_row[2];
#pragma unroll
        for (int half = 0; half < 2; half++) of_row[half] = (AFTER ? s.low : s.high)[row(half * 2)];
        weigh<TERMS>(s, x.other, x, scale, 8, sums, [&](float (&S)[4], int n) {
            float2 of = *(const float2 *)((AFTER ? s.high : s.low) + column(n, 0));
#pragma unroll
            for (int i = 0; i < 4; i++) S[i] *= (i % 2 ? of.y : of.x) * of_row[i / 2];
        });
    }
    /// Of S from `half` on, of columns from token `first` on: each(four numbers, n) weighs them.
    template <int TERMS, class Each>
    __device__ __forceinline__ void
    weigh(const TokenWeights &s, int first, const Sides &x, float scale, int half, float (&sums)[2], Each each) {
        auto &slopes = (const TokenSlopes &)s;
        // A thread has two rows, and two neighbouring columns of each n.
        float row_times[2], row_plus[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            row_times[i] = TERMS > 0 && !AFTER ? slopes.inverse[x.row + row(i * 2)] : scale;
            row_plus[i] = TERMS > 1 && !AFTER ? slopes.slope[x.row + row(i * 2)] : 0.0f;
        }
#pragma unroll
        for (int n = 0; n < 8; n++) {
            float(&to)[4] = S[half + n];
            int at = first + column(n, 0);
            float2 times = TERMS > 0 && AFTER ? *(const float2 *)(slopes.inverse + at) : float2{};
            float2 plus = TERMS > 1 && AFTER ? *(const float2 *)(slopes.slope + at) : float2{};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float by = TERMS > 0 && AFTER ? (i % 2 ? times.y : times.x) : row_times[i / 2];
                float add = TERMS > 1 && AFTER ? (i % 2 ? plus.y : plus.x) : row_plus[i / 2];
                to[i] = TERMS > 1 ? fmaf(to[i], by, add) : to[i] * by;
            }
            each(to, n);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                sums[i] += to[i * 2] + to[i * 2 + 1];
                left[(half + n) / 2][n % 2 * 2 + i] = pair_of(to[i * 2], to[i * 2 + 1]);
            }
        }
    }
    /// H += S Z.
    __device__ __forceinline__ void attend(Tile *tile, const Sides &x) {
#ifdef WARPGROUP
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; k++) multiply_group<1>(H, left[k], tile_descriptor(tile[x.side * TILES]) + k * DOWN);
        if (x.both) {
#pragma unroll
            for (int k = 0; k < 4; k++) multiply_group<1>(H, left[4 + k], tile_descriptor(tile[(1 - x.side) * TILES]) + k * DOWN);
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
                multiply_add(H[2 * n], left[k], b[0], b[1]);
                multiply_add(H[2 * n + 1], left[k], b[2], b[3]);
            }
        }
#endif
    }
    /// f(row, x . H) of the own rows' tiles.
    template <class F> __device__ __forceinline__ void dot_rows(Tile *own, const Sides &x, F f) {
        // Hidden from the compiler, which else keeps the places in registers from one use to the next.
        int first_row = row(0), c = LANE % 4 * 2;
        asm volatile("" : "+r"(first_row), "+r"(c));
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < OUT / 8; n++) {
                Pair pair = *(const Pair *)own[x.side * TILES + n / 8].at(first_row + half * 8, n % 8 * 8 + c);
                sum = fmaf(first(pair), H[n][half * 2], fmaf(second(pair), H[n][half * 2 + 1], sum));
            }
            sum += __shfl_xor_sync(ALL, sum, 1);
            sum += __shfl_xor_sync(ALL, sum, 2);
            if (LANE % 4 == 0) f(row(half * 2), sum);
        }
    }
};

#endif
