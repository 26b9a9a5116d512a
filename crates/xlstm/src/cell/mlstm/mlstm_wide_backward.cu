// The mLSTM cell backward by chunks of 128; mlstm_wide.cuh says how.

/// The chunk's whole d log i and d log f, but for the stabiliser.
/// grid (N, B NH), block 128. tiles, value_tiles: slices of features of dqk and dhv.
extern "C" __global__ void __launch_bounds__(CHUNK) mlstm_wide_gates(
    const float *a, const float *leaving, const float *b, const float *crossing, float *di, float *df, int tiles,
    int value_tiles
) {
    __shared__ float after[4], before[4];
    int tid = threadIdx.x, warp = tid / 32;
    long long at = (long long)blockIdx.y * gridDim.x + blockIdx.x, all = (long long)gridDim.y * gridDim.x;
    float in = 0.0f, out = 0.0f, whole = 0.0f, cross = 0.0f;
    for (int tile = 0; tile < tiles; tile++) {
        long long from = (tile * all + at) * CHUNK + tid;
        in += a[from];
        out += leaving[from];
        whole += b[from];
    }
    for (int tile = 0; tile < value_tiles; tile++)
        cross += crossing[tile * all + at];
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
    for (int other = 0; other < 4; other++) {
        if (other > warp) suffix += after[other];
        if (other < warp) sum += before[other];
    }
    di[at * CHUNK + tid] = whole;
    df[at * CHUNK + tid] = suffix + sum + cross;
}

#ifdef ELEMENT_BF16

