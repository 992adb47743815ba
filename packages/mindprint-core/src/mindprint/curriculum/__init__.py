"""The curriculum of a run: the order of topics, evaluations on held-out text, and decisions made from them."""
