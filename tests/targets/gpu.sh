#!/usr/bin/env bash
# Compiles every program for a described NVIDIA GPU, on a machine that has none: tests/targets, with JAX's CUDA wheels.
# They are gigabytes, so they get a virtual environment of their own (by default .venv-gpu), which is kept.
#
#     tests/targets/gpu.sh [FOLDER]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

folder=${1:-.venv-gpu}
if [ ! -x "$folder/bin/pytest" ]; then
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet -e '.[test,gpu-target]'
fi
JAX_PLATFORMS=cpu "$folder/bin/python" -m pytest -q -m slow -rs tests/targets -k gpu
