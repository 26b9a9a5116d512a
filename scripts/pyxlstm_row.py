#!/usr/bin/env python3
"""PyxLSTM's own cells in the table: trains its models as they are until a loss is not a number.

    python3 scripts/pyxlstm_row.py TOKENS FOLDER [--minutes 5] [--seed 1] [--blocks 6] [--width 384]

TOKENS holds train/ and validation/ as `xlstm prepare` made them; FOLDER gets row.json and, of each
cell, run/CELL.jsonl (step, tokens, seconds, loss); where both end in NaN, failure.txt says at which
step, and from which position on its logits are no
numbers, if they are not. Needs PyTorch and PyxLSTM 2 (https://github.com/muditbhargava66/PyxLSTM);
uses a GPU where there is one.

The model is its example's: embedding, blocks of one cell each with its norm and projection, a head
that is not tied; Adam at its rate of 1e-4, gradients clipped to 1; windows of 512 tokens, 64 at a time
on a GPU as in the other rows, of the mLSTM, which keeps its memory of every token, four; on a processor a
quarter of that. Both cells have 47 M parameters at width 384 with six
blocks.
"""

import argparse
import datetime
import json
import pathlib
import platform
import re
import time

import numpy
import torch
from torch.nn import functional


def tokens_of(folder):
    """The tokens of a prepared folder, one after the other."""
    index = json.loads((folder / "index.json").read_text())
    parts = []
    for shard in index["shards"]:
        data = numpy.memmap(folder / shard["file"], mode="r", dtype=numpy.uint8)
        length = int(data[:8].view(numpy.uint64)[0])
        header = json.loads(bytes(data[8 : 8 + length]))["tokens"]
        first, last = header["data_offsets"]
        kind = {"U16": numpy.uint16, "U32": numpy.uint32}[header["dtype"]]
        parts.append(numpy.frombuffer(data[8 + length + first : 8 + length + last].tobytes(), dtype=kind))
    return numpy.concatenate(parts), index["vocabulary_size"]



def train(cell, tokens, vocabulary, options, device, log):
    """Trains until the time is over or the loss is not finite; returns the last row."""
    import xLSTM

    torch.manual_seed(options.seed)
    order = numpy.random.default_rng(options.seed)
    model = xLSTM.xLSTM(vocabulary, options.width, options.width, 1, options.blocks, 0.0, cell).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    parameters = sum(p.numel() for p in model.parameters())
    length, batch = 512, {"slstm": 64, "mlstm": 4}[cell] // (1 if device.type == "cuda" else 4)
    start, step, row = time.perf_counter(), 0, {}
    while time.perf_counter() - start < 60 * options.minutes:
        begins = order.integers(0, len(tokens) - length - 1, batch)
        windows = torch.from_numpy(numpy.stack([tokens[b : b + length + 1] for b in begins]).astype(numpy.int64)).to(device)
        logits = model(windows[:, :-1])[0]
        loss = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step += 1
        row = {"step": step, "tokens": step * batch * length, "seconds": time.perf_counter() - start,
               "loss": float(loss.detach()), "grad_norm": float(norm), "parameters": parameters}
        finite_logits = torch.isfinite(logits).all(-1)
        if not finite_logits.all():
            row["first_position"] = int((~finite_logits).any(0).nonzero()[0])
        log.write(json.dumps(row) + "\n")
        log.flush()
        print(cell, row, flush=True)
        if not (numpy.isfinite(row["loss"]) and numpy.isfinite(row["grad_norm"])):
            return row
        optimizer.step()
    return row


def processor():
    """The processor's name, where the system tells."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found.group(1) if found else platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, vocabulary = tokens_of(options.tokens / "train")
    (options.folder / "run").mkdir(parents=True, exist_ok=True)
    ends = {}
    for cell in ("slstm", "mlstm"):
        with open(options.folder / "run" / f"{cell}.jsonl", "w", encoding="utf-8") as log:
            ends[cell] = train(cell, tokens, vocabulary, options, device, log)
    card = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    parameters = ends["slstm"]["parameters"]
    facts = {"row": "pyxlstm", "title": "PyxLSTM's cells", "seed": options.seed, "budget_minutes": options.minutes, "card": card,
             "date": datetime.date.today().isoformat(), "commit": "",
             "train_command": f"python3 scripts/pyxlstm_row.py {options.tokens} {options.folder} --seed {options.seed} "
             f"--minutes {options.minutes:g}"}
    (options.folder / "row.json").write_text(json.dumps(facts) + "\n")
    (options.folder / "pace.json").write_text(json.dumps({"params": parameters}) + "\n")
    said = []
    for cell, row in ends.items():
        if numpy.isfinite(row["loss"]) and numpy.isfinite(row["grad_norm"]):
            said.append(f"{cell}: loss {row['loss']:.3f} after step {row['step']}")
            continue
        what = "loss" if not numpy.isfinite(row["loss"]) else "gradient norm"
        where = f", logits from position {row['first_position']} on" if "first_position" in row else ""
        said.append(f"{cell}: {what} not a number at step {row['step']} ({row['tokens']:,} tokens){where}")
    (options.folder / "failure.txt").write_text("; ".join(said) + "\n")


if __name__ == "__main__":
    main()
