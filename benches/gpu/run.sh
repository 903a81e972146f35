#!/usr/bin/env bash
# benches/gpu/run.sh [PHASE...]: everything that holds a GPU against what we promise, in one go, from stripped binaries, on a machine
# with a driver and nothing else: no cargo, no compiler, no network. compute-sanitizer is used where it is installed.
#   BIN   the folder of the binaries (pack.sh)              [the folder of this script]
#   OUT   where logs go                                      [./gpu-out]
#   WORK  where models are made, 46 GB, kept between calls   [$TMPDIR/playhouse-gpu]
#   LIMIT seconds for the whole call: what does not fit is a FAIL, and the log says so instead of ending in the middle   [none]
#   MODELS, ONE_OF_EACH, RUNS, KERNELS   fewer models, fewer runs of the bench, some of the kernels     [all, 5 runs]
# Runs from the repository's root: the tests read tests/golden. Phases, all but `kernels` if none is named:
#   tests sanitizer synth parity determinism memory start bench table kernels
# One line per check, PASS, FAIL or SHORT (a speed below what it must be), in $OUT/log.txt; status 1 if a check failed.
set -uo pipefail
BIN=$(cd "${BIN:-$(dirname "$0")}" && pwd)
OUT=${OUT:-$PWD/gpu-out}
WORK=${WORK:-${TMPDIR:-/tmp}/playhouse-gpu}
mkdir -p "$OUT" "$WORK" || exit 2
OUT=$(cd "$OUT" && pwd)
LOG=$OUT/log.txt
ALL="tests sanitizer synth parity determinism memory start bench table"
MORE="kernels"
QUICK="qwen2.5-0.5b-F16 qwen2.5-0.5b-Q8_0 qwen2.5-0.5b-Q4_K_M phi-3-mini-Q4_K_M llama-3-8b-Q4_K_M gpt-oss-20b-MXFP4"
MODELS=${MODELS:-"$QUICK phi-3-mini-F16 llama-3-8b-F16"}
ONE_OF_EACH=${ONE_OF_EACH:-"qwen2.5-0.5b-F16 phi-3-mini-Q4_K_M llama-3-8b-F16 llama-3-8b-Q4_K_M gpt-oss-20b-MXFP4"}
CUDA_TESTS="attention attention_step embed feed gate loader matmul memory mixed moe norm rope_kv router sample"
# Those whose small cases run under the sanitizer.
SMALL_TESTS="embed feed gate norm rope_kv moe attention attention_step sample matmul mixed router"
RUNS=${RUNS:-5}

LIMIT=${LIMIT:-86400}

say() { echo "$@" | tee -a "$LOG"; }
failed=0

# within SECONDS COMMAND...: no longer than that, and than what is left of LIMIT; 124 if it is not done then
within() {
  local limit=$1 left=$((LIMIT - SECONDS))
  shift
  [ "$left" -gt 0 ] || { echo "no time was left of $LIMIT s"; return 124; }
  timeout -k 10 "$((limit < left ? limit : left))" "$@"
}

# check NAME SECONDS COMMAND...: the command's output in NAME.log, and one line
check() {
  local name=$1 limit=$2 start=$EPOCHREALTIME rc
  shift 2
  within "$limit" "$@" > "$OUT/$name.log" 2>&1
  rc=$?
  verdict "$name" $rc "$(awk "BEGIN { printf \"%.1f\", $EPOCHREALTIME - $start }")"
}

# verdict NAME STATUS SECONDS: PASS or FAIL by the status, with what the log says in the end
verdict() {
  local name=$1 rc=$2 seconds=$3 last
  last=$(grep -E '^test result|ERROR SUMMARY|RACECHECK SUMMARY|panicked' "$OUT/$name.log" | tail -2 | tr '\n' ' ')
  # Tests without a GPU pass and say so.
  if grep -q 'is skipped\|does not run on a GPU\|nothing runs on a GPU' "$OUT/$name.log"; then rc=3 last="found no GPU to run on: $last"; fi
  # A filter that fits nothing lets everything pass.
  if grep -q '^test result: ok. 0 passed' "$OUT/$name.log"; then rc=4 last="ran no test: $last"; fi
  [ "$rc" = 124 ] && last="ran past its time: $last"
  if [ "$rc" = 0 ]; then say "PASS $name, $seconds s: $last"; else say "FAIL $name, status $rc, $seconds s: $last" && failed=1; fi
}

