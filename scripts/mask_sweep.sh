#!/usr/bin/env bash
# Which mask ratio? One pre-training per ratio and seed, with equal epochs and with equal computation, then a table.
#
#   bash scripts/mask_sweep.sh DATA [OUT] [-- flags for main_pretrain.py]
#
#   DATA   any --data_path
#   OUT    folder for the runs, results.md, .csv and .png, default: runs/mask_sweep
#
# By environment variable:
#   MODEL  default mae_vit_base_patch16      RATIOS  default "0.25 0.5 0.75 0.9"      SEEDS  default 0,1,2
#   EPOCHS default 100, of every run with equal epochs, and at 75 % of those with equal computation
#   INPUT_SIZE default 224, px
#   GRID   flags for the runner, such as "--dry_run" or "--devices 0,1" (python -m util.run.grid --help)
#
# At equal epochs a low ratio is given more computation, because the encoder sees more patches; "compute" evens that out.
# The loss of different ratios is of different patches: compare by what `visualize.reconstruct` and the probes say.
# Relative paths start at the repository. Safe to stop and start again: what is finished is skipped.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "$0" "$@"
data_arguments runs/mask_sweep "$@"
ensure_env requirements.txt

model="${MODEL:-mae_vit_base_patch16}" epochs="${EPOCHS:-100}" size="${INPUT_SIZE:-224}"
ratios="${RATIOS:-0.25 0.5 0.75 0.9}"
# RATIOS and GRID are several words
matched="$(python scripts/matched_epochs.py --model "$model" --input_size "$size" --epochs "$epochs" --mask_ratios $ratios)"
equal="$(printf "%s/$epochs," $ratios)"
python -m util.run.grid --out "$out" \
    --command "epochs: main_pretrain.py" --command "compute: main_pretrain.py" \
    --vary "epochs:mask_ratio/epochs=${equal%,}" "compute:mask_ratio/epochs=$matched" "seed=${SEEDS:-0,1,2}" \
    --figure mask_ratio:val.psnr_db ${GRID:-} \
    -- --data_path "$data" --model "$model" --input_size "$size" ${flags[@]+"${flags[@]}"}
