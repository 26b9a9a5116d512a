// What the kernels of both cells share: marks, the cell of one element, and what it leaves behind.
//
// Backward works on the ratio r = c / n, which is all that h sees: with a = i' / n
//   r_t = (1 - a) r_{t-1} + a tanh ~z,  h_t = sigmoid(~o) r_t
// and, for l = log n + m, d log i = a (z - r) dr + a dl and d log f = -a (z - r) dr + (1 - a) dl. So m
// cancels, and every weight lies in [0, 1]. What remains is the last m's own: g = dm - c dc - n dn of
// the last state goes to log f of each token until the one whose log i set m.

#define SIGMOID_INPUT 1
#define EXPONENTIAL_FORGET 2
#define LSTM 4
#define GRADIENT_CUT 8
/// Bit FRESH_GATES + g: the gradient of gate g is written, not added to.
#define FRESH_GATES 5

/// Whether the state is zero before a token with this mark.
__device__ __forceinline__ bool resets(unsigned mark) { return (mark & (RESET | PAD)) == RESET; }

// ---- Functions, exact or by the approximations of the hardware (1e-6) ----

template <bool FAST> __device__ __forceinline__ float exp_of(float x) { return FAST ? __expf(x) : expf(x); }
template <bool FAST> __device__ __forceinline__ float inverse(float x) { return FAST ? __fdividef(1.0f, x) : 1.0f / x; }
template <bool FAST> __device__ __forceinline__ float sigmoid_of(float x) {
    return inverse<FAST>(1.0f + exp_of<FAST>(-x));
}
template <bool FAST> __device__ __forceinline__ float tanh_of(float x) {
    return FAST ? 1.0f - 2.0f * inverse<FAST>(1.0f + exp_of<FAST>(2.0f * x)) : tanhf(x);
}
/// log sigmoid(x), and its derivative.
template <bool FAST> __device__ __forceinline__ float log_sigmoid_of(float x, float *slope) {
    float e = exp_of<FAST>(-fabsf(x)), part = inverse<FAST>(1.0f + e);
    *slope = x >= 0.0f ? e * part : part;
    return fminf(x, 0.0f) - (FAST ? __logf(1.0f + e) : log1pf(e));
}

// ---- What a token leaves behind for backward, six numbers an element ----

/// sLSTM: i' / n, c / n, tanh ~z, sigmoid ~o (negative where log i set m), d log f / d ~f,
/// d log i / d ~i. LSTM: i, f, tanh ~z, o, tanh c_t, c_{t-1}.
struct Saved {
    float x[6];
};

__device__ __forceinline__ unsigned halves(float x, float y) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    return pair;
}
__device__ __forceinline__ float half_of(unsigned bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((unsigned short)bits));
    return x;
}
__device__ __forceinline__ unsigned bf16_pair(float x, float y) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    return pair;
}

/// The same in 16 bits each: f16, which near 1 is finer than bf16. An LSTM's c alone has no bound.
struct Packed {
    uint2 first;
    unsigned last;
};
__device__ __forceinline__ Packed pack(const Saved &saved, int flags) {
    const float *x = saved.x;
    unsigned last = halves(x[4], x[5]);
    if (flags & LSTM) last = last & 0xffffu | bf16_pair(0.0f, x[5]);
    return {make_uint2(halves(x[0], x[1]), halves(x[2], x[3])), last};
}
__device__ __forceinline__ Saved unpack(const Packed &packed, int flags) {
    float unbounded = __uint_as_float(packed.last & 0xffff0000u);
    return {{half_of(packed.first.x), half_of(packed.first.x >> 16), half_of(packed.first.y),
             half_of(packed.first.y >> 16), half_of(packed.last),
             flags & LSTM ? unbounded : half_of(packed.last >> 16)}};
}
/// Where they lie, for n elements in all: first n times `first`, then n times `last`.
__device__ __forceinline__ void save(void *record, long long n, long long at, const Packed &packed) {
    ((uint2 *)record)[at] = packed.first;
    ((unsigned *)((uint2 *)record + n))[at] = packed.last;
}
__device__ __forceinline__ Packed saved_at(const void *record, long long n, long long at) {
    return {((const uint2 *)record)[at], ((const unsigned *)((const uint2 *)record + n))[at]};
}

/// Of words an element in all, behind them: f' (B, NH DH), f32, of the first token after an initial state that
/// is given, but empty.
#define PACKED_WORDS 3
__device__ __forceinline__ float *first_forget(void *record, long long n, int words) {
    return (float *)record + words * n;
}

// As the activations are stored: packed, or in f32 one of the six after the other.
#ifdef ELEMENT_BF16
#define SAVED_WORDS PACKED_WORDS
__device__ __forceinline__ void leave(void *record, long long n, long long at, const Saved &saved, int flags) {
    save(record, n, at, pack(saved, flags));
}
__device__ __forceinline__ Saved left_at(const void *record, long long n, long long at, int flags) {
    return unpack(saved_at(record, n, at), flags);
}
#else
#define SAVED_WORDS 6
__device__ __forceinline__ void leave(void *record, long long n, long long at, const Saved &saved, int flags) {
    for (int part = 0; part < SAVED_WORDS; part++) ((float *)record)[part * n + at] = saved.x[part];
}
__device__ __forceinline__ Saved left_at(const void *record, long long n, long long at, int flags) {
    Saved saved;
    for (int part = 0; part < SAVED_WORDS; part++) saved.x[part] = ((const float *)record)[part * n + at];
    return saved;
}
#endif

// ---- The cell ----

#define EACH(N) _Pragma("unroll") for (int x = 0; x < N; x++)

