// The tokens of every document in reverse order; pads stay where they are.

#define WARP 32
#define ALL 0xffffffffu

/// places (rows, length): where each token of a row goes. A warp a row. tokens (rows, length) is work
/// space: the places of a row's tokens, without its pads.
extern "C" __global__ void reverse_places(const unsigned *marks, int *tokens, int *places, int length) {
    long long row = (long long)blockIdx.x * length;
    marks += row, tokens += row, places += row;
    int lane = threadIdx.x, count = 0;
    unsigned below = (1u << lane) - 1;
    for (int first = 0; first < length; first += WARP) {
        int t = first + lane;
        bool token = t < length && !(marks[t] & PAD);
        unsigned all = __ballot_sync(ALL, token);
        if (token) tokens[count + __popc(all & below)] = t;
        else if (t < length) places[t] = t;
        count += __popc(all);
    }
    __syncwarp();
    // Forward: places holds the number of the first token of each token's document.
    int start = 0;
    for (int first = 0; first < count; first += WARP) {
        int i = first + lane;
        bool resets = i < count && marks[tokens[i]] & RESET;
        unsigned upto = __ballot_sync(ALL, resets) & (below | 1u << lane);
        if (i < count) places[tokens[i]] = upto ? first + 31 - __clz(upto) : start;
        unsigned all = __ballot_sync(ALL, resets);
        if (all) start = first + 31 - __clz(all);
    }
    // Backward: with the last one, that of the token before the next reset, it is known where to go.
    int next = count;
    for (int first = (count - 1) / WARP * WARP; first >= 0; first -= WARP) {
        int i = first + lane;
        bool resets = i < count && marks[tokens[i]] & RESET;
        unsigned all = __ballot_sync(ALL, resets), after = all & ~(below | 1u << lane);
        int end = after ? first + __ffs(after) - 1 : next;
        if (i < count) places[tokens[i]] = tokens[places[tokens[i]] + end - 1 - i];
        if (all) next = first + __ffs(all) - 1;
    }
}

/// Where element i of (rows, length, width) goes.
__device__ __forceinline__ long long target(long long i, const int *places, int length, int width) {
    long long token = i / width, t = token % length;
    return (token - t + (places ? places[token] : length - 1 - t)) * width + i % width;
}

extern "C" __global__ void reverse_forward(
    const element_t *x, element_t *y, const int *places, long long n, int length, int width
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[target(i, places, length, width)] = x[i];
}

extern "C" __global__ void reverse_backward(
    const element_t *dy, element_t *dx, const int *places, long long n, int length, int width
) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) add(dx + i, load(dy + target(i, places, length, width)));
}
