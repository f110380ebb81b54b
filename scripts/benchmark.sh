#!/usr/bin/env bash
# All methods under equal conditions, mean and deviation over three seeds: OUT/leaderboard.md, .csv, .tex and figures.
#
#   bash scripts/benchmark.sh DATA [OUT] [-- flags for every script]
#
#   DATA   prepared or class folders, or hf:OWNER/NAME
#   OUT    folder for the runs and the leaderboard, default: runs/benchmark
#
# By environment variable:
#   PRESET   default full (ViT-B/16, ResNet-50, IR-50 at 224 px); face112, the same at 112 px; tiny, for two CPU cores
#   METHODS  default all                      SEEDS    default "0 1 2"
#   BUDGET   default recipe; epochs=N, images=N, gpu_minutes=X, memory=GIB or convergence matches the methods
#   WEIGHTS  such as "mae=FILE dino=FILE": instead of a download
#   BENCH    further flags for the runner, such as "--devices 0,1" (python scripts/benchmark.py --help)
#
# On two cores (39 minutes for 2,400 ToonFaces): PRESET=tiny BENCH="--jobs 2" bash scripts/benchmark.sh data/toonfaces -- --num_workers 0
# Relative paths start at the repository. Safe to stop and start again: what is finished is skipped.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "$0" "$@"
data_arguments runs/benchmark "$@"
ensure_env requirements.txt

# METHODS, SEEDS, WEIGHTS and BENCH are several words
python scripts/benchmark.py --data_path "$data" --out "$out" --preset "${PRESET:-full}" --methods ${METHODS:-all} \
    --seeds ${SEEDS:-0 1 2} --budget "${BUDGET:-recipe}" ${WEIGHTS:+--weights $WEIGHTS} ${BENCH:-} \
    -- ${flags[@]+"${flags[@]}"}
