"""Cut the sample rows of a project that `init` made, so that its commands run in seconds.

This is the only thing that the documentation tests change. Settings and commands stay as the reader has them.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

TOPICS = ("unit-01/chapter-01/topic-01-harbour", "unit-02/chapter-01/topic-01-bread")
"""One topic of each unit of the sample."""

ROWS = {"sft.jsonl": 8, "preferences.jsonl": 8, "heldout.jsonl": 2}
"""Rows of a topic that are kept, by file."""


def cut_sample_rows(data: Path) -> None:
    """Keep the first rows of two topics in each file of the folder."""
    for name, most in ROWS.items():
        kept: Counter[str] = Counter()
        lines = []
        for line in (data / name).read_text(encoding="utf-8").splitlines(keepends=True):
            topic = json.loads(line)["topic"]
            if topic in TOPICS and kept[topic] < most:
                kept[topic] += 1
                lines.append(line)
        (data / name).write_text("".join(lines), encoding="utf-8")
