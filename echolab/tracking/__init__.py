"""What a run leaves behind for people: its metrics, its wandb run, its report."""
