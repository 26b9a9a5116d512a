// What every kernel file starts with: it is put textually before each .cu file.
//
// Activations and their gradients are `element_t`: f32, or bf16 with -DELEMENT_BF16. Gate
// pre-activations and their gradients are `gate_t`: f32, or bf16 with -DGATE_BF16. Parameters
// are `weight_t`: f32, or bf16 with -DWEIGHT_BF16; their gradients are f32, as are all
// arithmetic, states, saved values and work space.

#define RESET 1u
#define PAD 2u

typedef unsigned short bf16_t;

__device__ __forceinline__ float load(const float *p) { return *p; }
__device__ __forceinline__ float load(const bf16_t *p) { return __uint_as_float((unsigned)*p << 16); }
__device__ __forceinline__ void store(float *p, float x) { *p = x; }
__device__ __forceinline__ void store(bf16_t *p, float x) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(*p) : "f"(x));
}
/// Gradients are added: other nodes add to the same buffer.
template <class T> __device__ __forceinline__ void add(T *p, float x) { store(p, load(p) + x); }

#ifdef ELEMENT_BF16
typedef bf16_t element_t;
#else
typedef float element_t;
#endif
#ifdef GATE_BF16
typedef bf16_t gate_t;
#else
typedef float gate_t;
#endif
#ifdef WEIGHT_BF16
typedef bf16_t weight_t;
#else
typedef float weight_t;
#endif

#define NEG_INFINITY __int_as_float(0xff800000)

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
/// Rounded the same in every kernel, hence no contraction of its last step.
__device__ __forceinline__ float log_sigmoid(float x) {
    return __fsub_rn(fminf(x, 0.0f), log1pf(expf(-fabsf(x))));
}

/// Sum over a warp, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}