/// What every later kernel needs of a token: G, E, w, 1 / N, dd, the gradient of m through eps, and
/// the query's weights s e / N in C and s e dd in n; 0 at pads and past the end.
/// grid (N, B NH), block 256.
extern "C" __global__ void __launch_bounds__(256) mlstm_wide_tokens(
    const element_t *h, const element_t *dh, const float *i, const float *f, const unsigned *marks, const float *n0,
    const float *m0, const float *stabilizers, const float *denominators, float *prefix, float *entry, float *w,
    float *inverse, float *dd, float *dm, float *query, float *slope, int S, int NH, int dqk, int dhv, int flags,
    float eps
) {
    __shared__ float products[CHUNK];
    int chunk = blockIdx.x, bh = blockIdx.y, tid = threadIdx.x, warp = tid / 32;
    long long step = (long long)NH * dhv, first_token = token_at(bh, chunk * CHUNK, S, NH, dhv);
    // Four tokens of a warp under way at once.
#pragma unroll 1
    for (int r0 = warp * 4; r0 < CHUNK; r0 += 32) {
        float sum[4] = {};
        for (int y = LANE * IN_VECTOR; y < dhv; y += 32 * IN_VECTOR) {
            Vector a[4] = {}, b[4] = {};
#pragma unroll
            for (int r = 0; r < 4; r++)
                if (chunk * CHUNK + r0 + r < S) {
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
    if (tid >= CHUNK) return;
    int t = chunk * CHUNK + tid;
    long long at = ((long long)bh * gridDim.x + chunk) * CHUNK + tid;
    float G, E, last;
    chunk_exponents({i, f, marks, n0, m0, stabilizers}, bh, chunk, S, NH, dqk, flags, &G, &E, &last);
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
    float *inner_last, float *inner_first, float *dC0, float *dn0, int S, int NH, int dqk, int dhv
) {
    extern __shared__ __align__(1024) char wide_shared[];
    Walk<COLUMNS> &s = *(Walk<COLUMNS> *)wide_shared;
    int tasks = gridDim.z / 2, bh = blockIdx.z % tasks, r0 = blockIdx.y * L, c0 = blockIdx.x * COLUMNS;
    int chunks = (S + CHUNK - 1) / CHUNK;
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
        C.normal.set(half, n);
        if (back && with_n && dn_last && x < dqk && LANE % 4 == 0) inner = fmaf(n_last[(long long)bh * dqk + x], n, inner);
    }
    // The gradient of the first state is wanted only where there is one.
    int additions = back && (C0 || dC0 || dn0) ? chunks : chunks - 1;
    C.walk(s, back ? q : k, back ? dh : v, back ? query : w, back ? slope : w, prefix, back ? dstates : states,
           back ? dnormals : normals, bh, r0, c0, with_n, back ? -1 : 1, additions, S, NH, dqk, dhv);
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
    extern "C" __global__ void __launch_bounds__(GROUP, WALK_BLOCKS(COLUMNS)) mlstm_wide_backward_states_##COLUMNS(    \
        const element_t *q, const element_t *k, const element_t *v, const element_t *dh, const float *w,               \
        const float *query, const float *slope, const float *prefix, const float *C0, const float *n0,                 \
        const float *C_last, const float *n_last, const float *dC_last, const float *dn_last, element_t *states,       \
        float *normals, element_t *dstates, float *dnormals, float *inner_last, float *inner_first, float *dC0,        \
        float *dn0, int S, int NH, int dqk, int dhv                                                                    \
    ) {                                                                                                                \
        wide_backward_states<COLUMNS>(q, k, v, dh, w, query, slope, prefix, C0, n0, C_last, n_last, dC_last, dn_last,  \
                                      states, normals, dstates, dnormals, inner_last, inner_first, dC0, dn0, S, NH,    \
                                      dqk, dhv);                                                                       \
    }
WIDE_BACKWARD_STATES(64)
WIDE_BACKWARD_STATES(128)

/// dv_j += w_j (K dC)_j + sum_t A_tj dh_t / N_t; and crossing = e_last (C . dC + n . dn) of a chunk by
/// slice of features. dv or null: written whole where fresh, else added to.
template <int OUT>
__device__ __forceinline__ void wide_values(
    const element_t *q, const element_t *k, const element_t *dh, const float *prefix, const float *entry,
    const float *inverse, const element_t *states, const float *normals, const element_t *dstates,
    const float *dnormals, element_t *dv, bool fresh, float *crossing, int S, int NH, int dqk, int dhv,
    int slice
) {
    typedef Pass<OUT, true, false, false, 2> Values;
    extern __shared__ __align__(1024) char wide_shared[];
    typename Values::Shared &s = *(typename Values::Shared *)wide_shared;
    int bh = gridDim.z - 1 - blockIdx.z, chunk = blockIdx.y, chunks = gridDim.y;
    int tid = threadIdx.x;
    long long at = (long long)bh * chunks + chunk;
    Sides x;
    x.rows = chunk_of(k, bh, chunk, S, NH, dqk);
    x.columns = chunk_of(q, bh, chunk, S, NH, dqk);
    x.state = {dstates + at * dqk * dhv, dhv, dqk, dhv, true};
    x.second = x.own = chunk_of(dh, bh, chunk, S, NH, dhv);
    x.inner = dqk, x.out = slice * OUT;
    x = Values::halves(x, 0);
    Rows to = chunk_of(dv, bh, chunk, S, NH, dhv);
    float scale = 1.0f / sqrtf((float)dqk), inner = 0.0f;
    // Each side has dC at hand, and reads half of the rows of C in every slice.
    const int IN_ROW = OUT / IN_VECTOR, AT_ONCE = GROUP / IN_ROW, PIECES_EACH = L / 2 / AT_ONCE;
    int first_row = SIDE * (L / 2) + MEMBER / IN_ROW, c = tid % IN_ROW * IN_VECTOR;
    const element_t *C = states + at * dqk * dhv;
    Vector piece[PIECES_EACH];
    auto read_state = [&](int step) {
#pragma unroll
        for (int i = 0; i < PIECES_EACH; i++) {
            int r = step * L + first_row + i * AT_ONCE, y = x.out + c;
            piece[i] = r < dqk && y < dhv ? read((const Vector *)(C + (long long)r * dhv + y)) : Vector{};
        }
    };
    Values pass;
    Tile *tile = pass.products<false>(
        s, x,
        [&]() {
            read_weights(s.weights, at, prefix, entry, inverse, nullptr, scale);
            if (dv && !fresh) prefetch_rows<OUT>(to, x.row, x.out);
            if (slice == 0)
                for (int r = tid; r < dqk; r += 2 * GROUP)
                    inner = fmaf(normals[at * dqk + r], dnormals[at * dqk + r], inner);
        },
        [&](int step) {
            read_state(step);
        },
        [&](int step, Tile *tile) {
#pragma unroll
            for (int i = 0; i < PIECES_EACH; i++)
                inner = dot(piece[i], read((const Vector *)tile[Values::STATE + c / L].at(first_row + i * AT_ONCE, c % L)), inner);
        },
        [](unsigned (&)[4], int) {}
    );
    finish_values<OUT>(pass, []() {}, []() {}, tile, s.weights, x);
    if (dv) put_rows<OUT>(pass.H, to, x.row + WARP * 16, x.out, !fresh);
    // In the place of weights that are used no more.
    inner = warp_sum(inner);
    __syncthreads();
    if (LANE == 0) s.weights.low[tid / 32] = inner;
    __syncthreads();
    if (tid > 0) return;
    inner = 0.0f;
    for (int i = 0; i < 2 * GROUP / 32; i++) inner += s.weights.low[i];
    crossing[slice * (long long)gridDim.z * chunks + at] = power(s.weights.prefix[CHUNK - 1]) * inner;
}

#ifdef WARPGROUP

/// Blocks of dq and dk that a slice of features has.
#define KEY_BLOCKS 1

/// dq_t += s e_t ((dH C^T)_t / N_t + dd_t n) + sum_j R_tj k_j and dk_j += w_j ((V dC^T)_j + dn) + sum_t R_tj q_t, whose
/// R is made once; a_t, b_j and leaving_j by slice of features.
/// dq, dk or null: written whole where fresh, else added to.
template <int OUT>
__device__ __forceinline__ void wide_queries_and_keys(
    const element_t *q, const element_t *k, const element_t *v, const element_t *dh, const float *prefix,
    const float *entry, const float *inverse, const float *dd, const element_t *states, const float *normals,
    const element_t *dstates, const float *dnormals, element_t *dq, element_t *dk, int fresh, float *a, float *leaving,
    float *b, int S, int NH, int dqk, int dhv, int slice
) {
    typedef Pass<OUT, false, true, true, 2> Queries;
    typedef Pass<OUT, true, true, true, 2> Keys;
    const int TILES = OUT / L, RING = Queries::RING, IN_STAGE = 4 + 2 * TILES;
    extern __shared__ __align__(1024) char wide_shared[];
    struct Both {
        Tile stage[RING][IN_STAGE];
        TokenSlopes weights;
    };
    Both &s = *(Both *)wide_shared;
    int bh = gridDim.z - 1 - blockIdx.z, chunk = blockIdx.y, chunks = gridDim.y;
    long long at = (long long)bh * chunks + chunk;
    Sides x;
    x.rows = chunk_of(dh, bh, chunk, S, NH, dhv);
    x.columns = chunk_of(v, bh, chunk, S, NH, dhv);
    x.state = {states + at * dqk * dhv, dhv, dqk, dhv, true};
    x.inner = dhv, x.out = slice * OUT;
    x = Queries::halves(x, 0);
    float scale = 1.0f / sqrtf((float)dqk);
    int steps = (dhv + L - 1) / L;
    // Rows of a half each, then C and dC; at last K and Q.
    auto begin = [&](int step) {
        Tile *tile = s.stage[step % RING];
        int side = x.side;
        if (step < steps) {
            fetch(tile[side], x.rows, x.row, step * L);
            fetch(tile[2 + side], x.columns, x.row, step * L);
            Rows state = x.state;
            if (side) state.from = dstates + at * dqk * dhv;
#pragma unroll
            for (int i = 0; i < TILES; i++) fetch(tile[4 + side * TILES + i], state, x.out + i * L, step * L);
        } else if (step == steps) {
            Rows of_k = chunk_of(k, bh, chunk, S, NH, dqk), of_q = chunk_of(q, bh, chunk, S, NH, dqk);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                fetch(tile[side * TILES + i], of_k, x.row, x.out + i * L);
                fetch(tile[(2 + side) * TILES + i], of_q, x.row, x.out + i * L);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    auto arrive = [&](int step) {
        asm volatile("cp.async.wait_group %0;" ::"n"(RING - 1) : "memory");
        publish_copies();
        __syncthreads();
        return s.stage[step % RING];
    };
    for (int step = 0; step < RING; step++) begin(step);
    read_weights(s.weights, at, prefix, entry, inverse, dd, scale);
    if (dq && !(fresh & 1)) prefetch_rows<OUT>(chunk_of(dq, bh, chunk, S, NH, dqk), x.row, x.out);
    if (dk && !(fresh & 2)) prefetch_rows<OUT>(chunk_of(dk, bh, chunk, S, NH, dqk), x.row, x.out);
    Queries pass;
    Keys other;
#pragma unroll
    for (int n = 0; n < 16; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) pass.S[n][i] = 0.0f;
#pragma unroll
    for (int n = 0; n < OUT / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) pass.H[n][i] = other.H[n][i] = 0.0f;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        Tile *tile = arrive(step);
        unsigned long long gradients = tile_descriptor(tile[x.side]), values = tile_descriptor(tile[2 + x.side]);
        unsigned long long before = tile_descriptor(tile[2 + 1 - x.side]);
        unsigned long long C = tile_descriptor(tile[4]), dC = tile_descriptor(tile[4 + TILES]);
        products_begin();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            multiply_group<0>(pass.H, gradients + i * ALONG, C + i * ALONG);
            multiply_group<0>(other.H, values + i * ALONG, dC + i * ALONG);
            multiply_group<0>(*(float (*)[8][4])pass.S, gradients + i * ALONG, values + i * ALONG);
        }
        if (x.both) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                multiply_group<0>(*(float (*)[8][4])(pass.S + 8), gradients + i * ALONG, before + i * ALONG);
        }
        products_commit();
        products_wait();
        __syncthreads();
        begin(step + RING);
    }
    Tile *tile = arrive(steps), *of_q = tile + 2 * TILES, *R = s.stage[(steps + 1) % RING];
    finish_queries<OUT>(pass, []() {}, []() {}, tile, s.weights, x, normals + at * dqk, dqk);
    // R by halves of tokens, then of what they see, for its transpose.
    {
        int r = WARP * 16 + LANE / 4, c = LANE % 4 * 2;
        asm volatile("" : "+r"(r), "+r"(c));
#pragma unroll
        for (int n = 0; n < 16; n++) {
            if (n >= 8 && !x.both) break;
            Tile &to = R[x.side + (n < 8 ? x.side : 0)];
#pragma unroll
            for (int half = 0; half < 2; half++)
                *(Pair *)to.at(r + half * 8, n % 8 * 8 + c) = pass.left[n / 2][n % 2 * 2 + half];
        }
    }
    long long first = (slice * (long long)gridDim.z * chunks + at) * CHUNK;
    pass.dot_rows(of_q, x, [&](int r, float sum) { a[first + x.row + r] = sum; });
    if (dq) put_rows<OUT>(pass.H, chunk_of(dq, bh, chunk, S, NH, dqk), x.row + WARP * 16, x.out, !(fresh & 1));
    publish_copies();
    __syncthreads();
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        factor[i] = power(s.weights.prefix[CHUNK - 1] - s.weights.entry[x.row + Keys::row(i * 2)]);
#pragma unroll
    for (int n = 0; n < OUT / 8; n++) {
        int r = x.out + Keys::column(n, 0);
        float2 normal = r < dqk ? *(const float2 *)(dnormals + at * dqk + r) : make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < 4; i++) other.H[n][i] = factor[i / 2] * (other.H[n][i] + (i % 2 ? normal.y : normal.x));
    }
    other.dot_rows(tile, x, [&](int r, float sum) { leaving[first + x.row + r] = sum; });
    products_begin();
#pragma unroll
    for (int i = 0; i < 4; i++)
        multiply_group<1, 1>(other.H, tile_descriptor(R[2 * x.side]) + i * DOWN,
                             tile_descriptor(of_q[x.side * TILES]) + i * DOWN);
    if (x.side == 0) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            multiply_group<1, 1>(other.H, tile_descriptor(R[1]) + i * DOWN, tile_descriptor(of_q[TILES]) + i * DOWN);
    }
    products_commit();
    products_wait();
    other.dot_rows(tile, x, [&](int r, float sum) { b[first + x.row + r] = sum; });
    if (dk) put_rows<OUT>(other.H, chunk_of(dk, bh, chunk, S, NH, dqk), x.row + WARP * 16, x.out, !(fresh & 2));
}

