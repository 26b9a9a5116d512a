// q, k, v, ~i and ~f of c and a. A block has 32 rows; its six warps take pieces of 32 columns in turn. The order
// of the columns in a product is free: lane (g, t) has columns 8 t to 8 t + 7 of rows g, g + 8, g + 16, g + 24, works
// out q, k and v of them, rounds them, and has in its registers what the product with W_g takes as an operand.

#ifdef ELEMENT_BF16
#define WARPS 6
/// Tiles of 16 rows of a block.
#define ROW_TILES 2
#define BLOCK_ROWS (16 * ROW_TILES)

struct Maps {
    const bf16_t *w[3];
    const float *bias[3];
    bf16_t *y[3];
};

/// TILES: of 8 outputs of both gates.
template <int TILES>
__device__ __forceinline__ void forward(
    const bf16_t *__restrict__ c, const bf16_t *__restrict__ a, const Maps &maps, const bf16_t *__restrict__ wi,
    const bf16_t *__restrict__ wf, const float *bias_i, const float *bias_f, float *yi, float *yf, int R, int D, int H
) {
    __shared__ float partial[WARPS][BLOCK_ROWS][8 * TILES];
    int g = LANE / 4, t = LANE % 4, first = blockIdx.x * BLOCK_ROWS;
    float sums[ROW_TILES][TILES][4] = {};
    for (int column = WARP * 32 + 8 * t; column - 8 * t < D; column += WARPS * 32) {
        bool has = column < D;
        const uint4 none = make_uint4(0, 0, 0, 0);
        uint4 from[2][ROW_TILES][2];
        EACH(m, ROW_TILES) EACH(half, 2) {
            long long at = (long long)min(first + 16 * m + 8 * half + g, R - 1) * D + column;
            from[0][m][half] = has ? load_raw(c + at) : none;
            from[1][m][half] = has ? load_raw(a + at) : none;
        }
        EACH(map, 3) {
            PackedBlock blocks[2] = {};
            uint4 gate[TILES];
            if (has) {
                EACH(s, 4) {
                    uint4 raw = __ldg((const uint4 *)(maps.w[map] + (long long)column * 4) + s);
                    unsigned *to = blocks[s / 2].pairs + s % 2 * 4;
                    to[0] = raw.x, to[1] = raw.y, to[2] = raw.z, to[3] = raw.w;
                }
            }
            EACH(n, TILES) {
                const bf16_t *row = gate_row(wi, wf, 8 * n + g, H, D);
                gate[n] = has && row ? __ldg((const uint4 *)(row + map * D + column)) : none;
            }
            EACH(m, ROW_TILES) {
                uint4 y[2];
                EACH(half, 2) {
                    Wide x = unpack(from[map / 2][m][half]), start = {};
                    if (has && maps.bias[map]) start = load_whole(maps.bias[map] + column);
                    Four low = map_block(
                        blocks[0], {{x.x[0], x.x[1], x.x[2], x.x[3]}},
                        {{start.x[0], start.x[1], start.x[2], start.x[3]}}
                    );
                    Four high = map_block(
                        blocks[1], {{x.x[4], x.x[5], x.x[6], x.x[7]}},
                        {{start.x[4], start.x[5], start.x[6], start.x[7]}}
                    );
                    y[half] = make_uint4(
                        pair_of(low.x[0], low.x[1]), pair_of(low.x[2], low.x[3]), pair_of(high.x[0], high.x[1]),
                        pair_of(high.x[2], high.x[3])
                    );
                    int row = first + 16 * m + 8 * half + g;
                    if (has && row < R) *(uint4 *)(maps.y[map] + (long long)row * D + column) = y[half];
                }
                unsigned low[4] = {y[0].x, y[1].x, y[0].y, y[1].y}, high[4] = {y[0].z, y[1].z, y[0].w, y[1].w};
                EACH(n, TILES) {
                    multiply_add(sums[m][n], low, gate[n].x, gate[n].y);
                    multiply_add(sums[m][n], high, gate[n].z, gate[n].w);
                }
            }
        }
    }
    EACH(m, ROW_TILES) EACH(n, TILES) EACH(i, 4)
        partial[WARP][16 * m + i / 2 * 8 + g][8 * n + 2 * t + i % 2] = sums[m][n][i];
    __syncthreads();
    for (int i = threadIdx.x; i < BLOCK_ROWS * 2 * H; i += 32 * WARPS) {
        int row = i / (2 * H), o = i % (2 * H), head = o % H;
        if (first + row >= R) break;
        const float *bias = o < H ? bias_i : bias_f;
        float sum = bias ? bias[head] : 0.0f;
        EACH(warp, WARPS) sum += partial[warp][row][o];
        (o < H ? yi : yf)[(long long)(first + row) * H + head] = sum;
    }
}

/// Biases may be null. D is a multiple of 8, pointers are aligned to 16 bytes. grid (ceil(R / 32)), block 192.
/// (Held to 128 registers for three more warps a multiprocessor it spills on some cards.)
#define FORWARD(NAME, TILES)                                                                                          \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) NAME(                                                    \
        const bf16_t *c, const bf16_t *a, const bf16_t *wq, const float *bq, const bf16_t *wk, const float *bk,       \
        const bf16_t *wv, const float *bv, const bf16_t *wi, const float *bi, const bf16_t *wf, const float *bf,      \
        bf16_t *q, bf16_t *k, bf16_t *v, float *yi, float *yf, int R, int D, int H                                    \
    ) {                                                                                                               \
        forward<TILES>(c, a, {{wq, wk, wv}, {bq, bk, bv}, {q, k, v}}, wi, wf, bi, bf, yi, yf, R, D, H);               \
    }
FORWARD(qkv_forward_8, 1)
FORWARD(qkv_forward_16, 2)
FORWARD(qkv_forward_32, 4)
#endif
