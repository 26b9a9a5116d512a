// The cells backward in bf16 on tensor cores, from the last token to the first; slstm_wide.cuh says how.
//
// A step: the gradients of the raw gates (4 DH, 8), element by element, to shared memory; [DH, 4 DH] R^T
// times them; the sums to the warps that have the features, whose next step adds them to dh. A block
// multiplies by its own gates alone, for all features of the head, and with more warps than tiles of 16
// features by a part of them: the sums of PARTS parts are added in their order.

/// What forward has left of a warp's features, dh, and the marks; even sequences stand before the odd ones.
struct __align__(16) WarpRecord {
    uint2 first[2][4][8];
    unsigned last[2][4][8];
    bf16_t dh[2][4][8];
    unsigned mark[SEQUENCES];
};

template <int KT, int C, int W> struct BackwardSizes {
    /// Parts that a block's gates are cut into; tiles of a warp; steps of 16 gates of a part.
    static const int CUTS = W > KT ? W / KT : 1, TILES = W > KT ? 1 : KT / W, STEPS = 2 * W / CUTS;
    static const int PARTS = C * CUTS, PITCH = 32 * W + 8;
};
template <int KT, int C, int W> struct BackwardShared {
    typedef BackwardSizes<KT, C, W> Sizes;
    /// Of an even and an odd token: the gradients of the gates (gate, feature), and the sums by lane.
    bf16_t draws[2][SEQUENCES][Sizes::PITCH];
    float2 sums[2][Sizes::PARTS][W][32];
    Arrival arrivals[2];
    /// What each warp reads of an even and an odd token, fetched two tokens ahead by itself.
    WarpRecord record[2][W];
};

/// R^T as the warps hold it, zero outside: (NH, C blocks, W warps, STEPS, TILES, 32 lanes) of 16 bytes.
/// A thread for 16 bytes. cuts, tiles, steps as in BackwardSizes.
extern "C" __global__ void slstm_wide_columns(
    const float *R, uint4 *fragments, int n, int C, int W, int cuts, int tiles, int steps, int DH
) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int lane = i % 32, tile = i / 32 % tiles, rest = i / 32 / tiles, step = rest % steps, warp = rest / steps % W;
    int block = rest / steps / W % C, head = rest / steps / W / C, warps = W / cuts;
    unsigned parts[4];
    for (int part = 0; part < 4; part++) {
        int column = (warp % warps * tiles + tile) * 16 + part % 2 * 8 + lane / 4, pair[2];
        for (int j = 0; j < 2; j++) {
            int k = (warp / warps * steps + step) * 16 + part / 2 * 8 + lane % 4 * 2 + j;
            int gate = k / (8 * W), d = block * 8 * W + k % (8 * W);
            bool inside = d < DH && column < DH;
            pair[j] = inside ? __float_as_int(R[(((long long)head * 4 + gate) * DH + d) * DH + column]) : 0;
        }
        parts[part] = bf16_pair(__int_as_float(pair[0]), __int_as_float(pair[1]));
    }
    fragments[i] = make_uint4(parts[0], parts[1], parts[2], parts[3]);
}

/// before (B, S, NH DH) = the h before each token, 0 at pads, from h and h0 (null: zeros). n threads, each 8
/// elements; width: NH DH.
extern "C" __global__ void slstm_wide_before(
    const bf16_t *h, const float *h0, const unsigned *marks, bf16_t *before, int n, int S, int width
) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int token = i / (width / WIDE), column = i % (width / WIDE) * WIDE, sequence = token / S, t = token % S;
    const unsigned *own = marks + (long long)sequence * S;
    bf16_t *to = before + (long long)token * width + column;
    int u = t - 1;
    if (marks) {
        // No h stands before these.
        if (own[t] & (RESET | PAD)) return store_whole(to, Wide{});
        while (u >= 0 && own[u] & PAD) u--;
    }
    if (u >= 0) *(uint4 *)to = *(const uint4 *)(h + ((long long)sequence * S + u) * width + column);
    else store_whole(to, h0 ? load_whole(h0 + (long long)sequence * width + column) : Wide{});
}

/// As slstm_backward of slstm.cu, whose arguments these are; but draw (B, S, NH, 4, DH) is bf16, and
/// parts (ceil(B / 8), 4, NH DH) are sums over tokens and 8 sequences.
struct BackwardArguments {
    const uint4 *fragments;
    const void *record;
    const unsigned *marks;
    const float *c0, *n0, *c_last, *n_last;
    const bf16_t *dh;
    const float *dh_last, *dc_last, *dn_last, *dm_last;
    bf16_t *draw;
    float *parts, *dgate[4], *dh0, *dc0, *dn0, *dm0, clip;
    int B, S, NH, DH, flags;
};

