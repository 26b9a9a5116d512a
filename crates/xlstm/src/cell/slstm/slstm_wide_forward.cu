// The cells forward in bf16 on tensor cores; slstm_wide.cuh says how.
//
// A step: [4 DH, DH] R times [DH, 8] h from shared memory, the cell in registers, h to shared memory.
// A warp multiplies the rows of its 8 features alone, in two tiles of 16 rows: i and f, z and o. So no gate
// moves between threads, and a block has one barrier a step.

/// The gates of a warp's features and the marks; even sequences stand before the odd ones.
struct WarpGates {
    float gate[4][2][4][8];
    unsigned mark[SEQUENCES];
};

template <int KT, int C, int W> struct ForwardShared {
    /// h before an even and an odd token.
    bf16_t hidden[2][SEQUENCES][16 * KT + 8];
    Arrival arrivals[2];
    /// What each warp reads of an even and an odd token, fetched two tokens ahead by itself.
    WarpGates gates[2][W];
    float bias[W][4][8];
};

/// R (NH, 4 DH, DH) as the warps hold it, zero outside: (NH, octets, KT, 2 tiles, 32 lanes) of 16 bytes.
/// A thread for 16 bytes. octets: C W.
extern "C" __global__ void slstm_wide_rows(const float *R, uint4 *fragments, int n, int octets, int KT, int DH) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int lane = i % 32, tile = i / 32 % 2, k = i / 64 % KT, unit = i / 64 / KT, d = unit % octets * 8 + lane / 4;
    const float *head = R + (long long)(unit / octets) * 4 * DH * DH;
    unsigned parts[4];
    for (int part = 0; part < 4; part++) {
        int gate = tile * 2 + part % 2, column = k * 16 + part / 2 * 8 + lane % 4 * 2;
        const float *from = head + ((long long)gate * DH + d) * DH + column;
        bool inside = d < DH && column < DH;
        parts[part] = inside ? bf16_pair(from[0], from[1]) : 0;
    }
    fragments[i] = make_uint4(parts[0], parts[1], parts[2], parts[3]);
}

/// As slstm_forward of slstm.cu, whose arguments these are.
struct ForwardArguments {
    const float *gate[4];
    const uint4 *fragments;
    const float *bias, *h0, *c0, *n0, *m0;
    const unsigned *marks;
    bf16_t *h;
    float *h_last, *c_last, *n_last, *m_last;
    void *record;
    int B, S, NH, DH, flags;
};

