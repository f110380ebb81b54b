# Sourced by the scripts in this folder: where the repository is, and one Python environment for all of them.
#
#   help_if_asked "$0" "$@"         # --help prints the comment at the head of the script
#   ensure_env requirements.txt     # from here on, `python` has what the file lists
#   grid_arguments OUT "$@"         # DATA INIT [OUT] [-- FLAGS] into the variables data, init, out and flags
#   data_arguments OUT "$@"         # the same without INIT
#
# The environment is .venv in the repository, made on the first call and brought up to date when a requirements
# file changes; with ANIMASK_USE_ACTIVE_ENV=1 it is the active one. PYTHON=... names the Python to make it with.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    echo "error: $*" >&2
    exit 2
}

help_if_asked() {
    case "${2:-}" in
    -h | --help)
        sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$1"
        exit 0
        ;;
    esac
}

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_recent "$PYTHON" || fail "PYTHON=$PYTHON is no Python 3.10 or newer"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if is_recent "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.10 or newer was found: install one, or name it with PYTHON=/path/to/python3"
}

make_venv() {
    local python
    python="$(find_python)" || exit 2
    # Debian and Ubuntu ship Python without ensurepip
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments: install python3-venv (sudo apt install python3-venv)"
    echo "making .venv with $("$python" --version)"
    "$python" -m venv --clear "$1" || fail "$1 could not be made: see the message above"
}

install() {
    local quiet=--quiet
    [ -t 1 ] && quiet=--progress-bar=on
    # wheels only: nothing here may need a compiler
    python -m pip install --disable-pip-version-check "$quiet" --only-binary=:all: -r "$ROOT/$1" ||
        fail "the packages of $1 could not be installed: see the message above"
}

ensure_env() {
    if [ "${ANIMASK_USE_ACTIVE_ENV:-}" = 1 ]; then
        is_recent python || fail "the active environment has no Python 3.10 or newer by the name of python"
        install "$1"
        return
    fi
    local venv="$ROOT/.venv" wanted
    # a .venv without pip was left half made
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv "$venv"
    export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
    unset PYTHONHOME
    wanted="$(cat "$ROOT"/requirements*.txt | cksum)"
    if [ "$(cat "$venv/$1.stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing $1 into .venv (minutes, the first time)"
        install "$1"
        echo "$wanted" >"$venv/$1.stamp"
    fi
}

grid_arguments() {
    [ $# -ge 3 ] && [ "${2#-}" = "$2" ] && [ "${3#-}" = "$3" ] || fail "DATA and INIT are needed: --help says what they are"
    init="$3"
    data_arguments "$1" "$2" "${@:4}"
}

data_arguments() {
    out="$1"
    shift
    [ $# -ge 1 ] && [ "${1#-}" = "$1" ] || fail "DATA is needed: --help says what it is"
    data="$1"
    shift
    if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
        out="$1"
        shift
    fi
    [ "${1:---}" = -- ] || fail "unexpected $1: flags for the runs come after a lone --"
    [ $# -eq 0 ] || shift
    flags=("$@")
    cd "$ROOT"
    [ -e "$data" ] || [ "${data#hf:}" != "$data" ] || fail "there is no $data: name a folder, or hf:OWNER/NAME"
}
