#!/usr/bin/env bash
# Which mask ratio? One pre-training per ratio and seed, with equal epochs and with equal computation, then a table.
#
#   bash scripts/mask_sweep.sh DATA [OUT] [-- flags for main_pretrain.py]
#
#   DATA   any --data_path
#   OUT    folder for the runs, results.md, .csv and .png, default: runs/mask_sweep; what the models reconstruct is in
#          OUT/pictures/epochs and OUT/pictures/compute: mask_sweep.md, tables, and figures
#
# By environment variable:
#   MODEL  default mae_vit_base_patch16      RATIOS  default "0.25 0.5 0.75 0.9"      SEEDS  default 0,1,2
#   EPOCHS default 100, of every run with equal epochs, and at 75 % of those with equal computation
#   INPUT_SIZE default 224, px
#   PROBE  labelled data: a linear probe of each run follows, and mask_sweep.md has pictures and features in one table
#   PROBE_FLAGS for main_linprobe.py, such as "--head_norm --epochs 90"
#   GRID   flags for the runner, such as "--dry_run" or "--devices 0,1" (python -m util.run.grid --help)
#
# At equal epochs a low ratio is given more computation, because the encoder sees more patches; "compute" evens that out.
# The loss of different ratios is of different patches: compare by mask_sweep.md, where all reconstruct the same ones.
# Relative paths start at the repository. Safe to stop and start again: what is finished is skipped.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "$0" "$@"
data_arguments runs/mask_sweep "$@"
ensure_env requirements.txt

model="${MODEL:-mae_vit_base_patch16}" epochs="${EPOCHS:-100}" size="${INPUT_SIZE:-224}"
ratios="${RATIOS:-0.25 0.5 0.75 0.9}"
probe=()
if [ -n "${PROBE:-}" ]; then
    [ -e "$PROBE" ] || [ "${PROBE#hf:}" != "$PROBE" ] || fail "there is no PROBE=$PROBE: name a folder, or hf:OWNER/NAME"
    encoder="${model#mae_}"
    probe=(--then "main_linprobe.py --data_path '$PROBE' --model ${encoder%_dec*} --input_size $size --init {run}/checkpoint-last.pth ${PROBE_FLAGS:-}")
fi

# RATIOS and GRID are several words
matched="$(python scripts/matched_epochs.py --model "$model" --input_size "$size" --epochs "$epochs" --mask_ratios $ratios)"
equal="$(printf "%s/$epochs," $ratios)"
python -m util.run.grid --out "$out" \
    --command "epochs: main_pretrain.py" --command "compute: main_pretrain.py" \
    --vary "epochs:mask_ratio/epochs=${equal%,}" "compute:mask_ratio/epochs=$matched" "seed=${SEEDS:-0,1,2}" \
    --figure mask_ratio:val.psnr_db ${probe[@]+"${probe[@]}"} ${GRID:-} \
    -- --data_path "$data" --model "$model" --input_size "$size" ${flags[@]+"${flags[@]}"}

case " ${GRID:-} " in *" --dry_run "*) exit 0 ;; esac
for kind in epochs compute; do
    python -m visualize.mask_sweep --ckpt "$out/$kind"/*/checkpoint-last.pth --data_path "$data" --mask_ratios $ratios \
        --out "$out/pictures/$kind" ${probe[@]+--probes "$out/then/$kind"}
done
