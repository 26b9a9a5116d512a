#!/usr/bin/env bash
# Holds the GPU against the processor in f64, and writes docs/results/gpu-correctness.md. Where the
# GPU is on a machine without Rust, build the example here, run it there, and give its output:
#
#   scripts/gpu_correctness.sh [OUTPUT_OF_GPU_CHECK]
set -euo pipefail
cd "$(dirname "$0")/.."
output=${1:-}
if [ -z "$output" ]; then
    output=$(mktemp)
    cargo run --release -p xlstm --features cuda --example gpu_check | tee "$output"
fi
python3 - "$output" >docs/results/gpu-correctness.md <<'PYTHON'
import datetime, pathlib, re, sys

lines = pathlib.Path(sys.argv[1]).read_text().splitlines()
print("# The GPU against the processor\n")
print(f"{lines[0]}, {datetime.date.today().isoformat()}: {lines[-1]}.\n")
print("Errors are against the processor in f64, on random inputs and poisoned buffers: in f32 the")
print("largest difference relative to the largest value of a tensor, in bf16 the relative Euclidean")
print("norm, the processor fed with the same numbers rounded to bf16. Every case ran twice; \"same")
print("bits\" says that the second run gave the first one's bits.\n")
print("| what | | error | bound | | |\n|---|---|---|---|---|---|")
for line in lines[2:]:
    row = re.match(r"(.+?)\s+(f32|bf16)\s+(\S+)\s+(\S+)\s+(ok|FAIL)\s*(.*)", line)
    if row:
        print("| " + " | ".join(row.groups()) + " |")
print("\nMade by `scripts/gpu_correctness.sh`.")
PYTHON
echo "wrote docs/results/gpu-correctness.md" >&2
