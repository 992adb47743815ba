"""Find plugins, load the chosen ones, and call their hooks."""
