#!/usr/bin/env bash
# Chooses the learning rates of the table: short runs of a row at several rates, each with a whole
# schedule, told apart by their loss on the validation text -> docs/results/table-rates.md
#
#   scripts/table_rates.sh ROW...     the rows of scripts/table.sh
#   scripts/table_rates.sh report     the report alone
#
#   RATES    to try (2e-3 4e-3 8e-3)       MINUTES  of each (0.5)
#   RUNS     where runs are kept (out/table-rates)
#   SETS     further keys to change, as KEY=VALUE KEY=VALUE, and NAME, what the report calls it
# The rest is told as to scripts/table.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${RUNS:-out/table-rates}
for row in "$@"; do
    [[ $row != report ]] || continue
    for rate in ${RATES:-2e-3 4e-3 8e-3}; do
        RUNS=$runs/$rate${NAME:+-$NAME} TOKENS=${TOKENS:-$runs/tokens} MINUTES=${MINUTES:-0.5} SCORES=none REPORT='' \
            SETS="optimizer.learning_rate=$rate ${SETS:-}" scripts/table.sh "$row"
    done
done
python3 - "$runs" <<'PYTHON'
import json, pathlib, sys

lines = {}
for path in sorted(pathlib.Path(sys.argv[1]).glob("*/*/run/1/metrics.jsonl")):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    facts = path.parents[2] / "row.json"
    if not facts.exists():  # Under way.
        continue
    facts = json.loads(facts.read_text())
    losses = [row for row in rows if "val_loss" in row]
    training = [row for row in rows if "loss" in row]
    if losses:
        lines[(facts["row"], facts["budget_minutes"], path.parents[3].name)] = (
            losses[-1]["val_loss"], training[-1]["tokens"], training[-1]["seconds"], facts["card"], facts["date"], facts["train_command"])
text = ["# Learning rates of the table", "",
        "Short runs of each row, each with its whole schedule, and their loss on the validation text at the end, in nats a",
        "token. The lowest of a row decides.", "",
        "| row | minutes | rate | validation loss | tokens, M | seconds | card | date |", "|---|---|---|---|---|---|---|---|"]
best = {}
for (row, minutes, _), (loss, *_) in lines.items():
    best[row, minutes] = min(loss, best.get((row, minutes), loss))
for (row, minutes, name), (loss, tokens, seconds, card, date, _) in sorted(lines.items()):
    shown = f"**{loss:.4f}**" if loss == best[row, minutes] else f"{loss:.4f}"
    text.append(f"| {row} | {minutes:g} | {name} | {shown} | {tokens / 1e6:.1f} | {seconds:.0f} | {card} | {date} |")
text += ["", "Made by `scripts/table_rates.sh`."]
pathlib.Path("docs/results/table-rates.md").write_text("\n".join(text) + "\n")
PYTHON
