// A few rows times several weight matrices, y_m = x W_m^T, for the steps of generation: what a block
// reads of W is under way before anything else, and each makes the rows x itself, of what the layers
// before have left, so that a layer's norm or gate needs no kernel of its own.
//
//   x = in                              PLAIN
//   x = sigmoid(gate) ∘ norm(in + added), by groups of features     MEAN_SQUARE, LAYER
//   x = SiLU(gate) ∘ in                                              SWIGLU
//
// Sizes: R rows of K features, K a multiple of 32; W_m (O_m, K). A block has 16 rows of one W; its
// warps take turns along K. HALF: it has 8, and there are twice as many blocks. Bytes of W over the memory's rate is the floor.
// Launch: grid (tiles of all W, at least 1), block 256, dynamic shared memory as few_rows.rs counts.

#define WARPS 8
/// Rows of W that a block has at most.
#define TILE 16
/// Features that a warp takes at once, eight a thread.
#define STEP 32
#define MAX_MAPS 7

#define PLAIN 0
#define MEAN_SQUARE 1
#define LAYER 2
#define SWIGLU 3

/// How the rows are made. In: x, added, gate (R, K), w, b (K), all but x may be null. Out, for those
/// who read on, written by the first block: sum (R, K) = in + added, y (R, K) = x; null where nobody does.
struct Preparation {
    const element_t *in, *added, *gate;
    const float *w, *b;
    element_t *sum, *y;
    __align__(8) int kind;
    __align__(8) int groups;
    __align__(8) float offset;
    __align__(8) float eps;
};

/// One W. y (R, O) = cap(x W^T + bias): f32 where full. No bias: null; no cap: 0.
struct Map {
    const element_t *w;
    const float *bias;
    void *y;
    __align__(8) int outer;
    __align__(8) int full;
    __align__(8) float cap;
};
struct Maps {
    Map map[MAX_MAPS];
};

/// x as the product reads it: rows `pitch` apart, so that no two lanes meet in a bank.
__device__ __forceinline__ void prepare(const Preparation &p, element_t *x, int pitch, int rows, int R, int K) {
    int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    bool first = blockIdx.x == 0;
    for (int i = tid * WIDE; i < rows * K; i += 256 * WIDE) {
        int row = i / K, column = i % K;
        Wide wide = {};
        if (row < R) {
            wide = load_whole(p.in + i);
            if (p.added) {
                Wide more = load_whole(p.added + i);
                EACH_WIDE(j) wide.x[j] += more.x[j];
            }
            if (p.kind == SWIGLU) {
                Wide gate = load_whole(p.gate + i);
                EACH_WIDE(j) wide.x[j] *= gate.x[j] * sigmoid(gate.x[j]);
            }
            if (first && p.sum) store_whole(p.sum + i, wide);
        }
        store_whole(x + row * pitch + column, wide);
    }
    __syncthreads();
    if (p.kind == MEAN_SQUARE || p.kind == LAYER) {
        // Several warps share a group where there are fewer groups than warps.
        __shared__ float parts[2][WARPS];
        int size = K / p.groups, tasks = R * p.groups, each = max(1, WARPS / tasks), part = warp % each;
        for (int task = warp / each; task < tasks; task += WARPS / each) {
            int row = task / p.groups, start = task % p.groups * size;
            element_t *own = x + row * pitch + start;
            // With each > 1 a warp comes here once at most.
            auto sum_of = [&](float mine, int which) {
                mine = warp_sum(mine);
                if (each == 1) return mine;
                if (lane == 0) parts[which][warp] = mine;
                asm volatile("bar.sync %0, %1;" ::"r"(1 + task), "r"(each * 32) : "memory");
                float sum = 0.0f;
                for (int i = 0; i < each; i++) sum += parts[which][task * each + i];
                return sum;
            };
            int first_column = (part * 32 + lane) * WIDE, step = each * 32 * WIDE;
            float mean = 0.0f, square = 0.0f;
            if (p.kind == LAYER) {
                for (int i = first_column; i < size; i += step) {
                    Wide wide = load_whole(own + i);
                    EACH_WIDE(j) mean += wide.x[j];
                }
                mean = sum_of(mean, 0) / size;
            }
            for (int i = first_column; i < size; i += step) {
                Wide wide = load_whole(own + i);
                EACH_WIDE(j) square = fmaf(wide.x[j] - mean, wide.x[j] - mean, square);
            }
            float inverse = 1.0f / sqrtf(sum_of(square, 1) / size + p.eps);
            for (int i = first_column; i < size; i += step) {
                Wide wide = load_whole(own + i), scale = load_whole(p.w + start + i);
                EACH_WIDE(j) wide.x[j] = (wide.x[j] - mean) * inverse * (scale.x[j] + p.offset);
                if (p.b) {
                    Wide bias = load_whole(p.b + start + i);
                    EACH_WIDE(j) wide.x[j] += bias.x[j];
                }
                if (p.gate) {
                    Wide open = load_whole(p.gate + (long long)row * K + start + i);
                    EACH_WIDE(j) wide.x[j] *= sigmoid(open.x[j]);
                }
                store_whole(own + i, wide);
            }
        }
        __syncthreads();
    }
    if (first && p.y)
        for (int i = tid * WIDE; i < R * K; i += 256 * WIDE)
            store_whole(p.y + i, load_whole(x + i / K * pitch + i % K));
}

