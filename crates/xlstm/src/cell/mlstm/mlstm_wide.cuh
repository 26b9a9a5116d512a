// The mLSTM cell in bf16 on the tensor cores by chunks of 128 tokens; mlstm.cuh has the sizes and
// tensors, mlstm_tiles.cuh the tiles. For head sizes that are multiples of 8; the others, and f32,
// take the kernels of chunks of 64.
//
//   forward    mlstm_gates -> mlstm_wide_exponents -> mlstm_wide_states -> mlstm_wide_outputs
//   backward   mlstm_wide_tokens -> mlstm_wide_backward_states -> mlstm_wide_gradients
//              -> mlstm_wide_gates -> mlstm_backward_unwind
//
// or, where a head's states stay on the chip (mlstm_resident_forward.cu; mlstm_resident_backward.cu),
//
//   forward    mlstm_gates -> mlstm_wide_exponents -> mlstm_resident_outputs
//   backward   mlstm_wide_tokens -> mlstm_wide_states -> mlstm_resident_gradients
//              -> mlstm_wide_gates -> mlstm_backward_unwind
//
// With G_t the sum of log2-decays from the chunk's first token to t, and E_j = G_j less the log2 of
// token j's entry, all weights are differences: W_tj = 2^(G_t - E_j), e_t = 2^G_t,
// w_j = 2^(G_last - E_j). A decay of less than 2^-160 counts as that: across it, as across a reset,
// every weight is 0 in f32.
//
// No pair of tokens goes to memory: every product of pairs makes its own (mlstm_wide_pass.cuh).
//
// Gradients of the gates: with a_t = q_t . dq_t, b_j = k_j . dk_j and leaving_j what b_j has through
// the state, di_j = b_j and df_u = sum_{t>=u} (a_t - b_t + leaving_t) + sum_{j<u} leaving_j + crossing.
// R is rounded the same for both, so that what should cancel does.
//
// Work space: N = ceil(S / 128) chunks. Of element_t: states, dstates (B, NH, N, dqk, dhv), before and
// after every chunk. Of f32: normals, dnormals (B, NH, N, dqk); by token (B, NH, N, 128): prefix G,
// entry E, w, and in backward inverse, dd, dm, query = s e / N, slope = s e dd, di, df; by slice of
// features too: a, leaving, b (slices of dqk, B, NH, N, 128), crossing (slices of dhv, B, NH, N).
//
// What a chunk moves is its tokens and its states, of which chunks of 128 have half as many as those
// of 64; chunks of 256 gain less than their products cost. A multiprocessor's share of L2 is the next
// limit: hence 128 x 128 results a block in backward; outputs, whose blocks are shorter, do better with
// two blocks of 64 x 128 a multiprocessor.

/// Tokens of a chunk: two of L.
#define CHUNK 128
#define LOG2_E 1.4426950408889634f

