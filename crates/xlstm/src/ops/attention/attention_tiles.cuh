// Causal attention on tensor cores: what its kernels share. Operands are bf16, sums f32 (m16n8k16).
//
// A block is four warps. Each has MT tiles of 16 rows of what the block owns (queries, or keys where it
// makes their gradients) and goes through the other side in tiles of 64, which asynchronous copies bring
// into one of two places in shared memory while the other is worked on. A head of N features, a multiple of
// 8, is filled up with zeros to W = 32, 64, 96 or 128 columns.
//
// Sizes: S tokens, C rows of the cache (0 without one), H heads, D = H N. q, k, v, y, their gradients
// (B, S, D), the cache and its gradients (B, C, D): bf16; first, position (B, S), logs and shares
// (B, H, S): f32. The cache is in the order of its tokens here (attention_unroll of attention.cu), a token
// u < 0 row C + u; its gradients are a ring, as it was. Grids: (B H, tiles of rows), block 128.

/// Tokens of a tile of the other side.
#define OTHERS 64
#define WARPS 4
#define THREADS (32 * WARPS)
#define LANE ((int)threadIdx.x % 32)
#define WARP ((int)threadIdx.x / 32)
#define ALL 0xffffffffu
#define LOG2_E 1.4426950408889634f
#define EACH(i, n) _Pragma("unroll") for (int i = 0; i < (n); i++)

extern __shared__ __align__(16) unsigned char space[];

__device__ __forceinline__ unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ unsigned pair_of(float x, float y) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    return pair;
}
/// Over the four lanes that share a row of a result.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(ALL, x, 1);
    return x + __shfl_xor_sync(ALL, x, 2);
}

// ---- Rows in memory ----

/// What one head of one sequence has of q, k, v, y or a gradient, and before it of the cache.
struct Rows {
    bf16_t *tokens, *cache;
    int S, C, D, N;
    __device__ __forceinline__ bf16_t *at(int u) const {
        return u >= 0 ? tokens + (long long)u * D : cache + (long long)(C + u) * D;
    }
};
__device__ __forceinline__ Rows rows_of(const bf16_t *tokens, int S, int H, int N) {
    long long D = (long long)H * N, b = blockIdx.x / H, column = (long long)(blockIdx.x % H) * N;
    return {(bf16_t *)tokens + b * S * D + column, nullptr, S, 0, (int)D, N};
}
__device__ __forceinline__ Rows rows_of(const bf16_t *tokens, const bf16_t *cache, int S, int C, int H, int N) {
    Rows rows = rows_of(tokens, S, H, N);
    if (cache) rows.cache = (bf16_t *)rows_of(cache, C, H, N).tokens, rows.C = C;
    return rows;
}

// ---- Tiles in shared memory: rows of W columns, by their addresses ----

/// By what the 16-byte pieces of a row change places: eight rows of a piece lie in different banks.
template <int W> __device__ __forceinline__ int turn_of(int row) { return W % 64 == 0 ? row % 8 : row / 2 % 4; }
template <int W> __device__ constexpr int tile_bytes(int rows) { return rows * W * 2; }

/// tile = ROWS rows from token `start` on, which do not reach over 0, zero where there is none;
/// asynchronous, by the whole block. Fewer copies UNROLLED take fewer registers.
template <int W, int ROWS, int UNROLLED = ROWS> __device__ __forceinline__ void fetch(unsigned tile, const Rows &rows, int start) {
    const int PIECES = W / 8;
    const bf16_t *from = rows.at(start);
    int low = start < 0 ? -rows.C - start : 0, high = start < 0 ? ROWS : rows.S - start;
#pragma unroll UNROLLED
    for (int i = 0; i < ROWS * PIECES / THREADS; i++) {
        int n = i * THREADS + threadIdx.x, row = n / PIECES, piece = n % PIECES;
        bool has = row >= low && row < high && piece * 8 < rows.N;
        // Where nothing is copied nothing is read.
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                         tile + row * W * 2 + (piece ^ turn_of<W>(row)) * 16
                     ),
                     "l"(from + (row * rows.D + piece * 8)), "r"(has ? 16 : 0)
                     : "memory");
    }
}
/// to[i] = from[start + i], zero outside 0..S, of 64; asynchronous, by the whole block.
__device__ __forceinline__ void fetch_numbers(float *to, const float *from, int start, int S) {
    int i = threadIdx.x, t = start + i;
    bool has = t >= 0 && t < S;
    if (i < OTHERS)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to + i)),
                     "l"(has ? from + t : from), "r"(has ? 4 : 0)
                     : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Until all that was fetched is there, for the whole block, and nobody works on what came before.
