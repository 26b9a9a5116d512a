// What the kernels of ops/qkv share: products of a warp on tensor cores, of bf16 operands with f32 sums, and the
// columns of the gates' weights. They are for bf16 and blocks of 4 x 4.
//
// Sizes: R rows of D features in blocks of 4; H heads of each gate, 2 H outputs o of both, of which o < H are ~i.
// c, a, q, k, v, their gradients (R, D) and all weights: bf16. W_q, W_k, W_v (D / 4, 4, 4), W_i, W_f (H, 3 D).
// ~i, ~f, their gradients (R, H), biases, parts: f32. A lane is (g, t) = (lane / 4, lane % 4).

#ifdef ELEMENT_BF16
#define LANE ((int)threadIdx.x % 32)
#define WARP ((int)threadIdx.x / 32)
#define ALL 0xffffffffu
#define EACH(i, n) _Pragma("unroll") for (int i = 0; i < (n); i++)

__device__ __forceinline__ unsigned pair_of(float x, float y) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    return pair;
}
__device__ __forceinline__ float low_of(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

/// A block of 4 x 4, packed as it lies in memory: row o is pairs 2 o and 2 o + 1.
struct PackedBlock {
    unsigned pairs[8];
    /// W[o][i].
    __device__ __forceinline__ float at(int o, int i) const {
        unsigned pair = pairs[2 * o + i / 2];
        return i % 2 ? high_of(pair) : low_of(pair);
    }
};

/// y = W x + b of a block, in the order in which headwise.cu adds.
__device__ __forceinline__ Four map_block(const PackedBlock &block, const Four &x, Four y) {
    EACH_FOUR(i) EACH_FOUR(o) y.x[o] = fmaf(block.at(o, i), x.x[i], y.x[o]);
    return y;
}

/// Row o of the gates' weights below each other; null where there is none.
__device__ __forceinline__ const bf16_t *gate_row(const bf16_t *wi, const bf16_t *wf, int o, int H, int D) {
    return o < H ? wi + (long long)o * 3 * D : o < 2 * H ? wf + (long long)(o - H) * 3 * D : nullptr;
}

/// sum (16, 8) += A (16, 16) B (16, 8).
__device__ __forceinline__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/// sum (16, 8) += A (16, 8) B (8, 8).
__device__ __forceinline__ void multiply_add(float (&sum)[4], const unsigned (&a)[2], unsigned b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
}
#endif
