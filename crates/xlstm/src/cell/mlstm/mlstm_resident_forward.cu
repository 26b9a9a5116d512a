// The mLSTM cell forward with C on the chip, on Hopper. A block has a slice of a head's values and walks along the
// sequence by half chunks of 64 tokens; C and n are in its registers, in f32, so that no state goes to memory. After
// mlstm_gates and mlstm_wide_exponents, instead of states and outputs.
//
// A side of the block has C^T of 64 values and all keys, or, where that is too much, all of the block's 64 values
// and half of the keys: then both have a part of every result. As a left side C^T comes from where its sums are, so
// that results are transposed, too: H^T = C^T Q^T, and H^T += V^T A^T, A being the one thing that sides exchange.

#ifdef WARPGROUP

/// KEYS: tiles of features of dqk.
template <int KEYS> struct ResidentForward {
    static const bool SPLIT = KEYS > 4;
    /// Tiles of keys of a side's part of C, and of values of the block.
    static const int OWN = SPLIT ? KEYS / 2 : KEYS, VALUES = SPLIT ? 1 : 2;
    static const int RING = KEYS > 2 ? 2 : 3;
    /// Keys whose n a side has, if it has any: a warp those of NORMALS times 16.
    static const int NORMALS = KEYS > 1 ? KEYS / 2 : 1, FEATURES = NORMALS * L;
    struct {
        Tile q[KEYS], k[KEYS], v[VALUES];
    } stage[RING];
    /// A, then h by side; of SPLIT that is in the place of queries that are used no more.
    Tile own[SPLIT ? 1 : 3];
    /// G and E of the half chunk, and in the last of four G of the token before it.
    float prefix[RING][L], entry[RING][L], before[RING][4];
    float e[L], w[L], d[2][L], factor[2][L];
    /// n and w in three parts each.
    element_t n[3][KEYS * L + 8], w_parts[3][L + 8];
};

/// Until the threads of a side are here.
__device__ __forceinline__ void join_side(int side) {
    asm volatile("bar.sync %0, 128;" ::"r"(side + 1) : "memory");
}

/// 64 tokens of a head, whose first is at `row`, from token and column on, go to tiles, by a side; asynchronous.
template <int TILES>
__device__ __forceinline__ void
bring(Tile *to, const element_t *x, int row, int column, int token, int S, int NH, int width) {
    int member = MEMBER;
    asm volatile("" : "+r"(member));
    int r = member / 8, c = member % 8 * 8, stride = NH * width;
    const element_t *from = x + (long long)(row + (token + r) * NH) * width + column + c;
    unsigned to_first = shared_address(to->at(r, c));
#pragma unroll
    for (int i = 0; i < L; i += 16) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            bool inside = token + r + i < S && column + tile * L + c < width;
            unsigned at = to_first + (unsigned)sizeof(Tile) * tile + i * Tile::PITCH * (int)sizeof(element_t);
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from + tile * L),
                         "r"(inside ? 16 : 0)
                         : "memory");
        }
        from += 16 * stride;
    }
}

/// C^T of 64 values and TILES tiles of keys: row of values, column of keys.
template <int TILES> struct TransposedState {
    float x[TILES * 8][4];
    /// f(number, where it is in C (B, NH, dqk, dhv), whether it is) for each, of values and keys from some on.
    template <class F> __device__ __forceinline__ void each(int bh, int key, int value, int dqk, int dhv, F f) {
#pragma unroll
        for (int n = 0; n < TILES * 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int r = key + n * 8 + LANE % 4 * 2 + i % 2, c = value + WARP * 16 + i / 2 * 8 + LANE / 4;
                f(x[n][i], ((long long)bh * dqk + r) * dhv + c, r < dqk && c < dhv);
            }
    }
};

