#!/usr/bin/env bash
# How many trainable parameters does LoRA need? One run per rank and seed, then a table and accuracy over parameters.
#
#   bash scripts/lora_ranks.sh DATA INIT [OUT] [-- flags for main_lora.py]
#
#   DATA   prepared or class folders, or hf:OWNER/NAME
#   INIT   pre-trained weights, such as runs/mae/checkpoint-last.pth
#   OUT    folder for the runs, results.md, .csv and .png, default: runs/lora_ranks
#
# By environment variable:
#   MODEL  default vit_base_patch16          RANKS  default 4,8,16,32          SEEDS  default 0,1,2
#   GRID   flags for the runner, such as "--dry_run" or "--devices 0,1" (python -m util.run.grid --help)
#
# Relative paths start at the repository. Safe to stop and start again: what is finished is skipped.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "$0" "$@"
grid_arguments runs/lora_ranks "$@"
ensure_env requirements.txt

# GRID is several words
python -m util.run.grid --out "$out" \
    --command "lora: main_lora.py" \
    --vary "rank=${RANKS:-4,8,16,32}" "seed=${SEEDS:-0,1,2}" \
    --figure trainable_params:test.top1 ${GRID:-} \
    -- --data_path "$data" --init "$init" --model "${MODEL:-vit_base_patch16}" ${flags[@]+"${flags[@]}"}
