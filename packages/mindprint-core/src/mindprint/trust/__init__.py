"""Proof that an adapter's effect is unchanged: fingerprints, and comparisons of an adapter or a merge with one."""
