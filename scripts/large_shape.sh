#!/usr/bin/env bash
# The published 7B's shape with random weights in bf16: creates a folder, opens it, generates;
# prints a table of the time and the peak memory of each -> docs/results/large-shape.md
#
# usage: scripts/large_shape.sh [--blocks N] [FOLDER]     (default 32 blocks in a temporary folder)
#   TOKENS    tokens to generate (default 16)
#   THREADS   threads (default 2)
# A folder that is there already is used as it is. 32 blocks take 13.7 GB of disk. Peak memory is
# the resident set, pages of the mapped file that were touched included.
set -euo pipefail
blocks=32 folder=
while (($#)); do
  case $1 in
    --blocks) blocks=$2; shift 2 ;;
    *) folder=$1; shift ;;
  esac
done
tokens=${TOKENS:-16} threads=${THREADS:-2}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
folder=${folder:-$work/model}
cat >"$work/large.yaml" <<YAML
model:
  family: large
  vocab_size: 50304
  embedding_dim: 4096
  num_blocks: $blocks
  large:
    num_heads: 8
YAML

cargo build --release -p xlstm-cli
xlstm=${CARGO_TARGET_DIR:-target}/release/xlstm
# measured NAME COMMAND…: a line of the table; stdout and stderr of the command go to files.
measured() {
  local name=$1
  shift
  /usr/bin/time -f '%e %M' -o "$work/time" "$@" >"$work/$name.out" 2>"$work/$name.err" || {
    cat "$work/$name.err" >&2
    exit 1
  }
  awk -v name="$name" '{ printf "| %s | %.2f | %.0f |\n", name, $1, $2 / 1024 }' "$work/time" >>"$work/table"
}
run() { "$xlstm" generate --model "$folder" --device cpu --threads "$threads" --temperature 0 --json "$@"; }
export -f run
export xlstm folder threads

result=docs/results/large-shape.md
# The row of a folder that was created before stays.
if [[ -e $folder ]]; then
  grep '^| create |' "$result" >"$work/table" || true
else
  measured create "$xlstm" init "$work/large.yaml" --out "$folder" --dtype bf16 --threads "$threads"
fi
# The folder is opened and one token read, which touches every weight once.
measured first-token bash -c 'run --prompt-ids 0 -n 0'
measured generate bash -c "run --prompt-ids 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16 -n $tokens"
speed=$(grep tokens/s "$work/generate.err")
bytes=$(stat -c %s "$folder/model.safetensors")
# Two blocks of the same widths, twice: just written, so that the system has them in memory.
folder=$work/two
sed "s/num_blocks: .*/num_blocks: 2/" "$work/large.yaml" >"$work/two.yaml"
"$xlstm" init "$work/two.yaml" --out "$folder" --dtype bf16 --threads "$threads"
measured "first-token, 2 blocks" bash -c 'run --prompt-ids 0 -n 0'
measured "the same again" bash -c 'run --prompt-ids 0 -n 0'
{
  echo "# The published 7B's shape, $blocks blocks, random weights in bf16"
  echo
  echo "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $threads threads," \
    "$(awk '/MemTotal/ { printf "%.0f GiB", $2 / 1048576 }' /proc/meminfo) of memory, $(date -u +%F);" \
    "$bytes bytes of weights, of 2 blocks $(stat -c %s "$folder/model.safetensors"). Made by scripts/large_shape.sh."
  echo "\`first-token\` opens the folder and reads one token; \`generate\` opens it, reads 16 and draws $tokens."
  echo
  echo "| step | seconds | peak MiB |"
  echo "| --- | --- | --- |"
  cat "$work/table"
  echo
  echo "$speed"
} | tee "$work/result.md"
cp "$work/result.md" "$result"
