# Sourced by demo.sh and test.sh in the repository's folder: makes .venv and installs requirement files into it.
#
#   setup_venv requirements.txt tests/requirements.txt     files named *-no-deps.txt: without dependencies
#
# A file is installed again only when it changed. PYTHON=/path/to/python3 chooses the interpreter.
#
# Long commands are started by `run`, so that a signal to the script ends them, too, after they have written what they
# must: bash obeys a trap only between commands and in `wait`. Each is a process group of its own (set -m), so that the
# terminal's Ctrl-C reaches it once, from here.

run() { start "$@"; wait $!; }
start() { set -m; "$@" & set +m; }

end_children() {
    trap '' TERM INT HUP
    kill $(jobs -p) 2>/dev/null || true
    wait || true
}
trap end_children EXIT
trap 'trap "" TERM INT HUP; exit 130' TERM INT HUP

setup_venv() {
    local python=${PYTHON:-python3} venv=.venv/bin/python ours=.venv/.made-by-setup file stamp options
    if ! "$venv" -m pip --version >/dev/null 2>&1; then
        if [[ (-e .venv || -L .venv) && ! -e $ours ]]; then
            echo "error: .venv has no working pip and was not made here: install pip into it, or remove it" >&2
            return 1
        fi
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
        mkdir .venv && touch "$ours" # before all else: a kill leaves nothing that the next start could not remove
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
        if ! run "$venv" -m pip install --quiet --no-input --disable-pip-version-check ${options[@]+"${options[@]}"} -r "$file"; then
            echo "error: installing $file failed (see above): is the network up and the disk not full?" >&2
            return 1
        fi
        cp "$file" "$stamp"
    done
}
