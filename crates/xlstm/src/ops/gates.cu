// What stands around the products of gates.rs. Both gates are one product: the rows of their weights below
// each other, filled up with zeros to `padded` rows, as products want them. Output o of 2 heads is output
// o % heads of gate o / heads. z, y_g, b_g and their gradients: f32, but for dz: element_t, as W_g.

/// w (padded, total) = the rows of both weights, then zeros. A thread an element.
extern "C" __global__ void gates_weights(
    const element_t *w0, const element_t *w1, element_t *w, int heads, int padded, int total
) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, o = i / total;
    if (o >= padded) return;
    int first = heads * total;
    w[i] = o < heads ? w0[i] : o < 2 * heads ? w1[i - first] : (element_t)0;
}

/// y_g (rows, heads) = cap tanh((z_g + b_g) / cap) of z (rows, padded), or z_g + b_g where cap is 0. b_g may be
/// null. A thread an output.
extern "C" __global__ void gates_values(
    const float *z, const float *b0, const float *b1, float *y0, float *y1, int rows, int heads, int padded, float cap
) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, row = i / (2 * heads), o = i % (2 * heads), head = o % heads;
    if (row >= rows) return;
    const float *bias = o < heads ? b0 : b1;
    float value = z[(long long)row * padded + o] + (bias ? bias[head] : 0.0f);
    if (cap != 0.0f) value = cap * tanhf(value / cap);
    (o < heads ? y0 : y1)[(long long)row * heads + head] = value;
}

/// dz (rows, padded) = the gradients of both gates before the cap, then zeros; full: the same in f32. dy_g may be
/// null. A thread an element.
extern "C" __global__ void gates_slopes(
    const float *y0, const float *y1, const float *dy0, const float *dy1, element_t *dz, float *full, int rows,
    int heads, int padded, float cap
) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, row = i / padded, o = i % padded;
    if (row >= rows) return;
    long long at = (long long)row * heads + o % heads;
    const float *dy = o < heads ? dy0 : o < 2 * heads ? dy1 : 0;
    float d = dy ? dy[at] : 0.0f;
    if (dy && cap != 0.0f) {
        float t = (o < heads ? y0 : y1)[at] / cap;
        d *= fmaf(-t, t, 1.0f);
    }
    store(dz + i, d);
    full[i] = d;
}

/// dW_g (heads, total) += the rows of dw (padded, total), db_g (heads) += those of db (padded). Null gradients are
/// not asked for, and those of dW_0, dW_1, db_0, db_1 whose bit `fresh` has are written, not added to. A thread an
/// element of 2 heads (total + 1).
extern "C" __global__ void gates_gradients(
    const float *dw, const float *db, float *dw0, float *dw1, float *db0, float *db1, int heads, int total, int fresh
) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, o = i / (total + 1), column = i % (total + 1), head = o % heads;
    if (o >= 2 * heads) return;
    bool second = o >= heads, bias = column == total;
    float *to = bias ? (second ? db1 : db0) : (second ? dw1 : dw0);
    if (!to) return;
    float sum = bias ? db[o] : dw[(long long)o * total + column];
    to += bias ? head : (long long)head * total + column;
    *to = fresh >> (2 * bias + second) & 1 ? sum : *to + sum;
}