/// A warp's sums of its share of K: 16 rows of W by 8 TILES rows of x.
template <int TILES> struct Sums;
#ifdef ELEMENT_BF16
template <int TILES> struct Sums {
    float sum[TILES][4] = {};

    /// The order of features within a step is of no matter, if it is the same in both: a lane has eight
    /// that lie together.
    __device__ __forceinline__ void add(const Raw (&w)[2], const element_t *x, int pitch) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            uint4 b = load_raw(x + (n * 8 + lane / 4) * pitch + lane % 4 * WIDE);
            multiply_add(sum[n], w[0].x, w[1].x, w[0].y, w[1].y, b.x, b.y);
            multiply_add(sum[n], w[0].z, w[1].z, w[0].w, w[1].w, b.z, b.w);
        }
    }
    static __device__ __forceinline__ void
    multiply_add(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                     "{%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
    /// part (16, 8 TILES).
    __device__ __forceinline__ void put(float *part) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                part[(lane / 4 + i / 2 * 8) * (8 * TILES) + n * 8 + lane % 4 * 2 + i % 2] = sum[n][i];
    }
};
#else
template <int TILES> struct Sums {
    float sum[8 * TILES][2] = {};

    __device__ __forceinline__ void add(const Raw (&w)[2], const element_t *x, int pitch) {
        Wide a = unpack(w[0]), b = unpack(w[1]);
#pragma unroll
        for (int r = 0; r < 8 * TILES; r++) {
            Wide row = load_whole(x + r * pitch + threadIdx.x % 4 * WIDE);
            EACH_WIDE(j) {
                sum[r][0] = fmaf(a.x[j], row.x[j], sum[r][0]);
                sum[r][1] = fmaf(b.x[j], row.x[j], sum[r][1]);
            }
        }
    }
    __device__ __forceinline__ void put(float *part) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int r = 0; r < 8 * TILES; r++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float whole = sum[r][half];
                whole += __shfl_xor_sync(0xffffffffu, whole, 1);
                whole += __shfl_xor_sync(0xffffffffu, whole, 2);
                if (lane % 4 == 0) part[(lane / 4 + half * 8) * (8 * TILES) + r] = whole;
            }
    }
};
#endif

template <int TILES, bool HALF>
__device__ __forceinline__ void few_rows(const Preparation &p, const Maps &maps, int count, int R, int K, int pitch) {
    extern __shared__ __align__(16) char space[];
    element_t *x = (element_t *)space;
    float *parts = (float *)(x + 8 * TILES * pitch);
    const int OWN = HALF ? TILE / 2 : TILE;
    int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, steps = K / STEP;
    int which = 0, tile = blockIdx.x;
    for (; which < count && tile >= (maps.map[which].outer + OWN - 1) / OWN; which++)
        tile -= (maps.map[which].outer + OWN - 1) / OWN;
    // Where there is no W, the rows alone are wanted.
    const Map &map = maps.map[min(which, MAX_MAPS - 1)];
    int outer = which < count ? map.outer : 0, row = tile * OWN + lane / 4;
    const element_t *from = map.w + (long long)row * K + lane % 4 * WIDE;
    // Half a tile is twice as many steps.
    const int AHEAD = HALF ? 8 : 4;
    Raw w[AHEAD][2] = {};
    auto fetch = [&](Raw (&to)[2], int step) {
        if (step >= steps) return;
        if (row < outer) to[0] = load_raw(from + step * STEP);
        if (!HALF && row + 8 < outer) to[1] = load_raw(from + (long long)8 * K + step * STEP);
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) fetch(w[i], warp + i * WARPS);
    // The norm's weights on their way to the cache, too.
    if (p.w)
        for (int i = tid * 32; i < K; i += 256 * 32) asm volatile("prefetch.global.L1 [%0];" ::"l"(p.w + i));
    release_next();
    wait_for_previous();
    prepare(p, x, pitch, 8 * TILES, R, K);
    if (outer == 0) return;
    Sums<TILES> sums;
    for (int first = warp; first < steps; first += AHEAD * WARPS)
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int step = first + i * WARPS;
            if (step >= steps) break;
            Raw own[2] = {w[i][0], w[i][1]};
            fetch(w[i], step + AHEAD * WARPS);
            sums.add(own, x + step * STEP, pitch);
        }
    sums.put(parts + warp * TILE * 8 * TILES);
    __syncthreads();
    for (int i = tid; i < OWN * 8 * TILES; i += 256) {
        int r = i / OWN, o = i % OWN, column = tile * OWN + o;
        if (r >= R || column >= outer) continue;
        float sum = map.bias ? map.bias[column] : 0.0f;
        for (int part = 0; part < WARPS; part++) sum += parts[(part * TILE + o) * 8 * TILES + r];
        if (map.cap > 0.0f) sum = map.cap * tanhf(sum / map.cap);
        long long at = (long long)r * outer + column;
        if (map.full) ((float *)map.y)[at] = sum;
        else store((element_t *)map.y + at, sum);
    }
}

/// BLOCKS: that a multiprocessor shall hold at least.
#define FEW_ROWS(NAME, TILES, HALF, BLOCKS)                                                                  \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS) NAME(                                          \
        const __grid_constant__ Preparation p, const __grid_constant__ Maps maps, int count, int R, int K,   \
        int pitch                                                                                            \
    ) {                                                                                                      \
        few_rows<TILES, HALF>(p, maps, count, R, K, pitch);                                                  \
    }
#ifdef ELEMENT_BF16
FEW_ROWS(few_rows_1, 1, false, 3)
FEW_ROWS(few_rows_1_half, 1, true, 2)
FEW_ROWS(few_rows_2, 2, false, 2)
FEW_ROWS(few_rows_4, 4, false, 2)
#else
FEW_ROWS(few_rows_1, 1, false, 1)
FEW_ROWS(few_rows_1_half, 1, true, 1)
#endif
