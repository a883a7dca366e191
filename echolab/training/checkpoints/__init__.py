"""Canonical checkpoints: written beside the training, whole or not there, for any topology."""
