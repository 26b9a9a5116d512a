// The mLSTM cell backward with dC on the chip; mlstm_resident_forward.cu says for what sizes. A block has a head and
// walks back along its chunks; what C was before each comes from mlstm_wide_states. After mlstm_wide_tokens,
// instead of the other walk and the gradients.

#ifdef WARPGROUP

/// KEYS: tiles of features of dqk; of dhv there are two.
template <int KEYS> struct ResidentBackward {
    Tile q[2][KEYS], k[2][KEYS], v[2][2], dh[2][2];
    /// By columns and rows.
    Tile C[2][KEYS], dC[2][KEYS];
    TokenSlopes weights;
    float query[CHUNK], slope[CHUNK], n[KEYS * L], dn[KEYS * L], sums[2 * GROUP / 32], scale;
};

/// dq, dk, dv, each null or added to, or, fresh (1 dq, 2 dk, 4 dv), written whole; a, leaving and b of every token and
/// crossing of every chunk; C . dC + n . dn of the last and the first state.
/// grid (B NH), block 256. In and out as in mlstm_wide_backward_states.
template <int KEYS>
__device__ __forceinline__ void resident_gradients(
    const element_t *q, const element_t *k, const element_t *v, const element_t *dh, const float *prefix,
    const float *entry, const float *inverse, const float *dd, const float *query, const float *slope,
    const element_t *states, const float *normals, const float *C0, const float *n0, const float *C_last,
    const float *n_last, const float *dC_last, const float *dn_last, element_t *dq, element_t *dk, element_t *dv,
    int fresh, float *a, float *leaving, float *b, float *crossing, float *inner_last, float *inner_first, float *dC0,
    float *dn0, int S, int NH, int dqk, int dhv
) {
    typedef Pass<KEYS * L, false, true, true, 2> Queries;
    typedef Pass<KEYS * L, true, true, true, 2> Keys;
    typedef Pass<2 * L, true, false, false, 2> Values;
    extern __shared__ __align__(1024) char wide_shared[];
    ResidentBackward<KEYS> &s = *(ResidentBackward<KEYS> *)wide_shared;
    int bh = blockIdx.x, side = __shfl_sync(ALL, SIDE, 0), chunks = (S + CHUNK - 1) / CHUNK;
    // What follows is worked out where it is used: hidden from the compiler, which else keeps it all in registers.
    auto thread = []() {
        int tid = threadIdx.x;
        asm volatile("" : "+r"(tid));
        return tid;
    };
    auto number_of = [&](int chunk) {
        asm volatile("" : "+r"(chunk));
        return (long long)bh * chunks + chunk;
    };
    auto rows_of = [&](const element_t *x, int chunk, int width) {
        asm volatile("" : "+r"(chunk));
        return chunk_of(x, bh, chunk, S, NH, width);
    };
    auto states_of = [&](int chunk) { return Rows{states + number_of(chunk) * dqk * dhv, dhv, dqk, dhv, true}; };
    // A sum over the block: here of a warp, there, after a barrier, of all.
    auto put_sum = [&](float x) {
        x = warp_sum(x);
        int tid = thread();
        if (tid % 32 == 0) s.sums[tid / 32] = x;
    };
    auto write_sum = [&](float *to, float factor) {
        if (thread() > 0) return;
        float sum = 0.0f;
        for (int i = 0; i < 2 * GROUP / 32; i++) sum += s.sums[i];
        *to = factor * sum;
    };
    auto write_dot = [&](ResidentState<KEYS> &gradient, const float *C, const float *n, float *to) {
        float inner = 0.0f;
        if (C) gradient.each([&](float &x, int r, int c) {
            if (r < dqk && c < dhv) inner = fmaf(C[((long long)bh * dqk + r) * dhv + c], x, inner);
        });
        if (n) gradient.each_normal([&](float x, int r) {
            if (r < dqk) inner = fmaf(n[(long long)bh * dqk + r], x, inner);
        });
        put_sum(inner);
        __syncthreads();
        write_sum(to, 1.0f);
        __syncthreads();
    };
    ResidentState<KEYS> dC(side);
    dC.read(dC_last, dn_last, bh, dqk, dhv);
    bool given = dC_last || dn_last;
    write_dot(dC, given ? C_last : nullptr, given ? n_last : nullptr, inner_last + bh);
    if (thread() == 0) s.scale = 1.0f / sqrtf((float)dqk);
    __syncthreads();
#pragma unroll 1
    for (int chunk = chunks - 1; chunk >= 0; chunk--) {
        // Not unrolled, for the registers.
#pragma unroll 1
        for (int i = 0; i < 2; i++) {
            fetch(s.dh[side][i], rows_of(dh, chunk, dhv), side * L, i * L);
            fetch(s.v[side][i], rows_of(v, chunk, dhv), side * L, i * L);
        }
#pragma unroll 1
        for (int i = 0; i < KEYS; i++) {
            fetch(s.C[side][i], states_of(chunk), i * L, side * L);
            fetch(s.k[side][i], rows_of(k, chunk, dqk), side * L, i * L);
            fetch(s.q[side][i], rows_of(q, chunk, dqk), side * L, i * L);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        long long at = number_of(chunk);
        read_weights(s.weights, at, prefix, entry, inverse, dd, s.scale);
        int tid = thread();
        if (tid < CHUNK) {
            s.query[tid] = query[at * CHUNK + tid];
            s.slope[tid] = slope[at * CHUNK + tid];
        }
        if (tid < KEYS * L) s.n[tid] = tid < dqk ? normals[at * dqk + tid] : 0.0f;
        dC.show(s.dC, [&](int r, float x) { s.dn[r] = x; });
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        publish_copies();
        __syncthreads();
        float inner = 0.0f;
        dC.each_pair(s.C, [&](const float *gradient, const Pair *C) {
            inner = fmaf(first(*C), gradient[0], fmaf(second(*C), gradient[1], inner));
        });
        if (thread() < KEYS * L) inner = fmaf(s.n[thread()], s.dn[thread()], inner);
        put_sum(inner);
        Sides x;
        x.out = 0;
        x.rows = rows_of(dh, chunk, dhv);
        {
            Queries pass;
            x = Queries::halves(x, 0);
            pass.template scores_of<2, false>(s.dh[0], s.v[0], x, []() {});
            auto states = [&]() {
                pass.template states_of<2>(s.dh[0], s.C[0], x);
                products_wait();
            };
            finish_queries<KEYS * L>(pass, []() {}, states, s.k[0], s.weights, x, s.n, KEYS * L);
            float *to = a + number_of(chunk) * CHUNK + x.row;
            pass.dot_rows(s.q[0], x, [&](int r, float sum) { to[r] = sum; });
            if (dq) put_rows<KEYS * L>(pass.H, rows_of(dq, chunk, dqk), x.row + WARP * 16, 0, !(fresh & 1));
        }
        {
            Keys pass;
            x = Keys::halves(x, 0);
            pass.template scores_of<2, false>(s.v[0], s.dh[0], x, []() {});
            auto states = [&]() {
                pass.template states_of<2>(s.v[0], s.dC[0], x);
                products_wait();
            };
            finish_keys<KEYS * L>(pass, []() {}, states, s.q[0], s.weights, x, s.dn, KEYS * L, [&]() {
                float *to = leaving + number_of(chunk) * CHUNK + x.row;
                pass.dot_rows(s.k[0], x, [&](int r, float sum) { to[r] = sum; });
            });
            float *to = b + number_of(chunk) * CHUNK + x.row;
            pass.dot_rows(s.k[0], x, [&](int r, float sum) { to[r] = sum; });
            if (dk) put_rows<KEYS * L>(pass.H, rows_of(dk, chunk, dqk), x.row + WARP * 16, 0, !(fresh & 2));
        }
        {
            Values pass;
            x = Values::halves(x, 0);
            pass.template scores_of<KEYS, false>(s.k[0], s.q[0], x, []() {});
            auto states = [&]() {
                pass.template states_of<KEYS>(s.k[0], s.dC[0], x);
                products_wait();
            };
            finish_values<2 * L>(pass, []() {}, states, s.dh[0], s.weights, x);
            if (dv) put_rows<2 * L>(pass.H, rows_of(dv, chunk, dhv), x.row + WARP * 16, 0, !(fresh & 4));
        }
        dC.set_normal(s.dn);
        float keep = power(s.weights.prefix[CHUNK - 1]);
        // The gradient of the first state is wanted only where there is one.
        if (chunk > 0 || C0 || dC0 || dn0) {
            dC.scale(keep);
            dC.add(s.q, s.dh, s.query, s.slope);
        }
        __syncthreads();
        write_sum(crossing + number_of(chunk), keep);
    }
    write_dot(dC, C0, n0, inner_first + bh);
    if (dC0) dC.each([&](float &x, int r, int c) {
        if (r < dqk && c < dhv) dC0[((long long)bh * dqk + r) * dhv + c] += x;
    });
    if (dn0) dC.each_normal([&](float x, int r) {
        if (r < dqk) dn0[(long long)bh * dqk + r] += x;
    });
}
#define RESIDENT_GRADIENTS(KEYS, WIDTH)                                                                                \
    extern "C" __global__ void __launch_bounds__(2 * GROUP, 1) mlstm_resident_gradients_##WIDTH(                       \
        const element_t *q, const element_t *k, const element_t *v, const element_t *dh, const float *prefix,          \
        const float *entry, const float *inverse, const float *dd, const float *query, const float *slope,             \
        const element_t *states, const float *normals, const float *C0, const float *n0, const float *C_last,          \
        const float *n_last, const float *dC_last, const float *dn_last, element_t *dq, element_t *dk, element_t *dv,  \
        int fresh, float *a, float *leaving, float *b, float *crossing, float *inner_last, float *inner_first,         \
        float *dC0, float *dn0, int S, int NH, int dqk, int dhv                                                        \
    ) {                                                                                                                \
        resident_gradients<KEYS>(q, k, v, dh, prefix, entry, inverse, dd, query, slope, states, normals, C0, n0,       \
                                 C_last, n_last, dC_last, dn_last, dq, dk, dv, fresh, a, leaving, b, crossing,         \
                                 inner_last, inner_first, dC0, dn0, S, NH, dqk, dhv);                                  \
    }
RESIDENT_GRADIENTS(1, 64)
RESIDENT_GRADIENTS(2, 128)

#endif
