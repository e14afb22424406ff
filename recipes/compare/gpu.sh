#!/usr/bin/env bash
# What needs a GPU: a base of about 115M parameters from scratch, then all methods on it, then the speed benchmarks. It works in
# slices: after SECONDS it stops with everything saved, and the same command goes on. Run it from anywhere in a clone.
#
#   bash recipes/compare/gpu.sh                # to its end
#   bash recipes/compare/gpu.sh 540            # for nine minutes; give it again until it says "complete"
set -euo pipefail
seconds=${1:-0}
python=${PYTHON:-python}
cd "$(dirname "$0")/../.."
started=$SECONDS

# Run a command for what is left of the slice; a command that the time ran out for ends the script, to be gone on with.
slice() {
  local left=0
  if [ "$seconds" -gt 0 ]; then
    left=$((seconds - SECONDS + started))
    if [ "$left" -lt 30 ]; then
      echo "time is up; give the same command again" >&2
      exit 3
    fi
  fi
  local code=0
  timeout --signal=TERM --kill-after=25 "$left" "$@" || code=$?
  if [ "$code" -eq 124 ] || [ "$code" -eq 137 ] || [ "$code" -eq 143 ]; then
    echo "time is up; give the same command again" >&2
    exit 3
  fi
  return "$code"
}

rim_peft() { slice "$python" -c "import sys; from rim_peft.cli.main import main; sys.exit(main(sys.argv[1:]))" "$@"; }

base=outputs/bases/potions-large
if [ ! -e "$base/made.json" ]; then
  slice "$python" -m rim_peft.demo.base --output "$base" --max-length 10 --num-layers 15 --hidden-size 768 --num-heads 12 \
    --num-colours 11 --num-names 64 --distractors 4 --batch-size 256 --num-steps 8000 --plain-steps 2000 \
    --learning-rate 6e-4 --save-steps 250
fi
rim_peft compare recipes/compare/gpu-potions.yaml
slice bash benchmarks/gpu.sh outputs/benchmarks-gpu
echo "complete: outputs/compare-gpu-potions, outputs/benchmarks-gpu" >&2
