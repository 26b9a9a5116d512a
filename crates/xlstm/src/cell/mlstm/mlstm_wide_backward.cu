// The mLSTM cell backward by chunks of T tokens; mlstm_wide.cuh says how.

/// What every later kernel needs of a token: G, E, w, 1 / N, dd, the gradient of m through eps, and
/// the query's weights s e / N in C and s e dd in n; 0 at pads and past the end.
/// grid (N, B NH), block 256.
extern "C" __global__ void __launch_bounds__(256) mlstm_wide_tokens(
    const element_t *h, const element_t *dh, const float *i, const float *f, const unsigned *marks, const float *n0,
    const float *m0, const float *stabilizers, const float *denominators, float *prefix, float *entry, float *w,
    float *inverse, float *dd, float *dm, float *query, float *slope, int T, int S, int NH, int dqk, int dhv,
    int flags, float eps
) {
    __shared__ float products[CHUNK];
    int chunk = blockIdx.x, bh = blockIdx.y, tid = threadIdx.x, warp = tid / 32;
    long long step = (long long)NH * dhv, first_token = token_at(bh, chunk * T, S, NH, dhv);
    // Four tokens of a warp under way at once.
#pragma unroll 1
    for (int r0 = warp * 4; r0 < T; r0 += 32) {
        float sum[4] = {};
        for (int y = LANE * IN_VECTOR; y < dhv; y += 32 * IN_VECTOR) {
            Vector a[4] = {}, b[4] = {};
#pragma unroll
            for (int r = 0; r < 4; r++)
                if (chunk * T + r0 + r < S) {
                    a[r] = read((const Vector *)(h + first_token + (r0 + r) * step + y));
                    b[r] = read((const Vector *)(dh + first_token + (r0 + r) * step + y));
                }
#pragma unroll
            for (int r = 0; r < 4; r++) sum[r] = dot(a[r], b[r], sum[r]);
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            sum[r] = warp_sum(sum[r]);
            if (LANE == 0) products[r0 + r] = sum[r];
        }
    }
    __syncthreads();
    if (tid >= T) return;
    int t = chunk * T + tid;
    long long at = ((long long)bh * gridDim.x + chunk) * T + tid;
    float G, E, last;
    chunk_exponents({i, f, marks, n0, m0, stabilizers}, bh, chunk, T, S, NH, dqk, flags, &G, &E, &last);
    float out[3] = {0.0f, 0.0f, 0.0f};
    if (t < S && !(marks && is_pad(marks[(long long)(bh / NH) * S + t]))) {
        float d = denominators[(long long)bh * S + t], m = stabilizers[(long long)bh * S + t];
        float norm = normalizer(d, m, eps, flags), rise = -products[tid] / norm;
        out[0] = 1.0f / norm;
        if (flags & NORMALIZE) {
            out[1] = fabsf(d) > expf(-m) ? (d > 0.0f ? rise : -rise) : 0.0f;
            out[2] = flags & SIGMOID_INPUT ? 0.0f : rise * eps;
        }
    }
    float state = power(G) / sqrtf((float)dqk);
    prefix[at] = G;
    entry[at] = E;
    w[at] = power(last - E);
    inverse[at] = out[0];
    dd[at] = out[1];
    dm[at] = out[2];
    query[at] = state * out[0];
    slope[at] = state * out[1];
}

