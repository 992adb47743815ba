"""Topic by topic: what is trained in which order, what is evaluated when, and what follows from it."""
