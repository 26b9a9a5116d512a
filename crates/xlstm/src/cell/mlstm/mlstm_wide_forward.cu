// The mLSTM cell forward by chunks of 128; mlstm_wide.cuh says how.

/// G, E and w of every token.
/// grid (N, B NH), block 128.
extern "C" __global__ void __launch_bounds__(CHUNK) mlstm_wide_exponents(
    const float *i, const float *f, const unsigned *marks, const float *n0, const float *m0, const float *stabilizers,
    float *prefix, float *entry, float *w, int S, int NH, int dqk, int flags
) {
    int bh = blockIdx.y, chunk = blockIdx.x;
    long long at = ((long long)bh * gridDim.x + chunk) * CHUNK + threadIdx.x;
    float G, E, last;
    chunk_exponents({i, f, marks, n0, m0, stabilizers}, bh, chunk, S, NH, dqk, flags, &G, &E, &last);
    prefix[at] = G;
    entry[at] = E;
    w[at] = power(last - E);
}

#ifdef ELEMENT_BF16

/// C and n before every chunk, C' = e_last C + (w ∘ K)^T V, n' = e_last n + (w ∘ K)^T 1, and the last.
/// grid (ceil(dhv / COLUMNS), ceil(dqk / 64), B NH), block 128. C_last, n_last may be null.
template <int COLUMNS>
__device__ __forceinline__ void wide_states(
    const element_t *k, const element_t *v, const float *w, const float *prefix, const float *C0, const float *n0,
    element_t *states, float *normals, float *C_last, float *n_last, int S, int NH, int dqk, int dhv
) {
    extern __shared__ __align__(1024) char wide_shared[];
    int bh = blockIdx.z, r0 = blockIdx.y * L, c0 = blockIdx.x * COLUMNS, chunks = (S + CHUNK - 1) / CHUNK;
    bool with_n = blockIdx.x == 0;
    long long size = (long long)dqk * dhv;
    StateTile<COLUMNS> C;
    C.each([&](float &x, int r, int c) {
        bool inside = C0 && r0 + r < dqk && c0 + c < dhv;
        x = inside ? C0[bh * size + (long long)(r0 + r) * dhv + c0 + c] : 0.0f;
    });
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int x = r0 + WARP * 16 + half * 8 + LANE / 4;
        C.normal.set(half, n0 && x < dqk ? n0[(long long)bh * dqk + x] : 0.0f);
    }
    C.walk(*(Walk<COLUMNS> *)wide_shared, k, v, w, w, prefix, states, normals, bh, r0, c0, with_n, 1,
           C_last ? chunks : chunks - 1, S, NH, dqk, dhv);
    if (!C_last) return;
    C.each([&](float &x, int r, int c) {
        if (r0 + r < dqk && c0 + c < dhv) C_last[bh * size + (long long)(r0 + r) * dhv + c0 + c] = x;
    });
    if (with_n) put(C.normal, [&](int row, float x) {
        if (r0 + row < dqk) n_last[(long long)bh * dqk + r0 + row] = x;
    });
}
#define WIDE_STATES(COLUMNS)                                                                                           \
    extern "C" __global__ void __launch_bounds__(GROUP, WALK_BLOCKS(COLUMNS)) mlstm_wide_states_##COLUMNS(             \
        const element_t *k, const element_t *v, const float *w, const float *prefix, const float *C0, const float *n0, \
        element_t *states, float *normals, float *C_last, float *n_last, int S, int NH, int dqk, int dhv               \
    ) {                                                                                                                \
        wide_states<COLUMNS>(k, v, w, prefix, C0, n0, states, normals, C_last, n_last, S, NH, dqk, dhv);               \
    }
WIDE_STATES(64)
WIDE_STATES(128)

/// h, and d of every token.
/// grid (ceil(dhv / OUT), 2 N, B NH), block 128: half a chunk. Out: h (B, S, NH, dhv), denominators
/// (B, NH, S). Shared: a Pass and three parts of n.
template <int OUT>
__device__ __forceinline__ void wide_outputs(
    const element_t *q, const element_t *k, const element_t *v, const unsigned *marks, const float *stabilizers,
    const float *prefix, const float *entry, const element_t *states, const float *normals, element_t *h,
    float *denominators, int S, int NH, int dqk, int dhv, int flags, float eps
) {
    typedef Pass<OUT, false, false, false, 1> Outputs;
    extern __shared__ __align__(1024) char wide_shared[];
    typename Outputs::Shared &s = *(typename Outputs::Shared *)wide_shared;
    element_t *n_parts = (element_t *)(&s + 1);
    int bh = gridDim.z - 1 - blockIdx.z, chunk = blockIdx.y / 2, half = blockIdx.y % 2, tid = threadIdx.x;
    if (chunk * CHUNK + half * L >= S) return;
    int chunks = gridDim.y / 2, pitch = (dqk + L - 1) / L * L + 8;
    long long at = (long long)bh * chunks + chunk;
    Sides x;
    x.rows = chunk_of(q, bh, chunk, S, NH, dqk);
    x.columns = chunk_of(k, bh, chunk, S, NH, dqk);
    x.state = {states + at * dqk * dhv, dhv, dqk, dhv, true};
    x.second = x.own = chunk_of(v, bh, chunk, S, NH, dhv);
    x.inner = dqk, x.out = blockIdx.x * OUT;
    x = Outputs::halves(x, half);
    Outputs pass;
    ColumnSum from_state;
    const element_t *part = n_parts + min(LANE / 4, 2) * pitch + LANE % 4 * 2;
    Tile *tile = pass.products<true>(
        s, x,
        [&]() {
            read_weights(s.weights, at, prefix, entry);
            for (int r = tid; r < pitch; r += GROUP) set_parts(n_parts + r, pitch, r < dqk ? normals[at * dqk + r] : 0.0f);
        },
        [](int) {}, [](int, Tile *) {},
        [&](unsigned (&a)[4], int feature) {
            multiply_add(from_state.x, a, *(const unsigned *)(part + feature), *(const unsigned *)(part + feature + 8));
        }
    );
    finish_outputs<OUT>(pass, tile, s.weights, x, from_state, bh, chunk, marks, stabilizers, h, denominators, S, NH,
                        dqk, dhv, flags, eps);
}
#define WIDE_OUTPUTS(OUT)                                                                                              \
    extern "C" __global__ void __launch_bounds__(GROUP, 2) mlstm_wide_outputs_##OUT(                                   \
        const element_t *q, const element_t *k, const element_t *v, const unsigned *marks, const float *stabilizers,   \
        const float *prefix, const float *entry, const element_t *states, const float *normals, element_t *h,          \
        float *denominators, int S, int NH, int dqk, int dhv, int flags, float eps                                     \
    ) {                                                                                                                \
        wide_outputs<OUT>(q, k, v, marks, stabilizers, prefix, entry, states, normals, h, denominators, S, NH, dqk,    \
                          dhv, flags, eps);                                                                            \
    }
WIDE_OUTPUTS(64)
#ifdef WARPGROUP
WIDE_OUTPUTS(128)
#endif

#endif