/// The chunk's whole d log i and d log f, but for the stabiliser.
/// grid (N, B NH), block T. tiles, value_tiles: slices of features of dqk and dhv.
extern "C" __global__ void __launch_bounds__(CHUNK) mlstm_wide_gates(
    const float *a, const float *leaving, const float *b, const float *crossing, float *di, float *df, int tiles,
    int value_tiles
) {
    __shared__ float after[CHUNK / 32], before[CHUNK / 32];
    int tid = threadIdx.x, warp = tid / 32, T = blockDim.x;
    long long at = (long long)blockIdx.y * gridDim.x + blockIdx.x, all = (long long)gridDim.y * gridDim.x;
    float in = 0.0f, out = 0.0f, whole = 0.0f, cross = 0.0f;
    for (int tile = 0; tile < tiles; tile++) {
        long long from = (tile * all + at) * T + tid;
        in += a[from];
        out += leaving[from];
        whole += b[from];
    }
    for (int tile = 0; tile < value_tiles; tile++)
        for (int part = 0; part < T / L; part++) cross += crossing[(tile * all + at) * (T / L) + part];
    // What comes to token t from pairs within the chunk, and to it from before; what left before it.
    float suffix = in - (whole - out), sum = out;
    for (int step = 1; step < 32; step <<= 1) {
        float right = __shfl_down_sync(ALL, suffix, step), left = __shfl_up_sync(ALL, sum, step);
        if (LANE + step < 32) suffix += right;
        if (LANE >= step) sum += left;
    }
    if (LANE == 0) after[warp] = suffix;
    if (LANE == 31) before[warp] = sum;
    __syncthreads();
    sum -= out;
    for (int other = 0; other < T / 32; other++) {
        if (other > warp) suffix += after[other];
        if (other < warp) sum += before[other];
    }
    di[at * T + tid] = whole;
    df[at * T + tid] = suffix + sum + cross;
}

#ifdef ELEMENT_BF16

/// Both walks at once: C and n before every chunk, and dC and dn after every chunk,
/// dC <- e_last dC + (s e / N ∘ Q)^T dH, dn <- e_last dn + (s e dd ∘ Q)^T 1; C . dC + n . dn of the last
/// and the first state, by tile.
/// grid (ceil(dhv / COLUMNS), ceil(dqk / 64), 2 B NH), block 128. In: dC_last, dn_last (null: zero),
/// C_last, n_last (read where dC_last or dn_last is given), C0, n0 (null: zero). Added to: dC0, dn0.
template <int COLUMNS>
__device__ __forceinline__ void wide_backward_states(
    const element_t *q, const element_t *k, const element_t *v, const element_t *dh, const float *w, const float *query,
    const float *slope, const float *prefix, const float *C0, const float *n0, const float *C_last, const float *n_last,
    const float *dC_last, const float *dn_last, element_t *states, float *normals, element_t *dstates, float *dnormals,
    float *inner_last, float *inner_first, float *dC0, float *dn0, int T, int S, int NH, int dqk, int dhv
) {
    extern __shared__ __align__(1024) char wide_shared[];
    Walk<COLUMNS> &s = *(Walk<COLUMNS> *)wide_shared;
    int tasks = gridDim.z / 2, bh = blockIdx.z % tasks, r0 = blockIdx.y * L, c0 = blockIdx.x * COLUMNS;
    int chunks = (S + T - 1) / T;
    bool back = blockIdx.z < tasks, with_n = blockIdx.x == 0;
    long long size = (long long)dqk * dhv;
    const float *C_from = back ? dC_last : C0, *n_from = back ? dn_last : n0;
    StateTile<COLUMNS> C;
    auto place = [&](int r, int c) { return bh * size + (long long)(r0 + r) * dhv + c0 + c; };
    auto inside = [&](int r, int c) { return r0 + r < dqk && c0 + c < dhv; };
    float inner = 0.0f;
    C.each([&](float &x, int r, int c) {
        x = C_from && inside(r, c) ? C_from[place(r, c)] : 0.0f;
        if (back && dC_last && inside(r, c)) inner = fmaf(C_last[place(r, c)], x, inner);
    });
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int x = r0 + WARP * 16 + half * 8 + LANE / 4;
        float n = n_from && x < dqk ? n_from[(long long)bh * dqk + x] : 0.0f;
        C.set_normal(half, n);
        if (back && with_n && dn_last && x < dqk && LANE % 4 == 0) inner = fmaf(n_last[(long long)bh * dqk + x], n, inner);
    }
    // The gradient of the first state is wanted only where there is one.
    int additions = back && (C0 || dC0 || dn0) ? chunks : chunks - 1;
    C.walk(s, back ? q : k, back ? dh : v, back ? query : w, back ? slope : w, prefix, back ? dstates : states,
           back ? dnormals : normals, bh, r0, c0, with_n, back ? -1 : 1, additions, T, S, NH, dqk, dhv);
    if (!back) return;
    long long tile = (long long)bh * gridDim.x * gridDim.y + blockIdx.y * gridDim.x + blockIdx.x;
    inner = block_sum(inner);
    if (threadIdx.x == 0) inner_last[tile] = inner;
    inner = 0.0f;
    if (C0 || dC0) C.each([&](float &x, int r, int c) {
        if (!inside(r, c)) return;
        if (C0) inner = fmaf(C0[place(r, c)], x, inner);
        if (dC0) dC0[place(r, c)] += x;
    });
    if (with_n) put(C.normal, [&](int row, float x) {
        if (r0 + row >= dqk) return;
        long long at = (long long)bh * dqk + r0 + row;
        if (n0) inner = fmaf(n0[at], x, inner);
        if (dn0) dn0[at] += x;
    });
    inner = block_sum(inner);
    if (threadIdx.x == 0) inner_first[tile] = inner;
}
#define WIDE_BACKWARD_STATES(COLUMNS)                                                                                  \
    extern "C" __global__ void __launch_bounds__(GROUP, COLUMNS == 64 ? 3 : 2) mlstm_wide_backward_states_##COLUMNS(   \
        const element_t *q, const element_t *k, const element_t *v, const element_t *dh, const float *w,               \
        const float *query, const float *slope, const float *prefix, const float *C0, const float *n0,                 \
        const float *C_last, const float *n_last, const float *dC_last, const float *dn_last, element_t *states,       \
        float *normals, element_t *dstates, float *dnormals, float *inner_last, float *inner_first, float *dC0,        \
        float *dn0, int T, int S, int NH, int dqk, int dhv                                                             \
    ) {                                                                                                                \
        wide_backward_states<COLUMNS>(q, k, v, dh, w, query, slope, prefix, C0, n0, C_last, n_last, dC_last, dn_last,  \
                                      states, normals, dstates, dnormals, inner_last, inner_first, dC0, dn0, T, S, NH, \
                                      dqk, dhv);                                                                       \
    }
