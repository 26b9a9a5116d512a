// Tiles of 64 x 64 numbers in shared memory and their products, each by a group of 128 threads.
//
// With bf16 activations the products run on the tensor cores: operands in bf16, sums in f32.
// With f32 activations they are exact f32 FMA, to check the others by. Everything else is common:
// a kernel fetches tiles by asynchronous 16-byte copies, a step ahead of the products that use
// them, and reads its sums through ROW and COLUMN.

#define GROUP 128
/// Numbers in 16 bytes.
#define IN_VECTOR (16 / (int)sizeof(element_t))
#define MEMBER ((int)threadIdx.x % GROUP)
/// Where a block has two products to do at once, each of its two sides of 128 threads does one.
#define SIDE ((int)threadIdx.x / GROUP)

/// Two neighbours of a row.
#ifdef ELEMENT_BF16
typedef unsigned Pair;
__device__ __forceinline__ float first(Pair pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float second(Pair pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ Pair pair_of(float x, float y) {
    Pair pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    return pair;
}
#else
typedef float2 Pair;
__device__ __forceinline__ float first(Pair pair) { return pair.x; }
__device__ __forceinline__ float second(Pair pair) { return pair.y; }
__device__ __forceinline__ Pair pair_of(float x, float y) { return {x, y}; }
#endif
/// As many as one access moves. Through uint4, since a struct is moved member by member.
struct __align__(16) Vector {
    Pair pair[IN_VECTOR / 2];
};
__device__ __forceinline__ Vector read(const Vector *from) {
    uint4 x = *(const uint4 *)from;
    return *(const Vector *)&x;
}
__device__ __forceinline__ void write(Vector *to, const Vector &x) { *(uint4 *)to = *(const uint4 *)&x; }
__device__ __forceinline__ float dot(const Vector &a, const Vector &b, float sum) {
#pragma unroll
    for (int i = 0; i < IN_VECTOR / 2; i++)
        sum = fmaf(second(a.pair[i]), second(b.pair[i]), fmaf(first(a.pair[i]), first(b.pair[i]), sum));
    return sum;
}

/// Columns that a row of work space takes, so that every row starts at a multiple of 16 bytes.
__device__ __forceinline__ int padded(int width) { return (width + 7) / 8 * 8; }

#ifdef ELEMENT_BF16
/// The 16-byte pieces of a row change places by the row's number: eight rows of a column of
/// pieces lie in different banks.
struct __align__(16) Tile {
    static const int PITCH = L;
    element_t x[L * PITCH];
    __device__ __forceinline__ element_t *at(int row, int column) { return x + row * PITCH + (column ^ row % 8 * 8); }
};
#else
struct __align__(16) Tile {
    static const int PITCH = L + 4;
    element_t x[L * PITCH];
    __device__ __forceinline__ element_t *at(int row, int column) { return x + row * PITCH + column; }
};
#endif

/// Some rows of a matrix; zero outside.
struct Rows {
    const element_t *from;
    int stride, rows, width;
    /// Whether every row is made of 16-byte pieces at multiples of 16 bytes.
    bool aligned;
};
__device__ __forceinline__ bool is_aligned(const element_t *x, int width) {
    return width % IN_VECTOR == 0 && (unsigned long long)x % 16 == 0;
}
/// Where a token's numbers of one head start, in (B, S, NH, width).
__device__ __forceinline__ long long token_at(int bh, int t, int S, int NH, int width) {
    return (((long long)(bh / NH) * S + t) * NH + bh % NH) * width;
}
/// The tokens of a chunk, of one head.
__device__ __forceinline__ Rows tokens(const element_t *x, int bh, int chunk, int S, int NH, int width) {
    int start = chunk * L;
    return {x + token_at(bh, start, S, NH, width), NH * width, min(L, S - start), width, is_aligned(x, width)};
}
/// A matrix of the work space, its rows padded; `index` counts matrices.
__device__ __forceinline__ Rows stored(const element_t *x, long long index, int rows, int width) {
    return {x + index * rows * padded(width), padded(width), rows, padded(width), true};
}

__device__ __forceinline__ unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

/// tile = 64 rows and columns from (row, column) on; asynchronous.
__device__ __forceinline__ void fetch(Tile &tile, const Rows &of, int row, int column) {
    if (of.aligned) {
        const int AT_ONCE = GROUP * IN_VECTOR / L;
        // Hidden from the compiler, which else keeps the addresses of every fetch of a loop in registers.
        int member = MEMBER;
        asm volatile("" : "+r"(member));
        int r = member * IN_VECTOR / L, c = member * IN_VECTOR % L, rows = column + c < of.width ? of.rows - row - r : 0;
        const element_t *from = of.from + (row + r) * of.stride + column + c;
        unsigned to = shared_address(tile.at(r, c));
        // A tile that is whole needs no test a row.
        if (row + L <= of.rows && column + L <= of.width) {
#pragma unroll
            for (int i = 0; i < L; i += AT_ONCE) {
                unsigned row_to = to + i * Tile::PITCH * (int)sizeof(element_t);
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(row_to), "l"(from) : "memory");
                from += AT_ONCE * of.stride;
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < L; i += AT_ONCE) {
            unsigned row_to = to + i * Tile::PITCH * (int)sizeof(element_t);
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(row_to),
                         "l"(i < rows ? from + i * of.stride : of.from), "r"(i < rows ? 16 : 0)
                         : "memory");
        }
    } else {
        for (int i = MEMBER; i < L * L; i += GROUP) {
            int r = i / L, c = i % L;
            bool inside = row + r < of.rows && column + c < of.width;
            *tile.at(r, c) = inside ? of.from[(row + r) * of.stride + column + c] : (element_t)0;
        }
    }
}

/// Before a barrier: this thread's copies are seen by products that read shared memory by themselves.
__device__ __forceinline__ void publish_copies() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/// Fetches that run STAGES - 1 steps ahead of their use.
template <int STAGES, class Fetch> struct Pipeline {
    int steps;
    Fetch fetch;
    __device__ __forceinline__ void begin(int step) {
        if (step < steps) fetch(step, step % STAGES);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    /// The stage in which is all that fetch(step, stage) copied. For each step in turn, by the
    /// whole block; a barrier. begin(step + STAGES - 1) is to follow.
    __device__ __forceinline__ int wait(int step) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES > 1 ? STAGES - 2 : 0) : "memory");
        publish_copies();
        __syncthreads();
        return step % STAGES;
    }
    /// The same, and it follows.
    __device__ __forceinline__ int arrive(int step) {
        if (STAGES == 1) {
            __syncthreads();
            begin(step);
        }
        int stage = wait(step);
        if (STAGES > 1) begin(step + STAGES - 1);
        return stage;
    }
};
template <int STAGES, class Fetch> __device__ __forceinline__ Pipeline<STAGES, Fetch> start(int steps, Fetch fetch) {
    Pipeline<STAGES, Fetch> pipeline = {steps, fetch};
    for (int step = 0; step < STAGES - 1; step++) pipeline.begin(step);
    return pipeline;
}

