#!/usr/bin/env bash
# Installs a driver for Debian's chromium under cargo's target directory and prints a command that runs a script with it,
# which the tests of the server want to know:
#
#     export DEEPBURN_BROWSER_NODE="$(tests/server/browser.sh)"
#
# It needs node, npm and chromium (Debian: nodejs npm chromium).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

target=$(cargo metadata --format-version 1 --no-deps --offline | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
folder="$target/playwright-core-1.65.1"
if [ ! -e "$folder/run" ]; then
    mkdir -p "$folder"
    npm install --silent --no-audit --no-fund --ignore-scripts --prefix "$folder" playwright-core@1.65.1 >&2
    printf '#!/bin/sh\nNODE_PATH=%q/node_modules exec node "$@"\n' "$folder" >"$folder/run"
    chmod +x "$folder/run"
fi
echo "$folder/run"
