#!/usr/bin/env bash
# From nothing to a recogniser: environment, anime faces, pre-training, figures, LoRA. 10 to 15 minutes on two cores.
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

echo "== 1/5  drawing anime faces into $data"
python datasets/prepare_toonfaces.py --out "$data" --identities 40 --images 4000 --size 128 --seed 0

echo "== 2/5  pre-training a masked autoencoder in $run"
python main_pretrain.py --data_path "$data" --model mae_vit_nano_patch8 --input_size 64 \
    --batch_size 32 --lr 2e-3 --epochs 40 --warmup_epochs 2 --clip_grad 1 --min_crop 0.8 \
    --eval_every 4 --num_workers 0 --output_dir "$run" --resume auto

echo "== 3/5  reconstructing faces it has never seen"
python -m visualize.reconstruct --ckpt "$run/checkpoint-last.pth" --data_path "$data" \
    --mask_ratios 0.25 0.5 0.75 0.9 --out "$run/reconstruction"

echo "== 4/5  what a linear probe makes of an encoder that has learned nothing"
python main_linprobe.py --data_path "$data" --model vit_nano_patch8 --input_size 64 --num_workers 0 \
    --output_dir "$run/probe_random" --resume auto | tail -n 3

echo "== 5/5  recognising characters: LoRA on the encoder pre-trained above"
python main_lora.py --data_path "$data" --model vit_nano_patch8 --init "$run/checkpoint-last.pth" --input_size 64 \
    --batch_size 32 --epochs 6 --warmup_epochs 1 --lr 4e-3 --head_lr 8e-3 --clip_grad 1 --num_workers 0 \
    --output_dir "$run/lora" --resume auto

echo
echo "done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s of compute"
python - "$run" <<'PYTHON'
import json, sys
lora, probe = (json.load(open(f"{sys.argv[1]}/{name}/results.json")) for name in ("lora", "probe_random"))
classes = lora["classes"]
print(f"top-1 of {classes} characters in pictures never seen: LoRA {lora['test']['top1']:.1%}, "
      f"probe of a random encoder {probe['test']['top1']:.1%}, chance {1 / classes:.1%}")
PYTHON
echo "figure:  $run/reconstruction/reconstruction.png"
echo "numbers: $run/reconstruction/metrics.json, results.json and log.txt in $run, $run/probe_random and $run/lora"
echo "curves:  tensorboard --logdir $run"
