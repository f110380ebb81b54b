#!/usr/bin/env bash
# The experiments of the first report in one command: mask ratios, domain-adaptive pre-training, transfer, recognition.
#
#   bash scripts/reproduce.sh [OUT] [-- flags for every training]
#
#   OUT  folder for the runs, their tables, and report.md, which has all of them; default: runs/reproduce
#
# By environment variable:
#   DATA      unlabelled pictures, any --data_path; default hf:Mercity/AnimeDiffusion_Dataset, which is downloaded
#   LABELLED  labelled faces for transfer and recognition; default: ToonFaces, drawn into data/toonfaces
#   INIT      where all starts from; default official:mae_visualize_vit_base, which is downloaded
#   MODEL     default mae_vit_base_patch16       INPUT_SIZE  default 224, px
#   RATIOS    default "0.25 0.5 0.75 0.9"        IMAGES      default 500, that are reconstructed
#   EPOCHS    default 100,200                    BATCHES     default 16,32, images      PRETRAIN_SEEDS  default 0
#   RANKS     default 8,16, of LoRA              SEEDS       default 0,1,2, of transfer
#   PRETRAIN, PROBE, LORA, FINETUNE, RECOGNITION, RECONSTRUCT    flags for the script of each
#   GRID      flags for the runner, such as "--dry_run" or "--devices 0,1" (python -m util.run.grid --help)
#
# Transfer starts from INIT and from the adapted weights of the last of EPOCHS, BATCHES and PRETRAIN_SEEDS. Relative
# paths start at the repository. Safe to stop and start again: what is finished is skipped. On a machine without a
# network, put the downloads where the messages say, or give DATA and INIT as paths.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "$0" "$@"
data_arguments runs/reproduce "${DATA:-hf:Mercity/AnimeDiffusion_Dataset}" "$@"
labelled="${LABELLED:-data/toonfaces}"
[ -z "${LABELLED:-}" ] || [ -e "$labelled" ] || [ "${labelled#hf:}" != "$labelled" ] ||
    fail "there is no LABELLED=$labelled: name a folder, or hf:OWNER/NAME"
ensure_env requirements.txt

init="${INIT:-official:mae_visualize_vit_base}" model="${MODEL:-mae_vit_base_patch16}" size="${INPUT_SIZE:-224}"
epochs="${EPOCHS:-100,200}" batches="${BATCHES:-16,32}" first_seeds="${PRETRAIN_SEEDS:-0}" ranks="${RANKS:-8,16}"
encoder="${model#mae_}" encoder="${encoder%_dec*}"
adapted="$out/adapt/adapt/epochs=${epochs##*,},batch_size=${batches##*,},seed=${first_seeds##*,}/checkpoint-last.pth"
measure="--data_path $(printf %q "$data") --input_size $size --images ${IMAGES:-500}"
measure+=" --mask_ratios ${RATIOS:-0.25 0.5 0.75 0.9} ${RECONSTRUCT:-}"
dry_run=
case " ${GRID:-} " in *" --dry_run "*) dry_run=1 ;; esac

echo "== 1/5  fetching $init and $data"
if [ -z "$dry_run" ]; then
    python scripts/fetch.py --weights "$init" --data "$data"
    [ -n "${LABELLED:-}" ] ||
        python datasets/prepare_toonfaces.py --out "$labelled" --identities 40 --images 4000 --size 128 --seed 0
fi

# RATIOS, GRID and the flags of each script are several words
echo "== 2/5  mask ratios: what $init reconstructs"
if [ -n "$dry_run" ]; then
    echo "python -m visualize.reconstruct --ckpt $init $measure --out $out/mask_ratio"
elif [ -f "$out/mask_ratio/metrics.json" ]; then
    echo "$out/mask_ratio is finished"
else
    eval "python -m visualize.reconstruct --ckpt $(printf %q "$init") $measure --out $(printf %q "$out/mask_ratio")"
fi

echo "== 3/5  domain-adaptive pre-training on $data"
python -m util.run.grid --out "$out/adapt" --command "adapt: main_pretrain.py ${PRETRAIN:---warmup_epochs 5}" \
    --vary "epochs=$epochs" "batch_size=$batches" "seed=$first_seeds" \
    --then "-m visualize.reconstruct --ckpt {run}/checkpoint-last.pth $measure --out {out}" \
    --columns val.loss val.psnr_db ratios.0.75.psnr_masked_db.mean seconds_per_epoch images_per_s ${GRID:-} \
    -- --data_path "$data" --init "$init" --model "$model" --input_size "$size" ${flags[@]+"${flags[@]}"}

echo "== 4/5  transfer to the characters of $labelled, and the recognition benchmark on each run"
commands=() vary=()
for start in official adapted; do
    weights="$init"
    [ "$start" = official ] || weights="$adapted"
    weights="$(printf %q "$weights")"
    commands+=(
        --command "probe-$start: main_linprobe.py --init $weights ${PROBE:-}"
        --command "lora-$start: main_lora.py --init $weights ${LORA:-}"
        --command "full-$start: main_finetune.py --init $weights ${FINETUNE:-}"
    )
    vary+=("lora-$start:rank=$ranks")
done
python -m util.run.grid --out "$out/transfer" "${commands[@]}" --vary "${vary[@]}" "seed=${SEEDS:-0,1,2}" \
    --then "eval_recognition.py --ckpt {run}/checkpoint-best.pth --data_path $(printf %q "$labelled") ${RECOGNITION:-}" \
    --columns test.top1 test.macro_f1 verification.tpr_at_fpr.0.01 open_set.auroc trainable_params ${GRID:-} \
    -- --data_path "$labelled" --model "$encoder" --input_size "$size" ${flags[@]+"${flags[@]}"}

[ -z "$dry_run" ] || exit 0
echo "== 5/5  the report"
python scripts/reproduce_report.py --runs "$out" --out "$out/report.md"
