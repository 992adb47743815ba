"""Find plugins, load the chosen ones, and call a backend's hooks."""
