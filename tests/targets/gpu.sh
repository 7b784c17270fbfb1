#!/usr/bin/env bash
# Compiles every program for a described NVIDIA GPU, on a machine that has none: tests/targets, with JAX's CUDA wheels.
# They are gigabytes, so they get a virtual environment of their own, in FOLDER (by default .venv-gpu), which is kept.
# An environment that has them and the tests' packages is used as it is. With --if-installed, nothing is installed:
# without such an environment, one line says that this half was skipped.
#
#     tests/targets/gpu.sh [--if-installed] [FOLDER]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

install=yes
if [ "${1:-}" = --if-installed ]; then
    install=no
    shift
fi
folder=${1:-.venv-gpu}

is_complete() {
    [ -x "$folder/bin/python" ] && "$folder/bin/python" -c '
import sys
from importlib.util import find_spec
sys.exit(not (find_spec("pytest") and (find_spec("jax_cuda12_plugin") or find_spec("jax_cuda13_plugin"))))'
}

if ! is_complete; then
    if [ $install = no ]; then
        echo "Skipped: $folder has no JAX with CUDA wheels. tests/targets/gpu.sh installs them."
        exit 0
    fi
    python3 -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet -e '.[test,gpu-target]'
fi
JAX_PLATFORMS=cpu "$folder/bin/python" -m pytest -q -m slow -rs tests/targets -k gpu
