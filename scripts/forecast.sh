#!/usr/bin/env bash
# Forecasts of ETTh1 against the last row repeated -> docs/results/forecast.md and forecast.svg
#
# usage: scripts/forecast.sh PATH/ETTh1.csv     (EXAMPLE: the example, where it is built already)
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,4p' "$0" >&2; exit 2; }
data=$(realpath "$1")
cd "$(dirname "$0")/.."
result=docs/results/forecast.md
example=$(realpath -m "${EXAMPLE:-target/release/examples/forecast}")
[[ -n ${EXAMPLE:-} ]] || cargo build --release -p xlstm --example forecast
{
    echo "# Forecasts of ETTh1"
    echo
    echo "Seven hourly series, standardised by the training months; from 336 rows the next 96, over all windows"
    echo "of the test months (12, 4 and 4 months train, validate and test)."
    echo
    (cd docs/results && "$example" "$data")
    echo
    echo "![A forecast](forecast.svg)"
    echo
    echo "$(nproc) cores of $(lscpu | sed -n 's/^Model name: *//p'), $(date -u +%F), seed 1; \`scripts/forecast.sh\` made this."
} >"$result.new"
mv "$result.new" "$result"
