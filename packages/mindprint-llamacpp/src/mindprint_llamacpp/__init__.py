"""The llama.cpp backend of Mindprint: log-probs and answers on CPUs, without training. Start at `plugin.py`."""

__version__ = "0.1.0"