WIDE_BACKWARD_STATES(64)
WIDE_BACKWARD_STATES(128)

/// A block's tile of a pass in backward: rows and columns of S have `inner` features, Z has `width`.
struct Place {
    int bh, chunk, chunks, tile, slice;
    long long at;
};
__device__ __forceinline__ Sides sides(
    const Place &place, const element_t *rows, const element_t *columns, const element_t *second, const element_t *own,
    const element_t *states, int inner, int width, int out, int T, int S, int NH, int dqk, int dhv
) {
    Sides x;
    x.tile = place.tile;
    x.rows = chunk_of(rows, place.bh, place.chunk, T, S, NH, inner);
    x.tiles = (x.rows.rows + L - 1) / L;
    x.columns = chunk_of(columns, place.bh, place.chunk, T, S, NH, inner);
    x.state = {states + place.at * dqk * dhv, dhv, dqk, dhv, true};
    x.second = chunk_of(second, place.bh, place.chunk, T, S, NH, width);
    x.own = chunk_of(own, place.bh, place.chunk, T, S, NH, width);
    x.inner = inner, x.out = out;
    return x;
}

/// dv_j += w_j (K dC)_j + sum_t A_tj dh_t / N_t; and crossing = e_last (C . dC + n . dn) of a chunk by
/// slice of features and tile of rows. Added to: dv or null.
template <int OUT, bool RESIDENT>
__device__ __forceinline__ void wide_values(
    const Place &place, const element_t *q, const element_t *k, const element_t *dh, const float *prefix,
    const float *entry, const float *inverse, const float *w, const element_t *states, const float *normals,
    const element_t *dstates, const float *dnormals, element_t *dv, float *crossing, int T, int S, int NH, int dqk,
    int dhv
) {
    typedef Pass<OUT, true, false, RESIDENT> Values;
    extern __shared__ __align__(1024) char wide_shared[];
    typename Values::Shared s(wide_shared, dqk, false, T);
    Sides x = sides(place, k, q, dh, dh, dstates, dqk, dhv, place.slice * OUT, T, S, NH, dqk, dhv);
    Rows to = chunk_of(dv, place.bh, place.chunk, T, S, NH, dhv);
    float scale = 1.0f / sqrtf((float)dqk), factor[2], inner = 0.0f;
    int tid = threadIdx.x;
    // Each block of a chunk has dC at hand, and reads some rows of C of every slice.
    const int IN_ROW = OUT / IN_VECTOR, AT_ONCE = GROUP / IN_ROW, MOST = L / 2 / AT_ONCE;
    int rows = L / (T / L), first_row = x.tile * rows + tid / IN_ROW, c = tid % IN_ROW * IN_VECTOR;
    const element_t *C = states + place.at * dqk * dhv;
    Vector piece[MOST];
    auto read_state = [&](int step) {
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            int r = step * L + first_row + i * AT_ONCE, y = x.out + c;
            bool inside = i * AT_ONCE < rows && r < dqk && y < dhv;
            piece[i] = inside ? read((const Vector *)(C + (long long)r * dhv + y)) : Vector{};
        }
    };
    Values pass;
    pass.template run<false, false>(
        s, x,
        [&]() {
            Values::weights(s, x, place.at, T, prefix, entry, inverse, nullptr);
            if (dv) prefetch_rows<OUT>(to, x.tile * L, x.out);
#pragma unroll
            for (int half = 0; half < 2; half++)
                factor[half] = w[place.at * T + x.tile * L + Values::row(half * 2)];
            if (x.tile == 0 && place.slice == 0)
                for (int r = tid; r < dqk; r += GROUP)
                    inner = fmaf(normals[place.at * dqk + r], dnormals[place.at * dqk + r], inner);
        },
        [&](int step) {
            if (PASS_READS_AHEAD) read_state(step);
        },
        [&](int step, Tile *tile) {
            if (!PASS_READS_AHEAD) read_state(step);
#pragma unroll
            for (int i = 0; i < MOST; i++) {
                int r = min(first_row + i * AT_ONCE, L - 1);
                inner = dot(piece[i], read((const Vector *)tile[c / L].at(r, c % L)), inner);
            }
        },
        [](unsigned (&)[4], int) {}, [&]() { pass.scale(factor); },
        [&](int c0, bool own) {
            pass.weigh(s, x, c0, own, [&](float score, int, int t) { return score * (scale * s.inverse[t]); });
        }
    );
    if (dv) put_rows<true, OUT>(pass.H, to, x.tile * L + WARP * 16, x.out);
    // In the place of weights that are used no more.
    inner = warp_sum(inner);
    __syncthreads();
    if (LANE == 0) s.factor[tid / 32] = inner;
    __syncthreads();
    if (tid == 0)
        crossing[(place.slice * (long long)gridDim.z * place.chunks + place.at) * (T / L) + x.tile] =
            power(s.prefix[T - 1]) * (s.factor[0] + s.factor[1] + (s.factor[2] + s.factor[3]));
}

