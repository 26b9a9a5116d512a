#!/usr/bin/env bash
# The table in miniature, on the processor and from the built-in text alone: models of a million
# parameters, MINUTES of training each (default 1), all rows in some ten minutes on two cores
# -> docs/results/table-cpu.md, .json and pictures.
#
#   scripts/table_cpu.sh [ROW...]     lstm transformer slstm mlstm xlstm-7-1 xlstm-large (default: all)
#
# RUNS, SEED, MINUTES, XLSTM and REPORT as in scripts/table.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${RUNS:-out/table-cpu}
text=$runs/text
mkdir -p "$text"
# The last tenth is tested, the tenth before it validated; cut where a line ends.
lines=$(wc -l <crates/xlstm-cli/data/tinyshakespeare.txt)
head -n $((lines * 8 / 10)) crates/xlstm-cli/data/tinyshakespeare.txt >"$text/train.txt"
sed -n "$((lines * 8 / 10 + 1)),$((lines * 9 / 10))p" crates/xlstm-cli/data/tinyshakespeare.txt >"$text/validation.txt"
tail -n +$((lines * 9 / 10 + 1)) crates/xlstm-cli/data/tinyshakespeare.txt >"$text/test.txt"
rows=("$@")
[[ $# -gt 0 ]] || rows=(lstm transformer slstm mlstm xlstm-7-1 xlstm-large)
DATA=$text TOKENIZER=$runs/tokenizer.json VOCABULARY=1024 RUNS=$runs CONFIGS=configs/table_cpu DEVICE=cpu \
    MINUTES=${MINUTES:-1} CONTEXT=${CONTEXT:-4096} POSITIONS=${POSITIONS:-256 1024 4096} PROMPT=${PROMPT:-ROMEO:} \
    REPORT=${REPORT-docs/results/table-cpu} scripts/table.sh "${rows[@]}"
