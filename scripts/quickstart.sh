#!/usr/bin/env bash
# From nothing to reconstructions: environment, anime faces, pre-training, figures. About ten minutes on two cores.
#
#   bash scripts/quickstart.sh [FOLDER]      FOLDER for the run's files, default: runs/quickstart
#
# Safe to stop and start again: it goes on where it was. With ANIMASK_USE_ACTIVE_ENV=1 it installs into, and uses,
# the active Python environment instead of .venv.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "$0" "$@"
case "${1:-}" in -*) fail "unknown option $1: --help says what there is" ;; esac
cd "$ROOT"
ensure_env requirements.txt

data=data/toonfaces
run="${1:-runs/quickstart}"
started=$SECONDS

echo "== 1/3  drawing anime faces into $data"
python datasets/prepare_toonfaces.py --out "$data" --identities 40 --images 4000 --size 128 --seed 0

echo "== 2/3  pre-training a masked autoencoder in $run"
python main_pretrain.py --data_path "$data" --model mae_vit_nano_patch8 --input_size 64 \
    --batch_size 32 --lr 2e-3 --epochs 40 --warmup_epochs 2 --clip_grad 1 --min_crop 0.8 \
    --eval_every 4 --num_workers 0 --output_dir "$run" --resume auto

echo "== 3/3  reconstructing faces it has never seen"
python -m visualize.reconstruct --ckpt "$run/checkpoint-last.pth" --data_path "$data" \
    --mask_ratios 0.25 0.5 0.75 0.9 --out "$run/reconstruction"

echo
echo "done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s of compute"
echo "figure:  $run/reconstruction/reconstruction.png"
echo "numbers: $run/reconstruction/metrics.json, $run/results.json, $run/log.txt"
echo "curves:  tensorboard --logdir $run"
