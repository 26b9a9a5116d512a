// Causal depthwise convolution on a GPU, as in causal_conv.rs:
// u_t = b + sum_j w_j ∘ x_{t-K+1+j}, y_t = SiLU(u_t) or u_t.
//
// A tap finds its row by walking over the marks: a pad is not there, and nothing is seen across a
// reset or before the window. With the usual four taps a thread carries the rows along instead.
//
// Sizes: B sequences <= 65535, S tokens, E features, K taps >= 1, all free; T = ceil(S / 32) tiles
// of tokens <= 65535, or of 64 where a thread has four features. x, y, dx, dy (B, S, E): element_t. w (E, K), b (E)
// or null, dw, db: f32. window, window_last and their gradients (B, K-1, E): f32; window null: zeros. marks (B, S)
// u32 or null. Outputs are written whole, and so are gradients where they are fresh, else they are added to what is
// there; null gradients are not wanted (given: zero). No kernel uses dynamic shared memory.
// Backward: causal_conv_backward_taps -> causal_conv_backward_inputs, or causal_conv_backward_4 for both; ->
// causal_conv_backward_window, causal_conv_backward_weights. Work space, f32: du (B, S, E), partials (B, T, K+1, E).

#define TOKENS 32
/// The same where a thread has four features.
#define FOURS_TOKENS 64
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

// ---- Four taps: a thread has four features, carries the rows of the last tokens along, and has the loads of
// TOGETHER tokens under way at once. Widths are multiples of 4. block 128,
// grid (ceil(E / 512), ceil(S / FOURS_TOKENS), B). ----

#define TAPS 4
#define EACH_TAP(k) _Pragma("unroll") for (int k = 0; k < TAPS; k++)
#define EACH_BEFORE(r) _Pragma("unroll") for (int r = 0; r < TAPS - 1; r++)
#define EACH_TOKEN(i) _Pragma("unroll") for (int i = 0; i < TOGETHER; i++)

/// One sequence at four features from e on, which its pointers are at.
struct Fours {
    const element_t *x;
    const float *window;
    const unsigned *marks;
    int E;
    __device__ __forceinline__ Four at(int source) const {
        if (source >= 0) return unpack(load_four(x + (long long)source * E));
        if (source == History::NONE || !window) return {};
        return unpack(*(const float4 *)(window + (long long)(-1 - source) * E));
    }
};
__device__ __forceinline__ Fours fours_of(
    const element_t *x, const float *window, const unsigned *marks, int b, int e, int S, int E
) {
    return {
        x + (long long)b * S * E + e, window ? window + (long long)b * (TAPS - 1) * E + e : window,
        marks ? marks + (long long)b * S : marks, E,
    };
}

/// Weights by tap, and where sums start.
struct Taps {
    Four w[TAPS], start;
    __device__ __forceinline__ Taps(const float *from, const float *bias, int e) {
        EACH_FOUR(j) {
            float4 feature = *(const float4 *)(from + (long long)(e + j) * TAPS);
            w[0].x[j] = feature.x, w[1].x[j] = feature.y, w[2].x[j] = feature.z, w[3].x[j] = feature.w;
            start.x[j] = bias ? bias[e + j] : 0.0f;
        }
    }
};

/// The last TAPS - 1 real tokens, oldest first, zero where there is none.
struct Seen {
    Four row[TAPS - 1];
    __device__ __forceinline__ Seen(const Fours &sequence, int t) {
        History history = {sequence.marks, t, TAPS - 1};
#pragma unroll
        for (int r = TAPS - 2; r >= 0; r--) row[r] = sequence.at(history.next());
    }
    __device__ __forceinline__ void clear() { EACH_BEFORE(r) row[r] = {}; }
    __device__ __forceinline__ float convolve(const Four &now, const Taps &taps, int j) const {
        float u = fmaf(taps.w[TAPS - 1].x[j], now.x[j], taps.start.x[j]);
#pragma unroll
        for (int r = TAPS - 2; r >= 0; r--) u = fmaf(taps.w[r].x[j], row[r].x[j], u);
        return u;
    }
    __device__ __forceinline__ void push(const Four &now) {
#pragma unroll
        for (int r = 0; r < TAPS - 2; r++) row[r] = row[r + 1];
        row[TAPS - 2] = now;
    }
};

