#!/usr/bin/env bash
# On a machine with a CUDA device and without a network: build, test and measure in one call.
#
#     bash benchmarks/on_gpu.sh [FOLDER [PART...]]
#
# Parts, by default all in this order: build (and what can run here), operations (their tests and
# benchmarks), training (tests of the step: it never waits, replays alike), step (benchmark of the
# whole step on the recipes of VOC and Cityscapes), profile (phases and a trace of a short run).
# What they print and the new rows and plots of benchmarks/results end in FOLDER (./gpu-results).
# Needs torch, triton, nvcc, setuptools, pybind11, pytest, hypothesis and pytest-benchmark; training,
# step and profile also what the extra `train` of pyproject.toml lists, and timm.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-gpu-results}
shift || true
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(build operations training step profile)
mkdir -p "$folder"

build() {
  nvidia-smi
  CTT_CPU=1 CTT_CUDA=1 python3 -m pip install --no-build-isolation --no-deps -e . &&
    python3 -m ctt
}
operations() {
  python3 -m pytest tests/ops tests/kernels -q -k "cuda or device or triton" &&
    python3 -m pytest benchmarks -q --ignore benchmarks/test_step.py --sizes paper --seconds 3 &&
    python3 -m benchmarks.report
}
training() {
  python3 -m pytest tests/train/test_gpu_step.py -q
}
step() {
  python3 -m pytest benchmarks/test_step.py -q --sizes voc,cityscapes --seconds 20
}
profile() {
  for options in "" "--train.amp bf16 --train.compile network" "--train.amp bf16 --train.cuda-graph"; do
    name=$(echo "digits $options" | tr -cs 'a-z0-9\n' -)
    traced="--train.profile 20"
    [[ $options == *graph* ]] && traced=""
    # shellcheck disable=SC2086
    python3 -c "from ctt.cli.train import main; main()" --train.iterations 600 \
      --bank.start-after 100 --train.eval-every 300 $traced $options --out "$folder/$name" || return
  done
}

failed=0
for part in "${parts[@]}"; do
  "$part" 2>&1 | tee "$folder/$part.txt"
  code=${PIPESTATUS[0]}
  echo "$part: exit code $code" | tee -a "$folder/$part.txt"
  [ "$code" -eq 0 ] || failed=1
done
cp -r benchmarks/results "$folder/"
exit $failed
