#!/usr/bin/env bash
# Kills a training run with SIGKILL at a hundred random moments, goes on each time, and checks
# that it ends bit for bit as a run that was never killed, with no file half written.
#
#   scripts/kill_resume.sh [KILLS]
set -euo pipefail
cd "$(dirname "$0")/.."
kills=${1:-100}

cargo build --release
xlstm=$PWD/target/release/xlstm
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat >run.yaml <<'YAML'
model: {embedding_dim: 32, num_blocks: 2, slstm_at: [1], dropout: 0.1}
data: {batch_size: 4, length: 64, batching: stream}
optimizer: {learning_rate: 2e-3}
schedule: {decay_steps: 4000}
training: {steps: 4000, validate_every: 25, validation_batches: 8, checkpoint_every: 5, log_every: 5}
sample: {tokens: 20}
YAML

# Reads every file of the run: none may be half written, whenever the kill came.
check() {
    python3 - "$1" <<'PYTHON'
import json, pathlib, struct, sys

run = pathlib.Path(sys.argv[1])
for path in run.rglob("*.json"):
    if ".partial" not in str(path):
        json.loads(path.read_text())
for path in run.rglob("*.safetensors"):
    if ".partial" in str(path):
        continue
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    end = max(t["data_offsets"][1] for name, t in header.items() if name != "__metadata__")
    assert len(data) == 8 + size + end, f"{path} is cut short"
PYTHON
}

echo "== $kills kills" >&2
"$xlstm" train run.yaml --out killed --threads 1 >/dev/null 2>&1 &
sleep 1
for ((i = 1; i <= kills; i++)); do
    sleep "0.$((RANDOM % 900 + 100))"
    kill -9 $! 2>/dev/null || true
    wait $! 2>/dev/null || true
    check killed/1
    "$xlstm" train --resume killed/1 --threads 1 >log 2>&1 &
done
sleep 1
kill -9 $! 2>/dev/null || true
wait $! 2>/dev/null || true

# To the same step, once more interrupted and once in one go.
reached=$(python3 -c 'import json; print(json.load(open("killed/1/last/training.json"))["step"])' 2>/dev/null ||
    python3 -c 'import json; print(json.load(open("killed/1/last.old/training.json"))["step"])')
goal=$((reached + 10))
"$xlstm" train --resume killed/1 --threads 2 --set "training.steps=$goal" >log 2>&1
"$xlstm" train run.yaml --out whole --threads 2 --set "training.steps=$goal" >log 2>&1
cmp killed/1/last/model.safetensors whole/1/last/model.safetensors
cmp killed/1/last/training.safetensors whole/1/last/training.safetensors
echo "$kills kills, $goal steps: the run is bit for bit the one that was never killed" >&2
