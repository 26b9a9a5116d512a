#!/usr/bin/env bash
# The article's table, row by row: trains each model for some minutes on the same text, scores it on
# the test text and, zero-shot, on WikiText-103's, and reports over all rows that are there
# -> docs/results/table.md, table.json and pictures.
#
#   scripts/table.sh ROW...      lstm transformer slstm mlstm xlstm-7-1 xlstm-large pyxlstm
#   scripts/table.sh prepare     the tokens alone, before several rows at once on as many GPUs
#   scripts/table.sh report      the report alone
#
# A row takes MINUTES and two more; called again it goes on with a run that was cut off and leaves what
# is done, so that the table can be made in pieces. What can be told:
#   DATA       a folder of text with splits (train-*.parquet, validation.parquet, test.parquet; or
#              WikiText-103's own wiki.train.tokens, wiki.valid.tokens, wiki.test.tokens)
#   TOKENIZER  a tokenizer.json, such as GPT-2's; it is trained on the text where VOCABULARY is given
#   WIKITEXT   WikiText-103's wiki.test.tokens, scored zero-shot (left out where not given)
#   MINUTES    of training (5)       SEED    (1)       DEVICE  (cuda:0)
#   RUNS       where rows are kept (out/table)         REPORT  (docs/results/table)
#   CONFIGS    the models (configs/table)              XLSTM   the program, where it is built already
#   POSITIONS  places at which generation is timed     CONTEXT tokens of the widest window
#   SCORES     all; test: the test text alone, for the spread over seeds; none (all)
#   SETS       keys to change, as KEY=VALUE KEY=VALUE
#   PYXLSTM    a Python with PyTorch and PyxLSTM, for the row pyxlstm
set -euo pipefail
cd "$(dirname "$0")/.."
data=${DATA:-}
minutes=${MINUTES:-5} seed=${SEED:-1} device=${DEVICE:-cuda:0}
runs=${RUNS:-out/table} configs=${CONFIGS:-configs/table}
tokens=${TOKENS:-$runs/tokens}
scores=${SCORES:-all}
positions=${POSITIONS:-512 2048 8192 16384} context=${CONTEXT:-16384}
say() { printf '%s  %s\n' "$(date -u +%H:%M:%S)" "$*" >&2; }

for row in "$@"; do
    [[ $row == report || $row == prepare || $row == pyxlstm || -f $configs/$row.yaml ]] || {
        say "no row $row: there are $(cd "$configs" && printf '%s ' *.yaml | sed 's/\.yaml//g')pyxlstm"
        exit 2
    }
done
if [[ -z ${XLSTM:-} ]]; then
    features=
    [[ $device == cpu ]] || features=cuda
    ! compgen -G "$data/*.parquet" >/dev/null || features+=,parquet
    cargo build --release -p xlstm-cli --features "$features"
fi
xlstm=${XLSTM:-target/release/xlstm}
mkdir -p "$runs"

# The number of a key in a line of JSON.
number() { sed -n "s/.*\"$1\":\([-0-9.e]*\).*/\1/p"; }

prepare() {
    local split
    : "${data:?DATA: a folder with the splits of a text}"
    for split in train validation; do
        "$xlstm" prepare --data "$data" --split "$split" --tokenizer "${TOKENIZER:?a tokenizer}" \
            ${VOCABULARY:+--train-tokenizer "$VOCABULARY"} --out "$tokens/$split" --json >"$tokens.$split.json"
    done
}

# As many steps as fit the minutes at the pace of a trial, less what checkpoints take.
steps() {
    local ms
    ms=$(number ms <"$1/pace.json")
    awk -v minutes="$minutes" -v ms="$ms" 'BEGIN { print int(0.97 * minutes * 60000 / ms) }'
}

train() {
    local row=$1 folder=$2 count
    local key sets=()
    for key in ${SETS:-}; do sets+=(--set "$key"); done
    [[ -e $folder/pace.json ]] || {
        "$xlstm" bench train --config "$configs/$row.yaml" ${sets[@]+"${sets[@]}"} --device "$device" --steps 20 \
            --json >"$folder/pace.part"
        mv "$folder/pace.part" "$folder/pace.json"
    }
    if [[ -d $folder/run/1/last ]]; then
        "$xlstm" train --resume "$folder/run/1"
        return
    fi
    rm -rf "$folder/run"
    count=$(steps "$folder")
    local command=("$xlstm" train "$configs/$row.yaml" ${sets[@]+"${sets[@]}"} --device "$device" --out "$folder/run"
        --set "seed=$seed" --set "data.train=$tokens/train" --set "data.validation=$tokens/validation"
        --set "training.steps=$count" --set "training.validate_every=$((count / 5 + 1))"
        --set "training.checkpoint_every=$((count / 3 + 1))" --set training.log_every=20)
    printf '%s ' xlstm "${command[@]:1}" | sed 's/ $//' >"$folder/command.txt"
    "${command[@]}"
}