/// dq_t += s e_t ((dH C^T)_t / N_t + dd_t n) + sum_j R_tj k_j, and a_t by slice of features.
/// Added to: dq or null.
template <int OUT, bool RESIDENT>
__device__ __forceinline__ void wide_queries(
    const Place &place, const element_t *q, const element_t *k, const element_t *v, const element_t *dh,
    const float *prefix, const float *entry, const float *inverse, const float *dd, const float *query,
    const float *slope, const element_t *states, const float *normals, element_t *dq, float *a, int T, int S, int NH,
    int dqk, int dhv
) {
    typedef Pass<OUT, false, true, RESIDENT> Queries;
    extern __shared__ __align__(1024) char wide_shared[];
    typename Queries::Shared s(wide_shared, dhv, true, T);
    Sides x = sides(place, dh, v, k, q, states, dhv, dqk, place.slice * OUT, T, S, NH, dqk, dhv);
    Rows to = chunk_of(dq, place.bh, place.chunk, T, S, NH, dqk);
    float scale = 1.0f / sqrtf((float)dqk), factor[2], of_normal[2];
    Queries pass;
    pass.template run<false, true>(
        s, x,
        [&]() {
            Queries::weights(s, x, place.at, T, prefix, entry, inverse, dd);
            if (dq) prefetch_rows<OUT>(to, x.tile * L, x.out);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                long long t = place.at * T + x.tile * L + Queries::row(half * 2);
                factor[half] = query[t];
                of_normal[half] = slope[t];
            }
        },
        [](int) {}, [](int, Tile *) {}, [](unsigned (&)[4], int) {},
        [&]() {
#pragma unroll
            for (int n = 0; n < OUT / 8; n++) {
                int r = x.out + Queries::column(n, 0);
                float2 normal = r < dqk ? *(const float2 *)(normals + place.at * dqk + r) : make_float2(0.0f, 0.0f);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    pass.H[n][i] = fmaf(of_normal[i / 2], i % 2 ? normal.y : normal.x, factor[i / 2] * pass.H[n][i]);
            }
        },
        [&](int c0, bool own) {
            pass.weigh(s, x, c0, own, [&](float product, int t, int) {
                return scale * fmaf(product, s.inverse[t], s.slope[t]);
            });
        }
    );
    long long first = (place.slice * (long long)gridDim.z * place.chunks + place.at) * T + x.tile * L;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = pass.dot_row(s.own, half);
        if (LANE % 4 == 0) a[first + Queries::row(half * 2)] = sum;
    }
    if (dq) put_rows<true, OUT>(pass.H, to, x.tile * L + WARP * 16, x.out);
}

