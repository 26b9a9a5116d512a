#!/usr/bin/env bash
# How speed and memory grow with the length of a text, with sessions and with threads, on the processor
# -> docs/results/growth.md
#
# usage: scripts/growth.sh
#   XLSTM    the program, where it is built already
#   MACHINE  how the table names the processor (default: its model name)
#   LENGTHS  the lengths read (default: 1024 to 1048576, times four)
# Some twenty minutes on two cores, 13 of them without 4096 and 65536.
set -euo pipefail
cd "$(dirname "$0")/.."
xlstm=${XLSTM:-$PWD/target/release/xlstm}
[[ -n ${XLSTM:-} ]] || cargo build --release -p xlstm-cli
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bench() {
    printf '%s\n' "bench $*" >&2
    "$xlstm" bench "$@" --device cpu --json 2>/dev/null
}
for length in ${LENGTHS:-1024 4096 16384 65536 262144 1048576}; do
    for preset in large-128 lm-mlstm-128 lm-slstm-128; do
        repeats=$((length > 300000 ? 1 : 3))
        bench prefill --preset "$preset" --prompt "$length" --repeats "$repeats" >"$work/length.$preset.$length"
    done
done
for sessions in 1 2 4 8 16 32; do
    bench decode --preset infer-50m --sessions "$sessions" --repeats 3 >"$work/sessions.f32.$sessions"
    bench decode --preset infer-50m --dtype int8 --sessions "$sessions" --repeats 3 >"$work/sessions.int8.$sessions"
done
# In turns, so that both see the same machine.
for round in 1 2 3; do
    for threads in 1 2; do
        for preset in large-128 large-256 lm-mlstm-256 lm-slstm-256 lstm-128 gpt-256; do
            bench train --preset "$preset" --threads "$threads" --steps 3 >"$work/threads.$preset.$threads.$round"
        done
    done
done
python3 - "$work" <<'PYTHON'
import datetime, json, os, pathlib, platform, re, statistics, sys

work = pathlib.Path(sys.argv[1])
report = {path.name: json.loads(path.read_text()) for path in work.iterdir()}
cpuinfo = pathlib.Path("/proc/cpuinfo")
found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
machine = os.environ.get("MACHINE") or (found.group(1) if found else platform.processor())
lengths = sorted({int(name.split(".")[2]) for name in report if name.startswith("length")})
presets = ["large-128", "lm-mlstm-128", "lm-slstm-128"]
lines = [
    "# How speed grows", "", f"{machine}, {datetime.date.today().isoformat()}.", "",
    "## With the length of a text", "",
    "One session reads a text of random tokens, logits after its last token: thousands of tokens a second, and the most",
    "memory that the process held.", "",
    "| tokens | " + " | ".join(f"{p} | MB" for p in presets) + " |", "|---|" + "---|---|" * len(presets),
]
for length in lengths:
    cells = [report[f"length.{preset}.{length}"] for preset in presets]
    lines.append(f"| {length:,} | " + " | ".join(f"{c['tokens_per_s'] / 1e3:.1f} | {c['peak_memory_mb']:.0f}" for c in cells) + " |")
lines += [
    "", "## With sessions", "",
    "`infer-50m`, a token at a time by so many sessions as one batch: tokens a second of all together.", "",
    "| sessions | f32 | int8 |", "|---|---|---|",
]
for sessions in sorted(int(name.split(".")[2]) for name in report if name.startswith("sessions.f32")):
    rates = [report[f"sessions.{dtype}.{sessions}"]["tokens_per_s"] for dtype in ("f32", "int8")]
    lines.append(f"| {sessions} | {rates[0]:.0f} | {rates[1]:.0f} |")
lines += [
    "", "## With threads", "",
    "Training steps, medians of three runs a side in turns: tokens a second.", "",
    "| preset | 1 thread | 2 threads | ratio |", "|---|---|---|---|",
]
for preset in ["large-128", "large-256", "lm-mlstm-256", "lm-slstm-256", "lstm-128", "gpt-256"]:
    one, two = (
        statistics.median(r["tokens_per_s"] for name, r in report.items() if name.startswith(f"threads.{preset}.{t}."))
        for t in (1, 2)
    )
    lines.append(f"| {preset} | {one:.0f} | {two:.0f} | {two / one:.2f} |")
lines += ["", "Made by `scripts/growth.sh`."]
pathlib.Path("docs/results/growth.md").write_text("\n".join(lines) + "\n")
PYTHON
cat docs/results/growth.md