__device__ __forceinline__ void arrive() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
}

/// Which of four 8 x 8 matrices a lane names a row of: rows 0 to 15 and columns 0 to 15 of a part of a
/// tile, the lower rows before the right columns, or the other way round.
template <int W> struct Reader {
    unsigned row, turn;
    __device__ __forceinline__ Reader(bool rows_first) {
        int r = rows_first ? LANE % 16 : LANE % 8 + LANE / 16 * 8, half = rows_first ? LANE / 16 : LANE / 8 % 2;
        row = r * W * 2;
        turn = (half ^ turn_of<W>(r)) * 16;
    }
    /// Of the part from (row, column) on, multiples of 8 and 16.
    __device__ __forceinline__ unsigned at(unsigned tile, int from, int column) const {
        return tile + row + from * W * 2 + (turn ^ column * 2);
    }
};
template <bool TRANSPOSED> __device__ __forceinline__ void load_matrices(unsigned (&to)[4], unsigned row) {
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(row)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(row)
                     : "memory");
}
__device__ __forceinline__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- Products of a warp. Number i of sum[m][n] is at row 16 m + LANE / 4 + i / 2 * 8 of the warp's,
// column 8 n + LANE % 4 * 2 + i % 2. ----

/// Reads a warp's rows of a tile, 16 columns at a time, as left sides.
template <int W, int MT> struct Own {
    unsigned tile;
    Reader<W> reader;
    __device__ __forceinline__ Own(unsigned tile) : tile(tile + WARP * MT * 16 * W * 2), reader(true) {}
    __device__ __forceinline__ void load(unsigned (&to)[MT][4], int k) const {
        EACH(m, MT) load_matrices<false>(to[m], reader.at(tile, m * 16, k * 16));
    }
};
/// The same, kept in registers.
template <int W, int MT> struct Kept {
    unsigned x[W / 16][MT][4];
    __device__ __forceinline__ void keep(const Own<W, MT> &own) { EACH(k, W / 16) own.load(x[k], k); }
    __device__ __forceinline__ void load(unsigned (&to)[MT][4], int k) const {
        EACH(m, MT) EACH(i, 4) to[m][i] = x[k][m][i];
    }
};

