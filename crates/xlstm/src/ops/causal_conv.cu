// Causal depthwise convolution on a GPU, as in causal_conv.rs:
// u_t = b + sum_j w_j ∘ x_{t-K+1+j}, y_t = SiLU(u_t) or u_t.
//
// A tap finds its row by walking over the marks: a pad is not there, and nothing is seen across a
// reset or before the window. With the usual four taps a thread carries the rows along instead.
//
// Sizes: B sequences <= 65535, S tokens, E features, K taps >= 1, all free; T = ceil(S / 32) tiles
// of tokens <= 65535. x, y, dx, dy (B, S, E): element_t. w (E, K), b (E) or null,
// dw, db: f32. window, window_last and their gradients (B, K-1, E): f32; window null: zeros. marks (B, S)
// u32 or null. Outputs are written whole, gradients added to what is there; null gradients are not
// wanted (given: zero). No kernel uses dynamic shared memory; blocks are 256 features wide.
// Backward: causal_conv_backward_taps -> causal_conv_backward_inputs, causal_conv_backward_window,
// causal_conv_backward_weights. Work space, f32: du (B, S, E), partials (B, T, K+1, E).

#define TOKENS 32
#define THREADS 256

__device__ __forceinline__ unsigned mark_of(const unsigned *marks, int t) { return marks ? marks[t] : 0u; }

/// The real tokens before a position, newest first, up to a reset, then the rows of the window.
struct History {
    const unsigned *marks;
    int tokens, window;
    /// A token t >= 0, a row r of the window as -1 - r, or NONE.
    static const int NONE = 0x80000000;
    __device__ __forceinline__ int next() {
        while (tokens > 0) {
            unsigned mark = mark_of(marks, --tokens);
            if (mark & PAD) continue;
            int token = tokens;
            if (mark & RESET) tokens = window = 0;
            return token;
        }
        return window > 0 ? -1 - --window : NONE;
    }
};

/// One sequence of the inputs, at one feature.
struct Sequence {
    const element_t *x;
    const float *window;
    const unsigned *marks;
    int E, K;
    __device__ __forceinline__ float at(int source) const {
        if (source >= 0) return load(x + (long long)source * E);
        return window ? window[(long long)(-1 - source) * E] : 0.0f;
    }
    __device__ __forceinline__ History before(int t) const { return {marks, t, K - 1}; }
    __device__ __forceinline__ float convolve(int t, const float *w, const float *bias, int e) const {
        float u = bias ? bias[e] : 0.0f;
        History history = before(t + 1);
        for (int tap = K - 1; tap >= 0; tap--) {
            int source = history.next();
            if (source == History::NONE) break;
            u = fmaf(w[(long long)e * K + tap], at(source), u);
        }
        return u;
    }
};
__device__ __forceinline__ Sequence sequence_of(
    const element_t *x, const float *window, const unsigned *marks, int b, int e, int S, int E, int K
) {
    return {
        x + (long long)b * S * E + e, window ? window + (long long)b * (K - 1) * E + e : window,
        marks ? marks + (long long)b * S : marks, E, K,
    };
}

#define TAPS 4
/// Tokens whose loads are under way at once.
#define TOGETHER 8

/// The last TAPS - 1 real tokens, oldest first, zero where there is none; for K = TAPS.
struct Seen {
    float row[TAPS - 1];
    __device__ __forceinline__ void start(const Sequence &sequence, int t) {
        History history = sequence.before(t);
#pragma unroll
        for (int r = TAPS - 2; r >= 0; r--) {
            int source = history.next();
            row[r] = source == History::NONE ? 0.0f : sequence.at(source);
        }
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int r = 0; r < TAPS - 1; r++) row[r] = 0.0f;
    }
    __device__ __forceinline__ float convolve(float now, const float *w, float bias) const {
        float u = fmaf(w[TAPS - 1], now, bias);
#pragma unroll
        for (int r = TAPS - 2; r >= 0; r--) u = fmaf(w[r], row[r], u);
        return u;
    }
    __device__ __forceinline__ void push(float now) {
#pragma unroll
        for (int r = 0; r < TAPS - 2; r++) row[r] = row[r + 1];
        row[TAPS - 2] = now;
    }
};

/// y of every token, for K = TAPS. Launched as causal_conv.
extern "C" __global__ void __launch_bounds__(THREADS) causal_conv_4(
    const element_t *x, const float *w, const float *bias, const float *window, const unsigned *marks,
    element_t *y, int S, int E, int K, int silu
) {
    int e = blockIdx.x * THREADS + threadIdx.x, b = blockIdx.z, t = blockIdx.y * TOKENS, end = min(t + TOKENS, S);
    if (e >= E) return;
    Sequence sequence = sequence_of(x, window, marks, b, e, S, E, K);
    float weights[TAPS], start = bias ? bias[e] : 0.0f;
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++) weights[tap] = w[(long long)e * TAPS + tap];
    Seen seen;
    seen.start(sequence, t);
    y += (long long)b * S * E + e;
    for (; t < end; t += TOGETHER) {
        float now[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) now[i] = sequence.at(min(t + i, end - 1));
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            if (t + i >= end) break;
            unsigned mark = mark_of(sequence.marks, t + i);
            float u = 0.0f;
            if (!(mark & PAD)) {
                if (mark & RESET) seen.clear();
                u = seen.convolve(now[i], weights, start);
                if (silu) u *= sigmoid(u);
                seen.push(now[i]);
            }
            store(y + (long long)(t + i) * E, u);
        }
    }
}

