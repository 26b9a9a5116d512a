#!/usr/bin/env bash
# The same small run on the processor with products in f32 and in bf16, from three seeds
# -> docs/results/bf16-training.md
#
#   scripts/bf16_training.sh            trains in out/bf16-training, then reports
#   scripts/bf16_training.sh run DIR    only trains, in DIR; XLSTM names the program, for a machine
#                                       without Rust
#   scripts/bf16_training.sh report DIR only reports
#   THREADS    threads of a run (default 2); STEPS (default 1000); AT_ONCE runs (default 1)
set -euo pipefail
cd "$(dirname "$0")/.."

run() {
    mkdir -p "$folder"
    date -u +%F >"$folder/date.txt"
    sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1 >"$folder/machine.txt"
    for seed in 1 2 3; do
        for dtype in f32 bf16; do
            "$xlstm" train shakespeare --device cpu --dtype "$dtype" --threads "${THREADS:-2}" --out "$folder/$dtype-$seed" \
                --set "seed=$seed" --set "training.steps=${STEPS:-1000}" --set training.log_every=1 --set sample.tokens=0 \
                2>"$folder/$dtype-$seed.log" &
            while (($(jobs -rp | wc -l) >= ${AT_ONCE:-1})); do wait -n; done
        done
    done
    wait
}

report() {
    python3 - "$folder" >docs/results/bf16-training.md <<'PYTHON'
import json, pathlib, sys

folder = pathlib.Path(sys.argv[1])
read = lambda name: (folder / name).read_text().strip()
def rows(name, key):
    lines = (folder / name / "1" / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row[key] for row in map(json.loads, lines) if key in row}

seeds, dtypes = (1, 2, 3), ("f32", "bf16")
losses = {f"{d}-{s}": rows(f"{d}-{s}", "loss") for d in dtypes for s in seeds}
last = max(losses["f32-1"])
print("# Products in bf16 on the processor: does it train the same?\n")
print(f"{read('machine.txt')}, {read('date.txt')}. {last:,} steps of `xlstm train shakespeare` with `--dtype f32` and `--dtype bf16`:")
print("operands of products with weights rounded to bf16, forward and backward, sums and all else in f32.")
if "no faster than f32" in read("bf16-1.log"):
    print("This processor has no fast products of bf16: the rounded operands were multiplied in f32.")
print()
print("Validation loss, nats a character:\n")
steps = sorted(rows("f32-1", "val_loss"))
print("| run | " + " | ".join(f"step {step}" for step in steps) + " |\n|---|" + "---|" * len(steps))
for name in losses:
    found = rows(name, "val_loss")
    print(f"| {name.replace('-', ', seed ')} | " + " | ".join(f"{found[step]:.4f}" for step in steps) + " |")
def smooth(name):
    values = [losses[name][step] for step in sorted(losses[name])]
    return [sum(values[i - 50:i]) / 50 for i in range(50, len(values) + 1, 50)]
def distance(a, b):
    return max(abs(x - y) for x, y in zip(smooth(a), smooth(b)))
print("\nLargest distance between two runs' training losses, as means of 50 steps:\n")
print("| runs | nats |\n|---|---|")
for seed in seeds:
    print(f"| f32 and bf16, seed {seed} | {distance(f'f32-{seed}', f'bf16-{seed}'):.4f} |")
for a, b in ((1, 2), (1, 3), (2, 3)):
    print(f"| f32, seeds {a} and {b}: the noise | {distance(f'f32-{a}', f'f32-{b}'):.4f} |")
print("\nMade by `scripts/bf16_training.sh`.")
PYTHON
    cat docs/results/bf16-training.md
}

folder=${2:-out/bf16-training}
xlstm=${XLSTM:-target/release/xlstm}
case ${1:-all} in
run) run ;;
report) report ;;
all)
    [[ -n ${XLSTM:-} ]] || cargo build --release -p xlstm-cli
    rm -rf "$folder"
    run
    report
    ;;
*) grep '^#  ' "$0" >&2 && exit 2 ;;
esac
