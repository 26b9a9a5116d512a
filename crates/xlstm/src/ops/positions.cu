// Where each token stands in its document, and the first token that it may look at, as in
// positions.rs. A warp a sequence, 32 tokens at a time.

/// before (B) or null; marks (B, S) or null; position, first (B, S); after (B); work space:
/// tokens (B, S), the places of the sequence's real tokens. grid B, block 32.
extern "C" __global__ void positions(
    const float *before, const unsigned *marks, float *position, float *first, float *after, int *tokens,
    int S, int window
) {
    int b = blockIdx.x, lane = threadIdx.x;
    unsigned below = (1u << lane) - 1u;
    // Real tokens so far, those of the document that still goes on, and whether it began earlier.
    int count = 0, seen = before ? __float2int_rn(before[b]) : 0, outside = seen;
    tokens += (long long)b * S;
    for (int start = 0; start < S; start += 32) {
        int t = start + lane;
        unsigned mark = t < S ? (marks ? marks[(long long)b * S + t] : 0u) : PAD;
        bool real = !(mark & PAD);
        unsigned reals = __ballot_sync(0xffffffffu, real);
        unsigned resets = __ballot_sync(0xffffffffu, real && (mark & RESET));
        int order = count + __popc(reals & below);
        if (real) tokens[order] = t;
        __threadfence_block();
        __syncwarp();
        // A pad has the position of the next token, were that of the same document.
        unsigned own = resets & (real ? below | 1u << lane : below);
        int place = own ? __popc(reals & below & ~((1u << (31 - __clz(own))) - 1u)) : seen + __popc(reals & below);
        int inside = own ? place : place - outside;
        if (t < S) {
            int back = min(window - 1, place), lowest = t + 1;
            if (real) lowest = back > inside ? inside - back : tokens[order - back];
            position[(long long)b * S + t] = (float)place;
            first[(long long)b * S + t] = (float)lowest;
        }
        count += __popc(reals);
        if (resets) {
            seen = __popc(reals & ~((1u << (31 - __clz(resets))) - 1u));
            outside = 0;
        } else {
            seen += __popc(reals);
        }
    }
    if (lane == 0) after[b] = (float)seen;
}
