#!/usr/bin/env bash
# Training steps on the CPU, ours and a peer's in turns -> docs/results/cpu-step.md
#
# usage: scripts/bench_cpu_step.sh [ROUNDS]     (default 3; from the repository's root)
#   THREADS       threads of both sides (default 2)
#   MACHINE       what the table says it was measured on (default: the processor's name)
#   PEER_PYTHON   a Python with PyTorch and the original xlstm package; without it, ours alone
#   PEER_SCRIPT   a script that takes a case name (nx_lm_mlstm_256, …) and prints one JSON
#                 line with tokens_per_s and peak_rss_mb
# Of ROUNDS runs the fastest counts, the one that other work disturbed least. Only ratios of
# one session mean something.
set -euo pipefail
rounds=${1:-3}
threads=${THREADS:-2}
machine=${MACHINE:-$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)}
presets=(lm-mlstm-128 lm-mlstm-256 lm-slstm-128 lm-slstm-256 lm-mixed-128)
out=docs/results/cpu-step.md
runs=$(mktemp)
trap 'rm -f "$runs"' EXIT

cargo build --release -p xlstm-cli
for preset in "${presets[@]}"; do
  for ((round = 0; round < rounds; round++)); do
    echo "$preset, round $((round + 1)) of $rounds" >&2
    echo "ours $preset $(target/release/xlstm bench train --preset "$preset" --threads "$threads" --json)" >>"$runs"
    if [[ -n ${PEER_PYTHON:-} ]]; then
      name=nx_${preset//-/_}
      line=$(PEER_THREADS=$threads "$PEER_PYTHON" "${PEER_SCRIPT:?set PEER_SCRIPT too}" "$name" 2>/dev/null | tail -n 1)
      echo "peer $preset $line" >>"$runs"
    fi
  done
done

# field SIDE PRESET KEY: the largest of a number over the rounds; nothing where there is none.
field() {
  grep "^$1 $2 " "$runs" | grep -o "\"$3\": *[0-9.]*" | sed 's/.*: *//' | sort -g | tail -n 1 || true
}
row() {
  awk -v n="$1" -v a="$2" -v g="$3" -v m="$4" -v b="$5" -v p="$6" 'BEGIN {
    printf "| %s | %.0f | %.0f | %.0f | ", n, a, g, m
    if (b == "") print "| | |"; else printf "%.0f | %.0f | %.1f |\n", b, p, a / b }'
}
{
  echo "# Training steps on the CPU"
  echo
  echo "Made by \`scripts/bench_cpu_step.sh $rounds\` on $(date +%F): $machine, $threads threads, f32, batch 8 x 256,"
  echo "forward, backward and AdamW (ours also clips by the global norm). The fastest of $rounds runs a side, taken in"
  echo "turns, each the median of several steps. The peer is the original PyTorch code (\`xlstm\` 2.0.6), eager."
  echo "Only the ratio means something on a machine that is shared."
  echo
  echo "| preset | tokens/s | GFLOP/s | peak MB | peer tokens/s | peer peak MB | ratio |"
  echo "|---|---|---|---|---|---|---|"
  for preset in "${presets[@]}"; do
    row "$preset" "$(field ours "$preset" tokens_per_s)" "$(field ours "$preset" gflops)" \
      "$(field ours "$preset" peak_memory_mb)" "$(field peer "$preset" tokens_per_s)" "$(field peer "$preset" peak_rss_mb)"
  done
} >"$out"
cat "$out"
