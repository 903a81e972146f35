#!/usr/bin/env bash
# benches/gpu/pack.sh [FILE]: builds what run.sh needs and packs it, stripped: gpu-pack.tar.xz. Needs cargo and nvcc, no GPU.
# The programs are release builds without link-time optimisation, the tests are debug builds: a step that is replayed as a graph
# hardly notices the host, and the tests keep their assertions.
#   PLAYHOUSE_CUDA_ARCHS=90a benches/gpu/pack.sh     for one chip, which is quicker
#   PACK_PROFILE=dev benches/gpu/pack.sh             debug builds only: quicker still, not for figures
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-gpu-pack.tar.xz} profile=${PACK_PROFILE:-release}
export CARGO_TERM_COLOR=never CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_DEBUG=none CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT

folder=${CARGO_TARGET_DIR:-target}/$profile
[ "$profile" = dev ] && folder=${CARGO_TARGET_DIR:-target}/debug
cargo build --locked --profile "$profile" --bin playhouse --example gpu
strip -o "$stage/playhouse" "$folder/playhouse"
strip -o "$stage/gpu" "$folder/examples/gpu"

# cargo prints `Executable tests/name.rs (path)`.
tests() { sed -n 's/.*Executable .*tests\/\([a-z_]*\)\(\/main\)\?\.rs (\(.*\))$/\1 \3/p'; }
{
  cargo test --locked --no-run -p playhouse-cuda --test '*' 2>&1 | tee /dev/stderr | tests | sed 's/^/cuda_/'
  cargo test --locked --no-run -p playhouse --test conformance --test models --test reproducibility 2>&1 | tee /dev/stderr | tests
} | while read -r name path; do
  strip -o "$stage/$name" "$path"
done
# Some tests read their files below the folder that they were compiled in.
pwd > "$stage/ROOT"
cp benches/gpu/run.sh "$stage/run.sh"
# The programs share most of their code and all of their kernels: a dictionary larger than any of them packs 300 MB into 17.
tar -C "$stage" -cf - . | xz -T1 --lzma2=preset=3,dict=192MiB > "$out"
ls -l "$stage" "$out"
