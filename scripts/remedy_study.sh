#!/usr/bin/env bash
# What helps against block artefacts, wrong colours and lost detail? Each remedy against plain training, in one table.
#
#   bash scripts/remedy_study.sh DATA [OUT] [-- flags for main_pretrain.py]
#
#   DATA   any --data_path with a test part, or one that can be split
#   OUT    folder for the runs, results.md and .csv, default: runs/remedy_study; pictures: OUT/then
#
# By environment variable:
#   MODEL       default mae_vit_base_patch16     SEEDS  default 0,1,2     EPOCHS  default 100
#   INPUT_SIZE  default 224, px                  RATIO  default 0.75, masked in the test
#   MULTISCALE FREQUENCY COLOUR  weights of the losses, default 1, 0.5 and 1; 0 leaves one out
#   FEATURE_NET own:CHECKPOINT, timm:NAME or timm:NAME=FILE; default: none, and no feature loss
#   FEATURE     default 2, its weight
#   SHOW        flags for visualize.reconstruct, such as "--images 500"
#   GRID        flags for the runner, such as "--dry_run" or "--devices 0,1" (python -m util.run.grid --help)
#
# Blockiness is what the reconstruction adds at patch borders (0 is best), delta_e the colour difference (CIEDE2000),
# hf_energy_ratio the part of the fine detail that is there (1 is best). OUT/blend has the plain checkpoints once more,
# reconstructed by averaging over shifted patches, which needs no training. Relative paths start at the repository.
# Safe to stop and start again: what is finished is skipped.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "$0" "$@"
data_arguments runs/remedy_study "$@"
ensure_env requirements.txt

commands=(--command "plain: main_pretrain.py" --command "refine: main_pretrain.py --refine")
add_loss() {
    [ "$2" = 0 ] || commands+=(--command "$1: main_pretrain.py --$1_loss $2 ${3:-}")
}
add_loss multiscale "${MULTISCALE:-1}"
add_loss frequency "${FREQUENCY:-0.5}"
add_loss colour "${COLOUR:-1}"
[ -z "${FEATURE_NET:-}" ] || add_loss feature "${FEATURE:-2}" "--feature_net $(printf %q "$FEATURE_NET")"

columns=()
for metric in psnr_db psnr_masked_db ssim blockiness delta_e hf_energy_ratio; do
    columns+=("ratios.${RATIO:-0.75}.$metric.mean")
done
show="--data_path $(printf %q "$data") --mask_ratios ${RATIO:-0.75} ${SHOW:-}"
# GRID is several words
python -m util.run.grid --out "$out" "${commands[@]}" --vary "seed=${SEEDS:-0,1,2}" \
    --then "-m visualize.reconstruct --ckpt {run}/checkpoint-last.pth $show --out {out}" --columns "${columns[@]}" ${GRID:-} \
    -- --data_path "$data" --model "${MODEL:-mae_vit_base_patch16}" --input_size "${INPUT_SIZE:-224}" \
    --epochs "${EPOCHS:-100}" ${flags[@]+"${flags[@]}"}

case " ${GRID:-} " in *" --dry_run "*) exit 0 ;; esac
for run in "$out"/plain/*/; do
    blend="$out/blend/$(basename "$run")"
    [ -e "$blend/metrics.json" ] || python -m visualize.reconstruct --blend --ckpt "$run/checkpoint-last.pth" \
        --data_path "$data" --mask_ratios "${RATIO:-0.75}" ${SHOW:-} --out "$blend"
done
