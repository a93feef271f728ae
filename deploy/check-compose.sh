#!/usr/bin/env bash
# Brings the containers up for real, trains a few steps through them, swaps the backend, takes them down.
set -euo pipefail
cd "$(dirname "$0")/.."
export NPU_PORT=${NPU_PORT:-50951} NPU_HTTP_PORT=${NPU_HTTP_PORT:-50980}
compose() { docker compose --project-name npu-in-the-loop-check "$@"; }
cleanup() {
  status=$?
  if [[ $status -ne 0 ]]; then compose logs --tail 50; fi
  compose --profile trainer down --volumes --timeout 5 >/dev/null 2>&1
  rm -rf "$work"
  exit $status
}
work=$(mktemp -d)
trap cleanup EXIT

expect() { # expect WHAT WANTED GOT
  if [[ $3 != *"$2"* ]]; then echo "FAILED: $1: wanted '$2', got: $3" >&2; exit 1; fi
  echo "ok: $1"
}
describe() { compose exec -T npu-server npu-server describe --endpoint 127.0.0.1:50051 --json; }
field() { python3 -c 'import json, sys; print(json.load(sys.stdin)["fingerprint"][sys.argv[1]])' "$1"; }

compose up --build --wait --wait-timeout 240
expect "the server answers as emulator" emulator "$(describe | field backend)"
expect "the image carries the native kernels" '"kernels": "native' "$(describe)"
expect "it does not run as root" 10001 "$(compose exec -T npu-server id -u)"
if compose exec -T npu-server touch /app/x 2>/dev/null; then echo "FAILED: the root file system is writable" >&2; exit 1; fi
echo "ok: the root file system is read-only"
expect "the status page answers" '"serving"' "$(python3 -c "import urllib.request as r; print(r.urlopen('http://127.0.0.1:$NPU_HTTP_PORT/healthz').read().decode())")"

compose --profile trainer build trainer
mkdir "$work/results"
export NPU_RESULTS=$work/results NPU_USER=12345:12345
chmod 777 "$work" "$work/results"
compose --profile trainer run --rm -T trainer compare --endpoint npu-server:50051 --seeds 1 --fp32-steps 60 --qat-steps 5 --out /runs/compare
echo "ok: the trainer container trained against the server container"
expect "NPU_RESULTS and NPU_USER: results in a folder of the host, of its user" 12345 "$(stat -c %u "$work/results/compare/results.json")"

sed 's/^name = .*/name = "of-the-host"/' npu_server/profiles/acc16.toml >"$work/my-npu.toml"
NPU_BACKEND=reference NPU_PROFILE_FILE=$work/my-npu.toml compose up --wait --wait-timeout 120
expect "NPU_BACKEND=reference swaps the backend" reference "$(describe | field backend)"
expect "NPU_PROFILE_FILE is the profile" of-the-host "$(describe | field profile)"
