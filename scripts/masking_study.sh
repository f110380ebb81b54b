#!/usr/bin/env bash
# Does it help to choose what is masked in pre-training? Every way of masking, tested under the same random masks.
#
#   bash scripts/masking_study.sh DATA LABELLED [OUT] [-- flags for main_pretrain.py]
#
#   DATA      any --data_path with the semantic maps that ARMS need (datasets/prepare_maps.py)
#   LABELLED  prepared or class folders, for the linear probe, few-shot episodes and LoRA; may be DATA
#   OUT       folder for the runs, screening/ and final/, default: runs/masking_study
#
# By environment variable:
#   ARMS   ways of masking, STRATEGY[@STRENGTH[/RANDOM_SHARE[/SCHEDULE]]]; default: random, face, face:-1, foreground,
#          foreground:-1, lineart, lineart:-1, face+foreground+lineart, hard, and the controls box, of the face's area,
#          and green@1000/0, block@1000/0 and grid@1000/0, in their published hard form
#   RATIOS default "0.5 0.75 0.9", masked    SEEDS  default 0,1,2,3,4, of the finalists    SCREEN  default 0, a seed
#   MODEL  default mae_vit_base_patch16      EPOCHS default 100, at 75 %; others as many as cost the same
#   INPUT_SIZE default 224, px               FINALISTS default 6
#   SCORE  flags for scripts/score_pretraining.py     LORA  flags for main_lora.py
#   GRID   flags for the runner, such as "--dry_run" or "--devices 0,1" (python -m util.run.grid --help)
#
# First every arm at every ratio with one seed (OUT/screening/masking.md). Then the FINALISTS ways of best mean rank,
# random masking among them, with all SEEDS and LoRA: OUT/final with all seeds, OUT/confirmed without the one that
# chose them. Relative paths start at the repository. Safe to stop and start again: what is finished is skipped.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "$0" "$@"
[ $# -ge 2 ] && [ "${1#-}" = "$1" ] && [ "${2#-}" = "$2" ] || fail "DATA and LABELLED are needed: --help says what they are"
labelled="$2"
data_arguments runs/masking_study "$1" "${@:3}"
[ -e "$labelled" ] || [ "${labelled#hf:}" != "$labelled" ] || fail "there is no $labelled: name a folder, or hf:OWNER/NAME"
ensure_env requirements.txt

model="${MODEL:-mae_vit_base_patch16}" size="${INPUT_SIZE:-224}" ratios="${RATIOS:-0.5 0.75 0.9}"
encoder="${model#mae_}"
encoder="${encoder%_dec*}"
screen="${SCREEN:-0}" seeds="${SEEDS:-0,1,2,3,4}"
arms="${ARMS:-random face face:-1 foreground foreground:-1 lineart lineart:-1 face+foreground+lineart hard
    box green@1000/0 block@1000/0 grid@1000/0}"
then="scripts/score_pretraining.py --ckpt {run}/checkpoint-last.pth --pictures $(printf %q "$data")
    --labelled $(printf %q "$labelled") ${SCORE:-}"
common="--data_path $(printf %q "$data") --model $model --input_size $size"
[ ${#flags[@]} -eq 0 ] || common+="$(printf ' %q' "${flags[@]}")"

arm_command() {
    local strategy="${1%%@*}" settings=() words
    [ "$strategy" = "$1" ] || IFS=/ read -r -a settings <<<"${1#*@}"
    words="--masking $strategy"
    [ ${#settings[@]} -lt 1 ] || words+=" --mask_strength ${settings[0]}"
    [ ${#settings[@]} -lt 2 ] || words+=" --mask_random ${settings[1]}"
    [ ${#settings[@]} -lt 3 ] || words+=" --mask_schedule ${settings[2]}"
    # a command's name is a folder's, too
    echo "$(tr ':+@/' '_._-' <<<"$1"): main_pretrain.py $common $words"
}

# RATIOS, ARMS and GRID are several words
matched="$(python scripts/matched_epochs.py --model "$model" --input_size "$size" --epochs "${EPOCHS:-100}" --mask_ratios $ratios)"
commands=()
for arm in $arms; do commands+=(--command "$(arm_command "$arm")"); done
columns=(--columns psnr_db psnr_face_db probe_top1 few_shot_5way_1shot few_shot_5way_5shot)
python -m util.run.grid --out "$out" "${commands[@]}" --vary "mask_ratio/epochs=$matched" "seed=$screen" \
    --then "$then" "${columns[@]}" ${GRID:-}
if [[ " ${GRID:-} " = *" --dry_run "* ]]; then
    echo "# the finalists are chosen from the scores of these runs"
    exit 0
fi
python scripts/masking_table.py --runs "$out" --seeds "$screen" --out "$out/screening" \
    --finalists "${FINALISTS:-6}" --write "$out/finalists.txt"

mapfile -t finalists <"$out/finalists.txt"
python -m util.run.grid --out "$out" "${finalists[@]}" --vary "seed=$seeds" --then "$then" "${columns[@]}" ${GRID:-}

# LoRA on every one of these runs, with the seed that it was pre-trained with
commands=()
for word in "${finalists[@]}"; do
    # such as face:mask_ratio/epochs=0.75/100,0.9/136
    [[ "$word" =~ ^([A-Za-z0-9_.-]+):mask_ratio/epochs=(.+)$ ]] || continue
    name="${BASH_REMATCH[1]}"
    for pair in ${BASH_REMATCH[2]//,/ }; do
        for seed in ${seeds//,/ }; do
            init="$out/$name/mask_ratio=${pair%/*},epochs=${pair#*/},seed=$seed/checkpoint-last.pth"
            commands+=(--command "$name-${pair%/*}-$seed: main_lora.py --init $(printf %q "$init") --seed $seed")
        done
    done
done
python -m util.run.grid --out "$out/lora" "${commands[@]}" --columns test.top1 test.macro_f1 ${GRID:-} \
    -- --data_path "$labelled" --model "$encoder" --input_size "$size" ${LORA:-}

tables=(python scripts/masking_table.py --runs "$out" --lora "$out/lora" --finalists "${FINALISTS:-6}")
"${tables[@]}" --min_seeds 2 --out "$out/final"
confirming="$(tr , '\n' <<<"$seeds" | grep -vxF "$screen" || true)"
# several seeds are several words
[ "$(wc -w <<<"$confirming")" -lt 2 ] || "${tables[@]}" --seeds $confirming --out "$out/confirmed"
