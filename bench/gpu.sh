#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU, torch, nvcc and no network: installs, tests and measures, in under 9 minutes.
#   bench/gpu.sh OUTDIR
# It needs the build wheels in .whl/, and tests more with the others. Where there is a network:
#   pip download --only-binary=:all: --no-deps -d .whl "setuptools>=77" "pybind11>=3" "ninja>=1.11"
#   pip download --only-binary=:all: --no-deps -d .whl --python-version 3.12 --platform manylinux_2_28_x86_64 --platform \
#     manylinux_2_17_x86_64 --platform any pytest iniconfig pluggy packaging pygments hypothesis sortedcontainers pytest-benchmark \
#     py-cpuinfo2 pytest-xdist execnet
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:?usage: bench/gpu.sh OUTDIR}"
out=$(cd "$1" && pwd)
status=0

part() {  # part NAME SECONDS COMMAND...: one log a part; what fails is remembered, the rest still runs
  local name=$1 limit=$2 rc=0
  shift 2
  echo "== $name"
  timeout --signal=INT --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || rc=$?  # a benchmark writes what it has
  tail -n 3 "$out/$name.log"
  [ $rc -eq 0 ] || { echo "== $name FAILED with status $rc"; status=1; }
  return $rc
}

pip="python3 -m pip --disable-pip-version-check"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH=$site PATH=$site/bin:$PATH PYTHONUNBUFFERED=1 FBK_TUNING=$out/tuning.json
pytest="python3 -P -m pytest -p no:cacheprovider"

part machine 5 nvidia-smi
gpu=$?
part install 85 $pip install . --no-index --find-links .whl --no-deps --target "$site" || exit 1
# what is missing of the test tools; the machine's own versions come first
for package in pytest iniconfig pluggy packaging pygments hypothesis sortedcontainers pytest-benchmark py-cpuinfo2 pytest-xdist execnet; do
  $pip show --quiet "$package" >/dev/null 2>&1 || $pip install --quiet --no-index --find-links .whl --no-deps --target "$site" "$package" >/dev/null 2>&1
done
part versions 15 python3 -P -c '
import platform, torch, fbkernels
print(platform.python_version(), torch.__version__, torch.version.cuda)
print(fbkernels.build_info())
print(fbkernels.backends())'
if python3 -P -c 'import pytest' 2>/dev/null; then
  [ $gpu -ne 0 ] || part test_gpu 60 $pytest -rs tests/test_gpu.py tests/test_fused_mlp_cuda.py
  if python3 -P -c 'import hypothesis' 2>/dev/null; then
    # Triton's kernels are compiled for this GPU, and for the others by test_aot.py
    part tests 100 $pytest -n auto --durations=10 --ignore=tests/test_gpu.py --ignore=tests/test_fused_mlp_cuda.py
  else
    echo "== tests: left out, no hypothesis"
  fi
  if python3 -P -c 'import pytest_benchmark' 2>/dev/null; then
    # the other files measure the CPU; what is short and compiles little first
    part bench_fused_mlp 40 $pytest bench/bench_fused_mlp_cuda.py --benchmark-json="$out/gpu_fused_mlp.json"
    part bench_pieces 45 $pytest bench/bench_triton.py -k "not step" --benchmark-json="$out/gpu_pieces.json"
    part bench_suite 35 $pytest bench/bench_suite.py -k "op or layer" --benchmark-json="$out/gpu_suite.json"
    part bench_cnn 40 $pytest bench/bench_triton.py -k "step and cnn" --benchmark-json="$out/gpu_cnn.json"
    part bench_resnet18 40 $pytest bench/bench_triton.py -k "step and resnet18" --benchmark-json="$out/gpu_resnet18.json"
  else
    echo "== bench: left out, no pytest-benchmark"
  fi
  if sanitizer=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer"); then
    part racecheck 20 "$sanitizer" --tool racecheck --error-exitcode 9 $pytest tests/test_fused_mlp_cuda.py -k "cutting and sgd and cuts0"
    part racecheck_ops 20 "$sanitizer" --tool racecheck --error-exitcode 9 $pytest tests/ops/test_cuda_ops.py -k order_of_threads
    # without torch's allocator, which hides what is read behind a tensor
    part sanitizer 30 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck --target-processes application-only \
      --error-exitcode 9 $pytest tests/test_gpu.py tests/test_fused_mlp_cuda.py tests/ops/test_cuda_ops.py \
      -k "in_bf16 or reference_on_the_device or as_exact or one_launch or cutting and cuts0 or order_of_threads"
  else
    echo "== sanitizer: left out, no compute-sanitizer"
  fi
else
  echo "== tests: left out, no pytest"
  status=1
fi
if [ $gpu -ne 0 ]; then
  echo "== no GPU was found: the GPU tests did not run"
  status=1
fi
exit $status
