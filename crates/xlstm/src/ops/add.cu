// y = a + b.

extern "C" __global__ void add_forward(const element_t *a, const element_t *b, element_t *y, long long n) {
    int count;
    long long i = my_elements(n, &count);
    if (count <= 0) return;
    Wide sum = load_wide(a + i, count), other = load_wide(b + i, count);
    EACH_WIDE(j) sum.x[j] += other.x[j];
    store_wide(y + i, sum, count);
}

/// dx += dy, or = where it is fresh.
extern "C" __global__ void add_backward(const element_t *dy, element_t *dx, long long n, int fresh) {
    int count;
    long long i = my_elements(n, &count);
    if (count > 0) give_wide(dx + i, load_wide(dy + i, count), count, fresh);
}