/// f(key, n) for the 16 keys of each of a warp's sums, from `first` on.
template <int NORMALS, class F>
__device__ __forceinline__ void each_normal(ColumnSum (&normal)[NORMALS], int first, F f) {
#pragma unroll
    for (int m = 0; m < NORMALS; m++)
        put(normal[m], [&](int row, float x) { f(first + m * 16 + row - WARP * 16, x); });
}

/// h, d of every token and the last C and n.
/// grid (slices of dhv, B NH), block 256. C0, n0 null: zero; C_last, n_last may be null.
template <int KEYS>
__device__ __forceinline__ void resident_outputs(
    const element_t *q, const element_t *k, const element_t *v, const unsigned *marks, const float *stabilizers,
    const float *prefix, const float *entry, const float *C0, const float *n0, element_t *h, float *denominators,
    float *C_last, float *n_last, int S, int NH, int dqk, int dhv, int flags, float eps
) {
    typedef ResidentForward<KEYS> Shared;
    const bool SPLIT = Shared::SPLIT;
    const int OWN = Shared::OWN, NORMALS = Shared::NORMALS, SLICE = sizeof(Tile) >> 4;
    extern __shared__ __align__(1024) char wide_shared[];
    Shared &s = *(Shared *)wide_shared;
    int bh = blockIdx.y, tid = threadIdx.x, side = __shfl_sync(ALL, SIDE, 0), steps = (S + L - 1) / L;
    int value = (blockIdx.x * Shared::VALUES + (SPLIT ? 0 : side)) * L, key_tile = SPLIT ? side * OWN : 0;
    // Where the head's first token is, in (B, S, NH).
    int first_row = bh / NH * S * NH + bh % NH;
    bool with_n = KEYS > 1 || side == 0;
    int side_feature = KEYS > 1 ? side * Shared::FEATURES : 0, feature = side_feature + WARP * NORMALS * 16;
    long long first_token = (long long)bh * ((S + CHUNK - 1) / CHUNK) * CHUNK;
    // s is in the exponents.
    float scale = -0.5f * log2f((float)dqk);
    // The rows of h of a step, from where they were put.
    const int H_ROWS = SPLIT ? L / 2 : L;
    auto put_step = [&](int step) {
        Tile &out = SPLIT ? s.stage[step % Shared::RING].q[2] : s.own[1 + side];
        int member = MEMBER;
        asm volatile("" : "+r"(member));
        int r = (SPLIT ? side * H_ROWS : 0) + member / 8, c = member % 8 * 8;
        element_t *to = h + (long long)(first_row + (step * L + r) * NH) * dhv + value + c;
#pragma unroll
        for (int i = 0; i < H_ROWS; i += 16) {
            Vector x = read((const Vector *)out.at(r + i, c));
            // By name: the compiler else makes four stores of some.
            if (step * L + r + i < S && value + c < dhv)
                asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.pair[0]), "r"(x.pair[1]),
                             "r"(x.pair[2]), "r"(x.pair[3])
                             : "memory");
            to += 16 * NH * dhv;
        }
    };
    auto pipeline = start<Shared::RING>(steps, [&](int step, int stage) {
        auto &to = s.stage[stage];
        bring<KEYS>(side ? to.k : to.q, side ? k : q, first_row, 0, step * L, S, NH, dqk);
        if (!SPLIT || side == 0) bring<1>(to.v + (SPLIT ? 0 : side), v, first_row, value, step * L, S, NH, dhv);
        long long at = first_token + step * L;
        if (tid < 16) fetch_piece(&s.prefix[stage][tid * 4], prefix + at + tid * 4);
        else if (tid < 32) fetch_piece(&s.entry[stage][tid * 4 - L], entry + at + tid * 4 - L);
        else if (tid == 32 && step % 2) fetch_piece(s.before[stage], prefix + at - 4);
    });

    TransposedState<OWN> state;
    float(&C)[OWN * 8][4] = state.x;
    state.each(bh, key_tile * L, value, dqk, dhv, [&](float &x, long long at, bool inside) {
        x = C0 && inside ? C0[at] : 0.0f;
    });
    ColumnSum normal[NORMALS];
    auto show_normal = [&](int first) {
        if (with_n) each_normal(normal, first, [&](int r, float x) { set_parts(&s.n[0][r], KEYS * L + 8, x); });
    };
