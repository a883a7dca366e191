"""Sampling, evaluation and preference rounds of the commands."""
