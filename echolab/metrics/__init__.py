"""Scores of generated video; names of scores by small demo networks end in `_demo`."""
