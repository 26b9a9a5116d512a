#!/usr/bin/env bash
# What fewer bits cost: the built-in model's loss on its validation text with weights in f32, bf16,
# int8 and int4, read 256 tokens at a time and one at a time -> docs/results/quantize.md
#
# usage: scripts/quantize.sh [MODEL_FOLDER TEXT]     (default: trains `shakespeare` first)
#   XLSTM    the program, where it is built already
# One at a time products with quantised weights are in integers, the activations in 8 bits.
set -euo pipefail
cd "$(dirname "$0")/.."
xlstm=${XLSTM:-$PWD/target/release/xlstm}
[[ -n ${XLSTM:-} ]] || cargo build --release -p xlstm-cli
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
model=${1:-} text=${2:-$work/validation.txt}
if [[ -z $model ]]; then
    "$xlstm" train shakespeare --device cpu --out "$work/run"
    model=$work/run/1/best
    python3 - "$text" <<'PYTHON'
import sys

whole = open("crates/xlstm-cli/data/tinyshakespeare.txt", encoding="utf-8").read()
open(sys.argv[1], "w", encoding="utf-8").write(whole[int(0.9 * len(whole)) :])
PYTHON
fi
convert() { "$xlstm" convert --model "$model" --to ours "$@"; }
convert --dtype f32 --out "$work/f32"
convert --dtype bf16 --out "$work/bf16"
convert --dtype f32 --quantize int8 --out "$work/int8"
convert --dtype f32 --quantize int4 --out "$work/int4"
for format in f32 bf16 int8 int4; do
    for pass in 256 1; do
        "$xlstm" eval --model "$work/$format" --data "$text" --device cpu --pass "$pass" --json >"$work/$format.$pass.json"
    done
done
python3 - "$work" <<'PYTHON'
import datetime, json, pathlib, sys

work = pathlib.Path(sys.argv[1])
report = {(f, p): json.loads((work / f"{f}.{p}.json").read_text()) for f in ("f32", "bf16", "int8", "int4") for p in (256, 1)}
tokens = report["f32", 1]["tokens"]
lines = [
    "# What fewer bits cost", "",
    f"The built-in model `shakespeare` on {tokens:,} tokens of its validation text: perplexity a token, and by how much it",
    "is above that of f32. Read 256 tokens at a time, weights are widened; one at a time, as in generation, products with",
    "quantised weights are in integers, the activations rounded to 8 bits.", "",
    "| weights | bytes | 256 tokens at a time | | one at a time | |", "|---|---|---|---|---|---|",
]
for format in ("f32", "bf16", "int8", "int4"):
    size = (work / format / "model.safetensors").stat().st_size
    cells = []
    for which in (256, 1):
        own, wide = (report[f, which]["token_perplexity"] for f in (format, "f32"))
        cells += [f"{own:.4f}", "" if format == "f32" else f"{100 * (own / wide - 1):+.3f} %"]
    lines.append(f"| {format} | {size:,} | " + " | ".join(cells) + " |")
lines += ["", f"{datetime.date.today().isoformat()}; made by `scripts/quantize.sh`."]
pathlib.Path("docs/results/quantize.md").write_text("\n".join(lines) + "\n")
PYTHON
cat docs/results/quantize.md
