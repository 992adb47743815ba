"""The toy backend of core's tests: the one of examples/mindprint-hello under another name."""

from __future__ import annotations

import sys
from pathlib import Path

SOURCE = Path(__file__).parents[3] / "examples" / "mindprint-hello" / "src"
sys.path.insert(0, str(SOURCE))

from mindprint_hello.model_folder import write_model as write_toy_model  # noqa: E402

__all__ = ["install_dummies", "install_toy", "write_toy_model"]


def install_toy(site: Path, name: str = "toy") -> Path:
    """Install the backend as `name` into a folder for `sys.path` or PYTHONPATH: a module and its metadata, no more."""
    metadata = site / f"{name}_backend-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-backend\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[mindprint.backends]\n{name} = {name}_backend\n", encoding="utf-8")
    (site / f"{name}_backend.py").write_bytes((SOURCE / "mindprint_hello" / "plugin.py").read_bytes())
    return site


def install_dummies(site: Path, count: int) -> None:
    """Install `count` distributions with a plugin in every group, none of which can be imported."""
    groups = ("backends", "scorers", "trackers", "commands")
    for number in range(count):
        metadata = site / f"dummy_{number}-1.0.dist-info"
        metadata.mkdir(parents=True)
        points = "".join(f"[mindprint.{group}]\ndummy-{number} = dummy_{number}:it\n" for group in groups)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dummy-{number}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(points)