#pragma unroll
    for (int m = 0; m < NORMALS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int r = feature + m * 16 + half * 8 + LANE / 4;
            normal[m].set(half, n0 && with_n && r < dqk ? n0[(long long)bh * dqk + r] : 0.0f);
        }
    show_normal(feature);

#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        int stage = pipeline.wait(step);
        auto &from = s.stage[stage];
        // Hidden from the compiler, which else keeps the places of all that is below in registers.
        int lane = LANE, member = MEMBER, warp_row = WARP * 16, of_side = side_feature, of_warp = feature;
        asm volatile("" : "+r"(lane), "+r"(member), "+r"(warp_row), "+r"(of_side), "+r"(of_warp));
        int row = warp_row + lane / 4, column = lane % 4 * 2;
        float A[4][4] = {}, H[8][4] = {};
        // C as a left side, two tiles of keys at a time; where registers are for two blocks a multiprocessor, not
        // before A is done.
        const bool BESIDE = KEYS > 1;
        unsigned left[2][4][4];
        auto convert = [&](int tile) {
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    float *x = C[tile * 8 + i * 2 + n / 2] + n % 2 * 2;
                    left[tile % 2][i][n] = pair_of(x[0], x[1]);
                }
        };
        const float *G = s.prefix[stage], *E = s.entry[stage];
        float boundary = s.before[stage][3], end = G[L - 1];
        if (step % 2 == 0) boundary = 0.0f;
        if (BESIDE) convert(0);
        unsigned long long queries = tile_descriptor(from.q[0]);
        products_begin();
#pragma unroll
        for (int i = 0; i < 4 * KEYS; i++) {
            int at = i / 4 * SLICE + i % 4 * ALONG;
            multiply_group<0>(A, queries + at, tile_descriptor(from.k[0]) + side * 2 * DOWN + at);
        }
        products_commit();
        auto multiply_state = [&](int tile) {
            if (!BESIDE || tile > 0) convert(tile);
            products_begin();
#pragma unroll
            for (int i = 0; i < 4; i++)
                multiply_group<0>(H, left[tile % 2][i], queries + (key_tile + tile) * SLICE + i * ALONG);
            products_commit();
        };
        if (BESIDE) multiply_state(0);
        // Beside the products: the last step's h, weights of pairs, d, and the tokens' own weights.
        if (step > 0) put_step(step - 1);
        ColumnSum from_state;
        if (with_n) {
            const element_t *part = s.n[min(lane / 4, 2)] + column + of_side;
#pragma unroll
            for (int f = 0; f < Shared::FEATURES; f += 16) {
                unsigned a[4];
                load_left<false>(a, from.q[(of_side + f) / L], warp_row, (of_side + f) % L);
                multiply_add(from_state.x, a, *(const unsigned *)(part + f), *(const unsigned *)(part + f + 8));
            }
        }
        if (member < L) {
            if (side == 0) s.e[member] = power(scale + G[member] - boundary);
            else {
                float w = power(end - E[member]);
                s.w[member] = w;
                set_parts(&s.w_parts[0][member], L + 8, w);
            }
        }
        products_wait<(int)BESIDE>();
        int pair = side * 32 + column;
        float of_row[2] = {scale + G[row], scale + G[row + 8]}, sums[2] = {};
