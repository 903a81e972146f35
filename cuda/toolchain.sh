#!/usr/bin/env bash
# Fetches NVIDIA's CUDA 13.0 compiler from PyPI into one folder, .cuda/ at the workspace root (270 MB, no root needed,
# no GPU needed). build.rs finds it there. Needs python3 with pip. Doing nothing when the folder is complete, it may
# be run before every build.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${1:-$root/.cuda}
[ -x "$target/bin/nvcc" ] && exit 0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=(nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl)
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2010_x86_64 \
  --platform manylinux_2_12_x86_64 --dest "$work" "${packages[@]/%/==13.0.*}"
for wheel in "$work"/*.whl; do
  python3 -m zipfile -e "$wheel" "$work/unpacked"
done
# Every wheel unpacks below nvidia/cu13: together they are one CUDA folder.
mkdir -p "$target"
cp -r "$work"/unpacked/nvidia/cu13/. "$target"/
chmod -R u+rwX "$target"
chmod +x "$target"/bin/* "$target"/nvvm/bin/* 2> /dev/null || true
"$target/bin/nvcc" --version | tail -n 2