template <int KT, int C, int W, int LATE> __device__ __forceinline__ void wide_backward(const BackwardArguments &x) {
    typedef BackwardSizes<KT, C, W> Sizes;
    extern __shared__ __align__(16) unsigned char wide_shared[];
    BackwardShared<KT, C, W> &shared = *(BackwardShared<KT, C, W> *)wide_shared;
    /// Where registers are short, gates' gradients do not wait for the product.
    const bool EARLY = W >= 12;
    /// Sums of a tile that run side by side, where there are few warps to hide a product's latency.
    const int CHAINS = W <= 8 ? 4 / Sizes::TILES : W < 16 ? 2 : 1, PIECES = Sizes::TILES * Sizes::STEPS;
    const int B = x.B, S = x.S, NH = x.NH, DH = x.DH, flags = x.flags;
    const int rank = blockIdx.x % C, first = blockIdx.x / C * SEQUENCES, head = blockIdx.y, width = NH * DH;
    const int octet = (rank * W + WARP) * 8, column = head * DH + octet + LANE / 4;
    const bool works = octet < DH, lstm = flags & LSTM, multiplies = !(flags & GRADIENT_CUT);
    const long long n = (long long)B * S * width;
    [[maybe_unused]] const int active = (DH + 8 * W - 1) / (8 * W);
    const unsigned arriving = min(W, DH / 8 - rank * W) * active * (int)sizeof(float2) * 32;

    for (int i = threadIdx.x; i < (int)sizeof(shared.draws) / 4; i += 32 * W) ((unsigned *)shared.draws)[i] = 0;
    for (int i = threadIdx.x; i < (int)sizeof(shared.sums) / 4; i += 32 * W) ((unsigned *)shared.sums)[i] = 0;
#ifdef HAS_CLUSTERS
    if (C > 1) {
        if (threadIdx.x == 0 && rank < active) {
            for (int i = 0; i < 2; i++) {
                shared.arrivals[i].start();
                shared.arrivals[i].expect(arriving);
            }
        }
        meet();
        // A block beyond the last feature, of whose sums there are none.
        if (rank >= active) return;
    }
#endif
    if (C == 1) __syncthreads();

    const Matrix<PIECES, LATE> matrix(
        x.fragments + ((long long)(head * C + rank) * W + WARP) * PIECES * 32 + LANE,
        (uint4 *)(&shared + 1) + WARP * LATE * 32 + LANE
    );
    // A sequence past the last is the last, and its results are thrown away.
    const int mine = first + LANE % 4 * 2;
    const bool given[2] = {works && mine < B, works && mine + 1 < B};
    const long long stride = mine + 1 < B ? (long long)S * width : 0;
    long long at = ((long long)(min(mine, B - 1) + 1) * S - 1) * width + column;
    float dh[2], sums[4] = {};
    Carry carry[2];
    /// Whether the initial state is given, but empty.
    bool is_empty[2];
    auto is_first = [&](int s, int t) {
        return comes_first(x.marks ? x.marks + (long long)min(mine + s, B - 1) * S : nullptr, t);
    };
#pragma unroll
    for (int s = 0; s < 2; s++) {
        long long from = (long long)min(mine + s, B - 1) * width + column;
        State last = {0.0f, 0.0f, 0.0f};
        if (works && !lstm) last = {x.c_last[from], x.n_last[from], 0.0f};
        auto value = [&](const float *gradient) { return works && gradient ? gradient[from] : 0.0f; };
        carry[s] = last_carry(last, value(x.dc_last), lstm ? 0.0f : value(x.dn_last), lstm ? 0.0f : value(x.dm_last), flags);
        dh[s] = value(x.dh_last);
        is_empty[s] = given[s] && !lstm && x.n0 && x.n0[from] == 0.0f;
    }

    // A lane copies 16 bytes of `first` of a sequence, and 16 of `last` or of dh, or a mark.
    const int second = LANE < 16 ? LANE / 2 : LANE % 8, step_back = LANE < 16 ? width * 4 : LANE < 24 ? width * 2 : 4;
    const bool has_second = LANE < 16 || (LANE < 24 ? x.dh != nullptr : x.marks != nullptr);
    auto row_of = [&](int sequence) { return (long long)(min(first + sequence, B - 1) + 1) * S - 1; };
    const uint2 *from = (const uint2 *)x.record + row_of(LANE / 4) * width + head * DH + octet + LANE % 4 * 2;
    const long long place = row_of(second) * width + head * DH + octet;
    const char *from_second = LANE < 16   ? (const char *)((const unsigned *)((const uint2 *)x.record + n) + place + LANE % 2 * 4)
                              : LANE < 24 ? (const char *)(x.dh + place)
                                          : (const char *)(x.marks + row_of(second));
    auto fetch = [&](int t) {
        if (works && t >= 0) {
            WarpRecord &to = shared.record[t % 2][WARP];
            copy_16(&to.first[LANE / 4 % 2][LANE / 8][LANE % 4 * 2], from);
            void *to_second = LANE < 16   ? (void *)&to.last[second % 2][second / 2][LANE % 2 * 4]
                              : LANE < 24 ? (void *)&to.dh[second % 2][second / 2][0]
                                          : (void *)&to.mark[second];
            if (has_second) {
                if (LANE < 24) copy_16(to_second, from_second);
                else copy_4(to_second, from_second);
            }
            from -= width;
            from_second -= step_back;
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    for (int i = LANE; i < (int)sizeof(WarpRecord) / 4; i += 32)
        ((unsigned *)&shared.record[0][WARP])[i] = ((unsigned *)&shared.record[1][WARP])[i] = 0;
    __syncwarp();
    fetch(S - 1);
    fetch(S - 2);

#pragma unroll 1
    for (int t = S - 1, step = 0; t >= 0; t--, step++, at -= width) {
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        __syncwarp();
        Saved saved[2];
        float draw[2][4], dy[2];
        unsigned mark[2];
        const WarpRecord &record = shared.record[t % 2][WARP];
#pragma unroll
        for (int s = 0; s < 2; s++) {
            mark[s] = record.mark[LANE % 4 * 2 + s];
            saved[s] = unpack({FETCHED(record.first, s), FETCHED(record.last, s)}, flags);
            dy[s] = dh[s] + load(&FETCHED(record.dh, s));
        }
        __syncwarp();
        fetch(t - 2);
        // What follows from it is cheaper to find again than to hold.
        int thread = threadIdx.x;
        asm volatile("" : "+r"(thread));
        const int lane = thread % 32, warp = thread / 32;
        Carry before[2] = {carry[0], carry[1]};
#pragma unroll
        for (int s = 0; s < 2; s++) cell_backward(saved[s], dy[s], carry[s], draw[s], flags);
#pragma unroll
        for (int s = 0; s < 2; s++) {
            if (mark[s] & PAD || !given[s]) {
                carry[s] = before[s];
                draw[s][0] = draw[s][1] = draw[s][2] = draw[s][3] = 0.0f;
                continue;
            }
            dh[s] = 0.0f;
            if (resets(mark[s])) {
                carry[s] = {0.0f, 0.0f, 0.0f};
            } else if (is_empty[s] && is_first(s, t)) {
                // All of such a state's gradient there is: it is no ratio.
                long long to = (long long)(mine + s) * width + column;
                float f = first_forget((void *)x.record, n, PACKED_WORDS)[to], dr = fmaf(dy[s], fabsf(saved[s].x[3]), before[s].r);
                if (x.dc0) x.dc0[to] += f * dr;
                if (x.dn0) x.dn0[to] += f * (before[s].l - dr * saved[s].x[1]);
            }
        }
#pragma unroll
        for (int g = 0; g < 4; g++) {
            sums[g] += draw[0][g] + draw[1][g];
            unsigned word = exchange(draw[0][g], draw[1][g]);
            if (works)
                *(unsigned *)&shared.draws[t % 2][lane % 4 * 2 + lane / 4 % 2][(g * W + warp) * 8 + lane / 8 * 2] = word;
        }
        auto give_gates = [&]() {
#pragma unroll
            for (int s = 0; s < 2; s++) {
                if (!given[s]) continue;
#pragma unroll
                for (int g = 0; g < 4; g++) {
                    if (!x.dgate[g]) continue;
                    float *to = x.dgate[g] + at + s * stride;
                    *to = draw[s][g] + (flags >> (FRESH_GATES + g) & 1 ? 0.0f : *to);
                }
            }
        };
        if (EARLY) give_gates();
        __syncthreads();
        float sum[CHAINS][Sizes::TILES][4] = {};
        if (multiplies) {
            const int part = warp / (W / Sizes::CUTS), tile = warp % (W / Sizes::CUTS) * Sizes::TILES;
#pragma unroll
            for (int k = 0; k < Sizes::STEPS; k += 2) {
                unsigned b[4];
                load_sequences(b, &shared.draws[t % 2][0][(part * Sizes::STEPS + k) * 16], Sizes::PITCH);
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int i = 0; i < Sizes::TILES; i++)
                        matrix.multiply(sum[(k + half) % CHAINS][i], (k + half) * Sizes::TILES + i, b[2 * half],
                                        b[2 * half + 1]);
            }
#pragma unroll
            for (int i = 0; i < Sizes::TILES; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float2 two = make_float2(sum[0][i][2 * half], sum[0][i][2 * half + 1]);
#pragma unroll
                    for (int chain = 1; chain < CHAINS; chain++) {
                        two.x += sum[chain][i][2 * half];
                        two.y += sum[chain][i][2 * half + 1];
                    }
                    int to = (tile + i) * 2 + half;
                    float2 *place = &shared.sums[t % 2][rank * Sizes::CUTS + part][C == 1 ? to : to % W][lane];
                    if (C == 1 && to < W) *place = two;
#ifdef HAS_CLUSTERS
                    if (C > 1 && to * 8 < DH)
                        send(address_in(shared_address(place), to / W), two.x, two.y,
                             address_in(shared_address(&shared.arrivals[t % 2]), to / W));
#endif
                }
        }
        if (!EARLY) give_gates();
        {
            int other = thread % W, gate = thread / W % 4, row = thread / W / 4, d = (rank * W + other) * 8;
            if (d < DH && first + row < B) {
                long long token = (long long)(first + row) * S + t;
                *(uint4 *)(x.draw + ((token * NH + head) * 4 + gate) * DH + d) =
                    *(const uint4 *)&shared.draws[t % 2][row][gate * 8 * W + other * 8];
            }
        }
        if (C == 1) __syncthreads();
#ifdef HAS_CLUSTERS
        if (C > 1 && multiplies) {
            shared.arrivals[t % 2].wait(step / 2 % 2);
            if (threadIdx.x == 0) shared.arrivals[t % 2].expect(arriving);
        }
#endif
        if (multiplies) {
#pragma unroll
            for (int part = 0; part < Sizes::PARTS; part++) {
                float2 two = shared.sums[t % 2][part][warp][lane];
                dh[0] += two.x;
                dh[1] += two.y;
            }
        }
#pragma unroll
        for (int s = 0; s < 2; s++) {
            if (resets(mark[s])) dh[s] = 0.0f;
            else if (x.clip >= 0.0f && !(mark[s] & PAD)) dh[s] = fminf(x.clip, fmaxf(-x.clip, dh[s]));
        }
    }
#pragma unroll
    for (int g = 0; g < 4; g++) {
        float sum = sums[g];
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        if (works && LANE % 4 == 0) x.parts[((long long)(first / SEQUENCES) * 4 + g) * width + column] = sum;
    }
#pragma unroll
    for (int s = 0; s < 2; s++) {
        if (!given[s]) continue;
        long long to = (long long)(mine + s) * width + column;
        if (x.dh0) x.dh0[to] += dh[s];
        if (lstm) {
            if (x.dc0) x.dc0[to] += carry[s].r;
            continue;
        }
        bool same = is_empty[s] && is_first(s, S);
        give_initial(carry[s], x.c0, x.n0, same ? x.dc_last : nullptr, same ? x.dn_last : nullptr, to, x.dc0, x.dn0,
                     x.dm0);
    }
}

#define WIDE_BACKWARD(NAME, KT, C, W, LATE, BYTES, CLUSTER)                                                            \
    static_assert(sizeof(BackwardShared<KT, C, W>) + LATE_BYTES(W, LATE) <= BYTES);                                    \
    extern "C" __global__ void __launch_bounds__(32 * W, 1) CLUSTER slstm_wide_backward_##NAME(                        \
        const uint4 *fragments, const void *record, const unsigned *marks, const float *c0, const float *n0,           \
        const float *c_last, const float *n_last, const bf16_t *dh, const float *dh_last, const float *dc_last,        \
        const float *dn_last, const float *dm_last, bf16_t *draw, float *parts, float *dgate_i, float *dgate_f,        \
        float *dgate_z, float *dgate_o, float *dh0, float *dc0, float *dn0, float *dm0, float clip, int B, int S,      \
        int NH, int DH, int flags                                                                                      \
    ) {                                                                                                                \
        wide_backward<KT, C, W, LATE>({fragments, record, marks, c0, n0, c_last, n_last, dh, dh_last, dc_last,         \
                                       dn_last, dm_last, draw, parts, {dgate_i, dgate_f, dgate_z, dgate_o}, dh0, dc0,  \
                                       dn0, dm0, clip, B, S, NH, DH, flags});                                          \
    }
WIDE_BACKWARD(64, 4, 1, 8, 0, 48 << 10, )
WIDE_BACKWARD(128, 8, 1, 16, 10, 144 << 10, )
#ifdef HAS_CLUSTERS
WIDE_BACKWARD(128_cluster, 8, 4, 4, 0, 48 << 10, __cluster_dims__(4, 1, 1))
WIDE_BACKWARD(192_cluster, 12, 2, 12, 8, 96 << 10, __cluster_dims__(2, 1, 1))
WIDE_BACKWARD(256_cluster, 16, 4, 8, 0, 48 << 10, __cluster_dims__(4, 1, 1))
#endif