# lines NAME SECONDS COMMAND...: a command that prints its own PASS and FAIL lines
lines() {
  local name=$1 limit=$2 rc
  shift 2
  within "$limit" "$@" > "$OUT/$name.log" 2>&1
  rc=$?
  grep -E '^(PASS|FAIL|SHORT|     )' "$OUT/$name.log" | tee -a "$LOG"
  [ $rc = 0 ] && return
  failed=1
  # What failed has said so, unless it ended before it could.
  grep -q '^FAIL' "$OUT/$name.log" || say "FAIL $name, status $rc: $(tail -1 "$OUT/$name.log")"
}

has() { [ -x "$BIN/$1" ] || { say "FAIL $1 is not in $BIN" && failed=1 && false; }; }
file() { echo "$WORK/$1.gguf"; }
files() { local model; for model in $1; do [ -f "$(file "$model")" ] && file "$model"; done; }

# Tests look below the folder that they were compiled in: here that is a link to this one.
home_of_tests() {
  local root
  [ -f "$BIN/ROOT" ] || return 0
  root=$(cat "$BIN/ROOT")
  [ -e "$root/tests/golden" ] && return 0
  [ -e tests/golden ] || { say "FAIL tests: run.sh is started in the repository's root, where tests/golden is" && failed=1 && return 1; }
  # Only an empty folder or a stale link gives way.
  [ -L "$root" ] && rm "$root"
  { [ ! -d "$root" ] || rmdir "$root"; } && mkdir -p "$(dirname "$root")" && ln -s "$PWD" "$root" && return 0
  say "FAIL tests: $root, where the tests were compiled, cannot be made a link to $PWD" && failed=1 && return 1
}

phase_tests() {
  home_of_tests || return
  local test
  for test in $CUDA_TESTS; do has "cuda_$test" && check "cuda_$test" 120 "$BIN/cuda_$test" --nocapture; done
  has conformance && check conformance 120 "$BIN/conformance" --nocapture
  has models && check models 180 "$BIN/models" gpu:: --nocapture
  has reproducibility && check reproducibility 180 "$BIN/reproducibility" --nocapture
}

# Small cases: a sanitizer is a hundred times slower. Buffers of the tests are allocations of their own, so that it sees their ends.
phase_sanitizer() {
  local tool kind test only jobs=()
  # It comes with the toolkit, whose folder is not in every PATH.
  tool=${SANITIZER:-$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer)}
  if ! command -v "$tool" > /dev/null; then say "FAIL sanitizer: compute-sanitizer is not installed" && failed=1 && return; fi
  for kind in memcheck racecheck initcheck; do
    for test in $SMALL_TESTS; do
      has "cuda_$test" || continue
      case $test in
        attention) only="an_unused_item neighbours_and_chunks" ;;
        sample) only="a_few_rows bad_rows a_place_without" ;;
        matmul) only="a_gated_product a_product_that_normalises" ;;
        mixed) only="three_kinds a_row_is misuse" ;;
        router) only="scores_that_are what_the_launch misuse" ;;
        *) only="" ;;
      esac
      # shellcheck disable=SC2086 # the filters are words
      one_sanitizer "$tool" $kind $test $only &
      jobs+=("$!")
      while [ "$(jobs -rp | wc -l)" -ge "${SANITIZER_JOBS:-8}" ]; do wait -n; done
    done
  done
  [ ${#jobs[@]} = 0 ] || wait "${jobs[@]}"
  for kind in memcheck racecheck initcheck; do
    for test in $SMALL_TESTS; do
      [ -f "$OUT/${kind}_$test.rc" ] || continue
      read -r rc seconds < "$OUT/${kind}_$test.rc"
      rm "$OUT/${kind}_$test.rc"
      verdict "${kind}_$test" "$rc" "$seconds"
    done
  done
}

one_sanitizer() {
  local tool=$1 kind=$2 test=$3 start=$EPOCHREALTIME rc
  shift 3
  within "${SANITIZER_SECONDS:-150}" "$tool" --tool "$kind" --error-exitcode 9 --print-limit 20 \
    "$BIN/cuda_$test" --test-threads 1 "$@" > "$OUT/${kind}_$test.log" 2>&1
  rc=$?
  echo "$rc $(awk "BEGIN { printf \"%.1f\", $EPOCHREALTIME - $start }")" > "$OUT/${kind}_$test.rc"
}

phase_synth() {
  has playhouse || return
  local model shape
  for model in $MODELS; do
    shape=${model%-*}
    [ -f "$(file "$model")" ] && continue
    lines "synth_$model" 120 "$BIN/playhouse" synth "$shape" --type "${model##*-}" -o "$(file "$model")"
  done
  say "     models: $(du -csh "$WORK"/*.gguf 2> /dev/null | tail -1 | cut -f1) in $WORK"
}

# shellcheck disable=SC2046 # names of models have no blanks
phase_parity() { has gpu && lines parity 400 "$BIN/gpu" parity $(files "$MODELS"); }
# shellcheck disable=SC2046
phase_determinism() { has gpu && lines determinism 400 "$BIN/gpu" determinism $(files "$MODELS"); }
# shellcheck disable=SC2046
phase_start() { has gpu && lines start 300 "$BIN/gpu" start $(files "$ONE_OF_EACH"); }
# shellcheck disable=SC2046
phase_memory() {
  has gpu || return
  lines memory 300 "$BIN/gpu" memory $(files "$ONE_OF_EACH")
  lines limit 120 "$BIN/gpu" memory --limit 24GB --context 4096 $(files gpt-oss-20b-MXFP4)
  # The whole context: KV of 16 sequences would be 100 GB, and gets what the limit leaves.
  lines limit_whole 120 "$BIN/gpu" memory --limit 24GB $(files gpt-oss-20b-MXFP4)
}

# one sequence from an empty cache, prompts; then many sequences with 512 tokens each
phase_bench() {
  has playhouse || return
  local model
  [ -n "$(files "$MODELS")" ] || { say "FAIL bench: none of $MODELS is in $WORK" && failed=1 && return; }
  for model in $MODELS; do
    [ -f "$(file "$model")" ] || continue
    bench "$model" one --prompt 512,4096 --batch 1 --decode 128
    case $model in *F16 | llama*Q4_K_M | gpt*) bench "$model" many --prompt 512 --batch 64,256 --decode "${DECODE:-32}" --depth 512 ;; esac
  done
}

