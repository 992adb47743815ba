"""From rows in files to batches of tokens, the same on every backend."""
