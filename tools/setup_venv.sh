# Sourced by demo.sh and test.sh in the repository's folder: makes .venv and installs requirement files into it.
#
#   setup_venv requirements.txt tests/requirements.txt     files named *-no-deps.txt: without dependencies
#
# A file is installed again only when it changed. PYTHON=/path/to/python3 chooses the interpreter.

setup_venv() {
    local python=${PYTHON:-python3} venv=.venv/bin/python file stamp options
    if ! "$venv" -m pip --version >/dev/null 2>&1; then
        if ! command -v "$python" >/dev/null; then
            echo "error: $python not found: install Python 3.10 or newer, or name one: PYTHON=/path/to/python3" >&2
            return 1
        fi
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            echo "error: $("$python" --version 2>&1) is too old: Python 3.10 or newer is needed;" \
                "name one: PYTHON=/path/to/python3" >&2
            return 1
        fi
        echo "making .venv with $("$python" --version 2>&1)"
        rm -rf .venv
        if ! "$python" -m venv .venv; then
            rm -rf .venv
            echo "error: $python -m venv failed: install its venv module (on Debian and Ubuntu: python3-venv)" >&2
            return 1
        fi
    fi
    for file in "$@"; do
        stamp=.venv/.installed-${file//\//-}
        cmp -s "$file" "$stamp" && continue
        options=()
        [[ $file == *-no-deps.txt ]] && options=(--no-deps)
        echo "installing $file (the first time this takes some minutes)"
        if ! "$venv" -m pip install --quiet --no-input --disable-pip-version-check ${options[@]+"${options[@]}"} -r "$file"; then
            echo "error: installing $file failed (see above): is the network up and the disk not full?" >&2
            return 1
        fi
        cp "$file" "$stamp"
    done
}
