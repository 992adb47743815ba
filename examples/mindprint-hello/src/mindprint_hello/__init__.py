"""A third-party backend for Mindprint, in an afternoon: what docs/write-a-backend.md builds."""
