// y = (h + s x) silu(z), s one number a column.

#define ROWS 64

extern "C" __global__ void skip_gate_forward(
    const element_t *h, const float *skip, const element_t *x, const element_t *z, element_t *y, long long n,
    int width
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float gate = load(z + i);
    store(y + i, fmaf(skip[i % width], load(x + i), load(h + i)) * (gate * sigmoid(gate)));
}

/// dh += a, dx += a s, dz += dy (h + s x) silu'(z), with a = dy silu(z); each may be null.
extern "C" __global__ void skip_gate_backward(
    const element_t *dy, const element_t *h, const float *skip, const element_t *x, const element_t *z,
    element_t *dh, element_t *dx, element_t *dz, long long n, int width
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float gate = load(z + i), s = sigmoid(gate), value = gate * s, slope = fmaf(value, 1.0f - s, s);
    float g = load(dy + i), scale = skip[i % width];
    if (dh) add(dh + i, g * value);
    if (dx) add(dx + i, g * value * scale);
    if (dz) add(dz + i, g * slope * fmaf(scale, load(x + i), load(h + i)));
}

/// parts (tiles, width) = the sums of a x over tiles of ROWS rows. grid (ceil(width / 128), tiles),
/// block 128.
extern "C" __global__ void skip_gate_parts(
    const element_t *dy, const element_t *x, const element_t *z, float *parts, int rows, int width
) {
    int column = blockIdx.x * 128 + threadIdx.x, first = blockIdx.y * ROWS;
    if (column >= width) return;
    float sum = 0.0f;
    for (int row = first; row < min(rows, first + ROWS); row++) {
        long long i = (long long)row * width + column;
        float gate = load(z + i);
        sum = fmaf(load(dy + i) * (gate * sigmoid(gate)), load(x + i), sum);
    }
    parts[(long long)blockIdx.y * width + column] = sum;
}