/// to (rows of `width`, padded) = the tile's 64 rows times factors, from a column on.
__device__ __forceinline__ void copy_weighted(Tile &tile, const float *factors, element_t *to, int column, int width) {
#pragma unroll
    for (int i = 0; i < L * L / IN_VECTOR / GROUP; i++) {
        int piece = i * GROUP + MEMBER, r = piece / (L / IN_VECTOR), c = piece % (L / IN_VECTOR) * IN_VECTOR;
        if (column + c >= padded(width)) continue;
        Vector wide = read((const Vector *)tile.at(r, c));
        float factor = factors[r];
#pragma unroll
        for (int i = 0; i < IN_VECTOR / 2; i++)
            wide.pair[i] = pair_of(factor * first(wide.pair[i]), factor * second(wide.pair[i]));
        write((Vector *)(to + r * padded(width) + column + c), wide);
    }
}

// ---- Sums: 32 numbers of a 64 x 64 product in every thread, sum[i] at (ROW(i), COLUMN(i)) ----
// i and i + 1 are neighbours in a row for even i.

#define EACH(i) _Pragma("unroll") for (int i = 0; i < 32; i++)
#define LANE ((int)threadIdx.x % 32)
#define WARP ((int)threadIdx.x / 32 % 4)

#ifdef ELEMENT_BF16

