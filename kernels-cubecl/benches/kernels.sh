#!/usr/bin/env bash
# Times the FP8 kernels and, where torch is installed, torch's product of the same shapes.
#
#     kernels-cubecl/benches/kernels.sh build   # anywhere: prints the path of a stripped binary
#     kernels-cubecl/benches/kernels.sh [FILE]  # on the GPU machine: runs that binary, or one that it builds
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

build() {
    local binary
    binary=$(cargo bench --locked --workspace --features wgpu,cuda --bench kernels --no-run \
        --config 'profile.bench.strip=true' --message-format json-render-diagnostics |
        sed -n 's/.*"name":"kernels".*"executable":"\([^"]*\)".*/\1/p' | tail -1)
    echo "$binary"
}

if [ "${1:-}" = build ]; then
    build
    exit
fi
binary=${1:-$(build)}
export DEEPBURN_COMMIT="${DEEPBURN_COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}"
export DEEPBURN_MACHINE="${DEEPBURN_MACHINE:-$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)}"
if [ -z "${DEEPBURN_PEER:-}" ] && python3 -c 'import torch' 2>/dev/null; then
    DEEPBURN_PEER=$(mktemp)
    export DEEPBURN_PEER
    trap 'rm -f "$DEEPBURN_PEER"' EXIT
    sed -n 's/.*(\[\([0-9]*\), \([0-9]*\), \([0-9]*\)\], Tile::.*/\1 \2 \3/p' kernels-cubecl/benches/kernels.rs |
        python3 kernels-cubecl/benches/scaled_mm.py >"$DEEPBURN_PEER"
fi
"$binary"
