"""Public implementations at the shapes of `xlstm bench`'s presets, timed on the processor in f32.

usage: cpu_peers.py --candidates PRESET    the names of those that fit a preset
       cpu_peers.py PRESET CANDIDATE       times one; prints one line of JSON

Needs PyTorch, `xlstm` 2.0.6 with `mlstm_kernels` 2.0.6, `transformers` 5.24 and, for the presets
`pyx-*`, version 2 of PyxLSTM from its repository (1.0.1, the last on PyPI, fails with two layers).
THREADS (default 2) and PEER_SECONDS (at least so long, after what does not count; default 3) are read
from the environment.
"""

import json
import os
import resource
import statistics
import sys
import time

# preset: family, vocabulary, width, more
PRESETS = {
    "large-128": ("large", 1000, 128, {"blocks": 4}),
    "large-256": ("large", 5000, 256, {"blocks": 4}),
    "infer-50m": ("large", 16000, 640, {"blocks": 6}),
    "lm-mlstm-128": ("small", 1000, 128, {"slstm_at": []}),
    "lm-mlstm-256": ("small", 5000, 256, {"slstm_at": []}),
    "lm-slstm-128": ("small", 1000, 128, {"slstm_at": [0, 1, 2, 3]}),
    "lm-slstm-256": ("small", 5000, 256, {"slstm_at": [0, 1, 2, 3]}),
    "lm-mixed-128": ("small", 1000, 128, {"slstm_at": [1]}),
    "pyx-slstm-128": ("pyx", 1000, 128, {"cell": "slstm", "blocks": 2}),
    "pyx-slstm-256": ("pyx", 5000, 256, {"cell": "slstm", "blocks": 4}),
    "pyx-mlstm-128": ("pyx", 1000, 128, {"cell": "mlstm", "blocks": 2}),
    "pyx-mlstm-256": ("pyx", 5000, 256, {"cell": "mlstm", "blocks": 4}),
    "lstm-128": ("lstm", 1000, 128, {"hidden": 160}),
    "lstm-eq256": ("lstm", 5000, 256, {"hidden": 304}),
    "gpt-128": ("gpt", 1000, 128, {}),
    "gpt-256": ("gpt", 5000, 256, {}),
}
PROMPT, DRAWN = 512, 128


def candidates(preset):
    family, _, _, more = PRESETS[preset]
    if preset == "infer-50m":
        return ["xlstm-large", "transformers", "transformers-xlstm"]
    return {
        "large": ["xlstm-large", "xlstm-large-compiled", "transformers"],
        # Compiling unrolls the vanilla sLSTM's loop over all tokens.
        "small": ["xlstm-small"] if more.get("slstm_at") else ["xlstm-small", "xlstm-small-compiled"],
        "pyx": ["pyxlstm"],
        "lstm": ["torch-lstm"],
        "gpt": ["torch-gpt", "torch-gpt-compiled"],
    }[family]


