#!/usr/bin/env bash
# How many labels does each method need? Linear probing, LoRA and fine-tuning on parts of the training set.
#
#   bash scripts/data_efficiency.sh DATA INIT [OUT] [-- flags for all three scripts]
#
#   DATA   prepared or class folders, or hf:OWNER/NAME
#   INIT   pre-trained weights, such as runs/mae/checkpoint-last.pth
#   OUT    folder for the runs, results.md, .csv and .png, default: runs/data_efficiency
#
# By environment variable:
#   MODEL  default vit_base_patch16          FRACTIONS  default 0.01,0.05,0.1,0.25,1          SEEDS  default 0,1,2
#   GRID   flags for the runner, such as "--dry_run" or "--devices 0,1" (python -m util.run.grid --help)
#
# Relative paths start at the repository. Safe to stop and start again: what is finished is skipped.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "$0" "$@"
grid_arguments runs/data_efficiency "$@"
ensure_env requirements.txt

# GRID is several words
python -m util.run.grid --out "$out" \
    --command "linprobe: main_linprobe.py" \
    --command "lora: main_lora.py" \
    --command "finetune: main_finetune.py" \
    --vary "label_fraction=${FRACTIONS:-0.01,0.05,0.1,0.25,1}" "seed=${SEEDS:-0,1,2}" \
    --figure label_fraction:test.top1 ${GRID:-} \
    -- --data_path "$data" --init "$init" --model "${MODEL:-vit_base_patch16}" ${flags[@]+"${flags[@]}"}
