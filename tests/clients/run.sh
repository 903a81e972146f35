#!/bin/sh
# Runs everybody's clients against a live server: tests/clients/run.sh URL [KEY]
#
# Needs python3, node and npm; a browser (Debian's chromium) for the dashboard, which is skipped aloud where there is none.
# WORK is where the packages go, outside of the project.
set -eu
url=${1:?the server, such as http://127.0.0.1:7070}
key=${2:-none}
here=$(cd "$(dirname "$0")" && pwd)
work=${WORK:-${TMPDIR:-/tmp}/playhouse-clients}
mkdir -p "$work"

# Packages of other versions that are there from an earlier run go.
cmp -s "$here/requirements.txt" "$work/requirements.txt" || {
    python3 -m venv --clear "$work/venv"
    "$work/venv/bin/pip" install --quiet --requirement "$here/requirements.txt"
    cp "$here/requirements.txt" "$work/"
}
cp "$here/package.json" "$here"/*.mjs "$work/"
(cd "$work" && npm install --no-audit --no-fund --no-package-lock --silent)

"$work/venv/bin/python" "$here/openai_python.py" "$url" "$key"
(cd "$work" && node openai_js.mjs "$url" "$key")
# Generated requests, right and wrong: nothing may be answered with a 5xx that means a mistake of ours, with a status that
# the document does not have, or with a body or an event that does not fit it. The same requests every time; another SEED
# and more EXAMPLES look further.
(cd "$work" && "$work/venv/bin/schemathesis" run "$url/openapi.json" --url "$url" --header "Authorization: Bearer $key" \
    --exclude-path /api/events --exclude-path-regex '^/models/(un)?load$' \
    --checks status_code_conformance,content_type_conformance,response_schema_conformance \
    --seed "${SEED:-1}" --max-examples "${EXAMPLES:-20}" --request-timeout 60 --phases examples,coverage,fuzzing)
# What vLLM's boards ask for was measured meanwhile, by workers that are processes: how long requests waited, too.
scraped=$(curl --silent --fail --header "Authorization: Bearer $key" "$url/metrics")
for name in request_queue_time_seconds request_prefill_time_seconds request_inference_time_seconds iteration_tokens_total; do
    echo "$scraped" | grep -q "^vllm:${name}_count{.*} [1-9]" || { echo "metrics: $name was not counted" >&2; exit 1; }
done
echo "ok metrics: queue, prefill and inference time were measured"
if command -v "${CHROMIUM:-chromium}" > /dev/null; then
    (cd "$work" && node dashboard.mjs "$url" ${SHOTS:+"$SHOTS"})
else
    echo "no chromium here: the dashboard was not looked at" >&2
fi
