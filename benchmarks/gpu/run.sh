#!/usr/bin/env bash
# The GPU suite on this machine: bash benchmarks/gpu/run.sh OUT [options]; --help tells them.
# Needs no network and installs nothing. PYTHON names another interpreter than python3.
set -euo pipefail
output=$(realpath -m -- "${1:?name the folder for the results}")
case "$1" in -*) output=$1 ;; esac
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${PYTHON:-python3}" -m benchmarks.gpu.run "$output" "$@"