__device__ __forceinline__ float power(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// The tokens of a chunk, of one head.
__device__ __forceinline__ Rows chunk_of(const element_t *x, int bh, int chunk, int S, int NH, int width) {
    int start = chunk * CHUNK;
    return {x + token_at(bh, start, S, NH, width), NH * width, min(CHUNK, S - start), width, true};
}

/// G and E of token tid of a chunk; by 128 threads of which each gets its own, and G of the last.
__device__ void chunk_exponents(
    const Gates &gates, int bh, int chunk, int S, int NH, int dqk, int flags, float *prefix, float *entry, float *last
) {
    __shared__ float totals[4];
    int tid = threadIdx.x, t = chunk * CHUNK + tid;
    float first = chunk == 0 ? initial_stabilizer(gates.n0, gates.m0, bh, dqk, flags) : 0.0f;
    Gate gate = gate_of(gates.i, gates.f, gates.marks, bh / NH, bh % NH, t, S, NH, flags);
    const float *m = gates.stabilizers + (long long)bh * S;
    float g = 0.0f, a = NEG_INFINITY;
    if (t < S) exponents(gate, t > 0 ? m[t - 1] : first, m[t], flags, &g, &a);
    float sum = is_reset(gate.mark) ? -160.0f : fmaxf(g * LOG2_E, -160.0f);
    for (int step = 1; step < 32; step <<= 1) {
        float left = __shfl_up_sync(ALL, sum, step);
        if (LANE >= step) sum += left;
    }
    if (LANE == 31) totals[tid / 32] = sum;
    __syncthreads();
    float before = 0.0f, all = 0.0f;
#pragma unroll
    for (int warp = 0; warp < 4; warp++) {
        if (warp == tid / 32) before = all;
        all += totals[warp];
    }
    *prefix = before + sum;
    *entry = *prefix - a * LOG2_E;
    *last = all;
}

#ifdef ELEMENT_BF16

/// A warp's 16 rows of results, WIDTH columns, go to rows of a matrix, or, with add, are added to them.
template <int WIDTH>
__device__ __forceinline__ void
put_rows(const float (&sum)[WIDTH / 8][4], const Rows &of, int row, int column, bool add) {
    element_t *to = (element_t *)of.from;
    int c = column + LANE % 4 * 8;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int r = row + half * 8 + LANE / 4;
        element_t *at = to + (long long)r * of.stride + c;
        Piece piece[WIDTH / 32] = {};
        if (add) {
#pragma unroll
            for (int g = 0; g < WIDTH / 32; g++)
                if (r < of.rows && c + g * 32 < of.width) piece[g] = read((const Vector *)(at + g * 32));
        }
#pragma unroll
        for (int g = 0; g < WIDTH / 32; g++) {
            if (add) exchange(piece[g]);
#pragma unroll
            for (int n = 0; n < 4; n++) {
                Pair &pair = piece[g].pair[n];
                float x = sum[g * 4 + n][half * 2], y = sum[g * 4 + n][half * 2 + 1];
                pair = add ? pair_of(first(pair) + x, second(pair) + y) : pair_of(x, y);
            }
            exchange(piece[g]);
            if (r < of.rows && c + g * 32 < of.width) write((Vector *)(at + g * 32), piece[g]);
        }
    }
}

/// A group's rows of results are asked for, to be added to later.
template <int OUT> __device__ __forceinline__ void prefetch_rows(const Rows &of, int row, int column) {
    const int IN_LINE = 64, LINES = OUT / IN_LINE;
    for (int i = MEMBER; i < L * LINES; i += GROUP) {
        int r = row + i / LINES, c = column + i % LINES * IN_LINE;
        if (r < of.rows && c < of.width)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(of.from + (long long)r * of.stride + c));
    }
}

/// 16 bytes; asynchronous.
__device__ __forceinline__ void fetch_piece(void *to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// ---- Products of a group of four warps, on Hopper ----

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define WARPGROUP

// The tiles' order of 16-byte pieces is the hardware's 128-byte swizzle, where tiles start at
// multiples of 1024 bytes. A descriptor names a tile by its address, the bytes between 8 rows, and,
// where features lie along the rows of the right side's transpose, those to the tile on its right,
// which is `right` tiles on.
__device__ __forceinline__ unsigned long long tile_descriptor(const Tile &tile, int right = 1) {
    const unsigned long long SWIZZLE_128 = 1ull << 62, EIGHT_ROWS = 1024 >> 4, TILE = sizeof(Tile) >> 4;
    return SWIZZLE_128 | EIGHT_ROWS << 32 | right * TILE << 16 | (shared_address(&tile) & 0x3ffff) >> 4;
}
/// In a descriptor, 16 on along the rows, and 16 rows on.
#define ALONG 2
#define DOWN 128

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Until all that was committed is there, but for the last so many.
template <int UNDER_WAY = 0> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(UNDER_WAY) : "memory");
}

