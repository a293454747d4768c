"""Films: a file becomes a canvas."""
