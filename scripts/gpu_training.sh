#!/usr/bin/env bash
# Trains the same small run on the processor in f32 and on a GPU in bf16, interrupts and resumes
# one, times whole steps, and writes docs/results/gpu-training.md.
#
#   scripts/gpu_training.sh            trains in out/gpu-training, then reports
#   scripts/gpu_training.sh run DIR    only trains, in DIR; XLSTM names the program (built with
#                                      --features cuda), for a GPU machine without Rust
#   scripts/gpu_training.sh report DIR only reports
set -euo pipefail
cd "$(dirname "$0")/.."

train() { # NAME SEED DEVICE-FLAGS...
    local name=$1 seed=$2
    shift 2
    "$xlstm" train shakespeare --set "seed=$seed" --set training.steps=1000 --set training.log_every=1 \
        --set sample.tokens=0 --out "$folder/$name" "$@" 2>"$folder/$name.log"
}

run() {
    mkdir -p "$folder"
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >"$folder/gpu.txt"
    date -u +%F >"$folder/date.txt"
    for seed in 1 2 3; do
        train "cpu-$seed" "$seed" --device cpu --threads 4 &
    done
    wait
    for seed in 1 2 3; do
        train "cuda-$seed" "$seed" --device cuda:0
    done
    train cuda-f32 1 --device cuda:0 --dtype f32
    # The run of seed 1 again, stopped on the way by Ctrl-C.
    train stopped 1 --device cuda:0 &
    local job=$!
    until [ "$(cat "$folder/stopped/1/metrics.jsonl" 2>/dev/null | wc -l)" -gt 300 ]; do sleep 0.05; done
    pkill -INT -P "$job" || kill -INT "$job"
    wait "$job" || true
    "$xlstm" train --resume "$folder/stopped/1" 2>>"$folder/stopped.log"
    for file in model.safetensors training.safetensors; do
        cmp "$folder/cuda-1/1/last/$file" "$folder/stopped/1/last/$file" && echo same || echo different
    done >"$folder/resumed.txt"
    for preset in small-125m lm-mlstm-256 lm-slstm-256 lm-mixed-128; do
        "$xlstm" bench train --preset "$preset" --device cuda:0 --steps 20 --json
    done >"$folder/bench.jsonl"
}

report() {
    python3 - "$folder" >docs/results/gpu-training.md <<'PYTHON'
import json, pathlib, sys

folder = pathlib.Path(sys.argv[1])
read = lambda name: (folder / name).read_text().strip()
def rows(name, key):
    lines = (folder / name / "1" / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row[key] for row in map(json.loads, lines) if key in row}

print("# Training on a GPU\n")
print(f"{read('gpu.txt')}, {read('date.txt')}. 1,000 steps of `xlstm train shakespeare` (two thousand tokens a step):")
print("the processor in f32, the GPU in bf16 with f32 master weights.\n")
runs = [f"{device}-{seed}" for seed in (1, 2, 3) for device in ("cpu", "cuda")] + ["cuda-f32"]
print("Validation loss, nats a character:\n")
steps = sorted(rows(runs[0], "val_loss"))
print("| run | " + " | ".join(f"step {step}" for step in steps) + " |\n|---|" + "---|" * len(steps))
for name in runs:
    losses = rows(name, "val_loss")
    label = {"cpu": "processor, f32", "cuda": "GPU, bf16"}[name.split("-")[0]]
    label = "GPU, f32, seed 1" if name == "cuda-f32" else f"{label}, seed {name[-1]}"
    print(f"| {label} | " + " | ".join(f"{losses[step]:.4f}" for step in steps) + " |")

def smooth(name):
    losses = rows(name, "loss")
    steps = sorted(losses)
    return [sum(losses[s] for s in steps[i - 50:i]) / 50 for i in range(50, len(steps) + 1, 50)]
def distance(a, b):
    return max(abs(x - y) for x, y in zip(smooth(a), smooth(b)))
print("\nLargest distance between two runs' training losses, as means of 50 steps:\n")
print("| runs | nats |\n|---|---|")
for seed in (1, 2, 3):
    print(f"| processor f32 and GPU bf16, seed {seed} | {distance(f'cpu-{seed}', f'cuda-{seed}'):.4f} |")
print(f"| processor f32 and GPU f32, seed 1 | {distance('cpu-1', 'cuda-f32'):.4f} |")
for a, b in ((1, 2), (1, 3), (2, 3)):
    print(f"| processor f32, seeds {a} and {b}: the noise | {distance(f'cpu-{a}', f'cpu-{b}'):.4f} |")
same = read("resumed.txt").split() == ["same", "same"]
print(f"\nThe GPU's run of seed 1, interrupted and resumed: parameters and optimizer at the end are "
      f"{'bit for bit those' if same else 'NOT those'} of the run that was not.\n")
print("Training steps (forward, backward, clipping, AdamW) on random tokens, replayed as one CUDA graph and")
print("launched kernel by kernel, medians of 20 each in one run:\n")
print("| preset | graph ms | plain ms | tokens/s | GFLOP/s |\n|---|---|---|---|---|")
for row in map(json.loads, read("bench.jsonl").splitlines()):
    print(f"| {row['preset']} | {row['ms']:.2f} | {row['plain_ms']:.2f} | {row['tokens_per_s']:,.0f} | {row['gflops']:,.0f} |")
print("\nMade by `scripts/gpu_training.sh`.")
PYTHON
    echo "wrote docs/results/gpu-training.md" >&2
}

folder=${2:-out/gpu-training}
xlstm=${XLSTM:-target/release/xlstm}
case ${1:-all} in
run) run ;;
report) report ;;
all)
    cargo build --release --features cuda
    rm -rf "$folder"
    run
    report
    ;;
*) grep '^#  ' "$0" >&2 && exit 2 ;;
esac