#define FOUR(x) "+f"((x)[0]), "+f"((x)[1]), "+f"((x)[2]), "+f"((x)[3])
/// to += left right, 64 x 32; RIGHT: the right side's tiles have its columns along their rows.
template <int RIGHT>
__device__ __forceinline__ void multiply_group(float (&to)[4][4], unsigned long long left, unsigned long long right) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %18, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
        "}, %16, %17, p, 1, 1, 0, %19;}"
        : FOUR(to[0]), FOUR(to[1]), FOUR(to[2]), FOUR(to[3])
        : "l"(left), "l"(right), "r"(1), "n"(RIGHT)
    );
}
/// to += left right, 64 x 64; RIGHT: the right side's tiles have its columns along their rows, LEFT: the left side's
/// have its rows along theirs.
template <int RIGHT, int LEFT = 0>
__device__ __forceinline__ void multiply_group(float (&to)[8][4], unsigned long long left, unsigned long long right) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, %32, %33, p, 1, 1, %36, %35;}"
        : FOUR(to[0]), FOUR(to[1]), FOUR(to[2]), FOUR(to[3]), FOUR(to[4]), FOUR(to[5]), 
          FOUR(to[6]), FOUR(to[7])
        : "l"(left), "l"(right), "r"(1), "n"(RIGHT), "n"(LEFT)
    );
}
template <int RIGHT>
__device__ __forceinline__ void multiply_group(float (&to)[8][4], const unsigned (&left)[4], unsigned long long right) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;}"
        : FOUR(to[0]), FOUR(to[1]), FOUR(to[2]), FOUR(to[3]), FOUR(to[4]), FOUR(to[5]), 
          FOUR(to[6]), FOUR(to[7])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "r"(1), "n"(RIGHT)
    );
}
/// The same, 64 x 128.
template <int RIGHT, int LEFT = 0>
__device__ __forceinline__ void multiply_group(float (&to)[16][4], unsigned long long left, unsigned long long right) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
        "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, %64, %65, p, 1, 1, %68, %67;}"
        : FOUR(to[0]), FOUR(to[1]), FOUR(to[2]), FOUR(to[3]), FOUR(to[4]), FOUR(to[5]), 
          FOUR(to[6]), FOUR(to[7]), FOUR(to[8]), FOUR(to[9]), FOUR(to[10]), FOUR(to[11]), 
          FOUR(to[12]), FOUR(to[13]), FOUR(to[14]), FOUR(to[15])
        : "l"(left), "l"(right), "r"(1), "n"(RIGHT), "n"(LEFT)
    );
}
template <int RIGHT>
__device__ __forceinline__ void multiply_group(float (&to)[16][4], const unsigned (&left)[4], unsigned long long right) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
        "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;}"
        : FOUR(to[0]), FOUR(to[1]), FOUR(to[2]), FOUR(to[3]), FOUR(to[4]), FOUR(to[5]), 
          FOUR(to[6]), FOUR(to[7]), FOUR(to[8]), FOUR(to[9]), FOUR(to[10]), FOUR(to[11]), 
          FOUR(to[12]), FOUR(to[13]), FOUR(to[14]), FOUR(to[15])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "r"(1), "n"(RIGHT)
    );
}
#endif

// ---- States ----

#define WIDE_STATE_STAGES 4
/// Blocks that a multiprocessor is to hold.
#define WALK_BLOCKS(COLUMNS) (COLUMNS == L ? 3 : 2)

/// 64 tokens of two matrices, and the tokens' factors in C and in n.
template <int COLUMNS> struct Walk {
    struct {
        Tile left, right[COLUMNS / L];
    } stage[WIDE_STATE_STAGES];
    float factor[WIDE_STATE_STAGES][2][L];
};

/// What a block of mlstm_wide_states or mlstm_wide_backward_states has: 64 x COLUMNS of a state, 16
/// rows a warp, and 64 numbers of its normaliser.
template <int COLUMNS> struct StateTile {
    float sum[COLUMNS / 8][4];
    ColumnSum normal;

    /// f(number, row, column) for each.
    template <class F> __device__ __forceinline__ void each(F f) {
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) f(sum[n][i], WARP * 16 + i / 2 * 8 + LANE / 4, n * 8 + LANE % 4 * 2 + i % 2);
    }
    /// sum += (factor left)^T right, and, with_n, normal += (normal_factor left)^T 1, of 64 tokens.
    __device__ __forceinline__ void
    add(Tile &left, Tile *right, const float *factor, const float *normal_factor, bool with_n) {
        unsigned whole[4][4], a[4][4];
        // Hidden from the compiler, which else keeps the places from one use to the next in registers.
        int row = WARP * 16;
        asm volatile("" : "+r"(row));
#pragma unroll
        for (int k = 0; k < 4; k++) load_left<true>(whole[k], left, row, k * 16);
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float2 x = *(const float2 *)&factor[k * 16 + i / 2 * 8 + LANE % 4 * 2];
                a[k][i] = pair_of(x.x * first(whole[k][i]), x.y * second(whole[k][i]));
            }
