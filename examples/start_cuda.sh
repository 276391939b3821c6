#!/usr/bin/env bash
# Trains on a CUDA device, going on from the newest checkpoint if there is one. Further arguments are
# passed on and win over these; PYTHON names the interpreter.
set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python3}" "$here/train_optimized.py" \
  --device cuda \
  --batch-size 8 \
  --learning-rate 1e-4 \
  --dataloader-workers 8 \
  --num-threads 8 \
  --enable-compile \
  --auto-resume \
  "$@"
