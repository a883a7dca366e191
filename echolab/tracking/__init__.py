"""Metrics, wandb run and report of a run."""