#else

#define KEY_BLOCKS 2

/// dq_t += s e_t ((dH C^T)_t / N_t + dd_t n) + sum_j R_tj k_j, and a_t by slice of features.
/// dq or null: written whole where fresh, else added to.
template <int OUT>
__device__ __forceinline__ void wide_queries(
    const element_t *q, const element_t *k, const element_t *v, const element_t *dh, const float *prefix,
    const float *entry, const float *inverse, const float *dd,
    const element_t *states, const float *normals, element_t *dq, bool fresh, float *a, int S, int NH,
    int dqk, int dhv, int slice
) {
    typedef Pass<OUT, false, true, true, 2> Queries;
    extern __shared__ __align__(1024) char wide_shared[];
    typename Queries::Shared &s = *(typename Queries::Shared *)wide_shared;
    int bh = gridDim.z - 1 - blockIdx.z, chunk = blockIdx.y, chunks = gridDim.y;
    long long at = (long long)bh * chunks + chunk, first = (slice * (long long)gridDim.z * chunks + at) * CHUNK;
    Sides x;
    x.rows = chunk_of(dh, bh, chunk, S, NH, dhv);
    x.columns = chunk_of(v, bh, chunk, S, NH, dhv);
    x.state = {states + at * dqk * dhv, dhv, dqk, dhv, true};
    x.second = chunk_of(k, bh, chunk, S, NH, dqk);
    x.own = chunk_of(q, bh, chunk, S, NH, dqk);
    x.inner = dhv, x.out = slice * OUT;
    x = Queries::halves(x, 0);
    Rows to = chunk_of(dq, bh, chunk, S, NH, dqk);
    float scale = 1.0f / sqrtf((float)dqk);
    auto prologue = [&]() {
        read_weights(s.weights, at, prefix, entry, inverse, dd, scale);
        if (dq && !fresh) prefetch_rows<OUT>(to, x.row, x.out);
    };
    Queries pass;
    Tile *tile = pass.products<false>(s, x, prologue, [](int) {}, [](int, Tile *) {}, [](unsigned (&)[4], int) {});
    finish_queries<OUT>(pass, []() {}, []() {}, tile, s.weights, x, normals + at * dqk, dqk);
    pass.dot_rows(tile + 2 * Queries::TILES, x, [&](int r, float sum) { a[first + x.row + r] = sum; });
    if (dq) put_rows<OUT>(pass.H, to, x.row + WARP * 16, x.out, !fresh);
}

