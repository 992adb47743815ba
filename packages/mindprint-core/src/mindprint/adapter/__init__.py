"""LoRA as values: where it goes, how it starts, and how it lies in files."""
