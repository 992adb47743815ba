"""Take the libraries for other GPUs out of bitsandbytes' wheel, which has a dozen of them: 43 MB become 3.

python benchmarks/on_gpu/slim.py bitsandbytes-0.50.2-py3-none-manylinux_2_24_x86_64.whl
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

KEPT = ("libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so")


def slim(wheel: Path) -> None:
    """Write the wheel again without the libraries that are not kept, nor their lines in its RECORD."""
    smaller = wheel.with_suffix(".smaller")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as target:
        dropped = [name for name in source.namelist() if name.endswith(".so") and not name.endswith(KEPT)]
        for item in source.infolist():
            if item.filename in dropped:
                continue
            content = source.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if line.split(",")[0] not in dropped).encode()
            target.writestr(item, content)
    smaller.replace(wheel)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        slim(Path(argument))
