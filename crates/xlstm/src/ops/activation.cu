// y = act(gate) * up, and y = act(x). kind: the order of the enumeration in activation.rs.

struct Both {
    float value, slope;
};

__device__ __forceinline__ Both activation(float x, int kind) {
    switch (kind) {
    case 0: { // GELU
        float below = fmaf(erff(x * 0.70710678118654752f), 0.5f, 0.5f);
        float density = 0.3989422804014327f * expf(-0.5f * x * x);
        return {x * below, fmaf(x, density, below)};
    }
    case 1: // ReLU; NaN goes through
        if (x <= 0.0f) return {0.0f, 0.0f};
        return {x, 1.0f};
    case 2: // ReLU squared
        if (x <= 0.0f) return {0.0f, 0.0f};
        return {x * x, x + x};
    case 3: { // sigmoid
        float s = sigmoid(x);
        return {s, s * (1.0f - s)};
    }
    case 4: { // swish
        float s = sigmoid(x), y = x * s;
        return {y, fmaf(y, 1.0f - s, s)};
    }
    default: { // SELU
        const float scale = 1.0507009873554805f, both = 1.0507009873554805f * 1.6732632423543772f;
        float slope = both * expf(x > 0.0f ? 0.0f : x);
        if (x > 0.0f) return {scale * x, scale};
        return {slope - both, slope};
    }
    }
}

extern "C" __global__ void gated_forward(
    const element_t *gate, const element_t *up, element_t *y, long long n, int kind
) {
    int count;
    long long i = my_elements(n, &count);
    if (count <= 0) return;
    Wide g = load_wide(gate + i, count), u = load_wide(up + i, count);
    EACH_WIDE(j) u.x[j] *= activation(g.x[j], kind).value;
    store_wide(y + i, u, count);
}

/// dgate += dy up act'(gate), dup += dy act(gate); either may be null. Where `fresh` has bit 0, 1, they are
/// written, not added to.
extern "C" __global__ void gated_backward(
    const element_t *dy, const element_t *gate, const element_t *up, element_t *dgate, element_t *dup, long long n,
    int kind, int fresh
) {
    int count;
    long long i = my_elements(n, &count);
    if (count <= 0) return;
    Wide g = load_wide(gate + i, count), u = load_wide(up + i, count), d = load_wide(dy + i, count);
    EACH_WIDE(j) {
        Both both = activation(g.x[j], kind);
        g.x[j] = d.x[j] * u.x[j] * both.slope;
        u.x[j] = d.x[j] * both.value;
    }
    if (dgate) give_wide(dgate + i, g, count, fresh & 1);
    if (dup) give_wide(dup + i, u, count, fresh & 2);
}

extern "C" __global__ void activated_forward(const element_t *x, element_t *y, long long n, int kind) {
    int count;
    long long i = my_elements(n, &count);
    if (count <= 0) return;
    Wide own = load_wide(x + i, count);
    EACH_WIDE(j) own.x[j] = activation(own.x[j], kind).value;
    store_wide(y + i, own, count);
}

/// dx += dy act'(x), or = where it is fresh.
extern "C" __global__ void activated_backward(
    const element_t *dy, const element_t *x, element_t *dx, long long n, int kind, int fresh
) {
    int count;
    long long i = my_elements(n, &count);
    if (count <= 0) return;
    Wide own = load_wide(x + i, count), slope = load_wide(dy + i, count);
    EACH_WIDE(j) own.x[j] = slope.x[j] * activation(own.x[j], kind).slope;
    give_wide(dx + i, own, count, fresh);
}
