#!/usr/bin/env bash
# benches/gpu/pack.sh [FILE]: builds what run.sh needs and packs it, stripped: gpu-pack.tar.xz. Needs cargo and nvcc, no GPU.
# The programs are release builds without link-time optimisation, the tests are debug builds: a step that is replayed as a graph
# hardly notices the host, and the tests keep their assertions.
#   PLAYHOUSE_CUDA_ARCHS=90a benches/gpu/pack.sh     for one chip, which is quicker
#   PACK_PROFILE=dev benches/gpu/pack.sh             debug builds only: quicker still, not for figures
#   PACK=programs benches/gpu/pack.sh old.tar.xz     without the tests, to compare the speed of two commits
set -euo pipefail
out=$(realpath -m "${1:-gpu-pack.tar.xz}") profile=${PACK_PROFILE:-release} parts=${PACK:-programs tests}
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || out=$PWD/gpu-pack.tar.xz
export CARGO_TERM_COLOR=never CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_DEBUG=none CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16
# Whatever carries it to the GPU may take no more; what the programs are is 17 MB.
most_bytes=$((60 << 20))
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT

# cargo prints `Executable tests/name.rs (path)`; a path that is not absolute is one below the workspace.
executables() { sed -n 's/.*Executable .*\(tests\|benches\)\/\([a-z0-9_]*\)\(\/main\)\?\.rs (\(.*\))$/\2 \4/p'; }

# build PREFIX ARGUMENTS...: builds tests or benches and packs them under their names
build() {
  local prefix=$1 list=$stage.list name path
  shift
  cargo test --locked --no-run "$@" 2>&1 | tee >(cat >&2) | executables > "$list"
  [ -s "$list" ] || { echo "pack.sh: cargo test --no-run $* built nothing that it names" >&2; return 1; }
  while read -r name path; do strip -o "$stage/$prefix$name" "$path"; done < "$list"
  rm "$list"
}

case " $parts " in *" programs "*)
  folder=${CARGO_TARGET_DIR:-target}/$profile
  [ "$profile" = dev ] && folder=${CARGO_TARGET_DIR:-target}/debug
  cargo build --locked --profile "$profile" --bin playhouse --example gpu
  strip -o "$stage/playhouse" "$folder/playhouse"
  strip -o "$stage/gpu" "$folder/examples/gpu"
  build bench_ --profile "$profile" -p playhouse-cuda --bench kernels
esac
case " $parts " in *" tests "*)
  build cuda_ -p playhouse-cuda --test '*'
  build "" -p playhouse --test conformance --test models --test reproducibility
esac
# Some tests read their files below the folder that they were compiled in.
pwd > "$stage/ROOT"
# What was packed, for the log of the run.
git describe --always --dirty > "$stage/COMMIT" 2> /dev/null || echo unknown > "$stage/COMMIT"
cp benches/gpu/run.sh "$stage/run.sh"
# A program without kernels would skip everything. build.rs says so in it.
for program in "$stage"/*; do
  if grep -qa 'nvcc was in neither CUDA_HOME' "$program"; then
    echo "pack.sh: ${program##*/} has no GPU kernels: nvcc was not found (cuda/toolchain.sh, or set CUDA_HOME)" >&2
    exit 1
  fi
done
# The programs share most of their code and all of their kernels: a dictionary larger than any of them packs 300 MB into 17.
tar -C "$stage" -cf - . | xz -T1 --lzma2=preset=3,dict=192MiB > "$out"
ls -l "$stage" "$out"
size=$(stat -c %s "$out")
[ "$size" -le "$most_bytes" ] || { echo "pack.sh: $out has $size bytes, and may have $most_bytes" >&2; exit 1; }
