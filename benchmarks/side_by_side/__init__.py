"""Comparisons with other trainers: the work, the contestants, and taking turns."""