# How a model reads a text: state carried over a whole document, or, where it has none, windows as
# long as in training, each half a window after the one before.
reading() {
    if [[ $1 == transformer ]]; then
        local length
        length=$(sed -n 's/^  length: //p' "$configs/$1.yaml")
        echo --window "$length" --stride $((length / 2))
    else
        echo --pass 2048
    fi
}

evaluate() {
    local folder=$1 name=$2
    shift 2
    [[ ! -e $folder/$name.json ]] || return 0
    "$xlstm" eval --model "$folder/run/1/last" --device "$device" --json "$@" >"$folder/$name.part"
    mv "$folder/$name.part" "$folder/$name.json"
}

score() {
    local row=$1 folder=$2 position
    [[ $scores != none ]] || return 0
    # shellcheck disable=SC2046
    evaluate "$folder" test $(reading "$row") --data "$data" --split test
    [[ $scores == all ]] || return 0
    [[ -z ${WIKITEXT:-} ]] || {
        # shellcheck disable=SC2046
        evaluate "$folder" wikitext $(reading "$row") --data "$WIKITEXT" --detokenize --positions --unscored '<unk>'
        # shellcheck disable=SC2046
        evaluate "$folder" wikitext-all $(reading "$row") --data "$WIKITEXT" --detokenize --positions
    }
    evaluate "$folder" positions --positions --window "$context" --data "$data" --split test
    [[ -e $folder/sample.txt ]] || "$xlstm" generate --model "$folder/run/1/last" --device "$device" --seed 1 \
        -n 200 --prompt "${PROMPT:-The history of the city}" >"$folder/sample.txt"
    [[ -e $folder/generation.jsonl ]] || {
        for position in $positions; do
            "$xlstm" bench decode --config "$configs/$row.yaml" --device "$device" --prompt "$position" --repeats 1 \
                --json >"$folder/decode.json"
            awk -v position="$position" -v rate="$(number tokens_per_s <"$folder/decode.json")" \
                -v state="$(number state_mb <"$folder/decode.json")" \
                'BEGIN { printf "{\"position\":%d,\"ms\":%.4f,\"state_mb\":%.4f}\n", position, 1000 / rate, state }'
        done >"$folder/generation.part"
        mv "$folder/generation.part" "$folder/generation.jsonl"
    }
}

card() {
    if [[ $device == cpu ]]; then
        sed -n 's/^model name.*: //p' /proc/cpuinfo 2>/dev/null | head -n 1
    else
        nvidia-smi --query-gpu=name --format=csv,noheader --id="${device#cuda:}"
    fi
}

title() {
    case $1 in
    lstm) echo LSTM ;;
    transformer) echo Transformer ;;
    slstm) echo sLSTM ;;
    mlstm) echo mLSTM ;;
    xlstm-7-1) echo 'xLSTM[7:1]' ;;
    xlstm-large) echo xLSTMLarge ;;
    *) echo "$1" ;;
    esac
}

facts() {
    local row=$1 folder=$2
    printf '{"row":"%s","title":"%s","seed":%s,"budget_minutes":%s,"card":"%s","date":"%s","commit":"%s","vocabulary":%s,"train_command":"%s"}\n' \
        "$row" "$(title "$row")" "$seed" "$minutes" "$(card)" "$(date -u +%F)" \
        "${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || true)}" "$(number vocabulary_size <"$tokens.train.json")" "$(sed 's/["\\]/\\&/g' "$folder/command.txt")" >"$folder/row.json"
}

for row in "$@"; do
    [[ $row != report ]] || continue
    [[ -e $tokens.validation.json ]] || prepare
    [[ $row != prepare ]] || continue
    folder=$runs/$row-s$seed-${minutes}min
    mkdir -p "$folder"
    if [[ $row == pyxlstm ]]; then
        say "$row: training"
        "${PYXLSTM:-python3}" scripts/pyxlstm_row.py "$tokens" "$folder" --seed "$seed" --minutes "$minutes"
        continue
    fi
    say "$row: training"
    train "$row" "$folder"
    facts "$row" "$folder"
    cp "$configs/protocol.md" "$runs/protocol.md"
    say "$row: scoring"
    score "$row" "$folder"
    say "$row: done"
done
report=${REPORT-docs/results/table}
if [[ -z $report ]]; then
    exit
elif command -v cargo >/dev/null; then
    # The README has the short form of the table of record.
    short=()
    [[ $report != docs/results/table ]] || short=(README.md)
    cargo run --release --example table -- "$runs" "$report" ${short[@]+"${short[@]}"}
else
    say "no cargo here: report with scripts/table.sh report where there is"
fi
