#!/usr/bin/env bash
# State tracking: trained on words of 3 to 40 symbols, tested on 40 to 256 ->
# docs/results/formal_languages.md
set -euo pipefail
cd "$(dirname "$0")/.."
result=docs/results/formal_languages.md
cargo build --release -p xlstm --example formal_languages
{
    echo "# Formal languages"
    echo
    echo "Words of 3 to 40 random symbols are learnt, with a target after every symbol; the table has the"
    echo "share of 1,024 new words whose last output is right. Two blocks of width 32 (\`slstm\`, \`mlstm\`, or"
    echo "\`both\`: an mLSTM block and an sLSTM block), 3,000 steps of 64 words."
    echo
    target/release/examples/formal_languages
    echo
    echo "$(nproc) cores of $(lscpu | sed -n 's/^Model name: *//p'), $(date -u +%F), seed 1; \`scripts/formal_languages.sh\` made this."
} >"$result.new"
mv "$result.new" "$result"
