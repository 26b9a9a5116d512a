#!/usr/bin/env bash
# `xlstm prepare` on Parquet files beside the tokenizer library alone, in turns, and its memory
# over a growing corpus -> docs/results/prepare.md
#
# usage: scripts/bench_prepare.sh TOKENIZER FILE…
#   PEER_PYTHON   a Python with tokenizers and pyarrow: reads the files first, then times encoding
#                 alone on two threads; without it, ours alone
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,8p' "$0" >&2; exit 2; }
tokenizer=$(realpath "$1")
shift
files=()
for file in "$@"; do files+=("$(realpath "$file")"); done
cd "$(dirname "$0")/.."
cargo build --release --features xlstm-cli/parquet
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

# prepare COUNT: "tokens seconds kilobytes" of preparing the first COUNT files.
prepare() {
    rm -rf "$out/shards"
    /usr/bin/time -f '%e %M' -o "$out/time" target/release/xlstm prepare --data "${files[@]:0:$1}" \
        --tokenizer "$tokenizer" --threads 2 --out "$out/shards" 2>/dev/null |
        awk '$1 == "tokens" { printf "%s ", $2 }'
    cat "$out/time"
}

few=$((${#files[@]} < 4 ? ${#files[@]} : 4))
for _ in 1 2 3; do
    echo "ours $(prepare "$few")"
    if [ -n "${PEER_PYTHON:-}" ]; then
        RAYON_NUM_THREADS=2 "$PEER_PYTHON" - "$tokenizer" "${files[@]:0:$few}" <<'PYTHON'
import sys, time
import pyarrow.parquet as parquet
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file(sys.argv[1])
texts = [text for file in sys.argv[2:] for text in parquet.read_table(file, columns=["text"])["text"].to_pylist()]
start = time.perf_counter()
tokens = sum(len(x.ids) for x in tokenizer.encode_batch(texts, add_special_tokens=False))
print(f"peer {tokens} {time.perf_counter() - start:.2f} 0")
PYTHON
    fi
done | tee "$out/pairs" >&2
for count in 1 8 20 ${#files[@]}; do
    [ "$count" -gt "${#files[@]}" ] || echo "$count $(prepare "$count")"
done | sort -nu | tee "$out/growth" >&2

python3 - "$out" "$few" >docs/results/prepare.md <<'PYTHON'
import datetime, pathlib, statistics, sys

out, few = pathlib.Path(sys.argv[1]), sys.argv[2]
model = [l.split(":", 1)[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")][0]
pairs = [line.split() for line in (out / "pairs").read_text().splitlines()]
print("# Preparing a corpus\n")
print(f"Two threads of an {model}, {datetime.date.today().isoformat()}, GPT-2's tokenizer, Parquet files of articles.\n")
print(f"{few} files, three times each, in turns. Ours: the whole process, reading, tokenizing and writing. The")
print("library: `encode_batch` alone, on texts in memory. The machine had other work: only ratios count.\n")
print("| | tokens | seconds | median tokens/s |\n|---|---|---|---|")
for side, name in (("ours", "xlstm prepare"), ("peer", "tokenizers (Python)")):
    rows = [row for row in pairs if row[0] == side]
    if rows:
        seconds = [float(row[2]) for row in rows]
        tokens = int(rows[0][1])
        listed = ", ".join(f"{s:.2f}" for s in seconds)
        print(f"| {name} | {tokens:,} | {listed} | {tokens / statistics.median(seconds):,.0f} |")
print("\nMemory over a growing corpus:\n\n| files | tokens | seconds | peak MB |\n|---|---|---|---|")
for line in (out / "growth").read_text().splitlines():
    count, tokens, seconds, kilobytes = line.split()
    print(f"| {count} | {int(tokens):,} | {float(seconds):.1f} | {int(kilobytes) / 1000:.0f} |")
print("\nMade by `scripts/bench_prepare.sh`.")
PYTHON
echo "wrote docs/results/prepare.md" >&2