#pragma unroll
        for (int n = 0; n < 4; n++) {
            float2 of = *(const float2 *)(E + pair + n * 8);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float x = A[n][half * 2] * power(of_row[half] - of.x);
                float y = A[n][half * 2 + 1] * power(of_row[half] - of.y);
                int distance = row + half * 8 - pair - n * 8;
                x = distance >= 0 ? x : 0.0f, y = distance >= 1 ? y : 0.0f;
                sums[half] += x + y;
                *(Pair *)s.own[0].at(row + half * 8, pair + n * 8) = pair_of(x, y);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = sums[half];
            sum += __shfl_xor_sync(ALL, sum, 1);
            sum += __shfl_xor_sync(ALL, sum, 2);
            // The three parts are in columns 0, 1 and 2.
            float low = from_state.x[half * 2] + from_state.x[half * 2 + 1];
            float d = __shfl_sync(ALL, low, lane & 28) + __shfl_sync(ALL, from_state.x[half * 2], (lane & 28) + 1);
            if (lane % 4 == 0) s.d[side][row + half * 8] = fmaf(power(of_row[half] - boundary), d, sum);
        }
        if (!BESIDE) multiply_state(0);
#pragma unroll
        for (int tile = 1; tile < OWN; tile++) {
            if (tile > 1) products_wait<1>();
            multiply_state(tile);
        }
        publish_copies();
        if (SPLIT) products_wait();
        __syncthreads();
        // The next tokens, in the place of the last step's.
        pipeline.begin(step + Shared::RING - 1);
        // What a token is divided by, of the first half of a side's threads.
        int token = step * L + member;
        float m = 0.0f;
        bool pad = true;
        if (member < L && token < S) {
            m = stabilizers[(long long)bh * S + token];
            pad = marks && is_pad(marks[(long long)(bh / NH) * S + token]);
        }

        // Of values: as they are, and weighed for C.
        const int SEEN = SPLIT ? 2 : 4;
        int first_seen = SPLIT ? 2 * side : 0;
        Tile &values = from.v[SPLIT ? 0 : side];
        unsigned weighed[4][4];
        products_wait();
#pragma unroll
        for (int n = 0; n < 8; n++) {
            float2 e = *(const float2 *)(s.e + n * 8 + column);
#pragma unroll
            for (int i = 0; i < 4; i++) H[n][i] *= i % 2 ? e.y : e.x;
        }
        products_begin();