/// y of every token.
/// grid (ceil(E / 256), T, B), block 256.
extern "C" __global__ void __launch_bounds__(THREADS) causal_conv(
    const element_t *x, const float *w, const float *bias, const float *window, const unsigned *marks,
    element_t *y, int S, int E, int K, int silu
) {
    int e = blockIdx.x * THREADS + threadIdx.x, b = blockIdx.z, start = blockIdx.y * TOKENS;
    if (e >= E) return;
    Sequence sequence = sequence_of(x, window, marks, b, e, S, E, K);
    for (int t = start; t < min(start + TOKENS, S); t++) {
        float u = 0.0f;
        if (!(mark_of(sequence.marks, t) & PAD)) {
            u = sequence.convolve(t, w, bias, e);
            if (silu) u *= sigmoid(u);
        }
        store(y + ((long long)b * S + t) * E + e, u);
    }
}

/// The window after the last token. Not for K = 1. window_last must not be window.
/// grid (ceil(E / 256), B), block 256.
extern "C" __global__ void __launch_bounds__(THREADS) causal_conv_window(
    const element_t *x, const float *window, const unsigned *marks, float *window_last, int S, int E, int K
) {
    int e = blockIdx.x * THREADS + threadIdx.x, b = blockIdx.y;
    if (e >= E) return;
    Sequence sequence = sequence_of(x, window, marks, b, e, S, E, K);
    History history = sequence.before(S);
    for (int r = K - 2; r >= 0; r--) {
        int source = history.next();
        window_last[((long long)b * (K - 1) + r) * E + e] = source == History::NONE ? 0.0f : sequence.at(source);
    }
}

/// du_t = dy_t SiLU'(u_t) or dy_t, 0 at pads; and of each tile of tokens, dw_j = sum du_t ∘ x_{t-K+1+j}
/// and, in row K, db = sum du_t.
/// grid (ceil(E / 256), T, B), block 256. dy may be null. Out: du (B, S, E), partials (B, T, K+1, E).
extern "C" __global__ void __launch_bounds__(THREADS, 4) causal_conv_backward_taps(
    const element_t *x, const float *w, const float *bias, const float *window, const unsigned *marks,
    const element_t *dy, float *du, float *partials, int S, int E, int K, int silu
) {
    int e = blockIdx.x * THREADS + threadIdx.x, b = blockIdx.z, start = blockIdx.y * TOKENS;
    if (e >= E) return;
    Sequence sequence = sequence_of(x, window, marks, b, e, S, E, K);
    int end = min(start + TOKENS, S);
    float *to = partials + ((long long)b * gridDim.y + blockIdx.y) * (K + 1) * E + e;
    du += (long long)b * S * E + e;
    float sum = 0.0f;
    for (int t = start; t < end; t++) {
        float gradient = 0.0f;
        if (dy && !(mark_of(sequence.marks, t) & PAD)) {
            gradient = load(dy + ((long long)b * S + t) * E + e);
            if (silu) {
                float u = sequence.convolve(t, w, bias, e), s = sigmoid(u);
                gradient *= fmaf(u * s, 1.0f - s, s);
            }
        }
        du[(long long)t * E] = gradient;
        sum += gradient;
    }
    to[(long long)K * E] = sum;
    for (int tap = K - 1; tap >= 0; tap--) {
        sum = 0.0f;
        for (int t = start; t < end; t++) {
            if (mark_of(sequence.marks, t) & PAD) continue;
            History history = sequence.before(t + 1);
            int source = history.next();
            for (int n = K - 1; n > tap && source != History::NONE; n--) source = history.next();
            if (source != History::NONE) sum = fmaf(du[(long long)t * E], sequence.at(source), sum);
        }
        to[(long long)tap * E] = sum;
    }
}

