"""The closed world behind `builtin:tiny`: its facts, registers, and the voice of the curriculum."""
