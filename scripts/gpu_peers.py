#!/usr/bin/env python3
"""A public PyTorch system at a whole training step, or a step of generation, on an NVIDIA GPU: one JSON line.

    gpu_peers.py CASE WAY

CASE: large-74m, large-162m, large-407m (NX-AI's xLSTMLarge with its Triton kernels) or gpt-125m (a GPT-2 with
PyTorch's attention). WAY: shipped (autocast, launched as it is) or tuned (the mLSTM as an opaque operation, all
else through torch.compile, the step as a CUDA graph). 16,384 tokens a step in sequences of 2048; TOKENS changes that.
Or CASE gen-407m, xLSTMLarge drawing the likeliest token: SESSIONS of them at once (1), weights in bf16, state in f32.
Needs PyTorch with Triton and the packages xlstm and mlstm_kernels.
"""
import json, os, statistics, sys

os.environ.setdefault("DISABLE_LLVM_OPT", "slp-recursion-max-depth")
import torch
import torch.nn as nn
import torch.nn.functional as F

VOCABULARY, LENGTH, TOKENS = 50304, 2048, int(os.environ.get("TOKENS", "16384"))
LARGE = {"large-74m": (512, 7, 4), "large-162m": (768, 12, 6), "large-407m": (1024, 24, 4)}
CHUNK = 128
bf16 = torch.bfloat16


@torch.library.custom_op("peer::mlstm", mutates_args=())
def mlstm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, i: torch.Tensor, f: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from mlstm_kernels.torch.chunkwise.triton_xl_chunk.fw import mlstm_chunkwise_fw
    h, n, m, _, _ = mlstm_chunkwise_fw(matQ=q, matK=k, matV=v, vecI=i, vecF=f, qk_scale=q.shape[-1] ** -0.5, chunk_size=CHUNK,
                                       return_last_states=False, return_all_states=False, output_dtype=q.dtype, eps=1e-6)
    return h, n, m


@mlstm.register_fake
def _(q, k, v, i, f):
    batch, heads, length, _ = q.shape
    return q.new_empty(batch, heads, length, v.shape[-1]), q.new_empty(batch, heads, length), q.new_empty(batch, heads, length)


@torch.library.custom_op("peer::mlstm_backward", mutates_args=())
def mlstm_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, i: torch.Tensor, f: torch.Tensor, n: torch.Tensor,
                   m: torch.Tensor, dh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from mlstm_kernels.torch.chunkwise.triton_xl_chunk.bw import mlstm_chunkwise_bw
    found = mlstm_chunkwise_bw(matQ=q, matK=k, matV=v, vecI=i, vecF=f, vecN_out=n, vecM_out=m, matDeltaH_out=dh,
                               qk_scale=q.shape[-1] ** -0.5, chunk_size=CHUNK, eps=1e-6)
    return tuple(g.to(x.dtype).contiguous() for g, x in zip(found, (q, k, v, i, f)))


@mlstm_backward.register_fake
def _(q, k, v, i, f, n, m, dh):
    return tuple(torch.empty_like(x) for x in (q, k, v, i, f))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])


def _backward(ctx, dh, dn, dm):
    return mlstm_backward(*ctx.saved_tensors, dh.contiguous())


mlstm.register_autograd(_backward, setup_context=_setup)


class Opaque(nn.Module):
    def forward(self, q, k, v, i, f, c_initial=None, n_initial=None, m_initial=None):
        return mlstm(*(x.to(bf16).contiguous() for x in (q, k, v, i, f)))[0], None


class GptBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.first, self.second = heads, nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out, self.up, self.down = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        batch, length, dim = x.shape
        q, k, v = self.qkv(self.first(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, dim))
        return x + self.down(F.gelu(self.up(self.second(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self, dim=768, blocks=12, heads=12):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, dim), nn.Embedding(LENGTH, dim)
        self.blocks, self.norm = nn.ModuleList(GptBlock(dim, heads) for _ in range(blocks)), nn.LayerNorm(dim)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def start(self, tokens):
        return self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))

    def loss(self, x, targets):
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1))


