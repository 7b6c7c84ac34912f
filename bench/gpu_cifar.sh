#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU, torch and no network: bench/gpu_cifar.py for 8 minutes. Call it again until all is done.
#   bench/gpu_cifar.sh OUT DATA [ARGUMENTS OF gpu_cifar.py]
# OUT: the results so far, bench/results. DATA: a folder with the published files of CIFAR-100, or with cifar100.part1.npz, .part2.npz and
# unpack.py, which makes them (it needs Pillow); where a call may bring one of the parts alone, bring the first with a call before.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bench/gpu_cifar.sh OUT DATA}
data=${2:?usage: bench/gpu_cifar.sh OUT DATA}
shift 2
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH=$site PYTHONUNBUFFERED=1
# Triton's kernels are what a GPU uses: nothing for nvcc to do
FBK_CUDA=0 python3 -m pip --disable-pip-version-check install --quiet . --no-index --no-build-isolation --no-deps --target "$site"
if [ -f "$data/unpack.py" ] && [ ! -d "$data/cifar-100-binary" ]; then
  python3 "$data/unpack.py" "$data" cifar100
fi
python3 bench/gpu_cifar.py "$out" "$data" "$@"
