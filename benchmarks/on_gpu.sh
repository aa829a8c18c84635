#!/usr/bin/env bash
# On a machine with a CUDA device and without a network: build, test and measure in one call.
#
#     bash benchmarks/on_gpu.sh [FOLDER]
#
# What it prints and the new rows and plots of benchmarks/results end in FOLDER (./gpu-results).
# Needs torch, triton, nvcc, setuptools, pybind11, pytest, hypothesis and pytest-benchmark.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-gpu-results}
mkdir -p "$folder"
{
  nvidia-smi
  CTT_CPU=1 CTT_CUDA=1 python3 -m pip install --no-build-isolation --no-deps -e . &&
    python3 -m ctt &&
    python3 -m pytest tests/ops tests/kernels -q -k "cuda or device or triton" &&
    python3 -m pytest benchmarks -q --sizes paper --seconds 3 &&
    python3 -m benchmarks.report
  echo "exit code $?"
} 2>&1 | tee "$folder/log.txt"
cp -r benchmarks/results "$folder/"
