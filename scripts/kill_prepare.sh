#!/usr/bin/env bash
# Kills `xlstm prepare` again and again at random moments, resumes it, and compares every file
# with those of a preparation that was left alone. Needs a build with the feature `parquet` for
# Parquet files.
#
#   scripts/kill_prepare.sh TOKENIZER PATH…
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: $0 TOKENIZER PATH…" >&2
    exit 2
fi
tokenizer=$(realpath "$1")
shift
data=()
for path in "$@"; do data+=("$(realpath "$path")"); done
cd "$(dirname "$0")/.."
xlstm=${XLSTM:-target/release/xlstm}
[ -x "$xlstm" ] || cargo build --release --features xlstm-cli/parquet
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
prepare=("$xlstm" prepare --data "${data[@]}" --tokenizer "$tokenizer" --out)

started=$(date +%s%N)
"${prepare[@]}" "$out/whole"
took=$((($(date +%s%N) - started) / 1000000))
kills=0
while true; do
    # The program itself and no shell around it: that is what has to die.
    "${prepare[@]}" "$out/killed" >/dev/null 2>&1 &
    process=$!
    # Anywhere within two thirds of the time that all of it takes.
    sleep "$(awk -v ms=$((RANDOM * took / 32768 * 2 / 3)) 'BEGIN { print ms / 1000 }')"
    kill -9 "$process" 2>/dev/null || true
    if wait "$process" 2>/dev/null; then break; fi
    kills=$((kills + 1))
    if [ $kills -ge 200 ]; then
        echo "no end after $kills kills" >&2
        exit 1
    fi
done
diff -r "$out/whole" "$out/killed"
echo "the same files after $kills kills"
