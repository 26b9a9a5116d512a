#!/usr/bin/env bash
# Holds the GPU against the processor in f64 and against the golden files, and writes
# docs/results/gpu-correctness.md. Where the GPU is on a machine without Rust, build the example
# and the tests here, run both there as below, and give their outputs:
#
#   scripts/gpu_correctness.sh [OUTPUT_OF_GPU_CHECK OUTPUT_OF_TESTS]
#
# What NOTE says goes below the tables.
set -euo pipefail
cd "$(dirname "$0")/.."
output=${1:-}
tests=${2:-}
if [ -z "$output" ]; then
    output=$(mktemp)
    tests=$(mktemp)
    cargo run --release -p xlstm --features cuda --example gpu_check | tee "$output"
    XLSTM_DEVICE=cuda:0 cargo test --release -p xlstm --features cuda --test it -- --test-threads=1 |
        tee "$tests"
fi
python3 - "$output" "$tests" "${NOTE:-}" >docs/results/gpu-correctness.md <<'PYTHON'
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
tests = re.findall(r"^test (\S+) \.\.\. (\S+)", pathlib.Path(sys.argv[2]).read_text(), re.M)
passed = sum(result == "ok" for _, result in tests)
print(f"\nThe golden and property tests of `tests/it`, run on the GPU in f32 (`XLSTM_DEVICE=cuda:0`): {passed} of")
print(f"{len(tests)} passed.\n\n| test | |\n|---|---|")
for name, result in tests:
    print(f"| {name} | {result} |")
if note := sys.argv[3]:
    print(f"\n{note}")
print("\nMade by `scripts/gpu_correctness.sh`.")
PYTHON
echo "wrote docs/results/gpu-correctness.md" >&2
