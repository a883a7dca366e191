"""Scores of generated video; those of small demo networks carry `_demo` in their names."""
