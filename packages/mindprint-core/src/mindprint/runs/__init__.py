"""The files of a run: where they are, how they are written and read, and the adapter in them, opened."""