def build(preset, candidate, inference):
    """A module, and what maps ids and a state to logits and the next state."""
    import torch
    from torch import nn
    from torch.nn import functional

    family, vocabulary, width, more = PRESETS[preset]
    if candidate.startswith("transformers"):
        import transformers.utils

        if not candidate.endswith("-xlstm"):
            # Its own code, not that of the package.
            transformers.utils.is_xlstm_available = lambda: False
        from transformers import xLSTMConfig, xLSTMForCausalLM

        config = xLSTMConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=more["blocks"], num_heads=4,
            autocast_kernel_dtype="float32",
        )
        model = xLSTMForCausalLM(config).float()

        def forward(ids, state):
            if not inference:
                return model(ids, use_cache=False).logits, None
            result = model(ids, cache=state, use_cache=True) if "cache" in arguments else None
            if result is None:
                result = model(ids, cache_params=state, use_cache=True)
                return result.logits, result.cache_params
            return result.logits, result.cache

        import inspect

        arguments = inspect.signature(model.forward).parameters
        return model, forward
    if family == "large":
        from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

        model = xLSTMLarge(
            xLSTMLargeConfig(
                embedding_dim=width, num_heads=4, num_blocks=more["blocks"], vocab_size=vocabulary,
                mode="inference" if inference else "train", return_last_states=True, chunk_size=64,
                chunkwise_kernel="chunkwise--native_autograd", sequence_kernel="native_sequence__native",
                step_kernel="native", autocast_kernel_dtype="float32",
            )
        )
        if inference:
            return model, lambda ids, state: model(ids, state)
        return model, lambda ids, state: (model(ids)[0], None)
    if family == "small":
        import xlstm

        slstm_at = more["slstm_at"]
        slstm = None
        if slstm_at:
            layer = xlstm.sLSTMLayerConfig(
                backend="vanilla", num_heads=4, conv1d_kernel_size=4, bias_init="powerlaw_blockdependent",
                dtype="float32",
            )
            feed_forward = xlstm.FeedForwardConfig(proj_factor=1.3, act_fn="gelu", embedding_dim=width)
            slstm = xlstm.sLSTMBlockConfig(slstm=layer, feedforward=feed_forward)
        layer = xlstm.mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=4)
        config = xlstm.xLSTMLMModelConfig(
            vocab_size=vocabulary, mlstm_block=xlstm.mLSTMBlockConfig(mlstm=layer), slstm_block=slstm,
            context_length=256, num_blocks=4, embedding_dim=width, slstm_at=slstm_at,
        )
        model = xlstm.xLSTMLMModel(config)
        model.reset_parameters()
        return model, lambda ids, state: (model(ids), None)
    if family == "pyx":
        import xLSTM

        model = xLSTM.xLSTM(vocabulary, width, width, 2, more["blocks"], 0.0, more["cell"])
        return model, lambda ids, state: (model(ids)[0], None)
    if family == "lstm":
        model = nn.ModuleDict({
            "embedding": nn.Embedding(vocabulary, width),
            "lstm": nn.LSTM(width, more["hidden"], 4, batch_first=True),
            "head": nn.Linear(more["hidden"], vocabulary, bias=False),
        })
        return model, lambda ids, state: (model["head"](model["lstm"](model["embedding"](ids))[0]), None)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv = nn.Linear(width, 3 * width, bias=False)
            self.out = nn.Linear(width, width, bias=False)
            self.up = nn.Linear(width, 4 * width, bias=False)
            self.down = nn.Linear(4 * width, width, bias=False)

        def forward(self, x):
            heads = [part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1)]
            mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).flatten(-2))
            return x + self.down(functional.gelu(self.up(self.second(x))))

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(256, width)
            self.blocks = nn.Sequential(*[Block() for _ in range(4)])
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, vocabulary, bias=False)

        def forward(self, ids):
            x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
            return self.head(self.norm(self.blocks(x)))

    model = Gpt()
    return model, lambda ids, state: (model(ids), None)


def megabytes():
    """The most memory that this process has held, in 10^6 bytes (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def timed(work, seconds):
    """Seconds of each repetition: at least three, and for so long, but fifteen at the most."""
    times, start = [], time.perf_counter()
    while len(times) < 3 or (len(times) < 15 and time.perf_counter() - start < seconds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return times


def train(preset, candidate, seconds):
    import torch
    from torch.nn import functional

    model, forward = build(preset, candidate, False)
    batch, length = 8, 128 if preset.startswith("pyx") else 256
    vocabulary = PRESETS[preset][1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    logits = lambda ids: forward(ids, None)[0]
    if candidate.endswith("-compiled"):
        logits = torch.compile(logits)
    ids, targets = torch.randint(vocabulary, (2, batch, length))

    def step():
        optimizer.zero_grad()
        loss = functional.cross_entropy(logits(ids).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    step()
    step()
    times = timed(step, seconds)
    return model, {"tokens_per_s": batch * length / statistics.median(times), "repeats": len(times), "loss": step()}


def infer(preset, candidate, seconds):
    import torch

    model, forward = build(preset, candidate, True)
    model.eval()
    prompt = torch.randint(PRESETS[preset][1], (1, PROMPT))
    with torch.inference_mode():
        def prefill():
            return forward(prompt, None)

        def decode():
            logits, state = after
            for _ in range(DRAWN):
                logits, state = forward(logits[:, -1:].argmax(-1), state)

        prefill()
        reads = timed(prefill, seconds)
        draws = []
        for _ in range(3):
            # A step may write into the state that it is given.
            after = prefill()
            began = time.perf_counter()
            decode()
            draws.append(time.perf_counter() - began)
    return model, {
        "prefill_tokens_per_s": PROMPT / statistics.median(reads),
        "decode_tokens_per_s": DRAWN / statistics.median(draws),
    }


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    if sys.argv[1] == "--candidates":
        print(" ".join(candidates(sys.argv[2])) if sys.argv[2] in PRESETS else "")
        return
    preset, candidate = sys.argv[1:]
    threads = int(os.environ.get("THREADS", "2"))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(1)
    framework = megabytes()
    work = infer if preset == "infer-50m" else train
    model, measured = work(preset, candidate, float(os.environ.get("PEER_SECONDS", "3")))
    print(json.dumps({
        "preset": preset, "peer": candidate, "torch": torch.__version__,
        "params": sum(parameter.numel() for parameter in model.parameters()), **measured,
        "peak_memory_mb": megabytes(), "framework_memory_mb": framework,
    }))


main()
