"""Tasks: their table, the masks of given pixels, and the curriculum."""
