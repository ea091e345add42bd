#!/usr/bin/env bash
# From a folder of pictures, one subfolder per class, to a network of half the depth:
#   examples/own_data/run.sh PICTURES OUTPUT
# README.md beside this file says what the variables below are.
set -euo pipefail
[ $# = 2 ] || { echo "usage: $0 PICTURES OUTPUT" >&2; exit 2; }
pictures=$1 out=$2 code=$(cd "$(dirname "$0")/../.." && pwd)
: "${PYTHON:=python}" "${MODEL:=DiT-T/4}" "${IMAGE_SIZE:=32}" "${VAE:=none}" "${PATTERN:=1:2}"
: "${EPOCHS:=200}" "${LEARN_EPOCHS:=10}" "${RECOVERY_EPOCHS:=50}"
: "${BATCH:=64}" "${LR:=1e-3}" "${MIRROR:=0.5}" "${SAMPLING_STEPS:=250}"

run() { echo "\$ python $*"; "$PYTHON" "$code/$1" "${@:2}"; }
newest() { printf '%s\n' "$out/runs/$1"-*/checkpoints/*.pt | tail -n 1; }
train=(--data-path "$out/latents" --results-dir "$out/runs" --global-batch-size "$BATCH" --mirror "$MIRROR" --ema-warmup)
recover=("${train[@]}" --lr "$LR" --min-lr 1e-5)
learn=("${train[@]}" --delta-w --lr "$LR" --gate-gradient pairs --gate-lr 2e-4 --target teacher --init learned)

run extract_features.py --model "$MODEL" --image-size "$IMAGE_SIZE" --vae "$VAE" \
    --data-path "$pictures" --features-path "$out/latents"
run train.py --model "$MODEL" --epochs "$EPOCHS" --prefix teacher "${recover[@]}"
teacher=$(newest teacher)
run prune_by_learning.py --model "$MODEL" --pattern "$PATTERN" --load-weight "$teacher" \
    --epochs "$LEARN_EPOCHS" --prefix learn --save-model "$out/pruned.safetensors" "${learn[@]}"
run train_masked_kd.py --load-weight "$out/pruned.safetensors" --load-teacher "$teacher" \
    --epochs "$RECOVERY_EPOCHS" --prefix student "${recover[@]}"
run sample.py --ckpt "$(newest student)" --num-sampling-steps "$SAMPLING_STEPS" --output "$out/student.png"
