#!/usr/bin/env bash
# Trains on Apple silicon (MPS), going on from the newest checkpoint if there is one. Further
# arguments are passed on and win over these; PYTHON names the interpreter.
set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python3}" "$here/train_optimized.py" \
  --device mps \
  --batch-size 2 \
  --learning-rate 3e-5 \
  --dataloader-workers 1 \
  --num-threads 4 \
  --enable-compile \
  --auto-resume \
  "$@"
