"""Measures of generated video.  Scores from stand-in networks carry `_demo` in their names."""