template <int KT, int C, int W, int LATE> __device__ __forceinline__ void wide_forward(const ForwardArguments &x) {
    extern __shared__ __align__(16) unsigned char wide_shared[];
    ForwardShared<KT, C, W> &shared = *(ForwardShared<KT, C, W> *)wide_shared;
    /// Sums that run side by side, where there are few warps to hide a product's latency.
    const int CHAINS = W < 16 ? 2 : 1;
    const int B = x.B, S = x.S, NH = x.NH, DH = x.DH, flags = x.flags;
    const int rank = blockIdx.x % C, first = blockIdx.x / C * SEQUENCES, head = blockIdx.y, width = NH * DH;
    const int octet = (rank * W + WARP) * 8, d = octet + LANE / 4, column = head * DH + d;
    [[maybe_unused]] const int active = (DH + 8 * W - 1) / (8 * W);
    const bool works = octet < DH;
    const long long n = (long long)B * S * width;

    for (int i = threadIdx.x; i < SEQUENCES * (16 * KT + 8); i += 32 * W) {
        int row = i / (16 * KT + 8), k = i % (16 * KT + 8);
        bool given = x.h0 && k < DH && first + row < B;
        store(&shared.hidden[0][row][k], given ? x.h0[(long long)(first + row) * width + head * DH + k] : 0.0f);
        shared.hidden[1][row][k] = 0;
    }
#ifdef HAS_CLUSTERS
    if (C > 1) {
        if (threadIdx.x == 0 && rank < active) {
            for (int i = 0; i < 2; i++) {
                shared.arrivals[i].start();
                shared.arrivals[i].expect(DH * SEQUENCES * 2);
            }
        }
        meet();
        // A block beyond the last feature.
        if (rank >= active) return;
    }
#endif
    if (C == 1) __syncthreads();

    const Matrix<2 * KT, LATE> matrix(
        x.fragments + ((long long)head * C * W + rank * W + WARP) * 2 * KT * 32 + LANE,
        (uint4 *)(&shared + 1) + WARP * LATE * 32 + LANE
    );
    float hidden[2];
    State state[2];
    // A sequence past the last is the last, and its results are thrown away.
    const int mine = first + LANE % 4 * 2;
    const bool given[2] = {works && mine < B, works && mine + 1 < B};
    const long long stride = mine + 1 < B ? (long long)S * width : 0;
    long long at = (long long)min(mine, B - 1) * S * width + column;
#pragma unroll
    for (int s = 0; s < 2; s++) {
        long long start = (long long)min(mine + s, B - 1) * width + column;
        hidden[s] = works && x.h0 ? x.h0[start] : 0.0f;
        state[s].c = works && x.c0 ? x.c0[start] : 0.0f;
        state[s].n = works && x.n0 ? x.n0[start] : 0.0f;
        state[s].m = works && x.m0 ? x.m0[start] : 0.0f;
    }
#pragma unroll
    for (int g = 0; g < 4; g++)
        if (LANE % 4 == 0) shared.bias[WARP][g][LANE / 4] = works ? x.bias[g * width + column] : 0.0f;
    __syncwarp();

    // A lane copies 4 features of a sequence of two gates, and lanes 0 to 7 the marks.
    long long from = (long long)min(first + LANE / 2 % 8, B - 1) * S * width + head * DH + octet + LANE % 2 * 4;
    if (LANE < 8) shared.gates[0][WARP].mark[LANE] = shared.gates[1][WARP].mark[LANE] = 0;
    auto fetch = [&](int t) {
        if (works && t < S) {
            WarpGates &to = shared.gates[t % 2][WARP];
#pragma unroll
            for (int i = 0; i < 2; i++)
                copy_16(&to.gate[2 * i + LANE / 16][LANE / 2 % 2][LANE / 4 % 4][LANE % 2 * 4],
                        (LANE < 16 ? x.gate[2 * i] : x.gate[2 * i + 1]) + from);
            from += width;
            if (x.marks && LANE < 8) copy_4(&to.mark[LANE], x.marks + (long long)min(first + LANE, B - 1) * S + t);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    fetch(0);
    fetch(1);

#pragma unroll 1
    for (int t = 0; t < S; t++, at += width) {
#ifdef HAS_CLUSTERS
        if (C > 1 && works && t > 0) {
            shared.arrivals[t % 2].wait((t - 1) / 2 % 2);
            if (threadIdx.x == 0) shared.arrivals[t % 2].expect(DH * SEQUENCES * 2);
        }
#endif
        float sum[CHAINS][2][4] = {};
        if (works) {
#pragma unroll
            for (int k = 0; k < KT; k += 2) {
                unsigned b[4];
                load_sequences(b, &shared.hidden[t % 2][0][k * 16], 16 * KT + 8);
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int tile = 0; tile < 2; tile++)
                        matrix.multiply(sum[half % CHAINS][tile], (k + half) * 2 + tile, b[2 * half], b[2 * half + 1]);
            }
        }
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        __syncwarp();
        float raw[2][4];
        unsigned mark[2];
        WarpGates &gates = shared.gates[t % 2][WARP];
#pragma unroll
        for (int s = 0; s < 2; s++) {
            mark[s] = gates.mark[LANE % 4 * 2 + s];
            bool reset = resets(mark[s]);
            if (reset) state[s].c = state[s].n = state[s].m = 0.0f;
#pragma unroll
            for (int g = 0; g < 4; g++) {
                float product = sum[0][g / 2][g % 2 * 2 + s];
                if (CHAINS > 1) product += sum[CHAINS - 1][g / 2][g % 2 * 2 + s];
                raw[s][g] = FETCHED(gates.gate[g], s) + shared.bias[WARP][g][LANE / 4] + (reset ? 0.0f : product);
            }
        }
        __syncwarp();
        fetch(t + 2);
        State before[2] = {state[0], state[1]};
        Saved saved[2];
        float y[2], forget[2];
        cell_forward<true, 2>(raw, state, y, saved, forget, flags);
        Packed packed[2];
#pragma unroll
        for (int s = 0; s < 2; s++) {
            packed[s] = pack(saved[s], flags);
            if (mark[s] & PAD) {
                state[s] = before[s];
                continue;
            }
            hidden[s] = y[s];
            // Of an initial state that is empty, but given: backward has no other way to it.
            if (x.n0 && x.record && given[s] && before[s].n == 0.0f && !resets(mark[s]))
                first_forget(x.record, n, PACKED_WORDS)[(long long)(mine + s) * width + column] = forget[s];
        }
        unsigned word = exchange(hidden[0], hidden[1]);
        bf16_t *place = &shared.hidden[(t + 1) % 2][MINE][octet + LANE / 8 * 2];
        if (C == 1) {
            if (works) *(unsigned *)place = word;
            __syncthreads();
        }
#ifdef HAS_CLUSTERS
        if (C > 1 && works && t + 1 < S) {
            unsigned to = shared_address(place), arrival = shared_address(&shared.arrivals[(t + 1) % 2]);
#pragma unroll
            for (int other = 0; other < C; other++)
                if (other < active) send(address_in(to, other), word, address_in(arrival, other));
        }
#endif
        // While the next product runs.
        if (ODD ? given[1] : given[0])
            *(unsigned *)(x.h + at + (ODD ? stride - 1 : 0)) = (ODD ? mark[1] : mark[0]) & PAD ? 0 : word;
        if (x.record) {
#pragma unroll
            for (int s = 0; s < 2; s++)
                if (given[s] && !(mark[s] & PAD)) save(x.record, n, at + s * stride, packed[s]);
        }
    }
#pragma unroll
    for (int s = 0; s < 2; s++) {
        if (!given[s]) continue;
        long long to = (long long)(mine + s) * width + column;
        x.h_last[to] = hidden[s];
        x.c_last[to] = state[s].c;
        if (flags & LSTM) continue;
        x.n_last[to] = state[s].n;
        x.m_last[to] = state[s].m;
    }
}

#define WIDE_FORWARD(NAME, KT, C, W, LATE, BYTES, CLUSTER)                                                             \
    static_assert(sizeof(ForwardShared<KT, C, W>) + LATE_BYTES(W, LATE) <= BYTES);                                     \
    extern "C" __global__ void __launch_bounds__(32 * W, 1) CLUSTER slstm_wide_forward_##NAME(                         \
        const float *gate_i, const float *gate_f, const float *gate_z, const float *gate_o, const uint4 *fragments,    \
        const float *bias, const float *h0, const float *c0, const float *n0, const float *m0, const unsigned *marks,  \
        bf16_t *h, float *h_last, float *c_last, float *n_last, float *m_last, void *record, int B, int S, int NH,     \
        int DH, int flags                                                                                              \
    ) {                                                                                                                \
        wide_forward<KT, C, W, LATE>({{gate_i, gate_f, gate_z, gate_o}, fragments, bias, h0, c0, n0, m0, marks, h,     \
                                      h_last, c_last, n_last, m_last, record, B, S, NH, DH, flags});                   \
    }
WIDE_FORWARD(64, 4, 1, 8, 0, 48 << 10, )
WIDE_FORWARD(128, 8, 1, 16, 4, 80 << 10, )
#ifdef HAS_CLUSTERS
WIDE_FORWARD(128_cluster, 8, 4, 4, 0, 48 << 10, __cluster_dims__(4, 1, 1))
WIDE_FORWARD(192_cluster, 12, 2, 12, 2, 48 << 10, __cluster_dims__(2, 1, 1))
WIDE_FORWARD(256_cluster, 16, 4, 8, 0, 48 << 10, __cluster_dims__(4, 1, 1))
#endif
