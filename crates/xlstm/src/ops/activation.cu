// y = act(gate) * up. One thread an element. kind: the order of the enumeration in
// activation.rs.

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
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) store(y + i, activation(load(gate + i), kind).value * load(up + i));
}

/// dgate += dy up act'(gate), dup += dy act(gate); either may be null.
extern "C" __global__ void gated_backward(
    const element_t *dy, const element_t *gate, const element_t *up, element_t *dgate, element_t *dup, long long n,
    int kind
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    Both both = activation(load(gate + i), kind);
    float g = load(dy + i);
    if (dgate) add(dgate + i, g * load(up + i) * both.slope);
    if (dup) add(dup + i, g * both.value);
}
