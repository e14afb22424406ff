#!/usr/bin/env bash
# What needs a GPU: for each of two generated tasks a base of about 115M parameters from scratch, then all methods on it; in the
# end the speed benchmarks. It works in slices: after SECONDS it stops with everything saved, and the same command goes on. Run it
# from anywhere in a clone. Trainings go on where they were stopped; measuring one run is a piece of work that is begun anew, so a
# slice must be longer than it (minutes).
#
#   bash recipes/compare/gpu.sh                # to its end
#   bash recipes/compare/gpu.sh 540            # for nine minutes; give it again until it says "complete"
#   bash recipes/compare/gpu.sh 100 small      # a dry run on a CPU, ten such slices, which says that everything runs
set -euo pipefail
seconds=${1:-0} size=${2:-large}
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

case $size in
  large)
    outputs=outputs changes=() quick=()
    base=(--num-layers 15 --hidden-size 768 --num-heads 12 --batch-size 256 --num-steps 8000 --plain-steps 2000
      --learning-rate 6e-4 --save-steps 250)
    ;;
  small)
    outputs=outputs/dry-run quick=(cpu --quick)
    base=(--num-layers 2 --hidden-size 32 --num-heads 2 --batch-size 8 --num-steps 60 --plain-steps 20 --save-steps 20
      --max-length 2)
    changes=({changes,methods.rim-stage-1-alone.changes}.grounding.max_steps=6 changes.grounding.save_steps=3
      {changes,methods.rim-stage-2-alone.changes}.refinement.max_steps=6 changes.baseline.max_steps=6
      changes.coconut.max_steps=12 changes.{grounding,refinement,baseline,coconut}.per_device_train_batch_size=4
      changes.data.options.num_rows=64 changes.data.validation_rows=8 {test,selection}.rows=16
      {test,selection}.options.num_held_out=16 "measures.budget=[1,2]" "measures.latency_batch_sizes=[1]")
    ;;
  *)
    echo "usage: gpu.sh [SECONDS [large|small]]" >&2
    exit 2
    ;;
esac

# Make a base, unless it is there.
make_base() { # NAME OPTION...
  local folder=$outputs/bases/$1
  [ -e "$folder/made.json" ] || slice "$python" -m rim_peft.demo.base --output-dir "$folder" "${@:2}" "${base[@]}"
}

# Compare all methods on it, unless the report's last file is there.
compare() { # NAME
  local places=()
  [ ! -e "$outputs/compare-gpu-$1/results.html" ] || return 0
  if [ "$size" = small ]; then
    places=("output_dir=$outputs/compare-gpu-$1" "changes.model.name_or_path=$outputs/bases/$1-large")
  fi
  slice "$python" -c "import sys; from rim_peft.cli.main import main; sys.exit(main(sys.argv[1:]))" \
    compare "recipes/compare/gpu-$1.yaml" "${places[@]}" "${changes[@]}"
}

make_base potions-large --max-length 10 --num-colours 11 --num-names 64 --distractors 4
compare potions
make_base prosqa-large --task ontology
compare prosqa
slice bash benchmarks/gpu.sh "$outputs/benchmarks-gpu" "${quick[@]}"
echo "complete: $outputs/compare-gpu-potions, $outputs/compare-gpu-prosqa, $outputs/benchmarks-gpu" >&2
