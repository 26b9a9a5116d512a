// What becomes of the products of a pass (mlstm_wide_pass.cuh): the results of 64 tokens. Of S its own half
// is there; the other is after far(), and H after wait().

#ifdef ELEMENT_BF16

/// h and d, from S, H and n . q of 64 rows, all of which are there. values: the tiles of V, as Pass::attend has them.
template <int OUT, class P>
__device__ __forceinline__ void finish_outputs(
    P &pass, Tile *values, const TokenWeights &s, const Sides &x, const ColumnSum &from_state, int bh, int chunk,
    const unsigned *marks, const float *stabilizers, element_t *h, float *denominators, int S, int NH, int dqk, int dhv,
    int flags, float eps
) {
    float scale = 1.0f / sqrtf((float)dqk);
    float factor[2], from_before[2], sums[2] = {};
    pass.template weigh_near<0>(s, x, scale, sums);
    pass.template weigh_far<0>(s, x, scale, sums);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int r = x.row + P::row(half * 2), t = chunk * CHUNK + r;
        float sum = sums[half], state = scale * power(s.prefix[r]);
        sum += __shfl_xor_sync(ALL, sum, 1);
        sum += __shfl_xor_sync(ALL, sum, 2);
        // The three parts are in columns 0, 1 and 2.
        float low = from_state.x[half * 2] + from_state.x[half * 2 + 1];
        float d = __shfl_sync(ALL, low, LANE & 28) + __shfl_sync(ALL, from_state.x[half * 2], (LANE & 28) + 1);
        d = fmaf(state, d, sum);
        bool pad = t >= S || (marks && is_pad(marks[(long long)(bh / NH) * S + t]));
        factor[half] = pad ? 0.0f : 1.0f / normalizer(d, stabilizers[(long long)bh * S + t], eps, flags);
        if (x.out == 0 && LANE % 4 == 0 && t < S) denominators[(long long)bh * S + t] = pad ? 0.0f : d;
        from_before[half] = state;
    }
#pragma unroll
    for (int n = 0; n < OUT / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) pass.H[n][i] *= from_before[i / 2];
    pass.attend(values, x);
#pragma unroll
    for (int n = 0; n < OUT / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) pass.H[n][i] = factor[i / 2] == 0.0f ? 0.0f : pass.H[n][i] * factor[i / 2];
    put_rows<OUT>(pass.H, chunk_of(h, bh, chunk, S, NH, dhv), x.row + WARP * 16, x.out, false);
}

/// H becomes dv. gradients: the tiles of dH, as Pass::attend has them.
template <int OUT, class P, class Far, class Wait>
__device__ __forceinline__ void
finish_values(P &pass, Far far, Wait wait, Tile *gradients, const TokenSlopes &s, const Sides &x) {
    float sums[2] = {};
    pass.template weigh_near<1>(s, x, 1.0f, sums);
    far();
    pass.template weigh_far<1>(s, x, 1.0f, sums);
    wait();
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; i++) factor[i] = power(s.prefix[CHUNK - 1] - s.entry[x.row + P::row(i * 2)]);
#pragma unroll
    for (int n = 0; n < OUT / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) pass.H[n][i] *= factor[i / 2];
    pass.attend(gradients, x);
}

/// H becomes dq. keys: the tiles of K, as Pass::attend has them.
template <int OUT, class P, class Far, class Wait>
__device__ __forceinline__ void finish_queries(
    P &pass, Far far, Wait wait, Tile *keys, const TokenSlopes &s, const Sides &x, const float *normals, int dqk
) {
    float sums[2] = {};
    pass.template weigh_near<2>(s, x, 1.0f, sums);
    far();
    pass.template weigh_far<2>(s, x, 1.0f, sums);
    wait();
    float factor[2], normal_factor[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int t = x.row + P::row(i * 2);
        float state = power(s.prefix[t]);
        factor[i] = state * s.inverse[t];
        normal_factor[i] = state * s.slope[t];
    }
#pragma unroll
    for (int n = 0; n < OUT / 8; n++) {
        int r = x.out + P::column(n, 0);
        float2 normal = r < dqk ? *(const float2 *)(normals + r) : make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < 4; i++)
            pass.H[n][i] = fmaf(normal_factor[i / 2], i % 2 ? normal.y : normal.x, factor[i / 2] * pass.H[n][i]);
    }
    pass.attend(keys, x);
}

/// H becomes dk, and at leaving() what of it is from beyond the chunk. queries: the tiles of Q, as Pass::attend has them.
template <int OUT, class P, class Far, class Wait, class Leaving>
__device__ __forceinline__ void finish_keys(
    P &pass, Far far, Wait wait, Tile *queries, const TokenSlopes &s, const Sides &x, const float *dnormals, int dqk,
    Leaving leaving
) {
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; i++) factor[i] = power(s.prefix[CHUNK - 1] - s.entry[x.row + P::row(i * 2)]);
    float sums[2] = {};
    pass.template weigh_near<2>(s, x, 1.0f, sums);
    far();
    pass.template weigh_far<2>(s, x, 1.0f, sums);
    wait();
#pragma unroll
    for (int n = 0; n < OUT / 8; n++) {
        int r = x.out + P::column(n, 0);
        float2 normal = r < dqk ? *(const float2 *)(dnormals + r) : make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < 4; i++) pass.H[n][i] = factor[i / 2] * (pass.H[n][i] + (i % 2 ? normal.y : normal.x));
    }
    leaving();
    pass.attend(queries, x);
}

#endif