bench() {
  local model=$1 which=$2
  shift 2
  # Not longer than the model's context.
  if within 120 "$BIN/playhouse" bench --device gpu --json --runs "$RUNS" --model "$(file "$model")" "$@" \
    > "$OUT/$model.$which.json" 2> "$OUT/bench_$model.$which.log"; then
    say "PASS bench $model $which: $*"
  else
    say "FAIL bench $model $which: $(tail -1 "$OUT/bench_$model.$which.log")" && failed=1
    rm -f "$OUT/$model.$which.json"
  fi
}

phase_table() {
  has gpu || return
  "$BIN/gpu" table "$OUT" > "$OUT/table.md" 2>&1 || { say "FAIL table: $(tail -1 "$OUT/table.md")" && failed=1; }
  tee -a "$LOG" < "$OUT/table.md"
}

# Each kernel alone, against what the machine allows; KERNELS is a part of their names.
phase_kernels() {
  has bench_kernels || return
  # shellcheck disable=SC2086 # one word or none
  within 300 "$BIN/bench_kernels" ${KERNELS:-} > "$OUT/kernels.txt" 2>&1 || { say "FAIL kernels: $(tail -1 "$OUT/kernels.txt")" && failed=1; }
  grep -q 'is skipped' "$OUT/kernels.txt" && say "FAIL kernels: found no GPU to run on" && failed=1
  tee -a "$LOG" < "$OUT/kernels.txt"
}

say "# $(cat "$BIN/COMMIT" 2> /dev/null || echo "of no known commit"), $(date -u +%FT%TZ)"
if command -v nvidia-smi > /dev/null; then say "# $(nvidia-smi --query-gpu=name,driver_version,memory.used --format=csv,noheader | tr '\n' ' ')"; fi
for phase in ${*:-$ALL}; do
  case " $ALL $MORE " in *" $phase "*) ;; *) echo "no phase $phase: $ALL $MORE" >&2 && exit 2 ;; esac
  start=$SECONDS
  say "## $phase"
  "phase_$phase"
  say "## $phase: $((SECONDS - start)) s"
done
say "# $(grep -c '^PASS' "$LOG") PASS, $(grep -c '^SHORT' "$LOG") SHORT, $(grep -c '^FAIL' "$LOG") FAIL so far"
exit $failed
