// The gradients of qkv_forward.cu. With dz (R, 2 H) = the gradients of ~i and ~f, rounded, and W_g (2 H, 3 D) both
// weights: dQ = dq + dz W_gq, and dK, dV alike; dc = W_q^T dQ + W_k^T dK, da = W_v^T dV; dW_q = the diagonal blocks of
// dQ^T c, and so on; dW_g = dz^T [q; k; v].
//
// A warp has 32 columns and goes down a tile of rows, 16 at a time, with all sums over rows in registers; what it is
// to read next is on its way into shared memory meanwhile. Lane (g, t) has the block of columns 4 g to 4 g + 3 and rows
// 2 t, 2 t + 1, 2 t + 8, 2 t + 9. So dQ^T, with columns as M and rows as N, is born where it is used; and q, of which
// it is cheaper to work out a block again than to read it, is packed by rows as the product over rows takes it.

#ifdef ELEMENT_BF16
#define WARPS 4
#define STAGES 2

/// dz as operands, 16 bytes a lane: of 16 rows and 8 outputs, as the columns of a product over outputs (rows g and
/// g + 8, outputs 2 t and 2 t + 1), then as those of a product over rows (output g, rows 2 t, 2 t + 1, then 2 t + 8,
/// 2 t + 9). fragments (ceil(R / 16), TILES, 32); zero where there is no row or output. And parts (ceil(R / 64), 2 H)
/// = the sums of 64 rows of the gradients, which are not rounded. Gradients may be null. grid (ceil(R / 64)), block 128.
extern "C" __global__ void __launch_bounds__(128) qkv_slopes(
    const float *dyi, const float *dyf, uint4 *fragments, float *parts, int R, int H, int tiles
) {
    int g = LANE / 4, t = LANE % 4, tile = blockIdx.x * 4 + WARP, first = tile * 16;
    auto at = [&](int row, int o) {
        const float *dy = o < H ? dyi : dyf;
        return dy && row < R && o < 2 * H ? dy[(long long)row * H + o % H] : 0.0f;
    };
    for (int n = 0; first < R && n < tiles; n++) {
        int o = 8 * n + 2 * t, row = first + 2 * t;
        fragments[((long long)tile * tiles + n) * 32 + LANE] = make_uint4(
            pair_of(at(first + g, o), at(first + g, o + 1)), pair_of(at(first + g + 8, o), at(first + g + 8, o + 1)),
            pair_of(at(row, 8 * n + g), at(row + 1, 8 * n + g)), pair_of(at(row + 8, 8 * n + g), at(row + 9, 8 * n + g))
        );
    }
    int o = threadIdx.x;
    if (o >= 2 * H) return;
    float sum = 0.0f;
#pragma unroll 16
    for (int row = 0; row < 64; row++) sum += at(blockIdx.x * 64 + row, o);
    parts[(long long)blockIdx.x * 2 * H + o] = sum;
}

/// 8 bytes, asynchronously; zero where `has` is not, and nothing is read.
__device__ __forceinline__ void fetch(uint2 *to, const bf16_t *from, bool has) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"((unsigned)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(has ? 8 : 0)
                 : "memory");
}
__device__ __forceinline__ void fetch(uint4 *to, const uint4 *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from)
                 : "memory");
}

/// Over the four lanes that share columns.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(ALL, x, 1);
    return x + __shfl_xor_sync(ALL, x, 2);
}

/// The maps of one input: x, their weights, biases, the gradients of their outputs, and what is to be made of all.
template <int MAPS> struct Side {
    const bf16_t *x, *w[MAPS];
    const float *bias[MAPS];
    const bf16_t *dy[MAPS];
    bf16_t *dx;
    bool adds;
};

/// What a lane reads of 16 rows.
template <int MAPS, int TILES> struct Stage {
    /// x, the old dx, dy; by rows.
    uint2 rows[MAPS + 2][4][32];
    uint4 slopes[TILES][32];
};

/// Of what is summed for the parameters in a tile of rows: where the sums of W_g begin, behind those of W_q, W_k and
/// W_v, and where those of b_q, b_k and b_v, which are there only where it is BIASED.
__device__ __forceinline__ int gates_at(int D) { return 12 * D; }
__device__ __forceinline__ int biases_at(int D, int H) { return 12 * D + 6 * H * D; }