/// dk_j += w_j ((V dC^T)_j + dn) + sum_t R_tj q_t; b_j and leaving_j by slice of features.
/// dk or null: written whole where fresh, else added to.
template <int OUT>
__device__ __forceinline__ void wide_keys(
    const element_t *q, const element_t *k, const element_t *v, const element_t *dh, const float *prefix,
    const float *entry, const float *inverse, const float *dd, const element_t *dstates,
    const float *dnormals, element_t *dk, bool fresh, float *leaving, float *b, int S, int NH, int dqk, int dhv,
    int slice
) {
    typedef Pass<OUT, true, true, true, 2> Keys;
    extern __shared__ __align__(1024) char wide_shared[];
    typename Keys::Shared &s = *(typename Keys::Shared *)wide_shared;
    int bh = gridDim.z - 1 - blockIdx.z, chunk = blockIdx.y, chunks = gridDim.y;
    long long at = (long long)bh * chunks + chunk;
    Sides x;
    x.rows = chunk_of(v, bh, chunk, S, NH, dhv);
    x.columns = chunk_of(dh, bh, chunk, S, NH, dhv);
    x.state = {dstates + at * dqk * dhv, dhv, dqk, dhv, true};
    x.second = chunk_of(q, bh, chunk, S, NH, dqk);
    x.own = chunk_of(k, bh, chunk, S, NH, dqk);
    x.inner = dhv, x.out = slice * OUT;
    x = Keys::halves(x, 0);
    float scale = 1.0f / sqrtf((float)dqk);
    auto prologue = [&]() {
        read_weights(s.weights, at, prefix, entry, inverse, dd, scale);
        if (dk && !fresh) prefetch_rows<OUT>(chunk_of(dk, bh, chunk, S, NH, dqk), x.row, x.out);
    };
    Keys pass;
    Tile *tile = pass.products<false>(s, x, prologue, [](int) {}, [](int, Tile *) {}, [](unsigned (&)[4], int) {});
    Tile *own = tile + 2 * Keys::TILES;
    long long first;
    finish_keys<OUT>(pass, []() {}, []() {}, tile, s.weights, x, dnormals + at * dqk, dqk, [&]() {
        // Only now, for the registers: hidden from the compiler until here.
        asm volatile("" : "+r"(chunk));
        first = (slice * (long long)gridDim.z * chunks + (long long)bh * chunks + chunk) * CHUNK;
        pass.dot_rows(own, x, [&](int r, float sum) { leaving[first + x.row + r] = sum; });
    });
    pass.dot_rows(own, x, [&](int r, float sum) { b[first + x.row + r] = sum; });
    if (dk) put_rows<OUT>(pass.H, chunk_of(dk, bh, chunk, S, NH, dqk), x.row + WARP * 16, x.out, !fresh);
}

