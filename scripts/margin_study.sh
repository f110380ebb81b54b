#!/usr/bin/env bash
# What a margin and its scale do to open-set recognition: softmax, ArcFace and CosFace, trained and then evaluated on
# characters that were never trained on; a table over seeds, and a figure of AUROC over the margin.
#
#   bash scripts/margin_study.sh DATA INIT [OUT] [-- flags for the training script]
#
#   DATA   prepared folder with open_val and open_test characters, such as data/toonfaces
#   INIT   pre-trained weights, such as runs/mae/checkpoint-last.pth
#   OUT    folder for the runs, results.md, .csv and .png, default: runs/margin_study
#
# By environment variable:
#   SCRIPT    default main_lora.py              MODEL    default vit_base_patch16     SEEDS  default 0,1,2
#   SCALES    default 16,64                     EVAL     further flags for eval_recognition.py
#   ARCFACE   margins in rad, default 0,0.2,0.5          COSFACE  margins in cosine, default 0.1,0.35
#   GRID      flags for the runner, such as "--dry_run" or "--devices 0,1" (python -m util.run.grid --help)
#
# Relative paths start at the repository. Safe to stop and start again: what is finished is skipped.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "$0" "$@"
grid_arguments runs/margin_study "$@"
ensure_env requirements.txt

script="${SCRIPT:-main_lora.py}"
# GRID is several words
python -m util.run.grid --out "$out" \
    --command "softmax: $script" --command "arcface: $script --head arcface" --command "cosface: $script --head cosface" \
    --vary "arcface:margin=${ARCFACE:-0,0.2,0.5}" "cosface:margin=${COSFACE:-0.1,0.35}" \
    "arcface:scale=${SCALES:-16,64}" "cosface:scale=${SCALES:-16,64}" "seed=${SEEDS:-0,1,2}" \
    --then "eval_recognition.py --ckpt {run}/checkpoint-best.pth --data_path $(printf %q "$data") \
        --protocols closed_set open_set verification ${EVAL:-}" \
    --columns closed_set.top1 open_set.auroc open_set.oscr open_set.dir_at_far.0.01 open_set.by.max_logit.auroc \
    verification.auc verification.eer \
    --figure margin:open_set.auroc ${GRID:-} \
    -- --data_path "$data" --init "$init" --model "${MODEL:-vit_base_patch16}" ${flags[@]+"${flags[@]}"}