/// MAPS from `map` on; parts: of this tile.
template <int MAPS, int TILES, bool BIASED>
__device__ __forceinline__ void backward(
    const Side<MAPS> &side, const uint4 *fragments, const bf16_t *wi, const bf16_t *wf, float *parts, int map,
    int R, int D, int H, int tile_rows, Stage<MAPS, TILES> (&stages)[STAGES]
) {
    int g = LANE / 4, t = LANE % 4, column = (blockIdx.y * WARPS + WARP) * 32 + 4 * g;
    int first = blockIdx.x * tile_rows, end = min(R, first + tile_rows);
    bool has = column < D;

    auto start = [&](int row) {
        Stage<MAPS, TILES> &to = stages[row / 16 % STAGES];
        if (row < end) {
            EACH(r, 4) {
                int at = row + 2 * t + r % 2 + r / 2 * 8;
                bool given = has && at < R;
                long long from = given ? (long long)at * D + column : 0;
                fetch(&to.rows[0][r][LANE], side.x + from, given);
                if (side.adds) fetch(&to.rows[1][r][LANE], side.dx + from, given);
                EACH(m, MAPS) if (side.dy[m]) fetch(&to.rows[2 + m][r][LANE], side.dy[m] + from, given);
            }
            EACH(n, TILES) fetch(&to.slopes[n][LANE], fragments + ((long long)(row / 16) * TILES + n) * 32 + LANE);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    EACH(s, STAGES - 1) start(first + 16 * s);

    PackedBlock blocks[MAPS] = {};
    Four bias[MAPS] = {};
    // W_g^T: its columns 4 g + 2 p and 4 g + 2 p + 1 as rows g and g + 8, outputs 2 t and 2 t + 1 of eight.
    unsigned gates[MAPS][TILES][2][2] = {};
    if (has) EACH(m, MAPS) {
        EACH(s, 2) {
            uint4 raw = *((const uint4 *)(side.w[m] + (long long)column * 4) + s);
            unsigned *to = blocks[m].pairs + 4 * s;
            to[0] = raw.x, to[1] = raw.y, to[2] = raw.z, to[3] = raw.w;
        }
        if (BIASED && side.bias[m]) EACH_FOUR(o) bias[m].x[o] = side.bias[m][column + o];
        EACH(n, TILES) {
            uint2 rows[2];
            EACH(i, 2) {
                const bf16_t *row = gate_row(wi, wf, 8 * n + 2 * t + i, H, D);
                rows[i] = row ? *(const uint2 *)(row + (map + m) * D + column) : make_uint2(0, 0);
            }
            EACH(p, 2) {
                unsigned low = p ? rows[0].y : rows[0].x, high = p ? rows[1].y : rows[1].x;
                gates[m][n][p][0] = __byte_perm(low, high, 0x5410);
                gates[m][n][p][1] = __byte_perm(low, high, 0x7632);
            }
        }
    }

    float sums[MAPS][4][4] = {}, bias_sums[MAPS][4] = {}, gate_sums[MAPS][TILES][2][4] = {};
    for (int row = first; row < end; row += 16) {
        start(row + 16 * (STAGES - 1));
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
        const Stage<MAPS, TILES> &from = stages[row / 16 % STAGES];
        Four x[4], dx[4] = {};
        EACH(r, 4) x[r] = unpack(from.rows[0][r][LANE]);
        if (side.adds) EACH(r, 4) dx[r] = unpack(from.rows[1][r][LANE]);
        EACH(m, MAPS) {
            // Number i of total[p][h] is of column 4 g + 2 p + i / 2 and row 2 h + i % 2 of the lane's.
            float total[2][2][4] = {};
            if (side.dy[m]) EACH(r, 4) {
                Four given = unpack(from.rows[2 + m][r][LANE]);
                EACH_FOUR(o) total[o / 2][r / 2][o % 2 * 2 + r % 2] = given.x[o];
            }
            EACH(n, TILES) {
                uint2 slopes = *(const uint2 *)&from.slopes[n][LANE];
                EACH(p, 2) {
                    multiply_add(total[p][0], gates[m][n][p], slopes.x);
                    multiply_add(total[p][1], gates[m][n][p], slopes.y);
                }
            }
            Four y[4];
            EACH(r, 4) {
                EACH_FOUR(o) {
                    float dy = total[o / 2][r / 2][o % 2 * 2 + r % 2];
                    if (BIASED) bias_sums[m][o] += dy;
                    EACH_FOUR(i) {
                        dx[r].x[i] = fmaf(blocks[m].at(o, i), dy, dx[r].x[i]);
                        sums[m][o][i] = fmaf(dy, x[r].x[i], sums[m][o][i]);
                    }
                }
                y[r] = map_block(blocks[m], x[r], bias[m]);
            }
            EACH(p, 2) {
                unsigned values[4] = {
                    pair_of(y[0].x[2 * p], y[1].x[2 * p]), pair_of(y[0].x[2 * p + 1], y[1].x[2 * p + 1]),
                    pair_of(y[2].x[2 * p], y[3].x[2 * p]), pair_of(y[2].x[2 * p + 1], y[3].x[2 * p + 1])
                };
                EACH(n, TILES) {
                    uint2 slopes = *((const uint2 *)&from.slopes[n][LANE] + 1);
                    multiply_add(gate_sums[m][n][p], values, slopes.x, slopes.y);
                }
            }
        }
        if (side.dx && has) EACH(r, 4) {
            int at = row + 2 * t + r % 2 + r / 2 * 8;
            if (at < R) store_four(side.dx + (long long)at * D + column, dx[r]);
        }
    }

    EACH(m, MAPS) {
        EACH_FOUR(o) {
            Four sum;
            EACH_FOUR(i) sum.x[i] = quad_sum(sums[m][o][i]);
            float bias_sum = BIASED ? quad_sum(bias_sums[m][o]) : 0.0f;
            if (!has || t != o) continue;
            store_four(parts + (map + m) * 4 * D + column * 4 + 4 * o, sum);
            if (BIASED) parts[biases_at(D, H) + (map + m) * D + column + o] = bias_sum;
        }
        EACH(n, TILES) EACH(i, 2) {
            int o = 8 * n + 2 * t + i;
            auto &sum = gate_sums[m][n];
            if (has && o < 2 * H)
                store_four(
                    parts + gates_at(D) + (o * 3 + map + m) * D + column,
                    {{sum[0][i], sum[0][i + 2], sum[1][i], sum[1][i + 2]}}
                );
        }
    }
}

/// dc and da are added to where bit 0 and 1 of `fresh` are not set. parts (tiles, count) = the sums for dW_q, dW_k, dW_v
/// (4 D each), dW_i, dW_f (3 H D each) and, where it is BIASED, db_q, db_k, db_v (D each) of each tile of `tile_rows`
/// rows, a multiple of 16. Biases and gradients may be null. grid (tiles, ceil(D / 128), 2), block 128. BLOCKS of a
/// multiprocessor, as registers allow.
#define BACKWARD(NAME, TILES, BIASED, BLOCKS)                                                                          \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) NAME(                                             \
        const bf16_t *c, const bf16_t *a, const bf16_t *wq, const float *bq, const bf16_t *wk, const float *bk,        \
        const bf16_t *wv, const float *bv, const bf16_t *wi, const bf16_t *wf, const bf16_t *dq, const bf16_t *dk,     \
        const bf16_t *dv, const uint4 *fragments, bf16_t *dc, bf16_t *da, float *parts, int R, int D, int H,           \
        int tile_rows, int count, unsigned fresh                                                                       \
    ) {                                                                                                                \
        __shared__ union {                                                                                             \
            Stage<2, TILES> two[WARPS][STAGES];                                                                        \
            Stage<1, TILES> one[WARPS][STAGES];                                                                        \
        } shared;                                                                                                      \
        parts += (long long)blockIdx.x * count;                                                                        \
        if (blockIdx.z == 0)                                                                                           \
            backward<2, TILES, BIASED>(                                                                                \
                {c, {wq, wk}, {bq, bk}, {dq, dk}, dc, dc && !(fresh & 1)}, fragments, wi, wf, parts, 0, R, D, H,       \
                tile_rows, shared.two[WARP]                                                                            \
            );                                                                                                         \
        else                                                                                                           \
            backward<1, TILES, BIASED>(                                                                                \
                {a, {wv}, {bv}, {dv}, da, da && !(fresh & 2)}, fragments, wi, wf, parts, 2, R, D, H, tile_rows,        \
                shared.one[WARP]                                                                                       \
            );                                                                                                         \
    }
BACKWARD(qkv_backward_8, 1, false, 3)
BACKWARD(qkv_backward_8_biased, 1, true, 2)
BACKWARD(qkv_backward_16, 2, false, 2)
BACKWARD(qkv_backward_16_biased, 2, true, 2)
BACKWARD(qkv_backward_24, 3, false, 2)
BACKWARD(qkv_backward_24_biased, 3, true, 2)

/// The parameters' gradients, of which any may be null: += the sums over parts (tiles, count) in order, and db_i, db_f +=
/// the sums (2 H) of the slopes; or = where bit i of `fresh` is set, for the i-th of them in the order of the arguments.
/// A thread four numbers of count, then one of 2 H.
extern "C" __global__ void __launch_bounds__(128) qkv_sums(
    const float *parts, const float *sums, float *dwq, float *dbq, float *dwk, float *dbk, float *dwv, float *dbv,
    float *dwi, float *dbi, float *dwf, float *dbf, int D, int H, int tiles, int count, unsigned fresh
) {
    int thread = blockIdx.x * 128 + threadIdx.x, at = 4 * thread;
    auto give = [&](float *to, int place, float sum, int bit) {
        if (to) to[place] = fresh >> bit & 1 ? sum : to[place] + sum;
    };
    if (at >= count) {
        int o = thread - count / 4;
        if (o < 2 * H) give(o < H ? dbi : dbf, o % H, sums[o], o < H ? 7 : 9);
        return;
    }
    Four sum = {};
#pragma unroll 16
    for (int tile = 0; tile < tiles; tile++) {
        Four other = unpack(*(const float4 *)(parts + (long long)tile * count + at));
        EACH_FOUR(i) sum.x[i] += other.x[i];
    }
    float *to;
    int bit;
    if (at < gates_at(D)) {
        int map = at / (4 * D);
        to = map == 0 ? dwq : map == 1 ? dwk : dwv, bit = 2 * map, at -= map * 4 * D;
    } else if (at < biases_at(D, H)) {
        int gate = (at -= gates_at(D)) / (3 * H * D);
        to = gate ? dwf : dwi, bit = gate ? 8 : 6, at -= gate * 3 * H * D;
    } else {
        int map = (at -= biases_at(D, H)) / D;
        to = map == 0 ? dbq : map == 1 ? dbk : dbv, bit = 2 * map + 1, at -= map * D;
    }
    EACH_FOUR(i) give(to, at + i, sum.x[i], bit);
}
#endif
