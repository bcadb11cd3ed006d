# Sourced by the scripts here: `ensure_env EXTRAS` makes .venv in the root, or reuses it if nothing it depends on changed.
# PYTHON names the interpreter (3.11 or newer); with another than python3's default, remove .venv first.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"

ensure_env() {
    local extras=$1 python=${PYTHON:-python3} version constraints stamp want
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
        { echo "no $python found: install Python 3.11 or newer, or set PYTHON" >&2; return 1; }
    case $version in
    3.[0-9] | 3.10) echo "$python is Python $version; dqjax needs 3.11 or newer: set PYTHON to one" >&2; return 1 ;;
    3.11) constraints=constraints.txt ;;
    *) constraints=constraints-3.12.txt ;;
    esac
    [ -x .venv/bin/python ] || "$python" -m venv .venv || return 1
    stamp=.venv/dqjax-$extras
    want=$(cat setup.py "$constraints" | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        echo "installing dqjax[$extras] into .venv (a few minutes on a fresh machine)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c "$constraints" -e ".[$extras]" || return 1
        echo "$want" >"$stamp"
    fi
    export PATH="$ROOT/.venv/bin:$PATH"
}
