#!/usr/bin/env bash
# GPU tests and benches, also on a machine that has an NVIDIA GPU but neither a compiler nor a network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'TEXT'
usage: bench/device.sh [STAGE ...] [-- PYTEST ARGUMENTS]

  prepare    on the developing machine: compile every row that tests and benches need for $TARGET
             (cuda:sm_90a) into .device-cache, and fetch pure-Python wheels into .device-wheels
  assemble   on the developing machine: hand every row of .device-cache to ptxas, if it is installed
  tests      on the GPU machine: the tests marked cuda
  bench      the benches on cuda
  sanitize   the conformance suite and the ops' tests under compute-sanitizer memcheck
  all        tests, bench and sanitize

No stage: "tests bench" where there is a GPU, else "prepare assemble". `tests` and `bench` read rows from
METAL_MARLIN_ROWS (.device-cache if it is there). Logs and results go to $OUT if it is set. PYTHON names
the interpreter. A table comes last; the status is 1 if a stage failed.
TEXT
}

PYTHON=${PYTHON:-python3}
TARGET=${TARGET:-cuda:sm_90a}
ROWS=.device-cache
WHEELS=.device-wheels
LOGS=${OUT:-$(mktemp -d)}
BENCHES=(dispatch gemv gemm sparse batched dense gated dequantize norm epilogue fusion)
SUMMARY=()
FAILED=0

step() { printf '\n==> %s\n' "$*"; }

suites() {
    local folder
    for folder in "$@"; do [ ! -d "$folder" ] || printf '%s\n' "$folder"; done
}

# NAME STATUS WORDS…: one line of the table.
note() {
    local name=$1 status=$2
    shift 2
    SUMMARY+=("$(printf '%-10s %-6s %s' "$name" "$status" "$*")")
    [ "$status" != FAIL ] || FAILED=1
}

last_line() { grep -E "$2" "$LOGS/$1" | tail -n 1 | tr -d '=' | sed 's/^ *//; s/ *$//' || true; }

frontend() { "$PYTHON" -c 'from metal_marlin.msl.program import frontend_hash; print(frontend_hash())'; }

run_pytest() { "$PYTHON" -m pytest -q -rfE -p no:cacheprovider --tb=short "$@"; }

stage_prepare() {
    local folders stamp status=ok
    mapfile -t folders < <(suites tests/msl tests/ops tests/formats tests/nn tests/runtime)
    mkdir -p -m 700 $ROWS $WHEELS
    # Every key holds the front end's digest: rows of another one can never be found again.
    stamp=$(frontend)
    if [ "$(cat $ROWS/frontend 2>/dev/null)" != "$stamp" ]; then
        find $ROWS -name '*.row' -delete
        printf '%s\n' "$stamp" >$ROWS/frontend
    fi
    step "Compiling the rows of the tests for $TARGET into $ROWS"
    run_pytest -n auto -m 'not cuda' --precompile "$TARGET=$ROWS" "${folders[@]}" "$@" 2>&1 |
        tee "$LOGS/prepare.log" | tail -n 15 || status=FAIL
    step "Compiling the rows of the benches and of the package"
    "$PYTHON" bench/dispatch.py --precompile "$TARGET=$ROWS" || status=FAIL # the others time the package's rows
    "$PYTHON" -m metal_marlin compile --target "$TARGET" --out $ROWS || status=FAIL
    step "Fetching wheels (used where the GPU machine's own packages are missing or too old)"
    "$PYTHON" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
        --platform any -d $WHEELS pytest pluggy iniconfig packaging pygments mpmath || note wheels WARN "none fetched"
    if [ "$(frontend)" != "$stamp" ]; then
        status=FAIL
        echo "The front end or the standard library changed meanwhile: run prepare again."
    fi
    note prepare $status "$(find $ROWS -name '*.row' | wc -l) rows, $(du -sh $ROWS | cut -f1) in $ROWS;" \
        "$(last_line prepare.log ' in [0-9.]+s')"
    cat <<TEXT

Take the checkout to the GPU machine with its ignored folders $ROWS and $WHEELS, and run there:
    bash bench/device.sh tests bench sanitize
TEXT
}

stage_assemble() {
    if ! command -v ptxas >/dev/null; then
        note assemble ABSENT "no ptxas on this machine"
        return
    fi
    step "Assembling the rows of $ROWS with ptxas"
    local status=ok
    "$PYTHON" - $ROWS <<'PY' 2>&1 | tee "$LOGS/assemble.log" | tail -n 40 || status=FAIL
import os, re, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from metal_marlin.runtime import _ptx
from metal_marlin.runtime.cache import RowCache

folder = Path(sys.argv[1])
cache = RowCache(folder)

def assemble(path):
    key, tag = path.stem.split("-", 1)
    found = cache.get(key, tag)
    if found is None or b".entry" not in found[1]:
        return None
    name = found[0]["name"]
    entry = _ptx.parse(found[1], name)
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "row.ptx"
        text.write_bytes(entry.text)
        done = subprocess.run(["ptxas", f"-arch={entry.arch}", "-v", text, "-o", text.with_suffix(".cubin")],
                              capture_output=True, text=True)
    spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
    return name, done.returncode, done.stderr, int(spilled[1]) if spilled else 0

with ThreadPoolExecutor(os.cpu_count()) as pool:
    results = [r for r in pool.map(assemble, sorted(folder.glob("*.row"))) if r]
failed = [r for r in results if r[1]]
for name, _, text, _ in failed[:10]:
    print(f"{name}: {text.strip()[:600]}")
spills = [f"{name} ({size})" for name, status, _, size in results if size]
if spills:
    print(f"bytes spilled: {', '.join(spills[:20])}")
print(f"{len(results)} rows: {len(results) - len(failed)} assembled, {len(failed)} failed, {len(spills)} spill")
sys.exit(bool(failed))
PY
    note assemble $status "$(last_line assemble.log 'assembled')"
}

