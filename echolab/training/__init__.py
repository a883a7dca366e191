"""Training: the loop, its state, checkpoints, and how a run resumes."""