/// sum (own rows, 8 NT tokens) = own · tokens from `from` on, over the features.
template <int W, int MT, int NT, class Left>
__device__ __forceinline__ void scores(
    float (&sum)[MT][NT][4], const Left &own, const Reader<W> &reader, unsigned tile, int from
) {
    EACH(m, MT) EACH(n, NT) EACH(i, 4) sum[m][n][i] = 0.0f;
    EACH(k, W / 16) {
        unsigned a[MT][4];
        own.load(a, k);
        EACH(n, NT / 2) {
            unsigned b[4];
            load_matrices<false>(b, reader.at(tile, from + n * 16, k * 16));
            EACH(m, MT) {
                multiply_add(sum[m][2 * n], a[m], b[0], b[1]);
                multiply_add(sum[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

/// sum (own rows, W features) += weights (own rows, 8 NT tokens) times the tokens from `from` on.
template <int W, int MT, int NT>
__device__ __forceinline__ void add_weighted(
    float (&sum)[MT][W / 8][4], const float (&weights)[MT][NT][4], const Reader<W> &reader, unsigned tile, int from
) {
    EACH(k, NT / 2) {
        unsigned a[MT][4];
        EACH(m, MT) EACH(i, 4)
            a[m][i] = pair_of(weights[m][2 * k + i / 2][i % 2 * 2], weights[m][2 * k + i / 2][i % 2 * 2 + 1]);
        EACH(n, W / 16) {
            unsigned b[4];
            load_matrices<true>(b, reader.at(tile, from + k * 16, n * 16));
            EACH(m, MT) {
                multiply_add(sum[m][2 * n], a[m], b[0], b[1]);
                multiply_add(sum[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

/// Pair n of thread t of a quad goes to pair t of thread n.
__device__ __forceinline__ void exchange(unsigned (&x)[4]) {
    EACH(s, 2) {
        const int STEP = 1 << s;
        EACH(i, 4) {
            if (i & STEP) continue;
            bool upper = LANE & STEP;
            unsigned other = __shfl_xor_sync(ALL, upper ? x[i] : x[i + STEP], STEP);
            if (upper) x[i] = other;
            else x[i + STEP] = other;
        }
    }
}

/// A warp's rows, the first of them token `start`, are written, or added to what is there; each times its
/// factor. Rows that there are not are left out.
template <int W, int MT, class Factor>
__device__ __forceinline__ void put(
    const Rows &rows, int start, const float (&sum)[MT][W / 8][4], bool fresh, Factor factor
) {
    EACH(m, MT) EACH(half, 2) {
        int u = start + m * 16 + half * 8 + LANE / 4;
        float times = factor(m, half);
        EACH(part, W / 32) {
            unsigned pairs[4];
            int column = part * 32 + LANE % 4 * 8;
            bool inside = u >= 0 && u < rows.S && column < rows.N;
            bf16_t *to = rows.at(inside ? u : 0) + column;
            const float (*from)[4] = &sum[m][part * 4];
            if (fresh) {
                EACH(n, 4) pairs[n] = pair_of(from[n][half * 2] * times, from[n][half * 2 + 1] * times);
                exchange(pairs);
            } else {
                uint4 old = inside ? *(const uint4 *)to : make_uint4(0, 0, 0, 0);
                pairs[0] = old.x, pairs[1] = old.y, pairs[2] = old.z, pairs[3] = old.w;
                exchange(pairs);
                EACH(n, 4) {
                    float x = __uint_as_float(pairs[n] << 16), y = __uint_as_float(pairs[n] & 0xffff0000u);
                    pairs[n] = pair_of(fmaf(from[n][half * 2], times, x), fmaf(from[n][half * 2 + 1], times, y));
                }
                exchange(pairs);
            }
            if (inside) *(uint4 *)to = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
}

// ---- Who sees whom ----

/// The first token that token t sees; beyond the end, as of a pad.
__device__ __forceinline__ int first_of(const float *first, int t, int S) { return t < S ? (int)first[t] : t + 1; }
__device__ __forceinline__ int warp_min(int x) { return __reduce_min_sync(ALL, x); }
__device__ __forceinline__ int warp_max(int x) { return __reduce_max_sync(ALL, x); }
/// The number of the tile that token u is in.
__device__ __forceinline__ int tile_of(int u) { return u >> 6; }

/// The lowest token that a tile of QUERIES sees; S where there is none.
template <int QUERIES> __device__ __forceinline__ int lowest_key(const float *first, int start, int S, int C) {
    int lowest = S;
    for (int t = start + LANE; t < min(start + QUERIES, S); t += 32) {
        int seen = (int)first[t];
        if (seen <= t) lowest = min(lowest, seen);
    }
    return max(warp_min(lowest), -C);
}

/// What a warp's queries see: the range that the firsts of its rows lie in.
template <int MT> struct Sight {
    const float *first;
    int start, S, lowest, highest;
    __device__ __forceinline__ Sight(const float *first, int start, int S) : first(first), start(start), S(S) {
        lowest = 0x7fffffff, highest = -0x7fffffff;
        EACH(m, MT) EACH(half, 2) lowest = min(lowest, seen(m, half)), highest = max(highest, seen(m, half));
        lowest = warp_min(lowest), highest = warp_max(highest);
    }
    __device__ __forceinline__ int row(int m, int half) const { return start + m * 16 + half * 8 + LANE / 4; }
    __device__ __forceinline__ int seen(int m, int half) const { return first_of(first, row(m, half), S); }
    __device__ __forceinline__ bool is_pad(int m, int half) const { return seen(m, half) > row(m, half); }
    /// Whether some query may see a token of `count` from u on.
    __device__ __forceinline__ bool reaches(int u, int count) const {
        return u < start + MT * 16 && u + count > lowest;
    }
    /// Whether every query sees all of them, but for pads.
    __device__ __forceinline__ bool is_full(int u, int count) const { return u + count <= start + 1 && u >= highest; }
    /// Sets scores of 8 NT tokens from u on to minus infinity where they are not seen; `pads` has a bit for
    /// each of these tokens.
    template <int NT> __device__ __forceinline__ void mask(float (&scores)[MT][NT][4], int u, unsigned long long pads) const {
        if (!pads && is_full(u, 8 * NT)) return;
        EACH(m, MT) EACH(half, 2) {
            int from = seen(m, half) - u, to = row(m, half) - u;
            EACH(n, NT) EACH(i, 2) {
                int column = n * 8 + LANE % 4 * 2 + i;
                if (column < from || column > to || pads >> column & 1) scores[m][n][half * 2 + i] = NEG_INFINITY;
            }
        }
    }
};

/// The pads among the 64 keys of a tile, as bits; `first` is of these keys.
__device__ __forceinline__ unsigned long long pads_of(const float *first, int start) {
    unsigned low = __ballot_sync(ALL, start >= 0 && (int)first[LANE] > start + LANE);
    unsigned high = __ballot_sync(ALL, start >= 0 && (int)first[LANE + 32] > start + LANE + 32);
    return (unsigned long long)high << 32 | low;
}
