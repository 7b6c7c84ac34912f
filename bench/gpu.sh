#!/usr/bin/env bash
# A GPU in two short calls, on a machine with torch, nvcc and no network; pause between them, and mend what the first one found.
#   bench/gpu.sh correct OUT     installs and compares every kernel with the reference: at most 270 s
#   bench/gpu.sh fast OUT DATA   installs, times, then trains on CIFAR-100 in DATA, .carry/data: at most 400 s
#   bench/gpu.sh carry           where there is a network: makes .carry/, which that machine needs beside the working tree
exec python3 "$(dirname "$0")/gpu.py" "$@"
