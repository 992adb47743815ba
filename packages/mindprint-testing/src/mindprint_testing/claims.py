"""What a test class says of its backend, and how a test asks for it."""

from __future__ import annotations

from typing import ClassVar

import pytest


class Claims:
    """The attributes that a backend's test class sets."""

    backend_name: ClassVar[str]
    """The backend's entry point."""

    capabilities: ClassVar[frozenset[str]] = frozenset()
    """The optional parts of the contract that the backend claims, of `mindprint.contract.CAPABILITIES`."""

    device: ClassVar[str] = "cpu"
    """Where it is tested."""

    def needs(self, capability: str) -> None:
        """Skip the test, naming the capability, unless it is claimed."""
        if capability not in self.capabilities:
            pytest.skip(f"not claimed: {capability}")