/// Both, those of dq first.
template <int OUT>
__device__ __forceinline__ void wide_queries_and_keys(
    const element_t *q, const element_t *k, const element_t *v, const element_t *dh, const float *prefix,
    const float *entry, const float *inverse, const float *dd, const element_t *states, const float *normals,
    const element_t *dstates, const float *dnormals, element_t *dq, element_t *dk, int fresh, float *a, float *leaving,
    float *b, int S, int NH, int dqk, int dhv, int block
) {
    int slices = (dqk + OUT - 1) / OUT;
    if (block < slices)
        wide_queries<OUT>(q, k, v, dh, prefix, entry, inverse, dd, states, normals, dq, fresh & 1, a, S, NH, dqk, dhv,
                          block);
    else
        wide_keys<OUT>(q, k, v, dh, prefix, entry, inverse, dd, dstates, dnormals, dk, fresh & 2, leaving, b, S, NH,
                       dqk, dhv, block - slices);
}

#endif

/// dv, dq and dk. fresh: those to be written whole, 1 dq, 2 dk, 4 dv. Blocks of a chunk are
/// neighbours, so that what they share is read once.
/// grid (ceil(dhv / VALUES) + KEY_BLOCKS ceil(dqk / KEYS), N, B NH), block 256.
#define WIDE_GRADIENTS(VALUES, KEYS)                                                                                   \
    extern "C" __global__ void __launch_bounds__(2 * GROUP, 1) mlstm_wide_gradients_##VALUES##_##KEYS(                 \
        const element_t *q, const element_t *k, const element_t *v, const element_t *dh, const float *prefix,          \
        const float *entry, const float *inverse, const float *dd, const element_t *states, const float *normals,      \
        const element_t *dstates, const float *dnormals, element_t *dq, element_t *dk, element_t *dv, int fresh,       \
        float *a, float *leaving, float *b, float *crossing, int S, int NH, int dqk, int dhv                           \
    ) {                                                                                                                \
        int key_blocks = KEY_BLOCKS * ((dqk + KEYS - 1) / KEYS), block = blockIdx.x;                                   \
        if (block < key_blocks)                                                                                        \
            wide_queries_and_keys<KEYS>(q, k, v, dh, prefix, entry, inverse, dd, states, normals, dstates, dnormals,   \
                                        dq, dk, fresh, a, leaving, b, S, NH, dqk, dhv, block);                         \
        else                                                                                                           \
            wide_values<VALUES>(q, k, dh, prefix, entry, inverse, states, normals, dstates, dnormals, dv, fresh & 4,   \
                                crossing, S, NH, dqk, dhv, block - key_blocks);                                        \
    }
WIDE_GRADIENTS(64, 64)
#ifdef WARPGROUP
WIDE_GRADIENTS(128, 64)
WIDE_GRADIENTS(128, 128)
#endif

#endif
