"""Checkpoints: format, verification, writing, retention and comparison."""
