#!/usr/bin/env bash
# On a machine with a CUDA device and without a network: build, test and measure.
#
#     bash benchmarks/on_gpu.sh [FOLDER [PART...]]
#
# Parts, by default all in this order. Each ends within ten minutes, and one that fails or is cut off
# keeps the next from nothing:
#   build       the package with its CUDA kernels, into this checkout
#   tests       every operation and dtype on the device; nothing waits, graphs replay alike
#   bank        times of EMA and of selection and push
#   high        times of info_nce against its two matrix products by the library
#   low         times of pair_info_nce, alike
#   views       times of info_nce as plain InfoNCE, against cross-entropy, Inf-CL and Liger
#   training    tests of the step: it never waits, replays alike
#   voc         time and phases of the whole step of VOC's recipe, eager and replayed
#   cityscapes  the same of Cityscapes' recipe
#   compiled    the same of VOC's with torch.compile
#   recipes     time, memory and hours of the step of every recipe, in float32 and bfloat16
#   profile     phases and a trace of a short run, packed in profile.tgz
#   targets     one table: what must be reached, and what was
# Where the package is not built yet, any part builds it first. What the parts print and the rows of
# benchmarks/results end in FOLDER (./gpu-results) as they come.
# Without a CUDA device this is a dry run: the parts run on the CPU at small sizes where they can,
# and otherwise name what they would measure.
# Needs torch, triton, nvcc, setuptools, pybind11, ninja, pytest, hypothesis and pytest-benchmark;
# the parts from training on also what the extra `train` of pyproject.toml lists, without tyro.
set -uo pipefail
cd "$(dirname "$0")/.."
all=(build tests bank high low views training voc cityscapes compiled recipes profile targets)
if [[ ${1:-} == -* ]]; then # --help, or an option: there is none
  sed -n '2,/^set /s/^# \{0,1\}//p' benchmarks/on_gpu.sh
  exit 2
fi
folder=${1:-gpu-results}
shift || true
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=("${all[@]}")
for part in "${parts[@]}"; do
  [[ " ${all[*]} " == *" $part "* ]] || {
    echo "on_gpu.sh: there is no part $part; the parts are ${all[*]}." >&2
    exit 2
  }
done
mkdir -p "$folder"
export PYTHONUNBUFFERED=1
limit=580 # seconds of a part
dry=
python3 -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || dry=yes

built() {
  python3 - 2>/dev/null <<'EOF'
from ctt.ops import available_backends
can = available_backends("cuda")
assert "cuda" in can["class_topk"] and "triton" in can["info_nce"]
EOF
}
build() {
  [ -n "$dry" ] || nvidia-smi
  CTT_CPU=1 CTT_CUDA=$([ -n "$dry" ] && echo auto || echo 1) python3 -m pip install --no-build-isolation --no-deps \
    -e . && python3 -m ctt
}
tests() { # a process each, as a fault on the device spoils what a process does later
  local code=0
  python3 -m pytest tests/ops/test_cuda_backend.py -q || code=1
  if [ -n "$dry" ]; then
    python3 -m pytest tests/ops/test_ema.py tests/ops/test_class_topk.py -q || code=1
    return $code
  fi
  python3 -m pytest tests/kernels/test_device.py -q || code=1
  python3 -m pytest tests/ops --ignore tests/ops/test_cuda_backend.py -q -k "cuda or device" ||
    code=1
  return $code
}
measure() { # names of benchmarks
  local name code=0
  for name in "$@"; do
    if [ -n "$dry" ]; then
      python3 -m pytest "benchmarks/test_$name.py" -q --sizes tiny --seconds 0.2 --no-record \
        --no-compile || code=1
    else
      python3 -m pytest "benchmarks/test_$name.py" -q -k cuda --sizes paper --seconds 2 || code=1
    fi
    keep
  done
  return $code
}
bank() { measure ema selection; }
high() { measure info_nce; }
low() { measure pair_info_nce; }
views() { measure paired_views; }
training() {
  if [ -n "$dry" ]; then
    echo "would test that a step never waits for the device, and that its graph replays alike"
    return 0
  fi
  # apart, as a recording that fails can spoil what the process does later
  python3 -m pytest tests/train/test_gpu_step.py -q -k "not replayed"
  local code=$?
  python3 -m pytest tests/train/test_gpu_step.py -q -k replayed && return $code
}
step() { # size and options
  local size=$1
  shift
  if [ -n "$dry" ]; then
    echo "would measure the step of $size: images a second, phases, and the share of contrast," \
      "banks and EMA; here a tiny one on the CPU"
    python3 -m pytest benchmarks/test_step.py -q --sizes tiny --seconds 0.2 --no-record --no-compile
    return
  fi
  python3 -m pytest benchmarks/test_step.py -q -k cuda --sizes "$size" --seconds 10 "$@"
}
voc() { step voc --no-compile; }
cityscapes() { step cityscapes --no-compile; }
compiled() { step voc; }
recipes() {
  if [ -n "$dry" ]; then
    python3 -m benchmarks.recipes --device cpu --steps 1 --recipes digits voc-classic-two-encoders
    return
  fi
  local amp code=0
  for amp in off bf16; do
    python3 -m benchmarks.recipes --amp "$amp" --steps 5 --out "$folder/recipes-$amp.csv" || code=1
  done
  return $code
}
targets() { python3 -m benchmarks.targets; }
profile() {
  if [ -n "$dry" ]; then
    echo "would trace 20 steps of the digits: as they are, compiled in bf16, and replayed"
    return 0
  fi
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
functions=(build tests measure bank high low views training step voc cityscapes compiled recipes targets profile keep)
export -f "${functions[@]}" # a part runs in a shell of its own, which can be cut off
export folder dry

failed=0
built || [ -n "$dry" ] || [ "${parts[0]}" = build ] || parts=(build "${parts[@]}")
for part in "${parts[@]}"; do
  started=$SECONDS
  timeout "$limit" bash -uo pipefail -c "$part" 2>&1 | tee "$folder/$part.txt"
  code=${PIPESTATUS[0]}
  [ "$code" -ne 124 ] || echo "$part: cut off after $limit s" | tee -a "$folder/$part.txt"
  echo "$part: exit code $code, $((SECONDS - started)) s" | tee -a "$folder/$part.txt"
  [ "$code" -eq 0 ] || failed=1
  keep
done
exit $failed
