# Sourced by ./demo and ./check. Makes .venv with all they need, once, and leaves its interpreter in $VENV_PYTHON.
#
# An interpreter that already has torch >= 2.11 (a GPU image, a notebook server) keeps it: the environment sees that
# interpreter's packages and only what is missing is installed. Otherwise torch comes from the constraints file that fits the
# machine. PYTHON=... chooses the interpreter; `rm -r .venv` starts over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV_PYTHON="$PWD/.venv/bin/python"
EXTRAS="demo,bench,test"

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "fxopt needs Python 3.11 or newer; install it or name it: PYTHON=/path/to/python $0" >&2
    return 1
}

# The version of a usable torch that the interpreter has, or nothing. Metadata only: importing torch takes seconds.
torch_version() {
    "$1" - <<'PY'
import importlib.metadata, re
try:
    version = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    version = "0.0"
if tuple(map(int, re.findall(r"\d+", version)[:2])) >= (2, 11):
    print(version)
PY
}

reachable() {
    "$1" - "$2" <<'PY' 2>/dev/null
import sys, urllib.request
urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=5)
PY
}

# A .pth line rather than --system-site-packages: it also works when the interpreter is itself a virtual environment's.
share_packages_of() {
    "$1" - "$2" <<'PY'
import pathlib, site, subprocess, sys
here = subprocess.check_output([sys.argv[1], "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip()
lines = [f"import site; site.addsitedir({path!r})" for path in (*site.getsitepackages(), site.getusersitepackages())]
pathlib.Path(here, "_shared_packages.pth").write_text("\n".join(lines) + "\n")
PY
}

install_beside_existing_torch() {
    local version="$1" pip=("$VENV_PYTHON" -m pip install -qq --no-compile --retries 1)
    echo "fxopt set-up: using the installed torch $version" >&2
    # Python 3.11's bundled setuptools is too old and would hide the shared one, which needs no network to build with.
    "$VENV_PYTHON" -m pip uninstall -qq -y setuptools 2>/dev/null || true
    "${pip[@]}" --no-build-isolation --no-deps -e . || "${pip[@]}" --no-deps -e .
    # Without a network whatever is there must do; what is missing is named when it is needed.
    "${pip[@]}" --no-build-isolation -c <(echo "torch==$version") -e ".[$EXTRAS]" ||
        echo "fxopt set-up: some optional packages could not be installed (see above); continuing without them" >&2
}

install_with_torch() {
    local constraints=constraints-cpu.txt index=()
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        constraints=constraints-cuda.txt
    elif reachable "$1" https://download.pytorch.org/whl/cpu/torch/; then
        # Asked for only when it answers: pip retries a dead index for minutes.
        index=(--extra-index-url https://download.pytorch.org/whl/cpu)
    fi
    echo "fxopt set-up: installing torch and the tools ($constraints)" >&2
    "$VENV_PYTHON" -m pip install -qq --no-compile "${index[@]}" -c constraints.txt -c "$constraints" -e ".[$EXTRAS]"
}

set_up() {
    local python version stamp
    stamp="$(cat pyproject.toml constraints*.txt scripts/setup.sh | sha256sum)"
    if [[ -x "$VENV_PYTHON" && "$(cat .venv/.stamp 2>/dev/null)" == "$stamp" ]]; then
        return
    fi
    python="$(find_python)"
    version="$(torch_version "$python")"
    "$python" -m venv .venv
    if [[ -n "$version" ]]; then
        share_packages_of "$python" "$VENV_PYTHON"
        install_beside_existing_torch "$version"
    else
        install_with_torch "$python"
    fi
    echo "$stamp" >.venv/.stamp
}

# The first process that imports a module keeps its bytecode for the others. Pip, which would compile the thousands that
# nobody imports, too, takes a minute for that.
unset PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK=1
set_up