#pragma unroll
        for (int i = 0; i < SEEN; i++)
            multiply_group<0, 1>(H, tile_descriptor(values) + (first_seen + i) * DOWN,
                                 tile_descriptor(s.own[0]) + (first_seen + i) * ALONG);
        products_commit();
        float keep = power(end - boundary);
        // n, its products before those of C, which take long.
        if (with_n) {
#pragma unroll
            for (int m = 0; m < NORMALS; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) normal[m].x[i] *= keep;
            const element_t *part = s.w_parts[min(lane / 4, 2)] + column;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                unsigned b0 = *(const unsigned *)(part + i * 16), b1 = *(const unsigned *)(part + i * 16 + 8);
#pragma unroll
                for (int m = 0; m < NORMALS; m++) {
                    unsigned a[4];
                    load_left<true>(a, from.k[(of_warp + m * 16) / L], (of_warp + m * 16) % L, i * 16);
                    multiply_add(normal[m].x, a, b0, b1);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            unsigned x[4];
            load_left<true>(x, values, warp_row, i * 16);
#pragma unroll
            for (int n = 0; n < 4; n++) {
                float2 w = *(const float2 *)(s.w + i * 16 + n / 2 * 8 + column);
                weighed[i][n] = pair_of(w.x * first(x[n]), w.y * second(x[n]));
            }
        }
#pragma unroll
        for (int n = 0; n < OWN * 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) C[n][i] *= keep;
        products_begin();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            unsigned long long keys = tile_descriptor(from.k[key_tile]) + i * DOWN;
#pragma unroll
            for (int tile = 0; tile + 1 < OWN; tile += 2)
                multiply_group<1>(*(float (*)[16][4])(C + tile * 8), weighed[i], keys + tile * SLICE);
            if (OWN % 2) multiply_group<1>(*(float (*)[8][4])(C + (OWN - 1) * 8), weighed[i], keys + (OWN - 1) * SLICE);
        }
        products_commit();
        // Beside them: what h is divided by, and n for the next step.
        if (member < L) {
            float d = s.d[0][member] + s.d[1][member];
            s.factor[side][member] = pad ? 0.0f : 1.0f / normalizer(d, m, eps, flags);
            if (blockIdx.x == 0 && side == 0 && token < S) denominators[(long long)bh * S + token] = pad ? 0.0f : d;
        }
        show_normal(of_warp);
        join_side(side);
        products_wait<1>();
        // To rows of tokens.
        Tile &out = SPLIT ? from.q[2] : s.own[1 + side];
        const int COLUMNS = SPLIT ? 4 : 8;
        int first_of_h = SPLIT ? side * H_ROWS : 0;
        float result[COLUMNS][4];
        if (SPLIT) {
            // In the place of queries that are used no more.
            float2 *mine = (float2 *)from.q[side].x + member, *others = (float2 *)from.q[1 - side].x + member;
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int i = half * 2;
                    float x = side ? H[n][i] : H[4 + n][i], y = side ? H[n][i + 1] : H[4 + n][i + 1];
                    mine[(n * 2 + half) * GROUP] = make_float2(x, y);
                }
            __syncthreads();
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int i = half * 2;
                    float2 other = others[(n * 2 + half) * GROUP];
                    float x = side ? H[4 + n][i] : H[n][i], y = side ? H[4 + n][i + 1] : H[n][i + 1];
                    result[n][i] = x + other.x, result[n][i + 1] = y + other.y;
                }
        } else {
#pragma unroll
            for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) result[n][i] = H[n][i];
        }
#pragma unroll
        for (int n = 0; n < COLUMNS; n += 2) {
            unsigned x[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float *y = result[n + i / 2] + i % 2 * 2;
                float2 by = *(const float2 *)(s.factor[side] + first_of_h + (n + i / 2) * 8 + column);
                x[i] = pair_of(y[0] * by.x, y[1] * by.y);
            }
            asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(
                             out.at(first_of_h + n * 8 + lane / 16 * 8 + lane % 8, warp_row + lane / 8 % 2 * 8)
                         )),
                         "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                         : "memory");
        }
        products_wait();
    }
    __syncthreads();
    put_step(steps - 1);
    if (C_last) state.each(bh, key_tile * L, value, dqk, dhv, [&](float &x, long long at, bool inside) {
        if (inside) C_last[at] = x;
    });
    if (n_last && with_n && blockIdx.x == 0) each_normal(normal, feature, [&](int r, float x) {
        if (r < dqk) n_last[(long long)bh * dqk + r] = x;
    });
}
#define RESIDENT_OUTPUTS(KEYS, WIDTH, BLOCKS)                                                                          \
    extern "C" __global__ void __launch_bounds__(2 * GROUP, BLOCKS) mlstm_resident_outputs_##WIDTH(                    \
        const element_t *q, const element_t *k, const element_t *v, const unsigned *marks, const float *stabilizers,   \
        const float *prefix, const float *entry, const float *C0, const float *n0, element_t *h, float *denominators,  \
        float *C_last, float *n_last, int S, int NH, int dqk, int dhv, int flags, float eps                            \
    ) {                                                                                                                \
        resident_outputs<KEYS>(q, k, v, marks, stabilizers, prefix, entry, C0, n0, h, denominators, C_last, n_last, S, \
                               NH, dqk, dhv, flags, eps);                                                              \
    }
RESIDENT_OUTPUTS(1, 64, 2)
RESIDENT_OUTPUTS(2, 128, 1)
RESIDENT_OUTPUTS(4, 256, 1)
RESIDENT_OUTPUTS(6, 384, 1)

#endif
