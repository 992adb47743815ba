"""A trained adapter of the toy backend, opened, for tests of whoever talks to one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mindprint
from mindprint.plugins.loading import load_backend_plugin
from mindprint.runs.opened import OpenedAdapter


@contextmanager
def opened_voice(
    site: Path, model: Path, folder: Path, data: Mapping[str, Any] | None = None
) -> Iterator[OpenedAdapter]:
    """Train for a few steps at a high rate, so that the answers are not the base's, and open the adapter.

    `data` are further settings of the rows.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.chdir(folder)
        load_backend_plugin.cache_clear()
        rows = [{"prompt": f"sea {n}?", "completion": "aye " * (n + 1)} for n in range(6)]
        config = {
            "model": {"name": str(model)},
            "backend": "toy",
            "adapter": {"r": 4, "alpha": 16},
            "data": {"heldout_fraction": 0.0, **(data or {})},
            "sft": {"steps_per_topic": 4, "batch_size": 2, "learning_rate": 0.05},
            "dpo": {"enabled": False},
            "generation": {"max_new_tokens": 6},
            "evaluation": {"levels": []},
        }
        run = mindprint.train(config, rows=rows).run
        with mindprint.open_adapter(run) as adapter:
            yield adapter
        load_backend_plugin.cache_clear()
