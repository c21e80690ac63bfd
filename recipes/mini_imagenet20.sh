#!/usr/bin/env bash
# All steps on Mini-ImageNet-20 (64 px, 8x8 cells) on a CPU: pretrain without positional embedding and with
# absolute labels, fine-tune with both, evaluate, train a linear probe, classify by nearest neighbours.
#
#   recipes/mini_imagenet20.sh DATA_DIR OUTPUT_DIR        # DATA_DIR has train.tar and val.tar (or class folders)
#
# PRETRAIN_EPOCHS, FINETUNE_EPOCHS and PROBE_EPOCHS shorten it. recipes/LOG.md has results.
set -euo pipefail
data=$1 out=$2
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
common=(--data_path "$data" --input_size 64 --num_workers 0)

$python main_pretrain.py @recipes/mini_imagenet20_mae_apl.args --data_path "$data" --output_dir "$out/pretrain" \
    --epochs "${PRETRAIN_EPOCHS:-16}"
$python main_finetune.py --model vit_tiny_patch8 "${common[@]}" --finetune "$out/pretrain/checkpoint-last.pth" \
    --batch_size 64 --epochs "${FINETUNE_EPOCHS:-3}" --warmup_epochs 1 --lr 1e-3 --output_dir "$out/finetune"
$python main_finetune.py --model vit_tiny_patch8 "${common[@]}" --eval --resume "$out/finetune/checkpoint-last.pth"
$python main_linprobe.py --model vit_tiny_patch8 "${common[@]}" --finetune "$out/pretrain/checkpoint-last.pth" \
    --cached --global_pool --batch_size 256 --epochs "${PROBE_EPOCHS:-50}" --blr 1 --output_dir "$out/linprobe"
$python main_linprobe.py --model vit_tiny_patch8 "${common[@]}" --finetune "$out/pretrain/checkpoint-last.pth" \
    --knn --batch_size 256 --output_dir "$out/knn"