/// dk_j += w_j ((V dC^T)_j + dn) + sum_t R_tj q_t; b_j and leaving_j by slice of features.
/// Added to: dk or null.
template <int OUT, bool RESIDENT>
__device__ __forceinline__ void wide_keys(
    const Place &place, const element_t *q, const element_t *k, const element_t *v, const element_t *dh,
    const float *prefix, const float *entry, const float *inverse, const float *dd, const float *w,
    const element_t *dstates, const float *dnormals, element_t *dk, float *leaving, float *b, int T, int S, int NH, int dqk, int dhv
) {
    typedef Pass<OUT, true, true, RESIDENT> Keys;
    extern __shared__ __align__(1024) char wide_shared[];
    typename Keys::Shared s(wide_shared, dhv, true, T);
    Sides x = sides(place, v, dh, q, k, dstates, dhv, dqk, place.slice * OUT, T, S, NH, dqk, dhv);
    Rows to = chunk_of(dk, place.bh, place.chunk, T, S, NH, dqk);
    float scale = 1.0f / sqrtf((float)dqk), factor[2];
    long long first = (place.slice * (long long)gridDim.z * place.chunks + place.at) * T + x.tile * L;
    Keys pass;
    pass.template run<false, true>(
        s, x,
        [&]() {
            Keys::weights(s, x, place.at, T, prefix, entry, inverse, dd);
            if (dk) prefetch_rows<OUT>(to, x.tile * L, x.out);
#pragma unroll
            for (int half = 0; half < 2; half++)
                factor[half] = w[place.at * T + x.tile * L + Keys::row(half * 2)];
        },
        [](int) {}, [](int, Tile *) {}, [](unsigned (&)[4], int) {},
        [&]() {
#pragma unroll
            for (int n = 0; n < OUT / 8; n++) {
                int r = x.out + Keys::column(n, 0);
                float2 normal = r < dqk ? *(const float2 *)(dnormals + place.at * dqk + r) : make_float2(0.0f, 0.0f);
#pragma unroll
                for (int i = 0; i < 4; i++) pass.H[n][i] = factor[i / 2] * (pass.H[n][i] + (i % 2 ? normal.y : normal.x));
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float sum = pass.dot_row(s.own, half);
                if (LANE % 4 == 0) leaving[first + Keys::row(half * 2)] = sum;
            }
        },
        [&](int c0, bool own) {
            pass.weigh(s, x, c0, own, [&](float product, int, int t) {
                return scale * fmaf(product, s.inverse[t], s.slope[t]);
            });
        }
    );
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = pass.dot_row(s.own, half);
        if (LANE % 4 == 0) b[first + Keys::row(half * 2)] = sum;
    }
    if (dk) put_rows<true, OUT>(pass.H, to, x.tile * L + WARP * 16, x.out);
}

