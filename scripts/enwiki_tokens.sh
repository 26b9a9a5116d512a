#!/usr/bin/env bash
# Token counts of Wikipedia articles by GPT-2's tokenizer, against those of Hugging Face's
# library: 570,849 in validation.parquet and 554,438 in test.parquet, every article followed by
# "\n<|endoftext|>\n". Needs a build with the feature `parquet`.
#
#   scripts/enwiki_tokens.sh FOLDER TOKENIZER
set -euo pipefail

if [ $# -ne 2 ]; then
    echo "usage: $0 FOLDER TOKENIZER" >&2
    exit 2
fi
data=$(realpath "$1")
tokenizer=$(realpath "$2")
cd "$(dirname "$0")/.."
cargo build --release --features xlstm-cli/parquet
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

failed=0
for split in validation:570849 test:554438; do
    name=${split%:*}
    expected=${split#*:}
    found=$(target/release/xlstm prepare --data "$data" --split "$name" --tokenizer "$tokenizer" \
        --document-end '\n<|endoftext|>\n' --out "$out/$name" | awk '$1 == "tokens" { print $2 }')
    echo "$name: $found tokens, expected $expected"
    [ "$found" = "$expected" ] || failed=1
done
exit $failed