/// The same for K = TAPS.
extern "C" __global__ void __launch_bounds__(THREADS) causal_conv_backward_taps_4(
    const element_t *x, const float *w, const float *bias, const float *window, const unsigned *marks,
    const element_t *dy, float *du, float *partials, int S, int E, int K, int silu
) {
    int e = blockIdx.x * THREADS + threadIdx.x, b = blockIdx.z, t = blockIdx.y * TOKENS, end = min(t + TOKENS, S);
    if (e >= E) return;
    Sequence sequence = sequence_of(x, window, marks, b, e, S, E, K);
    float weights[TAPS], sums[TAPS + 1] = {}, start = bias ? bias[e] : 0.0f;
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++) weights[tap] = w[(long long)e * TAPS + tap];
    Seen seen;
    seen.start(sequence, t);
    du += (long long)b * S * E + e;
    if (dy) dy += (long long)b * S * E + e;
    for (; t < end; t += TOGETHER) {
        float now[TOGETHER], given[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            long long at = min(t + i, end - 1);
            now[i] = load(sequence.x + at * E);
            given[i] = dy ? load(dy + at * E) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            if (t + i >= end) break;
            unsigned mark = mark_of(sequence.marks, t + i);
            float gradient = 0.0f;
            if (!(mark & PAD)) {
                if (mark & RESET) seen.clear();
                gradient = given[i];
                if (silu) {
                    float u = seen.convolve(now[i], weights, start), s = sigmoid(u);
                    gradient *= fmaf(u * s, 1.0f - s, s);
                }
#pragma unroll
                for (int tap = 0; tap < TAPS - 1; tap++) sums[tap] = fmaf(gradient, seen.row[tap], sums[tap]);
                sums[TAPS - 1] = fmaf(gradient, now[i], sums[TAPS - 1]);
                sums[TAPS] += gradient;
                seen.push(now[i]);
            }
            du[(long long)(t + i) * E] = gradient;
        }
    }
    float *to = partials + ((long long)b * gridDim.y + blockIdx.y) * (TAPS + 1) * E + e;
#pragma unroll
    for (int tap = 0; tap <= TAPS; tap++) to[(long long)tap * E] = sums[tap];
}

/// What the tokens from `t` on, and the window after them, hand to a row that `seen` real tokens
/// (itself among them) already passed: sum over the n-th real token of w_{K-1-n} ∘ du, and dwindow.
__device__ float from_later(
    const float *du, const float *w, const float *dlast, const unsigned *marks, int t, int seen, int S, int E,
    int K
) {
    float sum = 0.0f;
    for (; t < S && seen < K; t++) {
        unsigned mark = mark_of(marks, t);
        if (mark & PAD) continue;
        if (mark & RESET) return sum;
        sum = fmaf(w[K - 1 - seen], du[(long long)t * E], sum);
        seen++;
    }
    // In the last window, the newest row has been passed by one token: itself.
    if (t == S && seen < K && dlast) sum += dlast[(long long)(K - 1 - seen) * E];
    return sum;
}

/// dx_s += sum_n w_{K-1-n} ∘ du of the n-th real token from s on (n = 0: itself), and what the last
/// window's gradient (dlast, or null) says of it.
/// grid (ceil(E / 256), T, B), block 256.
extern "C" __global__ void __launch_bounds__(THREADS) causal_conv_backward_inputs(
    const float *w, const unsigned *marks, const float *du, const float *dlast, element_t *dx, int S, int E,
    int K
) {
    int e = blockIdx.x * THREADS + threadIdx.x, b = blockIdx.z, start = blockIdx.y * TOKENS;
    if (e >= E) return;
    if (marks) marks += (long long)b * S;
    if (dlast) dlast += (long long)b * (K - 1) * E + e;
    du += (long long)b * S * E + e;
    w += (long long)e * K;
    for (int t = start; t < min(start + TOKENS, S); t++) {
        if (mark_of(marks, t) & PAD) continue;
        float own = w[K - 1] * du[(long long)t * E];
        add(dx + ((long long)b * S + t) * E + e, own + from_later(du, w, dlast, marks, t + 1, 1, S, E, K));
    }
}

/// The same for the rows of the incoming window, of which the newest is one token old.
/// grid (ceil(E / 256), B), block 256. Not for K = 1.
extern "C" __global__ void __launch_bounds__(THREADS) causal_conv_backward_window(
    const float *w, const unsigned *marks, const float *du, const float *dlast, float *dwindow, int S, int E,
    int K
) {
    int e = blockIdx.x * THREADS + threadIdx.x, b = blockIdx.y;
    if (e >= E) return;
    if (marks) marks += (long long)b * S;
    if (dlast) dlast += (long long)b * (K - 1) * E + e;
    du += (long long)b * S * E + e;
    w += (long long)e * K;
    for (int r = 0; r < K - 1; r++)
        dwindow[((long long)b * (K - 1) + r) * E + e] += from_later(du, w, dlast, marks, 0, K - 1 - r, S, E, K);
}

/// dw and db: the partials' sums, in order; 8 threads a feature take every eighth part.
/// grid (ceil(E / 32), K+1), block (32, 8). parts: B T. dw, db may be null.
extern "C" __global__ void __launch_bounds__(THREADS) causal_conv_backward_weights(
    const float *partials, float *dw, float *db, int E, int K, int parts
) {
    __shared__ float sums[8][32];
    int e = blockIdx.x * 32 + threadIdx.x, tap = blockIdx.y;
    float *to = tap < K ? dw : db, sum = 0.0f;
    if (e < E && to)
        for (int part = threadIdx.y; part < parts; part += 8)
            sum += partials[((long long)part * (K + 1) + tap) * E + e];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || e >= E || !to) return;
    sum = 0.0f;
    for (int i = 0; i < 8; i++) sum += sums[i][threadIdx.x];
    to[tap < K ? (long long)e * K + tap : e] += sum;
}
