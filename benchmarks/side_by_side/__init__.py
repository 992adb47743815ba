"""What the comparisons share: the work, the contestants, and taking turns."""
