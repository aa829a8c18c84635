#!/usr/bin/env bash
# On a machine with a CUDA device and without a network: build, test and measure.
#
#     bash benchmarks/on_gpu.sh [FOLDER [PART...]]
#
# Parts, by default all in this order:
#   build       the package with its CUDA kernels, into this checkout
#   tests       of the operations on the device
#   operations  their benchmarks at the paper's sizes, and a table of all rows
#   training    tests of the step: it never waits, replays alike
#   step        benchmark of the whole step on the recipes of VOC and Cityscapes
#   compiled    the same on VOC's with torch.compile, some minutes
#   profile     phases and a trace of a short run, packed in profile.tgz
# Where the package is not built yet, any part builds it first. What the parts print and the rows of
# benchmarks/results end in FOLDER (./gpu-results), also when a later part is cut off.
# Needs torch, triton, nvcc, setuptools, pybind11, pytest, hypothesis and pytest-benchmark; the parts
# from training on also what the extra `train` of pyproject.toml lists, without tyro, and timm.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-gpu-results}
shift || true
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(build tests operations training step compiled profile)
mkdir -p "$folder"
export PYTHONUNBUFFERED=1

built() {
  python3 - 2>/dev/null <<'EOF'
from ctt.ops import available_backends
can = available_backends("cuda")
assert "cuda" in can["class_topk"] and "triton" in can["info_nce"]
EOF
}
build() {
  nvidia-smi
  CTT_CPU=1 CTT_CUDA=1 python3 -m pip install --no-build-isolation --no-deps -e . &&
    python3 -m ctt
}
tests() { # a process each, as a fault on the device spoils what a process does later
  local code=0
  python3 -m pytest tests/ops/test_cuda_backend.py -q || code=1
  python3 -m pytest tests/kernels/test_device.py -q || code=1
  python3 -m pytest tests/ops --ignore tests/ops/test_cuda_backend.py -q -k "cuda or device" ||
    code=1
  return $code
}
operations() {
  local name code=0
  for name in ema selection info_nce pair_info_nce; do
    python3 -m pytest "benchmarks/test_$name.py" -q -k cuda --sizes paper --seconds 2 || code=1
    keep
  done
  python3 -m benchmarks.report --no-plots
  return $code
}
training() {
  # apart, as a recording that fails can spoil what the process does later
  python3 -m pytest tests/train/test_gpu_step.py -q -k "not replayed"
  local code=$?
  python3 -m pytest tests/train/test_gpu_step.py -q -k replayed && return $code
}
step() {
  local size code=0
  for size in voc cityscapes; do # apart, so that what is measured stays
    python3 -m pytest benchmarks/test_step.py -q -k cuda --sizes $size --seconds 10 --no-compile ||
      code=1
    keep
  done
  return $code
}
compiled() {
  python3 -m pytest benchmarks/test_step.py -q -k cuda --sizes voc --seconds 10
}
profile() {
  local runs change code=0
  runs=$(mktemp -d)
  for change in '"profile": 20' '"profile": 20, "amp": "bf16", "compile": "network"' \
    '"cuda_graph": true, "amp": "bf16"'; do
    python3 - "$runs" "$change" <<'EOF' || code=1
import json
import sys
from pathlib import Path

from ctt import recipes
from ctt.train.loop import train
from ctt.settings import Settings, update

folder, change = sys.argv[1:]
settings = update(Settings(), recipes.load("digits"), "recipe")
train_settings = json.loads('{"iterations": 600, "eval_every": 300, %s}' % change)
settings = update(settings, {"train": train_settings, "bank": {"start_after": 0}}, "on_gpu.sh")
train(settings, out=Path(folder) / "-".join(sorted(train_settings)))
EOF
  done
  tar czf "$folder/profile.tgz" -C "$runs" --exclude='*.pt' --exclude='*.safetensors' .
  rm -r "$runs"
  return $code
}
keep() {
  cp benchmarks/results/*.csv "$folder/"
}

failed=0
built || [ "${parts[0]}" = build ] || parts=(build "${parts[@]}")
for part in "${parts[@]}"; do
  "$part" 2>&1 | tee "$folder/$part.txt"
  code=${PIPESTATUS[0]}
  echo "$part: exit code $code" | tee -a "$folder/$part.txt"
  [ "$code" -eq 0 ] || failed=1
  keep
done
exit $failed