// A warp has 32 x 32, as 2 x 4 results of m16n8k16.
#define ROW(i) (WARP / 2 * 32 + (i) / 16 * 16 + (i) % 4 / 2 * 8 + LANE / 4)
#define COLUMN(i) (WARP % 2 * 32 + (i) / 4 % 4 * 8 + LANE % 4 * 2 + (i) % 2)

/// What a thread moves at once: a quad of threads has 32 neighbours of a row, thread n those of
/// result n.
typedef Vector Piece;
#define PIECES 8
#define PIECE_SUM(piece, n) ((piece) / 16 * 16 + (piece) / 8 % 2 * 2 + (n) * 4)
#define PIECE_ROW(piece) ROW(PIECE_SUM(piece, 0))
#define PIECE_COLUMN(piece) (WARP % 2 * 32 + LANE % 4 * 8)
/// Pair n of thread t of a quad, that its sums are of, goes to pair t of thread n, and back.
__device__ __forceinline__ void exchange(Piece &piece) {
    Pair *x = piece.pair;
#pragma unroll
    for (int step = 1; step < 4; step <<= 1)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & step) continue;
            bool upper = LANE & step;
            unsigned other = __shfl_xor_sync(ALL, upper ? x[i] : x[i + step], step);
            if (upper) x[i] = other;
            else x[i + step] = other;
        }
}