/// y of every token.
extern "C" __global__ void __launch_bounds__(128) causal_conv_4(
    const element_t *x, const float *w, const float *bias, const float *window, const unsigned *marks,
    element_t *y, int S, int E, int silu
) {
    const int TOGETHER = 8;
    int e = (blockIdx.x * 128 + threadIdx.x) * 4, b = blockIdx.z, t = blockIdx.y * FOURS_TOKENS;
    int end = min(t + FOURS_TOKENS, S);
    if (e >= E) return;
    Fours sequence = fours_of(x, window, marks, b, e, S, E);
    Taps taps(w, bias, e);
    Seen seen(sequence, t);
    y += (long long)b * S * E + e;
    for (; t < end; t += TOGETHER) {
        RawFour of_x[TOGETHER];
        EACH_TOKEN(i) of_x[i] = load_four(sequence.x + (long long)min(t + i, end - 1) * E);
        EACH_TOKEN(i) {
            if (t + i >= end) break;
            unsigned mark = mark_of(sequence.marks, t + i);
            Four u = {};
            if (!(mark & PAD)) {
                Four now = unpack(of_x[i]);
                if (mark & RESET) seen.clear();
                EACH_FOUR(j) {
                    u.x[j] = seen.convolve(now, taps, j);
                    if (silu) u.x[j] *= quick_sigmoid(u.x[j]);
                }
                seen.push(now);
            }
            store_four(y + (long long)(t + i) * E, u);
        }
    }
}

/// Gradients of the last TAPS - 1 real tokens, oldest first, to which later ones still add; `token` is below 0
/// where there is none to be given.
struct Pending {
    Four row[TAPS - 1];
    int token[TAPS - 1];
    element_t *dx;
    int E;
    bool fresh;
    __device__ __forceinline__ Pending(element_t *dx, int E, bool fresh) : dx(dx), E(E), fresh(fresh) {
        EACH_BEFORE(r) token[r] = -1;
    }
    __device__ __forceinline__ void give(int t, Four four) const {
        if (t < 0) return;
        element_t *to = dx + (long long)t * E;
        if (!fresh) {
            Four old = unpack(load_four(to));
            EACH_FOUR(j) four.x[j] += old.x[j];
        }
        store_four(to, four);
    }
    /// All are complete.
    __device__ __forceinline__ void flush() {
        EACH_BEFORE(r) {
            give(token[r], row[r]);
            token[r] = -1;
        }
    }
    /// Real token t with du comes; the oldest is complete then. It joins them unless t < 0.
    __device__ __forceinline__ void push(int t, const Four &du, const Taps &taps) {
        EACH_BEFORE(r) EACH_FOUR(j) row[r].x[j] = fmaf(taps.w[r].x[j], du.x[j], row[r].x[j]);
        give(token[0], row[0]);
#pragma unroll
        for (int r = 0; r < TAPS - 2; r++) row[r] = row[r + 1], token[r] = token[r + 1];
        token[TAPS - 2] = t;
        EACH_FOUR(j) row[TAPS - 2].x[j] = taps.w[TAPS - 1].x[j] * du.x[j];
    }
    __device__ __forceinline__ bool any() const {
        bool any = false;
        EACH_BEFORE(r) any |= token[r] >= 0;
        return any;
    }
};

/// As causal_conv_backward_taps, and dx with it, which is written where it is fresh, else added to. A block goes
/// on behind its tokens until nothing is pending. du, only for the first window's gradient, dlast and dx may be
/// null. dy is there.
extern "C" __global__ void __launch_bounds__(128) causal_conv_backward_4(
    const element_t *x, const float *w, const float *bias, const float *window, const unsigned *marks,
    const element_t *dy, const float *dlast, float *du, float *partials, element_t *dx, int S, int E, int silu,
    int fresh
) {
    const int TOGETHER = 4;
    int e = (blockIdx.x * 128 + threadIdx.x) * 4, b = blockIdx.z, t = blockIdx.y * FOURS_TOKENS;
    int end = min(t + FOURS_TOKENS, S);
    if (e >= E) return;
    Fours sequence = fours_of(x, window, marks, b, e, S, E);
    Taps taps(w, bias, e);
    Seen seen(sequence, t);
    dy += (long long)b * S * E + e;
    if (dx) dx += (long long)b * S * E + e;
    if (du) du += (long long)b * S * E + e;
    Pending pending(dx, E, fresh);
    Four sums[TAPS + 1] = {};
    while (t < end || (t < S && pending.any())) {
        RawFour of_x[TOGETHER], of_dy[TOGETHER];
        EACH_TOKEN(i) {
            long long at = (long long)min(t + i, S - 1) * E;
            of_x[i] = load_four(sequence.x + at);
            of_dy[i] = load_four(dy + at);
        }
        EACH_TOKEN(i) {
            int now_at = t + i;
            if (now_at >= S) break;
            bool own = now_at < end;
            unsigned mark = mark_of(sequence.marks, now_at);
            Four gradient = {};
            if (!(mark & PAD)) {
                Four now = unpack(of_x[i]);
                gradient = unpack(of_dy[i]);
                if (mark & RESET) {
                    pending.flush();
                    seen.clear();
                }
                if (silu)
                    EACH_FOUR(j) {
                        float u = seen.convolve(now, taps, j), s = quick_sigmoid(u);
                        gradient.x[j] *= fmaf(u * s, 1.0f - s, s);
                    }
                if (own) {
                    EACH_BEFORE(k) EACH_FOUR(j) sums[k].x[j] = fmaf(gradient.x[j], seen.row[k].x[j], sums[k].x[j]);
                    EACH_FOUR(j) {
                        sums[TAPS - 1].x[j] = fmaf(gradient.x[j], now.x[j], sums[TAPS - 1].x[j]);
                        sums[TAPS].x[j] += gradient.x[j];
                    }
                }
                if (dx) pending.push(own ? now_at : -1, gradient, taps);
                seen.push(now);
            } else if (dx && own && fresh) {
                store_four(dx + (long long)now_at * E, gradient);
            }
            if (du && own) store_four(du + (long long)now_at * E, gradient);
        }
        t += TOGETHER;
    }
    if (dlast && dx) {
        // In the last window, the newest row is the newest token.
        dlast += (long long)b * (TAPS - 1) * E + e;
        EACH_BEFORE(r) if (pending.token[r] >= 0) {
            Four last = unpack(*(const float4 *)(dlast + (long long)r * E));
            EACH_FOUR(j) pending.row[r].x[j] += last.x[j];
        }
    }
    if (dx) pending.flush();
    float *to = partials + ((long long)b * gridDim.y + blockIdx.y) * (TAPS + 1) * E + e;
#pragma unroll
    for (int k = 0; k <= TAPS; k++) store_four(to + (long long)k * E, sums[k]);
}

