#!/usr/bin/env bash
# Trains the built-in configuration, scores its validation text, and writes what came out into
# docs/results/shakespeare.md (with the curve beside it) and between the README's RESULTS marks.
#
#   scripts/shakespeare.sh
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release
xlstm=$PWD/target/release/xlstm
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$xlstm" train shakespeare --out "$folder"
run=$folder/1
python3 - crates/xlstm-cli/data/tinyshakespeare.txt "$folder/validation.txt" <<'PYTHON'
import sys

text = open(sys.argv[1], encoding="utf-8").read()
open(sys.argv[2], "w", encoding="utf-8").write(text[int(0.9 * len(text)) :])
PYTHON
"$xlstm" eval --model "$run/best" --data "$folder/validation.txt" --json >"$folder/eval.json"
"$xlstm" generate --model "$run/best" --prompt "ROMEO:" -n 400 --seed 4 >"$folder/sample.txt" 2>"$folder/speed.txt"
"$xlstm" inspect --model "$run/best" >"$folder/inspect.txt"
cp "$run/loss.svg" docs/results/shakespeare.svg

python3 - "$folder" <<'PYTHON'
import datetime, json, pathlib, platform, re, subprocess, sys

folder = pathlib.Path(sys.argv[1])
rows = [json.loads(line) for line in (folder / "1/metrics.jsonl").read_text().splitlines()]
training = [row for row in rows if "loss" in row]
validation = [row for row in rows if "val_loss" in row]
best = min(validation, key=lambda row: row["val_loss"])
reached = next((row for row in validation if row["val_loss"] <= 1.65), None)
report = json.loads((folder / "eval.json").read_text())
inspect = dict(re.findall(r"^(\w+) {2,}(.+)$", (folder / "inspect.txt").read_text(), re.M))
speed = (folder / "speed.txt").read_text()
decode = re.search(r"decode \d+ tokens at (\d+)", speed).group(1)
try:
    cpu = re.search(r"model name\s*: (.+)", pathlib.Path("/proc/cpuinfo").read_text()).group(1)
except (OSError, AttributeError):
    cpu = platform.processor()
threads = len(__import__("os").sched_getaffinity(0))
commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
speeds = sorted(row["tokens_per_s"] for row in training)
clock = lambda seconds: f"{int(seconds // 60)} min {int(seconds % 60)} s"
table = "\n".join(
    f"| {name} | {value} |"
    for name, value in [
        ("parameters", f"{int(inspect['parameters']):,}"),
        ("validation loss, nats a character", f"**{best['val_loss']:.4f}** after {clock(best['seconds'])}"),
        ("1.65 reached", f"within {clock(reached['seconds'])}, at step {reached['step']}" if reached else "no"),
        ("the whole run", f"{training[-1]['step']:,} steps, {training[-1]['tokens'] / 1e6:.2f} M characters, {clock(rows[-1]['seconds'])}"),
        ("training speed", f"{speeds[len(speeds) // 2]:,.0f} characters/s (median)"),
        ("the same text read whole, state carried on", f"{report['loss']:.4f} nats a character, {report['bits_per_byte']:.4f} bits a byte"),
        ("state of a session", inspect["state"].split(" a seq")[0]),
        ("decoding", f"{int(decode):,} characters/s"),
    ]
)
sample = "\n".join((folder / "sample.txt").read_text().splitlines()[:14])
date = datetime.date.today().isoformat()
body = f"""`xlstm train shakespeare` on {threads} cores of an {cpu}, {date}:

| | |
|---|---|
{table}

```text
{sample}
```
"""
page = f"# Shakespeare, character by character\n\n{body}\n![Loss](shakespeare.svg)\n\nMade by `scripts/shakespeare.sh` at commit {commit}.\n"
pathlib.Path("docs/results/shakespeare.md").write_text(page)
readme = pathlib.Path("README.md")
marked = f"<!-- RESULTS -->\n{body}\n![Loss](docs/results/shakespeare.svg)\n<!-- /RESULTS -->"
text = re.sub(r"<!-- RESULTS -->.*?<!-- /RESULTS -->", lambda _: marked, readme.read_text(), flags=re.S)
readme.write_text(text)
PYTHON
echo "wrote docs/results/shakespeare.md, docs/results/shakespeare.svg and README.md" >&2