/// Four 8 x 8 matrices; lane i names row i % 8 of matrix i / 8.
template <bool TRANSPOSED> __device__ __forceinline__ void load_matrices(unsigned (&to)[4], const element_t *row) {
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(shared_address(row))
                     : "memory");
}
/// Rows row to row + 15 and columns k to k + 15 of the tile, or of its transpose.
template <bool TRANSPOSED> __device__ __forceinline__ void load_left(unsigned (&to)[4], Tile &tile, int row, int k) {
    if (TRANSPOSED) load_matrices<true>(to, tile.at(k + LANE % 8 + LANE / 16 * 8, row + LANE / 8 % 2 * 8));
    else load_matrices<false>(to, tile.at(row + LANE % 16, k + LANE / 16 * 8));
}
/// Rows k to k + 15 and columns column to column + 15 of the tile, or of its transpose.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_right(unsigned (&to)[4], Tile &tile, int k, int column) {
    if (TRANSPOSED) load_matrices<false>(to, tile.at(column + LANE % 8 + LANE / 16 * 8, k + LANE / 8 % 2 * 8));
    else load_matrices<true>(to, tile.at(k + LANE % 16, column + LANE / 16 * 8));
}
__device__ __forceinline__ void multiply_add(float *sum, const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// sum += left right, either transposed or not.
template <bool LEFT, bool RIGHT> __device__ __forceinline__ void multiply(Tile &left, Tile &right, float (&sum)[32]) {
#pragma unroll
    for (int k = 0; k < L; k += 16) {
        unsigned a[2][4], b[2][4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            load_left<LEFT>(a[half], left, WARP / 2 * 32 + half * 16, k);
            load_right<RIGHT>(b[half], right, k, WARP % 2 * 32 + half * 16);
        }
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int n = 0; n < 4; n++)
                multiply_add(sum + (m * 4 + n) * 4, a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
}

/// x as a sum of three in bf16, which hold all 24 bits: a product with them is exact.
__device__ __forceinline__ void set_parts(element_t *to, int pitch, float x) {
#pragma unroll
    for (int part = 0; part < 3; part++) {
        store(to + part * pitch, x);
        x -= load(to + part * pitch);
    }
}
/// 64 f32 numbers in such parts.
struct Column {
    element_t part[3][L + 8];
    __device__ __forceinline__ void set(int i, float x) { set_parts(&part[0][i], L + 8, x); }
};
struct ColumnSum {
    float x[4] = {};
    /// The number that lanes 0, 4, 8 ... hold, of row WARP 16 + half 8 + LANE / 4.
    __device__ __forceinline__ void set(int half, float to) {
        x[half * 2] = LANE % 4 == 0 ? to : 0.0f;
        x[half * 2 + 1] = 0.0f;
    }
};
/// sum += tile column, or tile^T column.
template <bool LEFT> __device__ __forceinline__ void multiply(Tile &left, const Column &right, ColumnSum &sum) {
#pragma unroll
    for (int k = 0; k < L; k += 16) {
        unsigned a[4];
        load_left<LEFT>(a, left, WARP * 16, k);
        const element_t *part = right.part[min(LANE / 4, 2)] + k + LANE % 4 * 2;
        multiply_add(sum.x, a, *(const unsigned *)part, *(const unsigned *)(part + 8));
    }
}
/// to(row, number) for all 64 rows.
template <class To> __device__ __forceinline__ void put(const ColumnSum &sum, To to) {
    float last[2] = {__shfl_down_sync(ALL, sum.x[0], 1), __shfl_down_sync(ALL, sum.x[2], 1)};
    if (LANE % 4 == 0)
        for (int half = 0; half < 2; half++)
            to(WARP * 16 + half * 8 + LANE / 4, sum.x[half * 2] + (sum.x[half * 2 + 1] + last[half]));
}

/// sums[0][row] + sums[1][row] = the sum of a row of x(0) ... x(31).
template <class X> __device__ __forceinline__ void add_rows(X x, float (*sums)[L]) {
#pragma unroll
    for (int i = 0; i < 32; i += (i % 4 ? 14 : 2)) {
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < 4; n++) sum += x(i + n * 4) + x(i + n * 4 + 1);
        sum += __shfl_xor_sync(ALL, sum, 1);
        sum += __shfl_xor_sync(ALL, sum, 2);
        if (LANE % 4 == 0) sums[WARP % 2][ROW(i)] = sum;
    }
}

#else

// A thread has 8 rows and 2 x 2 columns.
#define ROW(i) (MEMBER / 16 * 8 + (i) / 4)
#define COLUMN(i) (MEMBER % 16 * 2 + (i) % 4 / 2 * 32 + (i) % 2)

/// What a thread moves at once.
struct Piece {
    Pair pair[1];
};
__device__ __forceinline__ Piece read(const Piece *from) { return *from; }
__device__ __forceinline__ void write(Piece *to, const Piece &x) { *to = x; }
#define PIECES 2
#define PIECE_SUM(piece, n) (piece)
#define PIECE_ROW(piece) ROW(piece)
#define PIECE_COLUMN(piece) COLUMN(piece)
__device__ __forceinline__ void exchange(Piece &) {}

/// sum += left right, either transposed or not.
template <bool LEFT, bool RIGHT> __device__ __forceinline__ void multiply(Tile &left, Tile &right, float (&sum)[32]) {
#pragma unroll 2
    for (int k = 0; k < L; k += 4) {
        float a[4][8], b[4][4];
        if (LEFT) {
#pragma unroll
            for (int i = 0; i < 8; i++)
                *(float4 *)&a[i / 2][i % 2 * 4] = *(float4 *)left.at(k + i / 2, ROW(0) + i % 2 * 4);
        } else {
#pragma unroll
            for (int r = 0; r < 8; r++) {
                float4 x = *(float4 *)left.at(ROW(0) + r, k);
                a[0][r] = x.x, a[1][r] = x.y, a[2][r] = x.z, a[3][r] = x.w;
            }
        }
        if (RIGHT) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                float4 x = *(float4 *)right.at(COLUMN(c), k);
                b[0][c] = x.x, b[1][c] = x.y, b[2][c] = x.z, b[3][c] = x.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++)
                *(float2 *)&b[i / 2][i % 2 * 2] = *(float2 *)right.at(k + i / 2, COLUMN(i % 2 * 2));
        }
#pragma unroll
        for (int step = 0; step < 4; step++) EACH(i) sum[i] = fmaf(a[step][i / 4], b[step][i % 4], sum[i]);
    }
}

