"""Measurements: speed and memory of training, generation and data, and the memory estimate."""
