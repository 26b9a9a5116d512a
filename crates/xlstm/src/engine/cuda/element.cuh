// What every kernel file starts with: it is put textually before each .cu file.
//
// Activations, their gradients, and weights that enter products are `element_t`: f32, or bf16 with
// -DELEMENT_BF16. All else is f32: gate pre-activations and their gradients, the other parameters,
// the gradients of all of them, arithmetic, states, saved values and work space.

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

// ---- Eight at a time: 16 bytes of bf16, the widest load that a thread has ----

#define WIDE 8
/// Loops over them in registers.
#define EACH_WIDE(j) _Pragma("unroll") for (int j = 0; j < WIDE; j++)

struct Wide {
    float x[WIDE];
};

__device__ __forceinline__ bool is_aligned(const void *p) { return ((unsigned long long)p & 15) == 0; }

/// Eight as they lie in memory, aligned: a load that nothing waits for until they are unpacked.
struct RawFull {
    float4 a, b;
};
__device__ __forceinline__ RawFull load_raw(const float *p) { return {*(const float4 *)p, *(const float4 *)(p + 4)}; }
__device__ __forceinline__ uint4 load_raw(const bf16_t *p) { return *(const uint4 *)p; }
#ifdef ELEMENT_BF16
typedef uint4 Raw;
#else
typedef RawFull Raw;
#endif

__device__ __forceinline__ Wide unpack(const RawFull &raw) {
    return {{raw.a.x, raw.a.y, raw.a.z, raw.a.w, raw.b.x, raw.b.y, raw.b.z, raw.b.w}};
}
__device__ __forceinline__ Wide unpack(const uint4 &raw) {
    unsigned pairs[4] = {raw.x, raw.y, raw.z, raw.w};
    Wide wide;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        wide.x[2 * i] = __uint_as_float(pairs[i] << 16);
        wide.x[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
    return wide;
}
template <class T> __device__ __forceinline__ Wide load_whole(const T *p) { return unpack(load_raw(p)); }
__device__ __forceinline__ void store_whole(float *p, const Wide &wide) {
    *(float4 *)p = make_float4(wide.x[0], wide.x[1], wide.x[2], wide.x[3]);
    *(float4 *)(p + 4) = make_float4(wide.x[4], wide.x[5], wide.x[6], wide.x[7]);
}
__device__ __forceinline__ void store_whole(bf16_t *p, const Wide &wide) {
    unsigned pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pairs[i]) : "f"(wide.x[2 * i + 1]), "f"(wide.x[2 * i]));
    *(uint4 *)p = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

/// The first `count` of eight from p on, the others zero. A row may start anywhere.
template <class T> __device__ __forceinline__ Wide load_wide(const T *p, int count) {
    if (count >= WIDE && is_aligned(p)) return load_whole(p);
    Wide wide;
    EACH_WIDE(j) wide.x[j] = j < count ? load(p + j) : 0.0f;
    return wide;
}
template <class T> __device__ __forceinline__ void store_wide(T *p, const Wide &wide, int count) {
    if (count >= WIDE && is_aligned(p)) return store_whole(p, wide);
    EACH_WIDE(j) if (j < count) store(p + j, wide.x[j]);
}
template <class T> __device__ __forceinline__ void add_wide(T *p, const Wide &wide, int count) {
    Wide sum = load_wide(p, count);
    EACH_WIDE(j) sum.x[j] += wide.x[j];
    store_wide(p, sum, count);
}

/// p = wide where it is fresh, else p += wide.
template <class T> __device__ __forceinline__ void give_wide(T *p, const Wide &wide, int count, bool fresh) {
    if (fresh) store_wide(p, wide, count);
    else add_wide(p, wide, count);
}

// ---- Eight of a row, and four, by a thread that goes over rows: all loads of some rows come before
// the first use ----

/// The first `count` of eight, the others zero. WHOLE: rows are made of aligned pieces of eight.
template <bool WHOLE> __device__ __forceinline__ Raw take(const element_t *p, int count) {
    if (WHOLE) return load_raw(p);
    Raw raw;
    store_whole((element_t *)&raw, load_wide(p, count));
    return raw;
}
template <bool WHOLE> __device__ __forceinline__ void give(element_t *p, Wide wide, int count, bool fresh) {
    if (!WHOLE) return give_wide(p, wide, count, fresh);
    if (!fresh) {
        Wide old = load_whole(p);
        EACH_WIDE(j) wide.x[j] += old.x[j];
    }
    store_whole(p, wide);
}