# Packages, rows and caches of the GPU machine.
stage_setup() {
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
    if [ -d $WHEELS ] &&
        ! "$PYTHON" -c 'import mpmath, numpy, pytest; assert pytest.version_tuple >= (8, 3)' 2>/dev/null; then
        local site
        site=$(mktemp -d)
        "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" $WHEELS/*.whl
        export PYTHONPATH=$site:$PYTHONPATH
    fi
    if [ -d $ROWS ]; then
        # A copy may have brought another owner or mode along, which the cache refuses.
        [ "$(id -u)" != 0 ] || chown -R 0:0 $ROWS
        chmod -R go-w $ROWS
        export METAL_MARLIN_ROWS=${METAL_MARLIN_ROWS:-$PWD/$ROWS}
    fi
    [ -z "${OUT:-}" ] || export METAL_MARLIN_BENCH_RESULTS=$OUT
    "$PYTHON" - <<'PY'
import sys, torch
from metal_marlin.runtime import _driver, device_cuda
reason = device_cuda.probe()
if reason:
    sys.exit(f"no CUDA device: {reason}")
names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
print(f"{torch.cuda.device_count()} × {', '.join(names)}, {device_cuda.target(0)}, driver of CUDA "
      f"{'.'.join(map(str, _driver.driver().version))}, torch {torch.__version__}, Python {sys.version.split()[0]}")
PY
}

stage_tests() {
    local folders status=ok
    mapfile -t folders < <(suites tests/msl tests/ops tests/formats tests/nn tests/runtime)
    step "Tests on the GPU: ${folders[*]}"
    run_pytest -m cuda --junitxml="$LOGS/tests.xml" "${folders[@]}" "$@" 2>&1 | tee "$LOGS/tests.log" | tail -n 80 ||
        status=FAIL
    note tests $status "$(last_line tests.log ' in [0-9.]+s')"
}

stage_bench() {
    local name status
    for name in "${BENCHES[@]}"; do
        step "bench/$name.py"
        status=ok
        "$PYTHON" bench/$name.py --device cuda 2>&1 | tee "$LOGS/bench-$name.log" || status=FAIL
        note "bench" $status "$name: $(grep -c PASS "$LOGS/bench-$name.log" || true) goals met," \
            "$(grep -c OVER "$LOGS/bench-$name.log" || true) missed"
    done
}

find_sanitizer() {
    local path
    for path in "$(command -v compute-sanitizer || true)" /usr/local/cuda*/bin/compute-sanitizer \
        /usr/local/cuda*/compute-sanitizer/compute-sanitizer /opt/nvidia/*/compute-sanitizer; do
        if [ -x "$path" ] && [ ! -d "$path" ]; then
            printf '%s\n' "$path"
            return
        fi
    done
    find / -xdev -maxdepth 8 -name compute-sanitizer -type f -perm -u+x -print -quit 2>/dev/null || true
}

stage_sanitize() {
    local tool status=ok
    tool=$(find_sanitizer)
    if [ -z "$tool" ]; then
        note sanitize ABSENT "no compute-sanitizer on this machine"
        return
    fi
    step "$("$tool" --version | grep -i version | head -n 1): memcheck over tests/msl and tests/ops"
    # Without torch's caching allocator every tensor is an allocation of its own, with bounds that memcheck sees.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool memcheck --error-exitcode 9 --log-file "$LOGS/memcheck.log" \
        "$PYTHON" -m pytest -q -rfE -p no:cacheprovider --tb=short -m cuda tests/msl tests/ops "$@" 2>&1 |
        tee "$LOGS/sanitize.log" | tail -n 30 || status=FAIL
    head -n 60 "$LOGS/memcheck.log" || true
    grep -q 'ERROR SUMMARY: 0 errors' "$LOGS/memcheck.log" || status=FAIL
    note sanitize $status "$(last_line memcheck.log 'ERROR SUMMARY'); $(last_line sanitize.log ' in [0-9.]+s')"
}

has_gpu() {
    PYTHONPATH=$PWD "$PYTHON" -c \
        'import sys; from metal_marlin.runtime import device_cuda as d; sys.exit(d.probe() is not None)' 2>/dev/null
}

stages=()
while [ $# -gt 0 ]; do
    case $1 in
    prepare | assemble | tests | bench | sanitize) stages+=("$1") ;;
    all) stages+=(tests bench sanitize) ;;
    --)
        shift
        break
        ;;
    *)
        usage
        case $1 in -h | --help | help) exit 0 ;; *) exit 2 ;; esac
        ;;
    esac
    shift
done
if [ ${#stages[@]} = 0 ]; then
    if has_gpu; then stages=(tests bench); else stages=(prepare assemble); fi
fi
case " ${stages[*]} " in *" tests "* | *" bench "* | *" sanitize "*) stage_setup ;; esac
for stage in "${stages[@]}"; do
    "stage_$stage" "$@"
done
printf '\n%s\n' "stage      status what"
printf '%s\n' "${SUMMARY[@]}"
exit $FAILED
