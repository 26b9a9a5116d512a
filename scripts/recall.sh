#!/usr/bin/env bash
# Multi-query associative recall by the number of pairs -> docs/results/recall.md
set -euo pipefail
cd "$(dirname "$0")/.."
result=docs/results/recall.md
cargo build --release -p xlstm --example recall
{
    echo "# Recall"
    echo
    echo "Up to 32 keys with their values are told, then the keys are asked for in another order; the table"
    echo "has the share of right answers in 256 new episodes. Two blocks of width 64, trained on 2 to 32"
    echo "pairs for 2,000 steps of 32 episodes; 48 pairs are more than were ever told."
    echo
    target/release/examples/recall
    echo
    echo "$(nproc) cores of $(lscpu | sed -n 's/^Model name: *//p'), $(date -u +%F), seed 1; \`scripts/recall.sh\` made this."
} >"$result.new"
mv "$result.new" "$result"