/// 64 numbers.
struct Column {
    float x[L];
    __device__ __forceinline__ void set(int i, float to) { x[i] = to; }
};
struct ColumnSum {
    float x = 0.0f;
};
/// sum += tile column, or tile^T column.
template <bool LEFT> __device__ __forceinline__ void multiply(Tile &left, const Column &right, ColumnSum &sum) {
    if (MEMBER < L)
        for (int k = 0; k < L; k++)
            sum.x = fmaf(LEFT ? *left.at(k, MEMBER) : *left.at(MEMBER, k), right.x[k], sum.x);
}
/// to(row, number) for all 64 rows.
template <class To> __device__ __forceinline__ void put(const ColumnSum &sum, To to) {
    if (MEMBER < L) to(MEMBER, sum.x);
}

/// sums[0][row] + sums[1][row] = the sum of a row of x(0) ... x(31).
template <class X> __device__ __forceinline__ void add_rows(X x, float (*sums)[L]) {
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
        float sum = x(i) + x(i + 1) + (x(i + 2) + x(i + 3));
        for (int step = 1; step < 16; step <<= 1) sum += __shfl_xor_sync(ALL, sum, step);
        if (MEMBER % 16 < 2) sums[MEMBER % 16][ROW(i)] = MEMBER % 16 ? 0.0f : sum;
    }
}

#endif

/// The sums are put into rows, from (row, column) on, or added to what is there.
template <bool ADD> __device__ __forceinline__ void put(const float (&sum)[32], const Rows &of, int row, int column) {
    element_t *to = (element_t *)of.from + row * of.stride + column;
    if (of.aligned) {
#pragma unroll
        for (int i = 0; i < 32; i += PIECES) {
            int r = PIECE_ROW(i), c = PIECE_COLUMN(i);
            bool inside = row + r < of.rows && column + c < of.width;
            Piece piece = {}, *at = (Piece *)(to + r * of.stride + c);
            if (ADD) {
                if (inside) piece = read(at);
                exchange(piece);
            }
#pragma unroll
            for (int n = 0; n < PIECES / 2; n++) {
                Pair &pair = piece.pair[n];
                float x = sum[PIECE_SUM(i, n)], y = sum[PIECE_SUM(i, n) + 1];
                pair = ADD ? pair_of(first(pair) + x, second(pair) + y) : pair_of(x, y);
            }
            exchange(piece);
            if (inside) write(at, piece);
        }
    } else {
        EACH(i) if (row + ROW(i) < of.rows && column + COLUMN(i) < of.width) {
            element_t *x = to + ROW(i) * of.stride + COLUMN(i);
            store(x, ADD ? load(x) + sum[i] : sum[i]);
        }
    }
}

/// Sum over the block, valid in thread 0; fixed order.
__device__ float block_sum(float x) {
    __shared__ float parts[32];
    x = warp_sum(x);
    __syncthreads();
    if (LANE == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0.0f;
    for (int i = 0; i < (int)blockDim.x / 32; i++) total += parts[i];
    return total;
}

// ---- Shared memory ----

// Bytes of dynamic shared memory that a launch gives, enough in both precisions.
#define SCORES_SHARED (66 << 10)
#define STATES_SHARED (64 << 10)
#define OUTPUTS_SHARED (50 << 10)
#define BACKWARD_SCORES_SHARED (88 << 10)
#define BACKWARD_KEYS_SHARED ((98 << 10) + 512)

// Tiles under way of a matrix (a block that walks along the sequence is one of few), and blocks
// of two products that a multiprocessor is to hold.
#ifdef ELEMENT_BF16
#define BLOCKS 2
#define STAGES 3
#define SCORE_STAGES 2
#define STATE_STAGES 4
#else
#define BLOCKS 1
#define STAGES 1
#define SCORE_STAGES 1
#define STATE_STAGES 1
#endif

/// Of mlstm_states and mlstm_backward_states.
struct States {
    Tile left[STATE_STAGES], right[STATE_STAGES];
};
static_assert(sizeof(States) <= STATES_SHARED);