/// An LSTM has c alone.
struct State {
    float c, n, m;
};

/// One token of N elements, side by side to hide latencies: raw gates -> h, the state after it, what backward
/// needs, and f'.
template <bool FAST, int N>
__device__ __forceinline__ void cell_forward(
    const float (&raw)[N][4], State (&state)[N], float (&h)[N], Saved (&saved)[N], float (&forget)[N], int flags
) {
    float z[N], o[N];
    EACH(N) z[x] = tanh_of<FAST>(raw[x][2]);
    EACH(N) o[x] = sigmoid_of<FAST>(raw[x][3]);
    if (flags & LSTM) {
        EACH(N) {
            float i = sigmoid_of<FAST>(raw[x][0]), before = state[x].c;
            forget[x] = sigmoid_of<FAST>(raw[x][1]);
            state[x].c = fmaf(forget[x], before, i * z[x]);
            float y = tanh_of<FAST>(state[x].c);
            saved[x] = {{i, forget[x], z[x], o[x], y, before}};
            h[x] = o[x] * y;
        }
        return;
    }
    float log_i[N], log_f[N], slope_i[N], slope_f[N];
    EACH(N) log_i[x] = raw[x][0], log_f[x] = raw[x][1], slope_i[x] = slope_f[x] = 1.0f;
    if (flags & SIGMOID_INPUT) EACH(N) log_i[x] = log_sigmoid_of<FAST>(raw[x][0], &slope_i[x]);
    if (!(flags & EXPONENTIAL_FORGET)) EACH(N) log_f[x] = log_sigmoid_of<FAST>(raw[x][1], &slope_f[x]);
    EACH(N) {
        // One of i' and f' is 1. A NaN on either side becomes f'.
        float old = log_f[x] + state[x].m;
        bool is_newer = !(log_i[x] < old), sets = is_newer || state[x].n == 0.0f;
        float less = exp_of<FAST>(-fabsf(log_i[x] - old)), i = sets ? 1.0f : less;
        forget[x] = is_newer ? less : 1.0f;
        state[x].m = sets ? log_i[x] : old;
        state[x].c = fmaf(forget[x], state[x].c, i * z[x]);
        state[x].n = fmaf(forget[x], state[x].n, i);
        float part = inverse<FAST>(state[x].n), ratio = state[x].c * part;
        saved[x] = {{i * part, ratio, z[x], i == 1.0f ? -o[x] : o[x], slope_f[x], slope_i[x]}};
        h[x] = o[x] * ratio;
    }
}

/// Gradients on their way to earlier tokens: of r, of l, and g; of an LSTM, of c alone.
struct Carry {
    float r, l, g;
};

/// The same token backward: gradient dy of its h -> those of its raw gates, and of the state before it.
__device__ __forceinline__ void cell_backward(const Saved &saved, float dy, Carry &carry, float draw[4], int flags) {
    const float *x = saved.x;
    float z = x[2];
    if (flags & LSTM) {
        float i = x[0], f = x[1], o = x[3], y = x[4];
        draw[3] = dy * y * o * (1.0f - o);
        float dc = fmaf(dy * o, 1.0f - y * y, carry.r);
        draw[0] = dc * z * i * (1.0f - i);
        draw[1] = dc * x[5] * f * (1.0f - f);
        draw[2] = dc * i * (1.0f - z * z);
        carry.r = f * dc;
        return;
    }
    float a = x[0], ratio = x[1], o = fabsf(x[3]);
    bool sets = __float_as_uint(x[3]) >> 31;
    float dr = fmaf(dy, o, carry.r), weighted = dr * a, kept = 1.0f - a;
    draw[3] = dy * ratio * o * (1.0f - o);
    draw[2] = weighted * (1.0f - z * z);
    float moved = weighted * (z - ratio), dl = fmaf(kept, carry.l, -moved);
    draw[0] = x[5] * (fmaf(a, carry.l, moved) + (sets ? carry.g : 0.0f));
    draw[1] = x[4] * (dl + (sets ? 0.0f : carry.g));
    carry.r = kept * dr;
    carry.l = dl;
    if (sets) carry.g = 0.0f;
}

/// What reaches backward from the gradients of the last state.
__device__ __forceinline__ Carry last_carry(const State &last, float dc, float dn, float dm, int flags) {
    if (flags & LSTM) return {dc, 0.0f, 0.0f};
    float dl = last.c * dc + last.n * dn;
    return {last.n * dc, dl, dm - dl};
}

/// Whether all tokens of a sequence before t are pads; marks are its own, or null.
__device__ __forceinline__ bool comes_first(const unsigned *marks, int t) {
    int u = 0;
    while (u < t && marks && marks[u] & PAD) u++;
    return u == t;
}

/// Adds the gradients of an initial sLSTM state, at `to`, from what reaches it; n0 null: it was empty, and
/// nobody asks. Where n0 is 0, those of c0 and n0 are there already, unless no token came: then they are those
/// of the last state (else null).
__device__ __forceinline__ void give_initial(
    const Carry &carry, const float *c0, const float *n0, const float *dc_last, const float *dn_last, long long to,
    float *dc0, float *dn0, float *dm0
) {
    if (dm0) dm0[to] += carry.g + carry.l;
    if (!n0) return;
    float n = n0[to], dc = 0.0f, dn = 0.0f;
    if (n != 0.0f) {
        dc = carry.r / n;
        dn = (carry.l - dc * c0[to]) / n;
    } else {
        if (dc_last) dc = dc_last[to];
        if (dn_last) dn = dn_last[to];
    }
    if (dc0) dc0[to] += dc;
    if (dn0) dn0[to] += dn;
}
