#!/usr/bin/env bash
# Builds a virtual environment: requirements/install.sh cpu|gpu PYTHON VENV
# The last thing it writes is VENV/.installed, so a failed install is never taken for a finished one.
set -euo pipefail

flavour=$1 python=$2 venv=$3
cd "$(dirname "$0")/.."
torch=$(grep '^torch==' "requirements/$flavour.txt")
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf '[install] %s\n' "$*"; }

# One line that counts the packages on a terminal, one line every 50 packages elsewhere.
count() {
    local tty=0
    [ -t 1 ] && tty=1
    awk -v total="$1" -v tty="$tty" '
        /^ *(Collecting|Requirement already satisfied:)/ {
            n++
            name = ($1 == "Collecting") ? $2 : $4
            if (tty) printf "\r[install]   %d/%d %s\033[K", n, total, name
            else if (n % 50 == 0) printf "[install]   %d/%d\n", n, total
        }
        /^ *Installing collected packages/ {
            printf "%s[install]   unpacking%s", tty ? "\r" : "", tty ? " (about a minute)\033[K" : "\n"
        }
        { fflush() }
        END { if (tty) printf "\r\033[K" }'
}

if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
    found=$("$python" --version 2>&1 || true)
    echo "error: PYTHON=$python is '${found:-not found}', but Python 3.11 or 3.12 is needed;" \
        "try: make PYTHON=python3.12 ..." >&2
    exit 2
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    echo "error: $python has no venv module; install it (on Debian and Ubuntu: apt install python3-venv)" >&2
    exit 2
fi

rm -f "$venv/.installed"
say "$("$python" --version) -> $venv"
clear=()
if [ -e "$venv" ] && [ "$("$venv/bin/python" --version 2>/dev/null || true)" != "$("$python" --version)" ]; then
    clear=(--clear)
fi
"$python" -m venv "${clear[@]}" "$venv"
echo '*' >"$venv/.gitignore"
pip=("$venv/bin/python" -m pip install)
pins=$(cat "requirements/$flavour.txt" requirements/dev.txt | grep -c '==')

if [ "$flavour" = cpu ]; then
    say "$torch (about 200 MB; without PyTorch's index pip warns and looks elsewhere)"
    "${pip[@]}" --no-deps --retries 1 --timeout 15 "$torch" \
        --extra-index-url https://download.pytorch.org/whl/cpu | count 1
    say "$pins pinned packages (about 4 GB on disk)"
    "${pip[@]}" --no-deps -r requirements/cpu.txt -r requirements/dev.txt | count "$pins"
else
    say "$pins pinned packages and their CUDA libraries (about 15 GB on disk)"
    "${pip[@]}" -r requirements/gpu.txt | count "$pins"
    "${pip[@]}" --no-deps -r requirements/dev.txt | count "$pins"
fi
say "this project, editable"
"${pip[@]}" --quiet --no-deps --no-build-isolation -e .
touch "$venv/.installed"
say "done"
