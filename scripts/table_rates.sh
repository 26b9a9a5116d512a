#!/usr/bin/env bash
# Chooses the learning rates of the table: short runs of a row at several rates, each with a whole
# schedule, told apart by their loss on the validation text -> docs/results/table-rates.md
#
#   scripts/table_rates.sh ROW...     the rows of scripts/table.sh
#   scripts/table_rates.sh report     the report alone
#
#   RATES    to try (2e-3 4e-3 8e-3)       MINUTES  of each (0.5)
#   RUNS     where runs are kept (out/table-rates)
#   SETS     further keys to change, as KEY=VALUE KEY=VALUE, and NAME, what their folder is called
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
import json, pathlib, re, sys

# What all runs set, and what the other columns say.
COMMON = re.compile(r"seed|optimizer\.learning_rate|data\.(train|validation)|training\..*")


def changed(command):
    keys = re.findall(r"--set (\S+?)=(\S+)", command)
    return ", ".join(f"`{key}: {value}`" for key, value in keys if not COMMON.fullmatch(key))


def rate(command):
    return re.search(r"optimizer\.learning_rate=(\S+)", command)[1]


lines = []
for path in sorted(pathlib.Path(sys.argv[1]).glob("*/*/run/1/metrics.jsonl")):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    facts = path.parents[2] / "row.json"
    if not facts.exists():  # Under way.
        continue
    facts = json.loads(facts.read_text())
    losses = [row for row in rows if "val_loss" in row]
    training = [row for row in rows if "loss" in row]
    if losses:
        command, last = facts["train_command"], training[-1]
        lines.append((facts["row"], -facts["vocabulary"], facts["budget_minutes"], losses[-1]["val_loss"], rate(command), changed(command),
                      last["tokens"], last["tokens_per_s"], facts["card"], facts["date"], facts["commit"]))
text = ["# Learning rates of the table", "",
        "Short runs of each row, each with its whole schedule, and their loss on the validation text at the end, in nats a",
        "token; the best of a row first. What is changed is so against the configuration of that commit, `configs/table/ROW.yaml`.",
        "Losses of different vocabularies are of different tokens: 50,257 are GPT-2's, all others were trained on the text.", "",
        "| row | vocabulary | minutes | rate | changed | validation loss | tokens, M | tokens/s | card | date | commit |",
        "|---|---|---|---|---|---|---|---|---|---|---|"]
for row, size, minutes, loss, rate_of, keys, tokens, speed, *where in sorted(lines):
    text.append(f"| {row} | {-size:,} | {minutes:g} | {rate_of} | {keys} | {loss:.4f} | {tokens / 1e6:.1f} | {speed:,.0f} | {' | '.join(where)} |")
text += ["", "Made by `scripts/table_rates.sh`."]
pathlib.Path("docs/results/table-rates.md").write_text("\n".join(text) + "\n")
PYTHON
