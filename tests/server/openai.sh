#!/usr/bin/env bash
# Installs OpenAI's client in a virtual environment under cargo's target directory and prints the Python that the tests
# of the server want to know:
#
#     export DEEPBURN_OPENAI_PYTHON="$(tests/server/openai.sh)"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

target=$(cargo metadata --format-version 1 --no-deps --offline | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
environment="$target/openai-3.57"
if [ ! -e "$environment/installed" ]; then
    rm -rf "$environment"
    python3 -m venv "$environment" >&2
    "$environment/bin/pip" install --quiet --disable-pip-version-check \
        openai==3.57.0 \
        prometheus-client==0.26.0 >&2
    touch "$environment/installed"
fi
echo "$environment/bin/python"
