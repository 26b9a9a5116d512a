#!/usr/bin/env bash
# Times whole training steps on an NVIDIA GPU beside public PyTorch systems, in turns in one run on one card, and
# writes docs/results/h100.md and h100.json.
#
#   scripts/bench_h100.sh            runs in out/h100, then reports
#   scripts/bench_h100.sh run DIR    only runs, in DIR, for a GPU machine without Rust: XLSTM names the program
#                                    (built with --features cuda), PYTHON a python with PyTorch; PYTHONPATH may
#                                    name a folder with the packages xlstm and mlstm_kernels. Without them the
#                                    peers are left out.
#   scripts/bench_h100.sh report DIR only reports
set -euo pipefail
cd "$(dirname "$0")/.."

# CASE PRESET and what to change of it
cases() {
    cat <<'CASES'
large-74m large-74m
large-162m large-162m
large-407m large-407m
gpt-125m gpt-125m
small-125m small-125m --batch 8 --length 2048
CASES
}

run() {
    mkdir -p "$folder"
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >"$folder/gpu.txt"
    date -u +%F >"$folder/date.txt"
    : >"$folder/ours.jsonl"
    : >"$folder/peers.jsonl"
    while read -r name preset more; do
        # shellcheck disable=SC2086 # several words
        "$xlstm" bench train --preset "$preset" $more --device cuda:0 --steps 12 --json |
            sed "s/^{/{\"case\":\"$name\",/" >>"$folder/ours.jsonl"
    done < <(cases)
    for name in large-74m large-162m large-407m gpt-125m; do
        for way in ${WAYS:-shipped tuned}; do
            timeout 200 "$python" scripts/gpu_peers.py "$name" "$way" 2>"$folder/peer-$name-$way.log" | tail -1 >>"$folder/peers.jsonl" ||
                echo "no figure of the peer at $name, $way: see $folder/peer-$name-$way.log" >&2
        done
    done
}

report() {
    python3 - "$folder" <<'PYTHON'
import json, pathlib, sys

folder = pathlib.Path(sys.argv[1])
card, date = ((folder / name).read_text().strip() for name in ("gpu.txt", "date.txt"))
read = lambda name: [json.loads(line) for line in (folder / name).read_text().splitlines() if line.startswith("{")]
# Tokens a second and megabytes that are to be reached.
GOALS = {("large-74m", "tokens/s"): 1.1e6, ("large-162m", "tokens/s"): 500e3, ("large-407m", "tokens/s"): 180e3,
         ("large-162m", "peak MB"): 9000}
KEYS = {"tokens/s": "tokens_per_s", "ms": "ms", "peak MB": "peak_memory_mb", "TFLOP/s": "gflops"}
rows, peers = [], read("peers.jsonl")
for ours in read("ours.jsonl"):
    theirs = [peer for peer in peers if peer["case"] == ours["case"]]
    best = max(theirs, key=lambda peer: peer["tokens_per_s"], default={})
    for metric, key in KEYS.items():
        scale = 1e-3 if metric == "TFLOP/s" else 1
        rows.append({
            "case": ours["case"], "metric": metric, "ours": ours[key] * scale, "peer": best.get(key), "peer_name": best.get("peer"),
            "goal": GOALS.get((ours["case"], metric)), "floor_share": ours["floor_share"] if metric == "ms" else None,
            "card": card, "date": date})
document = {"rows": rows, "peers": peers, "rates": {"product_tflops": ours["product_gflops"] / 1e3, "copy_gb_s": ours["bandwidth_gb_s"]}}
results = pathlib.Path("docs/results")
(results / "h100.json").write_text(json.dumps(document, indent=1) + "\n")

number = lambda x: "" if x is None else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.1f}"
lines = [
    "# Training steps on an H100", "",
    f"{card}, {date}. Whole steps on random tokens (forward, backward, clipping by the global norm, AdamW) in bf16 with f32",
    "master weights, sequences of 2048, 16,384 tokens a step, replayed as one CUDA graph; medians. Share of floor: the time",
    f"of the model's products at the rate of one large product in the same run ({document['rates']['product_tflops']:.0f} TFLOP/s), over",
    f"the step's. (Copies of memory ran at {document['rates']['copy_gb_s']:,.0f} GB/s, bytes read and written counted.) Memory: the most that",
    "buffers take, the driver's own left out on both sides. Of the peers the fastest way counts; all are below.", "",
    "| case | metric | ours | peer | peer's name | goal | share of floor |", "|---|---|---|---|---|---|---|"]
for r in rows:
    share = "" if r["floor_share"] is None else f"{100 * r['floor_share']:.0f} %"
    lines.append(f"| {r['case']} | {r['metric']} | {number(r['ours'])} | {number(r['peer'])} | {r['peer_name'] or ''} | {number(r['goal'])} | {share} |")
if peers:
    lines += ["", "| peer | case | tokens/s | ms | peak MB |", "|---|---|---|---|---|"]
    lines += [f"| {p['peer']} | {p['case']} | {number(p['tokens_per_s'])} | {number(p['ms'])} | {number(p['peak_memory_mb'])} |" for p in peers]
lines += ["", "Made by `scripts/bench_h100.sh`; the peers by `scripts/gpu_peers.py`."]
(results / "h100.md").write_text("\n".join(lines) + "\n")
PYTHON
}

what=${1:-all}
folder=${2:-out/h100}
python=${PYTHON:-python3}
case $what in
all)
    cargo build --release -p xlstm-cli --features cuda
    xlstm=target/release/xlstm
    run
    report
    ;;
run)
    xlstm=${XLSTM:?names the program}
    run
    ;;
report) report ;;
*)
    echo "expected run or report, found $what" >&2
    exit 2
    ;;
esac