#ifdef WARPGROUP
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; k++) multiply_group<1>(sum, a[k], tile_descriptor(right[0]) + k * DOWN);
        products_commit();
#else
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int n = 0; n < COLUMNS / 16; n++) {
                unsigned b[4];
                load_right<false>(b, right[n / 4], k * 16, n % 4 * 16);
                multiply_add(sum[2 * n], a[k], b[0], b[1]);
                multiply_add(sum[2 * n + 1], a[k], b[2], b[3]);
            }
#endif
        if (with_n) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                // The factors in three parts of bf16, a column of the right side each.
                unsigned b[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float2 x = *(const float2 *)&normal_factor[k * 16 + i * 8 + LANE % 4 * 2];
                    b[i] = 0;
#pragma unroll
                    for (int part = 0; part < 3; part++) {
                        Pair pair = pair_of(x.x, x.y);
                        x.x -= first(pair), x.y -= second(pair);
                        if (LANE / 4 == part) b[i] = pair;
                    }
                }
                multiply_add(normal.x, whole[k], b[0], b[1]);
            }
        }
#ifdef WARPGROUP
        products_wait();
#endif
    }
    /// Along the sequence, or back. `direction` 1: sum = e_last sum + (factor left)^T right of each
    /// chunk in turn, from 0 on; -1: from the last on. Before each, it goes to states and normals.
    __device__ void walk(
        Walk<COLUMNS> &s, const element_t *left, const element_t *right, const float *factor, const float *normal_factor,
        const float *prefix, element_t *states, float *normals, int bh, int r0, int c0, bool with_n, int direction,
        int additions, int S, int NH, int dqk, int dhv
    ) {
        const int tiles = CHUNK / L;
        int chunks = (S + CHUNK - 1) / CHUNK, tid = threadIdx.x;
        long long first_chunk = (long long)bh * chunks;
        auto chunk_at = [&](int step) { return direction > 0 ? step / tiles : chunks - 1 - step / tiles; };
        auto pipeline = start<WIDE_STATE_STAGES>(additions * tiles, [&](int step, int stage) {
            int chunk = chunk_at(step), row = step % tiles * L;
            auto &to = s.stage[stage];
            fetch(to.left, chunk_of(left, bh, chunk, S, NH, dqk), row, r0);
#pragma unroll
            for (int i = 0; i < COLUMNS / L; i++)
                fetch(to.right[i], chunk_of(right, bh, chunk, S, NH, dhv), row, c0 + i * L);
            long long token = (first_chunk + chunk) * CHUNK + row + tid % 16 * 4;
            if (tid < 32) fetch_piece(&s.factor[stage][tid / 16][tid % 16 * 4], (tid < 16 ? factor : normal_factor) + token);
        });
        auto keep_of = [&](int chunk) { return power(prefix[(first_chunk + chunk) * CHUNK + CHUNK - 1]); };
        float keep = keep_of(chunk_at(0));
        for (int chunk_step = 0; chunk_step < chunks; chunk_step++) {
            int chunk = chunk_at(chunk_step * tiles);
            Rows to = {states + (first_chunk + chunk) * dqk * dhv, dhv, dqk, dhv, true};
            put_rows<COLUMNS>(sum, to, r0 + WARP * 16, c0, false);
            if (with_n) put(normal, [&](int row, float x) {
                if (r0 + row < dqk) normals[(first_chunk + chunk) * dqk + r0 + row] = x;
            });
            if (chunk_step == additions) break;
            each([&](float &x, int, int) { x *= keep; });
#pragma unroll
            for (int i = 0; i < 4; i++) normal.x[i] *= keep;
            // Of the next chunk, ahead.
            if (chunk_step + 1 < chunks) keep = keep_of(chunk_at((chunk_step + 1) * tiles));
            for (int step = chunk_step * tiles; step < (chunk_step + 1) * tiles; step++) {
                int stage = pipeline.arrive(step);
                auto &from = s.stage[stage];
                add(from.left, from.right, s.factor[stage][0], s.factor[stage][1], with_n);
            }
        }
    }
};

#endif
