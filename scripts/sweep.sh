#!/usr/bin/env bash
# Which recipe fine-tunes best? Learning rate x augmentation x schedule of main_finetune.py, by validation top-1.
#
#   bash scripts/sweep.sh DATA INIT [OUT] [-- flags for main_finetune.py]
#
#   DATA   prepared or class folders, or hf:OWNER/NAME
#   INIT   pre-trained weights, such as runs/mae/checkpoint-last.pth
#   OUT    folder for the runs, results.md, .csv and .png, default: runs/sweep
#
# By environment variable:
#   MODEL      default vit_base_patch16        SEEDS    default 0,1,2: 24 recipes x 3 seeds; SEEDS=0 for a first look
#   LRS        default 5e-5,1e-4,5e-4          SCHEDULES  epochs/warm-up epochs, default 20/2,50/5
#   CROPS      --min_crop, default 0.2,0.5     JITTERS    --color_jitter, default 0,0.4
#   GRID       flags for the runner, such as "--dry_run" or "--devices 0,1" (python -m util.run.grid --help)
#
# Relative paths start at the repository. Safe to stop and start again: what is finished is skipped.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "$0" "$@"
grid_arguments runs/sweep "$@"
ensure_env requirements.txt

# GRID is several words
python -m util.run.grid --out "$out" \
    --command "finetune: main_finetune.py" \
    --vary "lr=${LRS:-5e-5,1e-4,5e-4}" "min_crop=${CROPS:-0.2,0.5}" "color_jitter=${JITTERS:-0,0.4}" \
    "epochs/warmup_epochs=${SCHEDULES:-20/2,50/5}" "seed=${SEEDS:-0,1,2}" \
    --figure lr:val.top1 ${GRID:-} \
    -- --data_path "$data" --init "$init" --model "${MODEL:-vit_base_patch16}" ${flags[@]+"${flags[@]}"}
