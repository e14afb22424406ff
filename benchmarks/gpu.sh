#!/usr/bin/env bash
# Fills the rows that need a GPU: one JSON file for each benchmark. Those that are in the folder are left out, so that
# the work can be done in slices: stop it when time is up, and give the same command again.
#
#   bash benchmarks/gpu.sh FOLDER                   # on a GPU
#   bash benchmarks/gpu.sh FOLDER cpu --quick       # a dry run, which says that everything runs
set -euo pipefail
folder=${1:?usage: gpu.sh FOLDER [DEVICE [OPTION...]]}
device=${2:-cuda}
python=${PYTHON:-python}
folder=$(mkdir -p "$folder" && cd "$folder" && pwd)
cd "$(dirname "$0")/.."
for name in $("$python" -m benchmarks --list 2>/dev/null | cut -d' ' -f1); do
  [ -s "$folder/$name.json" ] && continue
  "$python" -m benchmarks "$name" --device "$device" "${@:3}" --save "$folder/$name.partial"
  mv "$folder/$name.partial" "$folder/$name.json"
done
echo "complete: $folder" >&2
