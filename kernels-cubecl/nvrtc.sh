#!/usr/bin/env bash
# Installs NVIDIA's run-time compiler for CUDA C++ with its headers and assembler, which need no GPU and no driver, in
# a virtual environment under cargo's target directory, and prints the folder that tests/nvrtc.rs wants to know:
#
#     export DEEPBURN_NVRTC="$(kernels-cubecl/nvrtc.sh)"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=$(cargo metadata --format-version 1 --no-deps --offline | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
environment="$target/nvrtc-12.9"
if [ ! -e "$environment/installed" ]; then
    rm -rf "$environment"
    python3 -m venv "$environment" >&2
    "$environment/bin/pip" install --quiet --disable-pip-version-check \
        nvidia-cuda-nvrtc-cu12==12.9.86 \
        nvidia-cuda-runtime-cu12==12.9.79 \
        nvidia-cuda-cccl-cu12==12.9.27 \
        nvidia-cuda-nvcc-cu12==12.9.86 >&2
    touch "$environment/installed"
fi
"$environment/bin/python" -c 'import pathlib, nvidia; print(pathlib.Path(nvidia.__file__).parent)'
