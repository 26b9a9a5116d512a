#!/usr/bin/env bash
# Times whole training steps and steps of generation on an NVIDIA GPU beside public PyTorch systems, in one run on
# one card, and writes docs/results/h100.md and h100.json.
#
#   scripts/bench_h100.sh            runs in out/h100, then reports
#   scripts/bench_h100.sh run DIR    only runs, in DIR, for a GPU machine without Rust: XLSTM names the program
#                                    (built with --features cuda), PYTHON a python with PyTorch; PYTHONPATH may
#                                    name a folder with the packages xlstm and mlstm_kernels. Without them the
#                                    peers are left out.
#   scripts/bench_h100.sh report DIR only reports; what notes.txt in DIR says goes below the tables
set -euo pipefail
cd "$(dirname "$0")/.."

# CASE KIND PRESET and what to change of it
cases() {
    cat <<'CASES'
large-74m train large-74m
large-162m train large-162m
large-407m train large-407m
large-74m,65k train large-74m --batch 32
large-162m,65k train large-162m --batch 32
gpt-125m train gpt-125m
small-125m train small-125m --batch 8 --length 2048
small-125m,65k train small-125m --batch 32 --length 2048
gen-407m,1 decode gen-407m --sessions 1
gen-407m,32 decode gen-407m --sessions 32
gen-407m,prefill prefill gen-407m
CASES
}

# CASE, the tokens of a training step or the sessions, and the ways that are timed
peers() {
    cat <<'PEERS'
large-74m TOKENS=16384
large-162m TOKENS=16384
large-407m TOKENS=16384
gpt-125m TOKENS=16384
large-74m TOKENS=65536
large-162m TOKENS=65536
gen-407m SESSIONS=1
gen-407m SESSIONS=32
PEERS
}

run() {
    mkdir -p "$folder"
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >"$folder/gpu.txt"
    date -u +%F >"$folder/date.txt"
    : >"$folder/ours.jsonl"
    : >"$folder/peers.jsonl"
    while read -r name kind preset more; do
        case $kind in
        train) count="--steps 12" ;;
        *) count="--repeats 5" ;;
        esac
        # shellcheck disable=SC2086 # several words
        "$xlstm" bench "$kind" --preset "$preset" $more --device cuda:0 $count --json |
            sed "s/^{/{\"case\":\"$name\",\"kind\":\"$kind\",/" >>"$folder/ours.jsonl"
    done < <(cases)
    while read -r name setting; do
        for way in ${WAYS:-shipped tuned}; do
            log=$folder/peer-$name-${setting#*=}-$way.log
            env "$setting" timeout 200 "$python" scripts/gpu_peers.py "$name" "$way" 2>"$log" | tail -1 >>"$folder/peers.jsonl" ||
                echo "no figure of the peer at $name, $setting, $way: see $log" >&2
        done
    done < <(peers)
}

report() {
    python3 - "$folder" <<'PYTHON'
import json, pathlib, sys

folder = pathlib.Path(sys.argv[1])
card, date = ((folder / name).read_text().strip() for name in ("gpu.txt", "date.txt"))
read = lambda name: [json.loads(line) for line in (folder / name).read_text().splitlines() if line.startswith("{")]
# Tokens a second, milliseconds and megabytes that are to be reached.
GOALS = {("large-74m", "tokens/s"): 1.1e6, ("large-162m", "tokens/s"): 500e3, ("large-407m", "tokens/s"): 180e3,
         ("large-74m,65k", "tokens/s"): 1.25e6, ("large-162m,65k", "tokens/s"): 560e3,
         ("small-125m,65k", "tokens/s"): 330e3, ("small-125m [7:1],65k", "tokens/s"): 250e3, ("large-162m", "peak MB"): 9000, ("gen-407m,1", "ms"): 0.45, ("gen-407m,32", "ms"): 0.9}
rows, peers = [], read("peers.jsonl")
for ours in read("ours.jsonl"):
    theirs = [peer for peer in peers if peer["case"] == ours["case"]]
    values = {"tokens/s": "tokens_per_s", "ms": "ms", "peak MB": "peak_memory_mb"}
    if ours["kind"] == "train":
        ours["tflops"] = ours["gflops"] / 1e3
        values["TFLOP/s"] = "tflops"
    elif ours["kind"] == "decode":
        # Of a step, not of all that are drawn.
        ours["ms"] = int(ours["case"].split(",")[1]) / ours["tokens_per_s"] * 1e3
    else:
        theirs = [{"ms": peer["prefill_ms"], "peer": peer["peer"]} for peer in peers if peer["case"] == "gen-407m,1"]
    best = min(theirs, key=lambda peer: peer["ms"], default={})
    for metric, key in values.items():
        rows.append({
            "case": ours["case"], "metric": metric, "ours": ours[key], "peer": best.get(key), "peer_name": best.get("peer"),
            "goal": GOALS.get((ours["case"], metric)), "floor_share": ours["floor_share"] if metric == "ms" else None,
            "card": card, "date": date})
document = {"rows": rows, "peers": peers, "rates": {"product_tflops": ours["product_gflops"] / 1e3, "copy_gb_s": ours["bandwidth_gb_s"]}}
results = pathlib.Path("docs/results")
(results / "h100.json").write_text(json.dumps(document, indent=1) + "\n")

number = lambda x: "" if x is None else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"
lines = [
    "# An H100", "",
    f"{card}, {date}. Training: whole steps on random tokens (forward, backward, clipping by the global norm, AdamW) in bf16",
    "with f32 master weights, sequences of 2048, 16,384 tokens a step (65,536 where the case says 65k), replayed as one CUDA",
    "graph; medians. Generation: the likeliest token each time, by 1 session or 32 at once; milliseconds of a step",
    "with its drawing; prefill of 2048 tokens. Share of floor: the time",
    f"of the model's products at the rate of one large product in the same run ({document['rates']['product_tflops']:.0f} TFLOP/s), over",
    f"the step's; in generation the time of reading weights and states. (Copies of memory ran at {document['rates']['copy_gb_s']:,.0f} GB/s, bytes read and written counted.) Memory: the most that",
    "buffers take, the driver's own left out on both sides. Of the peers the fastest way counts; all are below.", "",
    "| case | metric | ours | peer | peer's name | goal | share of floor |", "|---|---|---|---|---|---|---|"]
for r in rows:
    share = "" if r["floor_share"] is None else f"{100 * r['floor_share']:.0f} %"
    lines.append(f"| {r['case']} | {r['metric']} | {number(r['ours'])} | {number(r['peer'])} | {r['peer_name'] or ''} | {number(r['goal'])} | {share} |")
if peers:
    lines += ["", "| peer | case | tokens/s | ms | peak MB |", "|---|---|---|---|---|"]
    lines += [f"| {p['peer']} | {p['case']} | {number(p['tokens_per_s'])} | {number(p['ms'])} | {number(p['peak_memory_mb'])} |" for p in peers]
notes = folder / "notes.txt"
if notes.exists():
    lines += ["", notes.read_text().strip()]
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
