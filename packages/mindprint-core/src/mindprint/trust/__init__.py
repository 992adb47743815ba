"""Proof that an adapter still does what it did: fingerprints, and what compares an adapter or a merge with one."""
