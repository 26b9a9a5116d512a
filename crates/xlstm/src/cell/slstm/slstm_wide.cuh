// The cells in bf16 on tensor cores: R of a head stays on chip for the whole sequence, in registers.
//
// A cluster of C blocks (one block where there are no clusters) holds a head and walks along 8 sequences.
// Block q of it has the features from 8 W q on, each of its W warps 8 of them: a thread has feature lane / 4 of
// the warp's, of the sequences 2 (lane % 4) and the next, all four gates, and its states in f32. Products are
// mma.sync.m16n8k16 with rows of R as M and the sequences as N. Between blocks numbers go by st.async into the
// other's shared memory, where an mbarrier counts their bytes: no step has a barrier of the cluster.
//
//   forward    slstm_wide_rows -> slstm_wide_forward_*
//   backward   slstm_wide_columns -> slstm_wide_backward_* -> slstm_wide_before, and by the caller the sum of
//              parts for db, and the product for dR as in slstm.cu, of draw and before in bf16
//
// Sizes: B sequences, S >= 1 tokens, NH <= 65535 heads, DH <= 16 KT features a head, a multiple of 8; B S NH DH
// < 2^34. Launch: grid (C ceil(B / 8), NH), block 32 W, and as much dynamic shared memory as the end of
// each file says. Tensors and flags are those of slstm.cu, but h, dh, draw and before are bf16.
//
// The floor of a step: [4 DH, DH] times [DH, 8] is 256 mma in a block at DH 128, 0.2 us, or a quarter of that in
// four blocks; nine special functions an element are 0.3 us in one block. What is left is a chain of
// latencies that every step has once: h from shared memory, 4 to 8 dependent mma, the cell, h to the others.
// At 30 bytes an element forward and 38 backward memory takes less.

#define SEQUENCES 8
#define ALL_LANES 0xffffffffu
#define LANE ((int)threadIdx.x % 32)
#define WARP ((int)threadIdx.x / 32)

#if __CUDA_ARCH__ >= 900
#define HAS_CLUSTERS
#endif

__device__ __forceinline__ unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

/// sum (16, 8) += a (16, 16) b (16, 8).
__device__ __forceinline__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/// 32 of k of 8 sequences, whose rows start at `from` and are `pitch` apart: b of two steps.
__device__ __forceinline__ void load_sequences(unsigned (&b)[4], const bf16_t *from, int pitch) {
    unsigned address = shared_address(from + LANE % 8 * pitch + LANE / 8 * 8);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(address)
                 : "memory");
}

/// The last LATE of STEPS pieces of R that a thread multiplies by lie in shared memory, where registers are short.
template <int STEPS, int LATE> struct Matrix {
    unsigned held[STEPS - LATE][4];
    uint4 *late;
    /// Both start with this thread's 16 bytes, and go on with those of 32 lanes.
    __device__ __forceinline__ Matrix(const uint4 *from, uint4 *space) : late(space) {
#pragma unroll
        for (int i = 0; i < STEPS - LATE; i++) take(held[i], from[i * 32]);
#pragma unroll
        for (int i = 0; i < LATE; i++) late[i * 32] = from[(STEPS - LATE + i) * 32];
    }
    static __device__ __forceinline__ void take(unsigned (&a)[4], uint4 x) { a[0] = x.x, a[1] = x.y, a[2] = x.z, a[3] = x.w; }
    __device__ __forceinline__ void multiply(float (&sum)[4], int i, unsigned b0, unsigned b1) const {
        if (i < STEPS - LATE) return multiply_add(sum, held[i < STEPS - LATE ? i : 0], b0, b1);
        unsigned a[4];
        take(a, late[(i - (STEPS - LATE)) * 32]);
        multiply_add(sum, a, b0, b1);
    }
};
/// Bytes of shared memory for all threads' last pieces.
#define LATE_BYTES(W, LATE) ((W) * (LATE) * 32 * (int)sizeof(uint4))

/// Asynchronous, as far as they lie aligned.
__device__ __forceinline__ void copy_16(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_4(void *to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

/// A thread's own of what its warp has copied: even sequences stand before the odd ones.
#define FETCHED(x, s) x[s][LANE % 4][LANE / 4]

/// Of a thread's feature two sequences -> of the one sequence MINE two features, from an even one on.
#define ODD (LANE / 4 % 2)
#define MINE (LANE % 4 * 2 + ODD)
__device__ __forceinline__ unsigned exchange(float first, float second) {
    unsigned own = bf16_pair(first, second), other = __shfl_xor_sync(ALL_LANES, own, 4);
    return __byte_perm(own, other, ODD ? 0x3276 : 0x5410);
}

// ---- Between the blocks of a cluster ----

/// A barrier that counts bytes. Every phase of it is opened by one thread of its block.
struct __align__(8) Arrival {
    unsigned long long state;
    __device__ __forceinline__ void start() {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&state)) : "memory");
    }
#ifdef HAS_CLUSTERS
    __device__ __forceinline__ void expect(unsigned bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)), "r"(bytes)
                     : "memory");
    }
    __device__ __forceinline__ void wait(unsigned parity) {
        asm volatile("{\n"
                     ".reg .pred done;\n"
                     "again:\n"
                     "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                     "@!done bra again;\n"
                     "}" ::"r"(shared_address(&state)),
                     "r"(parity)
                     : "memory");
    }
#endif
};

#ifdef HAS_CLUSTERS
/// The address of a place in this block's shared memory in that of block `rank`.
__device__ __forceinline__ unsigned address_in(unsigned own, int rank) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(own), "r"(rank));
    return there;
}
__device__ __forceinline__ void send(unsigned to, unsigned x, unsigned arrival) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to), "r"(x),
                 "r"(arrival)
                 : "memory");
}
__device__ __forceinline__ void send(unsigned to, float x, float y, unsigned arrival) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to), "f"(x),
                 "f"(y), "r"(arrival)
                 : "memory");
}
/// All blocks of the cluster are here, and see what was written before.
__device__ __forceinline__ void meet() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#endif