/// Loops over four in registers.
#define EACH_FOUR(j) _Pragma("unroll") for (int j = 0; j < 4; j++)

struct Four {
    float x[4];
};
#ifdef ELEMENT_BF16
typedef uint2 RawFour;
__device__ __forceinline__ Four unpack(const uint2 &raw) {
    return {{__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u), __uint_as_float(raw.y << 16),
             __uint_as_float(raw.y & 0xffff0000u)}};
}
__device__ __forceinline__ void store_four(bf16_t *p, const Four &four) {
    uint2 raw;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(raw.x) : "f"(four.x[1]), "f"(four.x[0]));
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(raw.y) : "f"(four.x[3]), "f"(four.x[2]));
    *(uint2 *)p = raw;
}
#else
typedef float4 RawFour;
#endif
__device__ __forceinline__ Four unpack(const float4 &raw) { return {{raw.x, raw.y, raw.z, raw.w}}; }
__device__ __forceinline__ void store_four(float *p, const Four &four) {
    *(float4 *)p = make_float4(four.x[0], four.x[1], four.x[2], four.x[3]);
}
/// Four from p on, aligned: the row's width is a multiple of 4.
__device__ __forceinline__ RawFour load_four(const element_t *p) { return *(const RawFour *)p; }

/// Of n elements, the first that this thread takes; `count` of them, 0 or less for none.
__device__ __forceinline__ long long my_elements(long long n, int *count) {
    long long first = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * WIDE;
    *count = (int)min((long long)WIDE, max(0ll, n - first));
    return first;
}

// ---- Kernels that begin before the one before has ended, on Hopper ----

/// Lets the next kernel begin, if it was launched to do so, as soon as every block has come this far.
__device__ __forceinline__ void release_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/// Waits for the end of the kernel before; until then a kernel launched to begin early may read nothing
/// that changes.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#define NEG_INFINITY __int_as_float(0xff800000)

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
#ifdef ELEMENT_BF16
/// Within 1e-6, in a quarter of the instructions: for kernels that these would hold up.
__device__ __forceinline__ float quick_sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
#else
__device__ __forceinline__ float quick_sigmoid(float x) { return sigmoid(x); }
#endif
/// Rounded the same in every kernel, hence no contraction of its last step.
__device__ __forceinline__ float log_sigmoid(float x) {
    return __fsub_rn(fminf(x, 0.0f), log1pf(expf(-fabsf(x))));
}

/// Sum over a warp, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

/// Mean (0 unless it is taken off: `layer`) and 1 / std of the `size` numbers of x, by a warp that reads them once
/// for each, the second time from the cache.
__device__ __forceinline__ float2 warp_statistics(const element_t *x, int size, int layer, float eps) {
    int lane = threadIdx.x % 32;
    float mean = 0.0f, square = 0.0f;
    if (layer) {
        for (int i = lane * WIDE; i < size; i += 32 * WIDE) {
            Wide own = load_wide(x + i, size - i);
            EACH_WIDE(j) mean += own.x[j];
        }
        mean = warp_sum(mean) / size;
    }
    for (int i = lane * WIDE; i < size; i += 32 * WIDE) {
        Wide own = load_wide(x + i, size - i);
        EACH_WIDE(j) {
            float d = i + j < size ? own.x[j] - mean : 0.0f;
            square = fmaf(d, d, square);
        }
    }
    return make_float2(mean, 1.0f / sqrtf(warp_sum(square) / size + eps));
}

// ---- Sums over rows, in fixed tiles ----

/// Rows of a tile.
#define TILE_ROWS 64

/// parts (tiles, width) = the sums of value(row, column, place) over each tile of the rows, with
/// place = row width + column. A thread a column: grid (ceil(width / 128), tiles), block 128.
template <class F> __device__ __forceinline__ void sum_tile(float *parts, int rows, int width, F value) {
    int column = blockIdx.x * 128 + threadIdx.x, first = blockIdx.y * TILE_ROWS;
    if (column >= width) return;
    float sum = 0.0f;
#pragma unroll 4
    for (int row = first; row < min(rows, first + TILE_ROWS); row++)
        sum += value(row, column, (long long)row * width + column);
    parts[(long long)blockIdx.y * width + column] = sum;
}
