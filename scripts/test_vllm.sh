#!/usr/bin/env bash
# The tests that need vLLM, in an environment of their own: scripts/test_vllm.sh [pytest's arguments]
# The environment (4 GB, some minutes) is kept in $TARDIS_FX_VLLM_ENV, .vllm_env by default.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${TARDIS_FX_VLLM_ENV:-.vllm_env}
scripts/vllm_env.sh "$environment"
exec "$environment/bin/python" -m pytest -m vllm tests/serving "$@"
