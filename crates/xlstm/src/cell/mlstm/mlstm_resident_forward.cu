// The mLSTM cell forward with C on the chip, on Hopper: where there are heads for every multiprocessor, with at most
// 128 features of queries and 65 to 128 of values. A block has a head and walks along its chunks of 128; C and n are in
// its registers, in f32, and a chunk's tokens are read once. After mlstm_gates and mlstm_wide_exponents, instead of
// states and outputs.

#ifdef WARPGROUP

/// KEYS: tiles of features of dqk; of dhv there are two. C: by columns and rows.
template <int KEYS> struct ResidentForward {
    struct {
        Tile q[2][KEYS], k[2][KEYS], v[2][2];
    } stage[2];
    Tile C[2][KEYS];
    TokenWeights weights;
    float w[CHUNK];
    element_t n[3][KEYS * L + 8];
};

/// h, d of every token and the last C and n.
/// grid (B NH), block 256. C0, n0 null: zero; C_last, n_last may be null.
template <int KEYS>
__device__ __forceinline__ void resident_outputs(
    const element_t *q, const element_t *k, const element_t *v, const unsigned *marks, const float *stabilizers,
    const float *prefix, const float *entry, const float *w, const float *C0, const float *n0, element_t *h,
    float *denominators, float *C_last, float *n_last, int S, int NH, int dqk, int dhv, int flags, float eps
) {
    typedef Pass<2 * L, false, false, false, 2> Outputs;
    extern __shared__ __align__(1024) char wide_shared[];
    ResidentForward<KEYS> &s = *(ResidentForward<KEYS> *)wide_shared;
    int bh = blockIdx.x, tid = threadIdx.x, side = __shfl_sync(ALL, SIDE, 0), chunks = (S + CHUNK - 1) / CHUNK;
    long long first_token = (long long)bh * chunks * CHUNK;
    auto bring = [&](int chunk) {
        if (chunk < chunks) {
            auto &to = s.stage[chunk % 2];
            Rows of_q = chunk_of(q, bh, chunk, S, NH, dqk), of_k = chunk_of(k, bh, chunk, S, NH, dqk);
            Rows of_v = chunk_of(v, bh, chunk, S, NH, dhv);
#pragma unroll
            for (int i = 0; i < KEYS; i++) {
                fetch(to.q[side][i], of_q, side * L, i * L);
                fetch(to.k[side][i], of_k, side * L, i * L);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) fetch(to.v[side][i], of_v, side * L, i * L);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    bring(0);
    ResidentState<KEYS> C(side);
    C.read(C0, n0, bh, dqk, dhv);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk++) {
        bring(chunk + 1);
        read_weights(s.weights, first_token / CHUNK + chunk, prefix, entry);
        if (tid < CHUNK) s.w[tid] = w[first_token + chunk * CHUNK + tid];
        C.show(s.C, [&](int r, float x) { set_parts(&s.n[0][r], KEYS * L + 8, x); });
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        publish_copies();
        __syncthreads();
        auto &from = s.stage[chunk % 2];
        Sides x;
        x.rows = chunk_of(q, bh, chunk, S, NH, dqk);
        x.out = 0;
        x = Outputs::halves(x, 0);
        Outputs pass;
        ColumnSum from_state;
        const element_t *part = s.n[min(LANE / 4, 2)] + LANE % 4 * 2;
        pass.template scores_of<KEYS, true>(from.q[0], from.k[0], x, [&]() {
#pragma unroll
            for (int feature = 0; feature < KEYS * L; feature += 16) {
                unsigned a[4];
                load_left<false>(a, from.q[side][feature / L], WARP * 16, feature % L);
                multiply_add(from_state.x, a, *(const unsigned *)(part + feature), *(const unsigned *)(part + feature + 8));
            }
        });
        C.scale(power(s.weights.prefix[CHUNK - 1]));
        auto states = [&]() { pass.states_of<KEYS>(from.q[0], s.C[0], x); };
        finish_outputs<2 * L>(pass, states, products_wait<0>, from.v[0], s.weights, x, from_state, bh, chunk, marks,
                              stabilizers, h, denominators, S, NH, dqk, dhv, flags, eps);
        C.add(from.k, from.v, s.w, s.w);
        __syncthreads();
    }
    C.write(C_last, n_last, bh, dqk, dhv);
}
#define RESIDENT_OUTPUTS(KEYS, WIDTH)                                                                                  \
    extern "C" __global__ void __launch_bounds__(2 * GROUP, 1) mlstm_resident_outputs_##WIDTH(                         \
        const element_t *q, const element_t *k, const element_t *v, const unsigned *marks, const float *stabilizers,   \
        const float *prefix, const float *entry, const float *w, const float *C0, const float *n0, element_t *h,       \
        float *denominators, float *C_last, float *n_last, int S, int NH, int dqk, int dhv, int flags, float eps       \
    ) {                                                                                                                \
        resident_outputs<KEYS>(q, k, v, marks, stabilizers, prefix, entry, w, C0, n0, h, denominators, C_last, n_last, \
                               S, NH, dqk, dhv, flags, eps);                                                           \
    }
RESIDENT_OUTPUTS(1, 64)
RESIDENT_OUTPUTS(2, 128)

#endif
