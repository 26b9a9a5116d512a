#!/usr/bin/env bash
# State tracking: trained on words of 3 to 40 symbols, tested on 40 to 256 ->
# docs/results/formal_languages.md. As many runs side by side as there are cores.
#
#   scripts/formal_languages.sh [SEED]      EXAMPLE: the example, where it is built already
set -euo pipefail
cd "$(dirname "$0")/.."
export seed=${1:-1}
result=${RESULT:-docs/results/formal_languages.md}
if [[ -z ${EXAMPLE:-} ]]; then
    cargo build --release -p xlstm --example formal_languages
    EXAMPLE=target/release/examples/formal_languages
fi
export EXAMPLE rows=$(mktemp -d)
trap 'rm -rf "$rows"' EXIT
for language in "parity" "even pairs" "cycle navigation" "modular arithmetic"; do
    for blocks in slstm mlstm both; do printf '%s,%s\n' "$language" "$blocks"; done
done | tee "$rows/all" | xargs -d '\n' -P "$(nproc)" -I{} bash -c \
    'RAYON_NUM_THREADS=1 "$EXAMPLE" "${1%,*}" "${1#*,}" "$seed" >"$rows/$1"' _ {}
{
    echo "# Formal languages"
    echo
    echo "Words of 3 to 40 random symbols are learnt, with a target after every symbol; the table has the"
    echo "share of 1,024 new words whose last output is right. Two blocks of width 32 (\`slstm\`, \`mlstm\`, or"
    echo "\`both\`: an mLSTM block and an sLSTM block), 6,000 steps of 64 words, seed $seed."
    echo
    head -n 2 "$rows/parity,slstm"
    while read -r row; do tail -n 1 "$rows/$row"; done <"$rows/all"
    echo
    echo "$(nproc) cores of $(lscpu | sed -n 's/^Model name: *//p'), $(date -u +%F); \`scripts/formal_languages.sh\` made this."
} >"$result.new"
mv "$result.new" "$result"
