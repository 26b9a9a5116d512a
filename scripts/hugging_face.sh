#!/usr/bin/env bash
# Proves that `transformers` opens the folders that we write unchanged, and that we open those that
# it writes: logits, states and greedy tokens are compared. Writes docs/results/hugging_face.md.
#
#     scripts/hugging_face.sh [VENV]
#
# VENV is a Python environment that is made if it is not there; it takes torch (large) and
# transformers from PyPI. XLSTM names the program if it is not to be built.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${1:-$work/venv}
if [[ ! -x $venv/bin/python ]]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q torch 'transformers==5.24.*' safetensors
fi
if [[ -z ${XLSTM:-} ]]; then
    cargo build --release -p xlstm-cli
    XLSTM=target/release/xlstm
fi
HF_HUB_OFFLINE=1 "$venv/bin/python" scripts/hugging_face.py "$XLSTM" "$work" docs/results/hugging_face.md