/// dv, dq and dk. Blocks of a chunk are neighbours, so that what they share is read once.
/// grid (ceil(dhv / VALUES) + 2 ceil(dqk / KEYS), N T / 64, B NH), block 128.
#define WIDE_GRADIENTS(NAME, VALUES, KEYS, RESIDENT)                                                                   \
    extern "C" __global__ void __launch_bounds__(GROUP, 2) NAME(                                                       \
        const element_t *q, const element_t *k, const element_t *v, const element_t *dh, const float *prefix,          \
        const float *entry, const float *inverse, const float *dd, const float *w, const float *query,                 \
        const float *slope, const element_t *states, const float *normals, const element_t *dstates,                   \
        const float *dnormals, element_t *dq, element_t *dk, element_t *dv, float *a, float *leaving, float *b,        \
        float *crossing, int T, int S, int NH, int dqk, int dhv                                                        \
    ) {                                                                                                                \
        int key_slices = (dqk + KEYS - 1) / KEYS, slice = blockIdx.x, tiles = T / L;                                   \
        Place place = {(int)(gridDim.z - 1 - blockIdx.z), (int)blockIdx.y / tiles, (int)gridDim.y / tiles,             \
                       (int)blockIdx.y % tiles, slice, 0};                                                             \
        place.at = (long long)place.bh * place.chunks + place.chunk;                                                   \
        if (slice < key_slices) {                                                                                      \
            wide_queries<KEYS, RESIDENT>(place, q, k, v, dh, prefix, entry, inverse, dd, query, slope, states,         \
                                         normals, dq, a, T, S, NH, dqk, dhv);                                          \
        } else if (slice < 2 * key_slices) {                                                                           \
            place.slice -= key_slices;                                                                                 \
            wide_keys<KEYS, RESIDENT>(place, q, k, v, dh, prefix, entry, inverse, dd, w, dstates, dnormals, dk,        \
                                      leaving, b, T, S, NH, dqk, dhv);                                                 \
        } else {                                                                                                       \
            place.slice -= 2 * key_slices;                                                                             \
            wide_values<VALUES, RESIDENT>(place, q, k, dh, prefix, entry, inverse, w, states, normals, dstates,        \
                                          dnormals, dv, crossing, T, S, NH, dqk, dhv);                                 \
        }                                                                                                              \
    }
WIDE_GRADIENTS(mlstm_wide_gradients_64_64, 64, 64, true)
WIDE_GRADIENTS(mlstm_wide_gradients_64_128, 64, 128, true)
WIDE_GRADIENTS(mlstm_wide_gradients_128_64, 128, 64, true)
WIDE_GRADIENTS(mlstm_wide_gradients_128_128, 128, 128, true)
WIDE_GRADIENTS(mlstm_wide_gradients_128_64_long, 128, 64, false)
WIDE_GRADIENTS(mlstm_wide_gradients_64_128_long, 64, 128, false)
WIDE_GRADIENTS(mlstm_wide_gradients_128_128_long, 128, 128, false)

#endif
