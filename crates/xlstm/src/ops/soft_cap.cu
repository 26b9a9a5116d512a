// y = cap tanh(x / cap).

extern "C" __global__ void soft_cap_forward(const element_t *x, element_t *y, long long n, float cap) {
    int count;
    long long i = my_elements(n, &count);
    if (count <= 0) return;
    Wide wide = load_wide(x + i, count);
    EACH_WIDE(j) wide.x[j] = cap * tanhf(wide.x[j] / cap);
    store_wide(y + i, wide, count);
}

/// dx += dy (1 - (y / cap)^2), or = where it is fresh.
extern "C" __global__ void soft_cap_backward(
    const element_t *dy, const element_t *y, element_t *dx, long long n, float cap, int fresh
) {
    int count;
    long long i = my_elements(n, &count);
    if (count <= 0) return;
    Wide d = load_wide(dy + i, count), value = load_wide(y + i, count);
    EACH_WIDE(j) {
        float t = value.x[j] / cap;
        d.x[j] *= fmaf(-t, t, 1.0f);
    }
    give_wide(dx + i, d, count, fresh);
}
