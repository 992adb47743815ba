#!/usr/bin/env bash
# Run benchmarks/gpu.py where nothing can be downloaded.
#
#   bash benchmarks/gpu.sh fetch             here: put the wheels that a bare machine lacks into .gpu-wheels (34 MB)
#   bash benchmarks/gpu.sh run --out OUT     there: install them into a folder, and run gpu.py with these options
#
# The bare machine has Python 3.12, PyTorch for CUDA, Triton, NumPy, pyarrow and pandas. Everything that decides the
# figures is brought along at the versions of constraints.txt, transformers included. Environment: PYTHON (python3),
# GPU_PYTHON (the Python to fetch wheels for, 3.12), GPU_WHEELS (.gpu-wheels), GPU_SITE (where `run` installs them).
set -euo pipefail
cd "$(dirname "$0")/.."
WHEELS=${GPU_WHEELS:-.gpu-wheels}
PYTHON=${PYTHON:-python3}
SITE=${GPU_SITE:-/tmp/mindprint-gpu-site}

PINNED=(accelerate annotated-doc annotated-types anyio click datasets dill fsspec h11 hf-xet httpcore2 httpx2
        huggingface-hub idna multiprocess packaging peft pluggy pydantic pydantic-core pytest pytest-timeout regex rich safetensors
        shellingham tokenizers transformers trl truststore typer typing-extensions typing-inspection xxhash)
PEERS=(liger-kernel==0.8.5 bitsandbytes==0.50.2)
PACKAGES=(core torch testing)

download() { # into a folder: exactly these, for the bare machine's Python and not for this one
    local platforms=() folder=$1
    shift
    for version in 2_34 2_28 2_27 2_24 2_17 2_5; do platforms+=(--platform "manylinux_${version}_x86_64"); done
    "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version "${GPU_PYTHON:-3.12}" --implementation cp \
        "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d "$folder" "$@"
}

pinned() { # NAME==VERSION of each name, from constraints.txt, which writes some names with underscores
    for name in "${PINNED[@]}"; do
        grep -i -E "^${name//-/[-_]}==" constraints.txt || { echo "constraints.txt does not pin $name" >&2; exit 1; }
    done
}

fetch() {
    rm -rf "$WHEELS" && mkdir "$WHEELS"
    mapfile -t versions < <(pinned)
    download "$WHEELS" "${versions[@]}" "${PEERS[@]}"
    for package in "${PACKAGES[@]}"; do
        "$PYTHON" -m pip wheel -q --no-deps -w "$WHEELS" "packages/mindprint-$package"
    done
    "$PYTHON" benchmarks/on_gpu/slim.py "$WHEELS"/bitsandbytes-*.whl
    du -sh "$WHEELS"
}

run() {
    if [ ! -e "$SITE/complete" ]; then
        "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" \
            "$WHEELS"/*.whl
        touch "$SITE/complete"
    fi
    # The wheels have our entry points. The code is that of this checkout.
    local sources
    sources=$(printf "$PWD/packages/mindprint-%s/src:" "${PACKAGES[@]}")
    export PYTHONPATH=$sources$SITE PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_DISABLED=true
    exec "$PYTHON" benchmarks/gpu.py "$@"
}

case ${1:-} in
    fetch) fetch ;;
    run) shift; run "$@" ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