// ---- Any number of taps: a thread has one feature ----

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

/// dx_s += (= where it is fresh) sum_n w_{K-1-n} ∘ du of the n-th real token from s on (n = 0: itself), and what the last
/// window's gradient (dlast, or null) says of it.
/// grid (ceil(E / 256), T, B), block 256.
extern "C" __global__ void __launch_bounds__(THREADS) causal_conv_backward_inputs(
    const float *w, const unsigned *marks, const float *du, const float *dlast, element_t *dx, int S, int E,
    int K, int fresh
) {
    int e = blockIdx.x * THREADS + threadIdx.x, b = blockIdx.z, start = blockIdx.y * TOKENS;
    if (e >= E) return;
    if (marks) marks += (long long)b * S;
    if (dlast) dlast += (long long)b * (K - 1) * E + e;
    du += (long long)b * S * E + e;
    w += (long long)e * K;
    for (int t = start; t < min(start + TOKENS, S); t++) {
        float sum = 0.0f;
        if (!(mark_of(marks, t) & PAD))
            sum = w[K - 1] * du[(long long)t * E] + from_later(du, w, dlast, marks, t + 1, 1, S, E, K);
        element_t *to = dx + ((long long)b * S + t) * E + e;
        if (fresh) store(to, sum);
        else add(to, sum);
    }
}

/// The same for the rows of the incoming window, of which the newest is one token old.
/// grid (ceil(E / 256), B), block 256. Not for K = 1.
extern "C" __global__ void __launch_bounds__(THREADS) causal_conv_backward_window(
    const float *w, const unsigned *marks, const float *du, const float *dlast, float *dwindow, int S, int E,
    int K, int fresh
) {
    int e = blockIdx.x * THREADS + threadIdx.x, b = blockIdx.y;
    if (e >= E) return;
    if (marks) marks += (long long)b * S;
    if (dlast) dlast += (long long)b * (K - 1) * E + e;
    du += (long long)b * S * E + e;
    w += (long long)e * K;
    for (int r = 0; r < K - 1; r++) {
        float *to = dwindow + ((long long)b * (K - 1) + r) * E + e;
        float sum = from_later(du, w, dlast, marks, 0, K - 1 - r, S, E, K);
        *to = fresh ? sum : *to + sum;
    }
}

/// dw and db: the partials' sums, in order, or with these added where their bits of `fresh` (1, 2) are not set;
/// 32 threads a feature take every 32nd part. grid (ceil(E / 32), K+1), block (32, 32). dw, db may be null.
extern "C" __global__ void __launch_bounds__(1024) causal_conv_backward_weights(
    const float *partials, float *dw, float *db, int E, int K, int parts, unsigned fresh
) {
    __shared__ float sums[32][33];
    int e = blockIdx.x * 32 + threadIdx.x, tap = blockIdx.y;
    float *to = tap < K ? dw : db, sum = 0.0f;
    if (e < E && to)
#pragma unroll 4
        for (int part = threadIdx.y; part < parts; part += 32)
            sum += partials[((long long)part * (K + 1) + tap) * E + e];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || e >= E || !to) return;
    sum = 0.0f;
    for (int i = 0; i < 32; i++) sum += sums[i][threadIdx.x];
    to += tap < K ? (long long)e * K + tap : e;
    *to = fresh & (tap < K ? 2 : 4) ? sum : *to + sum;
}