class Large(nn.Module):
    def __init__(self, dim, blocks, heads, tuned):
        super().__init__()
        from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig
        self.model = xLSTMLarge(xLSTMLargeConfig(
            embedding_dim=dim, num_heads=heads, num_blocks=blocks, vocab_size=VOCABULARY, mode="train", return_last_states=True,
            chunkwise_kernel="chunkwise--triton_xl_chunk", chunk_size=CHUNK, autocast_kernel_dtype="bfloat16",
            sequence_kernel="native_sequence__native", step_kernel="native"))
        self.blocks = self.model.backbone.blocks
        if tuned:
            for block in self.blocks:
                block.mlstm_layer.mlstm_backend = Opaque()

    def start(self, tokens):
        return self.model.embedding(tokens)

    def loss(self, x, targets):
        from xlstm.xlstm_large.components import soft_cap
        logits = soft_cap(self.model.lm_head(self.model.backbone.out_norm(x)), 30.0)
        return F.cross_entropy(logits.view(-1, VOCABULARY).float(), targets.view(-1))


@torch.no_grad()
def generation(case, way):
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig
    sessions, tuned = int(os.environ.get("SESSIONS", "1")), way == "tuned"
    dim, blocks, heads = LARGE["large-" + case.removeprefix("gen-")]
    torch.manual_seed(0)
    torch.set_default_dtype(bf16)
    with torch.device("cuda"):
        model = xLSTMLarge(xLSTMLargeConfig(
            embedding_dim=dim, num_heads=heads, num_blocks=blocks, vocab_size=VOCABULARY, mode="inference", return_last_states=True,
            chunkwise_kernel="chunkwise--triton_xl_chunk", sequence_kernel="native_sequence__triton", step_kernel="triton",
            chunk_size=CHUNK, autocast_kernel_dtype="bfloat16", weight_mode="fused", inference_state_dtype="float32")).eval()
    prompt = torch.randint(0, VOCABULARY, (sessions, LENGTH), device="cuda")

    def timed(run, rounds, each):
        run(), run()
        times = []
        for _ in range(rounds):
            first, last = torch.cuda.Event(True), torch.cuda.Event(True)
            first.record()
            for _ in range(each):
                run()
            last.record()
            torch.cuda.synchronize()
            times.append(first.elapsed_time(last) / each)
        return statistics.median(times)

    prefill = timed(lambda: model(prompt, None)[0][:, -1:].argmax(-1), 5, 1)
    logits, state = model(prompt[:, :CHUNK], None)
    state = {block: tuple(part.float().contiguous() for part in parts) for block, parts in state.items()}
    token = logits[:, -1:].argmax(-1)

    def step():
        token.copy_(model(token, state)[0][:, -1:].argmax(-1))

    run = step
    if tuned:
        torch._dynamo.config.cache_size_limit = 64
        for block in model.backbone.blocks:
            block.compile(dynamic=False)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        run = graph.replay
    ms = timed(run, 5, 64)
    print(json.dumps({
        "case": f"{case},{sessions}", "peer": f"xLSTMLarge, {way}", "ms": ms, "tokens_per_s": sessions / ms * 1e3,
        "prefill_ms": prefill, "peak_memory_mb": torch.cuda.max_memory_allocated() / 1e6,
        "params": sum(p.numel() for p in model.parameters())}))


def main(case, way):
    if case.startswith("gen-"):
        return generation(case, way)
    tuned = way == "tuned"
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Gpt() if case == "gpt-125m" else Large(*LARGE[case], tuned)
    model = model.to("cuda").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=tuned)
    tokens = torch.randint(0, VOCABULARY, (TOKENS // LENGTH, LENGTH + 1), device="cuda")
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    head = model.loss
    if tuned:
        for block in model.blocks:
            block.compile(dynamic=False, fullgraph=True)
        head = torch.compile(head, dynamic=False)
    kept = {}

    def step():
        with torch.autocast("cuda", bf16, cache_enabled=not tuned):
            x = model.start(inputs)
            for block in model.blocks:
                x = block(x) if case == "gpt-125m" else block(x, None)[0]
            loss = head(x, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        kept["loss"] = loss.detach()

    run = step
    if tuned:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        run = graph.replay
    else:
        step()
        torch.cuda.reset_peak_memory_stats()
    run(), run()
    times = []
    for _ in range(12):
        first, last = torch.cuda.Event(True), torch.cuda.Event(True)
        first.record(), run(), last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last))
    ms = statistics.median(times)
    print(json.dumps({
        "case": case + (",65k" if TOKENS == 65536 else ""), "peer": ("GPT-2, PyTorch" if case == "gpt-125m" else "xLSTMLarge") + f", {way}", "ms": ms,
        "tokens_per_s": TOKENS / ms * 1e3, "peak_memory_mb": torch.cuda.max_memory_allocated() / 1e6,
        "params": sum(p.numel() for p in model.parameters()), "loss": float(kept["loss"])}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
