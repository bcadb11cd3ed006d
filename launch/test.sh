#!/usr/bin/env bash
# Environment, install, and all tests; what CI runs. Arguments go to pytest: launch/test.sh tests/test_config.py -k frozen
set -euo pipefail
source "$(dirname "$0")/env.sh"
ensure_env test
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false
exec python -m pytest -n 2 -q "$@"
