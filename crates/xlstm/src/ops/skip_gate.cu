// y = (h + s x) silu(z), s one number a column.

/// The skip's columns of elements i and on.
__device__ __forceinline__ Wide columns(const float *skip, long long i, int width, int count) {
    int column = (int)(i % width);
    if (column + WIDE <= width) return load_wide(skip + column, count);
    Wide wide;
    EACH_WIDE(j) wide.x[j] = skip[(column + j) % width];
    return wide;
}

extern "C" __global__ void skip_gate_forward(
    const element_t *h, const float *skip, const element_t *x, const element_t *z, element_t *y, long long n,
    int width
) {
    int count;
    long long i = my_elements(n, &count);
    if (count <= 0) return;
    Wide sum = load_wide(h + i, count), s = columns(skip, i, width, count);
    Wide xs = load_wide(x + i, count), gates = load_wide(z + i, count);
    EACH_WIDE(j) sum.x[j] = fmaf(s.x[j], xs.x[j], sum.x[j]) * (gates.x[j] * sigmoid(gates.x[j]));
    store_wide(y + i, sum, count);
}

/// dh += a, dx += a s, dz += dy (h + s x) silu'(z), with a = dy silu(z); each may be null.
extern "C" __global__ void skip_gate_backward(
    const element_t *dy, const element_t *h, const float *skip, const element_t *x, const element_t *z,
    element_t *dh, element_t *dx, element_t *dz, long long n, int width
) {
    int count;
    long long i = my_elements(n, &count);
    if (count <= 0) return;
    Wide g = load_wide(dy + i, count), hs = load_wide(h + i, count), xs = load_wide(x + i, count);
    Wide gates = load_wide(z + i, count), s = columns(skip, i, width, count);
    EACH_WIDE(j) {
        float gate = gates.x[j], open = sigmoid(gate), value = gate * open;
        gates.x[j] = g.x[j] * fmaf(value, 1.0f - open, open) * fmaf(s.x[j], xs.x[j], hs.x[j]);
        g.x[j] *= value;
        s.x[j] *= g.x[j];
    }
    if (dh) add_wide(dh + i, g, count);
    if (dx) add_wide(dx + i, s, count);
    if (dz) add_wide(dz + i, gates, count);
}

/// parts (tiles, width) = the sums of a x over tiles of rows. grid (ceil(width / 128), tiles),
/// block 128.
extern "C" __global__ void skip_gate_parts(
    const element_t *dy, const element_t *x, const element_t *z, float *parts, int rows, int width
) {
    sum_tile(parts, rows, width, [=](int, int, long long i) {
        float gate = load(z + i);
        return load(dy + i) * (gate * sigmoid(gate)) * load(x + i);
    });
}
