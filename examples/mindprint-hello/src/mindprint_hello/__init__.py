"""A third-party backend for Mindprint. docs/write-a-backend.md builds it from an empty folder."""
